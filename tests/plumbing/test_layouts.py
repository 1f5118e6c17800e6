"""docs/layouts.md: the Python of each layout turns rows of it, made up here, into rows that are
read."""
import json
import re
from pathlib import Path

import pytest

from support.rows import load_rows

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
SECTIONS = re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"),
                      re.S | re.M)


def dialogue(question):
    return f"\n\nHuman: {question}\n\nAssistant:"


def asked(*turns):
    """Messages of a person and the assistant, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn}
            for i, turn in enumerate(turns)]


def replies(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def nectar(*answers):
    answers = [{"answer": text, "model": "gpt-4", "rank": rank} for text, rank in answers]
    return {"prompt": "\n\nHuman: Where is Bergen?\n\nAssistant: ", "answers": answers, "turns": 1,
            "num_responses": 7, "source": ["sharegpt"], "good_natured": True}


def shp(labels, score_a, score_b):
    return {"post_id": "x1", "domain": "askculinary_train", "upvote_ratio": 0.9,
            "history": "How long do eggs boil?", "c_root_id_A": "a", "c_root_id_B": "b",
            "score_A": score_a, "score_B": score_b, "human_ref_A": "Seven minutes.",
            "human_ref_B": "An hour.", "labels": labels, "score_ratio": 2.0}


def safer(better, harmless):
    return {"prompt": "May I?", "response_0": "Do.", "response_1": "Don't.",
            "is_response_0_safe": False, "is_response_1_safe": True,
            "better_response_id": better, "safer_response_id": harmless}


def helpsteer(preference):
    return {"domain": "general", "language": "english",
            "context": [{"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Yes?"},
                        {"role": "user", "content": "Sum up."}],
            "response1": "One.", "response2": "Two.", "overall_preference": preference,
            "individual_preference": [{"score": preference, "reasoning": "Short.",
                                       "feedback1": "Good.", "feedback2": "Good."}]}


def webgpt(score):
    return {"question": {"dataset": "eli5", "id": "q1", "full_text": "Why is the sky blue?"},
            "quotes_0": {"title": ["Sky"], "extract": ["It scatters."]}, "answer_0": "Air [1].",
            "tokens_0": {"prefix": [1], "completion": [2]}, "score_0": score,
            "quotes_1": {"title": ["Sea"], "extract": ["It mirrors."]}, "answer_1": "The sea [1].",
            "tokens_1": {"prefix": [1], "completion": [3]}, "score_1": -score}


def comparison(choice, **info):
    return {"info": {"id": "t3_x", "post": None, "title": None, "subreddit": None, "site": None,
                     "article": None, **info},
            "summaries": [{"text": " Good one.", "policy": "sup2", "note": None},
                          {"text": " Bad one. ", "policy": "ref", "note": None}],
            "choice": choice, "worker": "w", "batch": "batch3", "split": "train",
            "extra": {"confidence": None}}


POST = {"post": "My boss fired me.", "title": "Fired", "subreddit": "jobs"}
POST_PROMPT = "SUBREDDIT: r/jobs\n\nTITLE: Fired\n\nPOST: My boss fired me.\n\nTL;DR:"


def distilabel(generations, ratings):
    return {"instruction": "Count.", "generations": generations, "ratings": ratings,
            "generation_models": ["m"] * len(generations),
            "rationales": ["r"] * len(generations)}


def kto(prompt, completion, label):
    return {"prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}], "label": label}


def turns(*pairs):
    said = [{"from": speaker, "value": text} for speaker, text in pairs]
    return {"id": "c1", "conversations": said}


# {layout: (rows as they are published, rows as they are to be read)}
LAYOUTS = {
    "Nectar": (
        [nectar(("Oslo?", 4.0), (" In Norway. ", 1.0), ("On Mars.", 7.0), ("Hm.", 2.0)),
         nectar(("Yes.", 1.0), ("No.", 1.0))],
        [{"prompt": dialogue("Where is Bergen?"), "responses": [" In Norway.", " On Mars."]}]),
    "Stanford SHP": (
        [shp(1, 20, 10), shp(0, 3, 30)],
        [{"prompt": asked("How long do eggs boil?"),
          "responses": replies("Seven minutes.", "An hour."), "scores": [[20], [10]]},
         {"prompt": asked("How long do eggs boil?"),
          "responses": replies("An hour.", "Seven minutes."), "scores": [[30], [3]]}]),
    "PKU-SafeRLHF": (
        [safer(0, 1), safer(1, 1)],
        [{"prompt": asked("May I?"), "responses": replies("Do.", "Don't.")},
         {"prompt": asked("May I?"), "responses": replies("Don't.", "Do.")}]),
    "HelpSteer3": (
        [helpsteer(-3), helpsteer(0), helpsteer(1)],
        [{"prompt": asked("Hi", "Yes?", "Sum up."), "responses": replies(*pair)}
         for pair in (["One.", "Two."], ["Two.", "One."])]),
    "WebGPT comparisons": (
        [webgpt(0.5), webgpt(0.0), webgpt(-1.0)],
        [{"prompt": asked("Why is the sky blue?"), "responses": replies("Air [1].", "The sea [1]."),
          "scores": [[0.5], [-0.5]]},
         {"prompt": asked("Why is the sky blue?"), "responses": replies("The sea [1].", "Air [1]."),
          "scores": [[1.0], [-1.0]]}]),
    "OpenAI's summaries": (
        [comparison(0, **POST), comparison(1, **POST), comparison(0, article="News.")],
        [{"prompt": POST_PROMPT, "responses": [" Good one.", " Bad one."]},
         {"prompt": POST_PROMPT, "responses": [" Bad one.", " Good one."]}]),
    "distilabel: generations and ratings": (
        [distilabel(["one", "two", "three", "four"], [3, 5, None, 1]),
         distilabel(["one", "two"], [4, 4]), distilabel(["one", "two"], ["10", "9"]),
         distilabel(["one"], [None])],
        [{"prompt": asked("Count."), "responses": replies("two", "four"), "scores": [[5], [1]]},
         {"prompt": asked("Count."), "responses": replies("one", "two"), "scores": [[10], [9]]}]),
    "KTO: single responses with a label": (
        [kto("Hi", "Go.", False), kto("Hi", "Yes?", True), kto("Alone", "Yes.", True),
         kto("Hi", "Hello!", True)],
        [{"prompt": asked("Hi"), "responses": replies("Yes?", "Go.")}]),
    "ShareGPT": (
        [turns(("system", "Be kind."), ("human", "Hi"), ("gpt", "Yes?")),
         turns(("gpt", "As I said."), ("human", "Go."), ("gpt", "No.")),
         turns(("human", "Hi")), turns(("human", "Hi"), ("gpt", "Wait."), ("tool", "42"))],
        [{"prompt": [{"role": "system", "content": "Be kind."}, *asked("Hi")],
          "responses": replies("Yes?")},
         {"prompt": asked("Go."), "responses": replies("No.")}]),
    "HH's dialogues, as messages": (
        [{side: dialogue("Hi") + text for side, text in (("chosen", first), ("rejected", " No."))}
         for first in (" Yes?\n\nHuman: Go\n\nAssistant: Well.", " ")],
        [{"prompt": asked("Hi"), "responses": [
            [{"role": "assistant", "content": "Yes?"}, *asked("Go", "Well.")],
            *replies("No.")]}]),
}


def test_all_layouts_of_the_page_are_tried():
    assert [name for name, _ in SECTIONS] == list(LAYOUTS)


@pytest.mark.parametrize("name, code", SECTIONS, ids=[name for name, _ in SECTIONS])
def test_layout(tmp_path, monkeypatch, capsys, name, code):
    """What the code writes is read without a bad row or a warning, as the rows above."""
    published, wanted = LAYOUTS[name]
    monkeypatch.chdir(tmp_path)
    source, = re.findall(r'open\("([^"]*)", encoding', code)
    target, = re.findall(r'open\("([^"]*)", "w"\)', code)
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in published))
    exec(compile(code, name, "exec"), {})
    assert list(load_rows(target, demonstrations=target == "demos.jsonl")) == wanted
    assert capsys.readouterr().out == ""


def test_other_columns_point_to_the_page(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(shp(1, 2, 1)) + "\n")
    with pytest.raises(ValueError, match="needs columns .*; docs/layouts.md converts the layouts"):
        list(load_rows(str(path)))
