"""Reading rows: every layout, every format, and what is said of a bad one."""
import gzip
import json

import pytest

from support.flags import InputError
from support.formats import implicit_prompt, load_rows, parse_row

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}
SIDES = ("chosen", "rejected")


def says(role, content):
    return {"role": role, "content": content}


# ------------------------------------------------------------------ one record

def test_implicit_prompt():
    hi = "\n\nHuman: Hi\n\nAssistant:"
    assert implicit_prompt(hi + " A b", hi + " A c") == hi
    dialogue = hi + " Yes?\n\nHuman: "              # the texts part in a person's turn
    assert implicit_prompt(dialogue + "one\n\nAssistant: A", dialogue + "two\n\nAssistant: A") == hi
    assert implicit_prompt("What is this? A dog", "What is this? A den") == "What is this? A"
    assert implicit_prompt("one", "two") == ""


def test_a_blank_turn_of_a_dialogue_is_a_response():
    """Four real dialogues of HH's helpful-base test set are like this."""
    dialogue = "\n\nHuman: Hi\n\nAssistant: "
    row = parse_row({"chosen": dialogue + "Yes?", "rejected": dialogue}, False)
    assert row["responses"] == [" Yes?", " "]


def test_layouts_of_text():
    wanted = {"prompt": "Say hello.", "responses": [" Hello!", " Go away."]}
    assert parse_row({**PAIR, "confidence": 7}, False) == wanted
    assert parse_row(PAIR, True) == {"prompt": "Say hello.", "responses": [" Hello!"]}
    demonstration = {"prompt": "a", "completion": " b"}
    assert parse_row(demonstration, True) == {"prompt": "a", "responses": [" b"]}


def test_layouts_of_chat_messages():
    """The dialogues may hold the prompt or not, and the prompt may be text beside them, or left
    out."""
    chat = {"prompt": [says("user", "Hi")], "chosen": [says("assistant", "Yes?")],
            "rejected": [says("assistant", "No.")]}
    as_text = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": [" Yes?", " No."]}
    assert parse_row(chat, False) == as_text
    implicit = {side: chat["prompt"] + chat[side] for side in SIDES}
    assert parse_row(implicit, False) == as_text
    assert parse_row({**implicit, "prompt": chat["prompt"]}, False) == as_text  # as UltraFeedback
    assert parse_row({**implicit, "prompt": "Hi"}, False) == as_text


def test_a_text_prompt_beside_longer_dialogues():
    hi = [says("user", "Hi")]
    before = [says("system", "Be kind."), *hi, says("assistant", "Yes?"), *hi]
    record = {"prompt": "Hi", "chosen": before + [says("assistant", "Yes?")],
              "rejected": before + [says("assistant", "No.")]}
    assert parse_row(record, False) == {
        "prompt": "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Hi\n\nAssistant:",
        "responses": [" Yes?", " No."]}
    message = "^column 'rejected' is a dialogue that does not begin with the prompt"
    for start in (hi, [says("system", "Be brief."), *hi]):
        with pytest.raises(ValueError, match=message):
            parse_row({**record, "rejected": start + [says("assistant", "No.")]}, False)


@pytest.mark.parametrize("record, message", [
    ({**PAIR, "chosen": "  "}, "response 'chosen' is empty"),
    ({**PAIR, "rejected": None}, "column 'rejected' is missing"),
    ({**PAIR, "chosen": 3}, "column 'chosen' is neither"),
    ({"chosen": "a", "rejected": "b"}, "^there is no column 'prompt', and 'chosen' and 'rejected' "
                                       "share no beginning of whole words$"),
    ({**PAIR, "chosen": [says("robot", "x")]}, "column 'chosen' is not a list of chat messages"),
    ({**PAIR, "chosen": [says("assistant", None)]},
     r"column 'chosen' is not a list of chat messages with a role \(user, assistant or system\) "
     "and a text as content$")])
def test_parse_row_refuses(record, message):
    with pytest.raises(ValueError, match=message):
        parse_row(record, False)


def test_a_demonstration_needs_its_prompt():
    with pytest.raises(ValueError, match="^column 'prompt' is missing$"):
        parse_row({"completion": " b"}, True)


# ------------------------------------------------------------------ scores and rankings

@pytest.mark.parametrize("chosen, rejected, wanted", [
    (1, 0.5, [[1], [0.5]]),
    ([1, 2], [3, 4], [[1, 2], [3, 4]]),
    (None, None, None)])
def test_scores_of_a_pair(chosen, rejected, wanted):
    """Numbers or lists; they don't change which response is the chosen one."""
    record = {**PAIR, "score_chosen": chosen, "score_rejected": rejected}
    row = parse_row(record, False)
    assert row.get("scores") == wanted and row["responses"] == [" Hello!", " Go away."]
    assert "scores" not in parse_row(record, True)


RANKING = {"prompt": "Say hello.", "responses": [" b", " a", " c"]}


@pytest.mark.parametrize("more, order, scores", [
    ({}, " b a c", None),
    ({"ranks": [3, 1, 2]}, " a c b", None),
    ({"scores": [0.5, -1, 2]}, " c b a", [[2], [0.5], [-1]]),
    ({"scores": [[0, 0], [3, -1], [1, 2]]}, " c a b", [[1, 2], [3, -1], [0, 0]]),
    ({"scores": None, "ranks": [2, 3, 1]}, " c b a", None),
    ({"scores": [1, 2, 3], "ranks": [2, 1, 3]}, " a b c", [[2], [1], [3]])])
def test_ranked_responses(more, order, scores):
    """The best first: as listed, by ranks, else by scores, or by the mean of several scores. Scores
    stay with their response."""
    row = parse_row({**RANKING, **more}, False)
    assert "".join(row["responses"]) == order and row.get("scores") == scores
    best = {"prompt": "Say hello.", "responses": [order[:2]]}
    assert parse_row({**RANKING, **more}, True) == best


def test_ties_in_a_ranking_do_not_go_by_place():
    """Which of two equals comes first depends on their text alone, half the time either way: of
    400, within 4 standard errors of 200 (a false alarm in 16,000, had the texts been drawn
    anew)."""
    first = 0
    for i in range(400):
        texts = [f" left {i}", f" right {i}"]
        forwards = parse_row({"prompt": "a", "responses": texts, "ranks": [1, 1]}, False)
        backwards = parse_row({"prompt": "a", "responses": texts[::-1], "ranks": [1, 1]}, False)
        assert forwards == backwards
        first += forwards["responses"][0] == texts[0]
    assert 160 < first < 240


def test_ranked_chat_messages():
    record = {"prompt": [says("user", "Hi")],
              "responses": [[says("assistant", text)] for text in "ab"]}
    as_text = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": [" a", " b"]}
    assert parse_row(record, False) == as_text
    whole = [record["prompt"] + response for response in record["responses"]]
    assert parse_row({"prompt": "Hi", "responses": whole}, False) == as_text


@pytest.mark.parametrize("record, message", [
    ({**PAIR, "score_chosen": 1}, "column 'score_rejected' is missing"),
    ({**PAIR, "score_chosen": "x", "score_rejected": 1}, "'score_chosen' is neither"),
    ({**PAIR, "score_chosen": [1, 2], "score_rejected": [1]},
     "'score_rejected' has 1 numbers for one response, 2"),
    ({**PAIR, "score_chosen": float("nan"), "score_rejected": 1}, "'score_chosen' is neither"),
    ({**PAIR, "score_chosen": 1e39, "score_rejected": 1}, "'score_chosen' is neither"),
    ({**RANKING, "scores": 1}, "'scores' is not"),
    ({**RANKING, "scores": [1, 2]},
     "'scores' is not a list of 3, one number or list for each response$"),
    ({**RANKING, "scores": [1, 2, "x"]}, "^column 'scores' is neither"),
    ({**RANKING, "ranks": [1, float("nan"), 2]}, "'ranks' is not"),
    ({**RANKING, "ranks": [1, 2]}, "'ranks' is not a list of 3"),
    ({**RANKING, "ranks": ["a", "b", "c"]}, "'ranks' is not a list of 3"),
    ({**RANKING, "responses": [" a"]},
     "^column 'responses' is not a list of two responses or more"),
    ({**RANKING, "responses": " a"}, "two responses or more"),
    ({**RANKING, "responses": [" a", 1]}, "^column 'responses' is neither"),
    ({**RANKING, "responses": [" a", " ", " b"]}, "the response 'responses' is empty"),
    ({"responses": [" a", " b"]}, "^column 'prompt' is missing")])
def test_bad_scores_and_rankings(record, message):
    with pytest.raises(ValueError, match=message):
        parse_row(record, False)


# ------------------------------------------------------------------ files

def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_load_rows_formats(tmp_path, hub_cache, name):
    rows, path = [PAIR, {**PAIR, "prompt": "Say more."}], str(tmp_path / name)
    if name.startswith("a.jsonl"):
        write(tmp_path / name, rows)
    elif name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        import pandas
        frame = pandas.DataFrame(rows)
        if name == "a.csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path)
    responses = [" Hello!", " Go away."]
    wanted = [{"prompt": row["prompt"], "responses": responses} for row in rows]
    assert list(load_rows(path)) == wanted


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, "no such file"),
    ("a.txt", "x", "files end in"),
    ("a.jsonl", "", "the file is empty"),
    ("a.jsonl", '{"prompt": "a", "chosen": " b"}\n',
     "needs columns chosen and rejected, or prompt and responses; has prompt, chosen"),
    ("a.jsonl", json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "chosen": ""}) + "\n",
     "row 2: the response 'chosen' is empty"),
    ("a.jsonl", json.dumps(PAIR) + "\n{oops\n", "row 2: not JSON"),
    ("a.jsonl", "[1, 2]\n", "needs columns chosen and rejected"),
    ("a.csv", "prompt,chosen,rejected\n", "no rows")])
def test_load_rows_refuses(tmp_path, hub_cache, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        list(load_rows(str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("latin.jsonl", b'{"prompt":"caf\xe9","chosen":"a","rejected":"b"}\n', "row 1: .*utf-8"),
    ("cut.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 50)[:40], "not a whole gzip file"),
    ("a [1]*.jsonl", json.dumps({**PAIR, "chosen": ""}).encode(),
     "row 1: the response 'chosen' is empty")])
def test_load_rows_refuses_bytes(tmp_path, hub_cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(load_rows(str(tmp_path / name)))


def test_the_row_that_is_named_beyond_the_first_thousand(tmp_path, hub_cache):
    """Rows are read a thousand at a time; the number is the file's."""
    rows = [PAIR] * 2100
    rows[1500] = {**PAIR, "rejected": " "}
    with pytest.raises(InputError, match="row 1501: the response 'rejected' is empty"):
        list(load_rows(write(tmp_path / "a.jsonl", rows)))


def test_words_and_fields_of_csv(tmp_path, hub_cache):
    """NA and None are words, an empty field is missing, and a field too many is refused."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nNA,None,null\n")
    assert list(load_rows(str(path))) == [{"prompt": "NA", "responses": ["None", "null"]}]
    path.write_text("prompt,chosen,rejected\na,b,c,d\n")
    with pytest.raises(InputError, match="a.csv: Length of header"):
        list(load_rows(str(path)))
    path.write_text("prompt,chosen,rejected\na,,c\n")
    with pytest.raises(InputError, match="row 1: column 'chosen' is missing"):
        list(load_rows(str(path)))


def test_other_columns_are_ignored(tmp_path, hub_cache):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "annotator": {"id": 3}, "confidence": 7}] * 3)
    assert list(load_rows(path)) == [parse_row(PAIR, False)] * 3


# ------------------------------------------------------------------ the hub, folders like its

@pytest.mark.parametrize("data, owner_name, folder", [
    ("trl-lib/tldr", "trl-lib/tldr", None),
    ("imdb", "imdb", None),
    ("Anthropic/hh-rlhf/helpful-base", "Anthropic/hh-rlhf", "helpful-base")])
def test_hub_names(monkeypatch, hub_cache, data, owner_name, folder):
    import datasets
    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(list(load_rows(data))) == 1
    assert asked == [((owner_name,), {"data_dir": folder, "split": "train"})]


def test_no_such_hub_name(hub_cache):
    with pytest.raises(InputError, match="--data: nobody/nothing: "):
        list(load_rows("nobody/nothing"))


def test_a_folder_of_files(tmp_path, hub_cache):
    """A copy of a hub repository: its train split, in the layout of UltraFeedback (dialogues, the
    prompt in both, scores)."""
    hi = says("user", "Hi")
    record = {"chosen": [hi, says("assistant", "Yes?")], "rejected": [hi, says("assistant", "No.")],
              "score_chosen": 8.5, "score_rejected": 3.0}
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl.gz", [record])
    write(tmp_path / "data" / "test.jsonl.gz", [record, record])
    assert list(load_rows(str(tmp_path / "data"))) == [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": [" Yes?", " No."],
         "scores": [[8.5], [3.0]]}]
