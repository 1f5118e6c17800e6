"""Reading rows: every layout, every format, and what is said of a bad one."""
import gzip
import json
import os
from collections import Counter

import pytest

from support.flags import InputError
from support.rows import describe, implicit_prompt, load_rows, parse_rows
from support.tokens import hash_content

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}
SIDES = ("chosen", "rejected")


def says(role, content):
    return {"role": role, "content": content}


def replies(*texts):
    return [[says("assistant", text)] for text in texts]


def parse_row(record, demonstrations):
    row, = parse_rows(record, demonstrations)
    return row


# ------------------------------------------------------------------ one record

def test_implicit_prompt():
    hi = "\n\nHuman: Hi\n\nAssistant:"
    assert implicit_prompt(hi + " A b", hi + " A c") == hi
    dialogue = hi + " Yes?\n\nHuman: "              # the texts part in a person's turn
    assert implicit_prompt(dialogue + "one\n\nAssistant: A", dialogue + "two\n\nAssistant: A") == hi
    post = "POST: My boss\n\nTL;DR:"
    assert implicit_prompt(post + " I am broke.", post + " I am out.") == post
    assert implicit_prompt("What is this? A dog", "What is this? A den") == ""


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
    """The dialogues may hold the prompt or not, and the prompt may be text next to them, or left
    out."""
    chat = {"prompt": [says("user", "Hi")], "chosen": [says("assistant", "Yes?")],
            "rejected": [says("assistant", "No.")]}
    row = {"prompt": chat["prompt"], "responses": replies("Yes?", "No.")}
    assert parse_row(chat, False) == row
    implicit = {side: chat["prompt"] + chat[side] for side in SIDES}
    assert parse_row(implicit, False) == row
    assert parse_row({**implicit, "prompt": chat["prompt"]}, False) == row
    assert parse_row({**implicit, "prompt": "Hi"}, False) == row        # as UltraFeedback
    assert parse_row({**chat, "prompt": "Hi"}, False) == row
    assert parse_row({**chat, "chosen": "Yes?", "rejected": "No."}, False) == row


def test_a_text_prompt_beside_dialogues_that_begin_with_the_reply():
    """The person said it before; so it stays, however long they go on."""
    after = [says("assistant", "Yes?"), says("user", "So?")]
    record = {"prompt": "Hi", "chosen": after + [says("assistant", "Well.")],
              "rejected": after + [says("assistant", "No.")]}
    assert parse_row(record, False) == {
        "prompt": [says("user", "Hi")],
        "responses": [[*after, says("assistant", last)] for last in ("Well.", "No.")]}


def test_what_other_programs_write():
    """A gap as NaN, a label as 0.0, lines that end in \\r\\n."""
    with pytest.raises(ValueError, match="^column 'rejected' is missing$"):
        parse_row({**PAIR, "rejected": float("nan")}, False)
    for label in (0.0, -1.0):       # what pandas makes of 0 and -1
        assert parse_rows({"prompt": "a", "completion": " b", "label": label}, True) == []
    assert len(parse_rows({"prompt": "a", "completion": " b", "label": 1.0}, True)) == 1
    text = "\r\n\r\nHuman: Hi\r\n\r\nAssistant:"
    assert parse_row({"chosen": text + " Yes", "rejected": text + " No"}, False) == {
        "prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": [" Yes", " No"]}
    asked = [says("user", "Hi,\r\nyou")]
    assert parse_row({"prompt": asked, "chosen": asked + [says("assistant", "Yes")],
                      "rejected": asked + [says("assistant", "No")]}, False) == {
        "prompt": [says("user", "Hi,\nyou")], "responses": replies("Yes", "No")}


def test_a_text_prompt_beside_longer_dialogues():
    hi = [says("user", "Hi")]
    before = [says("system", "Be kind."), *hi, says("assistant", "Yes?"), *hi]
    record = {"prompt": "Hi", "chosen": before + [says("assistant", "Yes?")],
              "rejected": before + [says("assistant", "No.")]}
    assert parse_row(record, False) == {
        "prompt": before, "responses": replies("Yes?", "No.")}
    message = "^column 'chosen' is a dialogue that does not begin with the prompt"
    for start in (hi, [says("system", "Be brief."), *hi]):
        with pytest.raises(ValueError, match=message):
            parse_row({**record, "rejected": start + [says("assistant", "No.")]}, False)


@pytest.mark.parametrize("more, prompt, chosen", [
    ([says("user", "So?")], [], "Yes?"),                # a person has the last word: left out
    ([], [says("system", "Be kind.")], "Yes?"),
    ([], [says("user", "2+2?"), says("assistant", "4")], "Yes?"),
    ([says("tool", "42"), says("assistant", "42!")], [], "42!")])
def test_dialogues_of_any_turns(more, prompt, chosen):
    """The prompt is what the dialogues have in common, up to a turn of the assistant."""
    prompt = [*prompt, says("user", "Hi")]
    whole = {"chosen": [*prompt, says("assistant", "Yes?"), *more],
             "rejected": [*prompt, says("assistant", "No.")]}
    row = parse_row(whole, False)
    assert row["prompt"] == prompt and row["responses"][0][-1] == says("assistant", chosen)
    assert row["responses"][1] == [says("assistant", "No.")]


def test_dialogues_that_part_in_a_turn_of_the_person():
    """They go on with the assistant's turn before it, which both have."""
    hi = [says("user", "Hi"), says("assistant", "Yes?")]
    sides = [[*hi, says("user", text), says("assistant", text)] for text in "ab"]
    assert parse_row(dict(zip(SIDES, sides)), False) == {
        "prompt": hi[:1], "responses": [side[1:] for side in sides]}


def test_content_in_parts():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]
    record = {**PAIR, "prompt": [says("user", parts)]}
    assert parse_row(record, False)["prompt"] == [says("user", "Hi you")]
    parts.append({"type": "image", "url": "a.png"})
    with pytest.raises(ValueError, match="^column 'prompt' has a message with a part of type 'image"
                                         "'; models here read text alone$"):
        parse_row(record, False)


def test_calls_of_tools_stay_in_their_messages():
    """Parquet fills up what a message does not have with gaps."""
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    asks = {"role": "assistant", "content": None, "tool_calls": call, "name": None}
    record = {"prompt": [says("user", "1+1?"), asks, says("tool", "2")], "chosen": "2",
              "rejected": [says("assistant", "3")]}
    assert parse_row(record, False)["prompt"][1] == {"role": "assistant", "content": "",
                                                     "tool_calls": call}


@pytest.mark.parametrize("record, message", [
    ({**PAIR, "chosen": "  "}, "response 'chosen' is empty"),
    ({**PAIR, "rejected": None}, "column 'rejected' is missing"),
    ({**PAIR, "chosen": {"text": "a"}}, "^column 'chosen' is neither text nor chat messages$"),
    ({**PAIR, "chosen": b"a"}, "^column 'chosen' is neither text nor chat messages$"),
    ({**PAIR, "chosen": "[{'content': 'a', 'role': 'user'}]"},
     "^column 'chosen' has a list of chat messages written out as text; save the data as JSONL"),
    ({**PAIR, "rejected": '[ {"role": "user", "content": "a"}]'}, "^column 'rejected' has a list "),
    ({**PAIR, "chosen": "caf\udce9"}, "^column 'chosen' is not utf-8 text$"),
    ({"chosen": "a", "rejected": "b"}, "^there is no column 'prompt', and 'chosen' and 'rejected' "
     "share no beginning that ends in 'Assistant:' or 'TL;DR:'; what they answer belongs into a "
     "column 'prompt'$"),
    ({**PAIR, "chosen": [says("robot", "x")]}, "column 'chosen' is not a list of chat messages"),
    ({**PAIR, "chosen": [says("assistant", None)]},
     r"column 'chosen' is not a list of chat messages with a role \(user, assistant, system, "
     r"developer, tool\) and a text as content$")])
def test_parse_row_refuses(record, message):
    with pytest.raises(ValueError, match=message):
        parse_row(record, False)


def test_a_demonstration_needs_its_prompt():
    with pytest.raises(ValueError, match="^column 'prompt' is missing$"):
        parse_row({"prompt": None, "completion": " b"}, True)


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
    again)."""
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
    row = {"prompt": [says("user", "Hi")], "responses": replies("a", "b")}
    assert parse_row(record, False) == row
    whole = [record["prompt"] + response for response in record["responses"]]
    assert parse_row({"prompt": "Hi", "responses": whole}, False) == row


@pytest.mark.parametrize("record, message", [
    ({**PAIR, "score_chosen": 1}, "column 'score_rejected' is missing"),
    ({**PAIR, "score_chosen": "x", "score_rejected": 1}, "'score_chosen' is neither"),
    ({**PAIR, "score_chosen": [1, 2], "score_rejected": [1]},
     "'score_rejected' has 1 numbers for one response, 2"),
    ({**PAIR, "score_chosen": float("nan"), "score_rejected": 1}, "'score_chosen' is missing"),
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
    ({**RANKING, "responses": [" a", None]}, "^column 'responses' is missing"),
    ({**RANKING, "responses": [" a", " ", " b"]}, "the response 'responses' is empty"),
    ({"prompt": None, "responses": [" a", " b"]}, "^column 'prompt' is missing")])
def test_bad_scores_and_rankings(record, message):
    with pytest.raises(ValueError, match=message):
        parse_row(record, False)


# ------------------------------------------------------------------ labels

TWO = {"prompt": "Say hello.", "responses": [" a", " b"]}


@pytest.mark.parametrize("record, message", [
    ({**TWO, "pairs": [[1, 0]]}, "column 'pairs' looks like a label .* into 'ranks', or leave it"),
    ({**TWO, "chosen": " b", "rejected": " a"}, "column 'chosen' looks like a label"),
    ({**TWO, "ratings": [1, 5]}, "^column 'ratings' has a number for each of the 'responses' and "
     "would be ignored; call it 'scores' .* or 'ranks' "),
    ({**TWO, "ranks": [1, 10 ** 400]}, "column 'ranks' is not a list of 2 numbers"),
    ({**TWO, "scores": [1, 10 ** 400]}, "column 'scores' is neither a number below 1e12")])
@pytest.mark.parametrize("demonstrations", [False, True])
def test_labels_that_do_not_agree(record, message, demonstrations):
    with pytest.raises(ValueError, match=message):
        parse_rows(record, demonstrations)


@pytest.mark.parametrize("column", [
    "label", "labels", "preferred", "preference", "winner", "better_response_id", "choice", "rank",
    "safer_response_id", "best", "isPreferred", "Label", "overall_preference", "preferred-response",
    "human_label", "response_0_is_better"])
@pytest.mark.parametrize("layout", [PAIR, TWO])
def test_a_label_that_nobody_reads_is_refused(column, layout):
    """It may contradict what is read. Without a value it says nothing."""
    for value in (0, 1, False, "a", [2, 1]):
        for demonstrations in (False, True):
            with pytest.raises(ValueError, match=f"^column '{column}' looks like a label of which "
                                                 "response is better, and would be ignored; "):
                parse_rows({**layout, column: value}, demonstrations)
    assert parse_rows({**layout, column: None}, False) == parse_rows(layout, False)
    assert parse_rows({**layout, column: float("nan")}, False) == parse_rows(layout, False)


@pytest.mark.parametrize("column", [
    "preferred", "chosen", "rank", "is_chosen", "better", "pairs", "ranks"])
@pytest.mark.parametrize("layout", [{"prompt": "a", "completion": " b"},
                                    {"messages": [says("user", "a"), says("assistant", "b")]}])
def test_a_demonstration_whose_label_nobody_reads(column, layout):
    with pytest.raises(ValueError, match=f"^column '{column}' looks like a label .*'label', which "
                                         "is false for what is not to be imitated"):
        parse_rows({**layout, column: False}, True)


@pytest.mark.parametrize("column", [
    "chosen_model", "rejected-rating", "chosen_id", "preference_strength", "annotator", "source",
    "prompt_id", "labeler", "margin", "response", "label_source"])
def test_columns_about_something_else_are_ignored(column):
    assert parse_rows({**PAIR, column: "1"}, False) == parse_rows(PAIR, False)


def test_a_dialogue_whose_label_is_false_is_not_imitated():
    record = {"messages": [says("user", "Hi"), says("assistant", "Go away.")]}
    assert parse_rows({**record, "label": False}, True) == []
    assert len(parse_rows({**record, "label": True}, True)) == 1


@pytest.mark.parametrize("label, desirable", [
    (True, True), (False, False), (1, True), (0.0, False), ("True", True), ("undesirable", False)])
def test_a_single_response_with_a_label(label, desirable):
    record = {"prompt": "Hi", "completion": " Yes?", "label": label}
    assert parse_row(record, False) == {"prompt": "Hi", "responses": [" Yes?"],
                                        "desirable": desirable}
    chat = {**record, "prompt": [says("user", "Hi")], "completion": [says("assistant", "Yes?")]}
    assert parse_row(chat, False) == {"prompt": chat["prompt"], "responses": [chat["completion"]],
                                      "desirable": desirable}


@pytest.mark.parametrize("change, message", [
    ({"label": None}, "column 'label' is missing"), ({"label": ""}, "column 'label' is missing"),
    ({"label": 0.7}, "column 'label' is '0.7', which is neither true nor false"),
    ({"label": 2}, "column 'label' is '2', which is neither"),
    ({"label": [True]}, "column 'label' is "),
    ({"prompt": None}, "column 'prompt' is missing"),
    ({"completion": None}, "column 'completion' is missing"),
    ({"completion": " "}, "the response 'completion' is empty"),
    ({"preferred": 1}, "column 'preferred' looks like a label"),
    ({"chosen": " a", "rejected": " b"}, "column 'label' looks like a label")])
def test_a_single_response_that_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        parse_row({"prompt": "Hi", "completion": " Yes?", "label": True, **change}, False)


def test_a_gap_beside_a_preference():
    row, = parse_rows({**PAIR, "completion": None}, True)
    assert row["responses"] == [PAIR["chosen"]]


def test_ranks_and_scores_that_disagree_are_counted(tmp_path, hub_cache, capsys):
    rows = [{**TWO, "ranks": [1, 2], "scores": [i, 1]} for i in range(4)]
    assert all(row["responses"] == [" a", " b"] for row in load_rows(write(tmp_path / "a.jsonl",
                                                                           rows)))
    assert capsys.readouterr().out == ("1 row: 'ranks' and 'scores' have another response as the "
                                       "best; the ranks decide\n")


# ------------------------------------------------------------------ the prompt, once

POST = "POST: My boss\n\nTL;DR:"


@pytest.mark.parametrize("prompt, texts, rests", [
    (POST, [POST + " Broke.", POST + " Out."], [" Broke.", " Out."]),
    (POST, [POST + " Broke."], [" Broke."]),
    (POST, [POST + " a", POST + " b", POST + "\nc"], [" a", " b", "\nc"]),
    ("Hi?", ["Hi?\n\nYes", "Hi? No"], ["\n\nYes", " No"]),
    ("Hi?\n", ["Hi?\nYes", "Hi?\n\nNo"], ["Yes", "\nNo"]),
    (" Hi? ", ["Hi? Yes", "Hi? No"], ["Yes", "No"]),
    ("你好。", ["你好。我", "你好。他"], ["我", "他"])])
def test_responses_that_begin_with_the_prompt(prompt, texts, rests):
    """It is taken off, in pairs, rankings and demonstrations, and counted. Prompt and rest have the
    white space of the file between them once."""
    columns = {1: "completion", 2: ("chosen", "rejected")}.get(len(texts), "responses")
    if len(texts) == 2:
        record = dict(zip(columns, texts))
    else:
        record = {columns: texts[0] if len(texts) == 1 else texts}
    notes = Counter()
    row, = parse_rows({"prompt": prompt, **record}, len(texts) == 1, notes)
    assert row == {"prompt": prompt, "responses": rests}
    assert notes == {"{} rows: the responses begin with the prompt, which is taken off there": 1}


@pytest.mark.parametrize("prompt, texts, counted", [
    ("I", ["It is", "Is it"], 0),               # other words
    ("I", ["Is it", "In it"], 0),
    ("Why?", ["Why? So.", "So."], 1),           # one repeats the question
    ("Hello", ["Hello", "Hello you"], 1),       # an answer may be the same as the prompt
    ("", [" a", " b"], 0), (" ", [" a", " b"], 0)])
def test_responses_that_begin_like_the_prompt_stay(prompt, texts, counted):
    notes = Counter()
    row, = parse_rows({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}, False, notes)
    assert row == {"prompt": prompt, "responses": texts} and notes.total() == counted


def test_the_rows_with_the_prompt_twice_are_said(tmp_path, hub_cache, capsys):
    twice = {"prompt": POST, "chosen": POST + " a", "rejected": POST + " b"}
    mixed = {**twice, "rejected": " b"}
    rows = list(load_rows(write(tmp_path / "a.jsonl", [twice, twice, PAIR, mixed])))
    assert [row["responses"][0] for row in rows] == [" a", " a", " Hello!", POST + " a"]
    assert capsys.readouterr().out == (
        "2 rows: the responses begin with the prompt, which is taken off there\n"
        "1 row: a response begins with the prompt, but not all do or nothing comes after it; they "
        "are left as they are\n")


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
    ("a.jsonl", "[1, 2]\n", "row 1: not a JSON object"),
    ("a.jsonl", "null", "row 1: not a JSON object"),
    ("a.json", "null", "row 1: not a JSON object"),
    ("a.json", "[]", "no rows"),
    ("a.json", json.dumps([PAIR, PAIR])[:-1], "not JSON: Expecting ',' delimiter: line 1 column"),
    ("a.json", json.dumps([PAIR, PAIR]) + "]", "not JSON: Extra data: line 1 column"),
    ("a.json", json.dumps([PAIR, PAIR])[:-3], "not JSON: Unterminated string"),
    ("a.json", "[" * 100_000, "JSON nested too deeply"),
    ("a.json", '{"prompt":' * 100_000, "row 1: JSON nested too deeply"),
    ("a.jsonl", "[" * 100_000 + "]" * 100_000, "row 1: JSON nested too deeply"),
    ("a.jsonl", json.dumps({**PAIR, "chosen": "\ud83d"}), "row 1: column 'chosen' is not utf-8"),
    ("a.csv", 'prompt,chosen,rejected\na,"b,c\n', "row 1: not CSV: unexpected end of data"),
    ("a.csv", "prompt,chosen,rejected\n", "no rows"),
    ("a.parquet", "PAR1", "a.parquet: ")])
def test_load_rows_refuses(tmp_path, hub_cache, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        list(load_rows(str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("latin.jsonl", b'{"prompt":"caf\xe9","chosen":"a","rejected":"b"}\n', "row 1: .*utf-8"),
    ("cut.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 50, mtime=0)[:40],   # no date in it
     "not a whole gzip file"),
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
    with pytest.raises(InputError, match="a.csv: row 1: 4 fields, the header has 3"):
        list(load_rows(str(path)))
    path.write_text("prompt,chosen,rejected\na,,c\n")
    with pytest.raises(InputError, match="row 1: column 'chosen' is missing"):
        list(load_rows(str(path)))


SCALARS = ["1", "007", "true", "2024-05-06", "1e5", "NaN", "2024-05-06T07:08:09"]


@pytest.mark.parametrize("text", SCALARS)
def test_text_that_looks_like_something_else(tmp_path, hub_cache, text):
    """Columns of nothing but numbers, booleans or dates are text, as they are written."""
    wanted = [{"prompt": text, "responses": [text, f"{text} "]}] * 3
    csv, jsonl = tmp_path / "a.csv", tmp_path / "a.jsonl"
    csv.write_text("prompt,chosen,rejected\n" + f"{text},{text},{text} \n" * 3)
    record = {"prompt": text, "chosen": text, "rejected": f"{text} "}
    for path in (str(csv), write(jsonl, [record] * 3)):
        assert list(load_rows(path)) == wanted


def test_values_that_are_no_text(tmp_path, hub_cache):
    """Numbers and booleans of JSON, and dates of Parquet, become the text that one would write."""
    rows = list(load_rows(write(tmp_path / "a.jsonl", [
        {"prompt": 12, "chosen": True, "rejected": 0.5},
        {"prompt": [says("user", "Hi")], "responses": [1, False]}])))
    assert rows == [{"prompt": "12", "responses": ["true", "0.5"]},
                    {"prompt": [says("user", "Hi")], "responses": replies("1", "false")}]
    import pandas
    day = pandas.Timestamp("2024-05-06").date()
    frame = pandas.DataFrame({"prompt": [day], "chosen": [1], "rejected": [True]})
    frame.to_parquet(tmp_path / "a.parquet")
    wanted = [{"prompt": "2024-05-06", "responses": ["1", "true"]}]
    assert list(load_rows(str(tmp_path / "a.parquet"))) == wanted


def test_scores_of_csv_are_numbers(tmp_path, hub_cache):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\na,b,c,1,-0.5\na,b,c,,\n")
    pair = {"prompt": "a", "responses": ["b", "c"]}
    assert list(load_rows(str(path))) == [{**pair, "scores": [[1], [-0.5]]}, pair]
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\na,b,c,1,x\n")
    with pytest.raises(InputError, match="row 1: column 'score_rejected' is neither a number"):
        list(load_rows(str(path)))


@pytest.mark.parametrize("layout", ["array", "array on lines", "values"])
def test_layouts_of_json(tmp_path, hub_cache, layout):
    rows = [{**PAIR, "prompt": "é [{" * n} for n in range(1, 60)]
    path = tmp_path / "a.json"
    if layout == "values":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=2 if "lines" in layout else None) + "\n")
    assert [row["prompt"] for row in load_rows(str(path))] == [row["prompt"] for row in rows]


def test_other_columns_are_ignored(tmp_path, hub_cache):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "annotator": {"id": 3}, "confidence": 7}] * 3)
    assert list(load_rows(path)) == [parse_row(PAIR, False)] * 3


# ------------------------------------------------------------------ bad rows

def test_bad_rows_are_listed(tmp_path, hub_cache):
    """All that are wrong, up to five kinds of error and five rows of a kind, in one line; nothing
    is read into a data set after the first."""
    rows = [PAIR] * 40
    for i in (2, 16):
        rows[i] = {**PAIR, "chosen": " "}
    rows[20] = {"prompt": "a", "chosen": "b"}
    for i in range(30, 37):
        rows[i] = {**PAIR, "rejected": None}
    path = write(tmp_path / "a.jsonl", rows)
    used = []
    with pytest.raises(InputError) as error:
        for row in load_rows(path):
            used.append(row)
    assert len(used) == 2
    assert str(error.value) == (
        f"--data: {path}: rows 3, 17: the response 'chosen' is empty; row 21: needs columns chosen "
        "and rejected, or prompt and responses; has prompt, chosen; rows 31, 32, 33, 34, 35 and 2 "
        "more: column 'rejected' is missing; --skip_bad_rows leaves them out")


def test_of_many_kinds_of_error_five_are_listed():
    bad = [(number, f"wrong {min(number, 7)}") for number in range(1, 12)]
    assert describe(bad) == ("row 1: wrong 1; row 2: wrong 2; row 3: wrong 3; row 4: wrong 4; "
                             "row 5: wrong 5; and 6 more")


def test_bad_rows_are_skipped(tmp_path, hub_cache, capsys):
    """If asked for: also lines that are not JSON, and rows unlike most; they are said."""
    good = {"prompt": "Say hello.", "responses": [" Hello!", " Go away."]}
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record) for record in (PAIR, {**PAIR, "chosen": ""}, PAIR, RANKING)]
    path.write_text("\n".join([*lines, "{oops", lines[0], "3"]))
    assert list(load_rows(str(path), skip_bad_rows=True)) == [good] * 3
    assert capsys.readouterr().out == (
        "4 bad rows skipped: row 2: the response 'chosen' is empty; row 4: 3 responses, most rows "
        "have 2; they must be as many; row 5: not JSON: Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1); row 7: not a JSON object\n")
    path.write_text(lines[1])
    with pytest.raises(InputError, match="row 1: the response 'chosen' is empty$"):
        list(load_rows(str(path), skip_bad_rows=True))


@pytest.mark.parametrize("other, message", [
    ({"prompt": "a", "responses": ["b", "c", "d"]},
     "row 2: 3 responses, most rows have 2; they must be as many"),
    ({**PAIR, "score_chosen": [1, 2], "score_rejected": [2, 1]},
     "row 2: 2 scores for each response, most rows have 1; they must be as many")])
def test_rows_that_are_not_alike(tmp_path, hub_cache, other, message):
    scored = {**PAIR, "score_chosen": 1, "score_rejected": 2}
    with pytest.raises(InputError, match=f"{message}; --skip_bad_rows leaves them out$"):
        list(load_rows(write(tmp_path / "a.jsonl", [scored, other])))


@pytest.mark.parametrize("odd", [0, 1, 5])
def test_the_odd_rows_are_bad_and_not_the_others(tmp_path, hub_cache, odd):
    """Most rows decide how many responses and scores there are, wherever the odd ones stand."""
    scored = {**PAIR, "score_chosen": 1, "score_rejected": 2}
    rows = [scored] * 5
    rows[odd:odd] = [{**RANKING}, {**PAIR, "score_chosen": [1, 2], "score_rejected": [2, 1]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=f": row {odd + 1}: 3 responses, most rows have 2; they "
                       f"must be as many; row {odd + 2}: 2 scores for each response, most rows "
                       "have 1; they must be as many; --skip_bad_rows leaves them out$"):
        list(load_rows(path))
    assert len(list(load_rows(path, skip_bad_rows=True))) == 5
    rankings = [PAIR, *[RANKING] * 3]
    path = write(tmp_path / "b.jsonl", rankings)
    assert len(list(load_rows(path, skip_bad_rows=True))) == 3
    assert len(list(load_rows(path, demonstrations=True))) == 4         # these have one each


def test_a_rank_of_400_digits_is_a_bad_row(tmp_path, hub_cache):
    path = write(tmp_path / "a.jsonl", [TWO, {**TWO, "ranks": [1, 10 ** 400]}])
    with pytest.raises(InputError, match="row 2: column 'ranks' is not a list of 2 numbers, one"):
        list(load_rows(path))


def test_what_is_no_file_is_refused(tmp_path, hub_cache):
    """Reading a pipe or a device would wait or never end."""
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    for path in (str(pipe), "/dev/zero"):
        for read in (load_rows, hash_content):
            with pytest.raises(InputError, match=f"^--data: {path}: a pipe, socket or device, not "
                                                 "a file; save what comes out of it in a file"):
                list(read(path))
    with pytest.raises(InputError, match="a.jsonl: a pipe, socket or device"):
        hash_content(str(tmp_path))


# ------------------------------------------------------------------ demonstrations

HI, YES, GO, NO = (says("user", "Hi"), says("assistant", "Yes?"), says("user", "Go."),
                   says("assistant", "No."))
FIRST = {"prompt": [HI], "responses": [[YES]]}
SECOND = {"prompt": [HI, YES, GO], "responses": [[NO]]}
IN_TEXT = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("record, wanted", [
    ({"messages": [HI, YES, GO, NO]}, [FIRST, SECOND]),
    ({"messages": [HI, YES, GO]}, [FIRST]),
    ({"messages": [HI, {**YES, "weight": 0}, GO, NO]},
     [{**SECOND, "prompt": [HI, {**YES, "weight": 0}, GO]}]),
    ({"messages": [HI, YES], "prompt": None, "completion": None}, [FIRST]),
    ({"prompt": [HI], "completion": [YES]}, [FIRST]),
    ({"prompt": [HI, YES, GO], "completion": [NO]}, [SECOND]),
    ({"prompt": [HI], "completion": [YES, GO, NO]}, [FIRST, SECOND]),
    ({"prompt": [HI], "completion": [HI, YES, GO, NO]}, [FIRST, SECOND]),
    ({"prompt": [HI, YES], "completion": [GO, NO]}, [SECOND]),
    ({"prompt": [HI], "completion": "Yes?"}, [FIRST]),
    ({"prompt": "Hi", "completion": [YES, GO, NO]}, [FIRST, SECOND]),
    ({"prompt": "Hi", "completion": [HI, YES, GO, NO]}, [FIRST, SECOND]),
    ({"prompt": IN_TEXT, "completion": " Yes?\n\nHuman: Go.\n\nAssistant: No."},
     [{"prompt": IN_TEXT, "responses": [" Yes?"]},
      {"prompt": IN_TEXT + " Yes?\n\nHuman: Go.\n\nAssistant:", "responses": [" No."]}]),
    ({"chosen": [HI, YES, GO, NO], "rejected": [HI, NO]}, [FIRST, SECOND]),
    ({"prompt": "a", "completion": " b\n\nHuman: c"},
     [{"prompt": "a", "responses": [" b\n\nHuman: c"]}])])
def test_demonstrations_are_the_turns_of_the_assistant(record, wanted):
    """Each turn in a completion, or in a dialogue, is to be imitated, after all that was said
    before it, and what a person says never is. Plain text stays as it is."""
    assert parse_rows(record, True) == wanted


def test_an_opening_of_the_system_is_a_prompt():
    system = says("system", "Be kind.")
    row, = parse_rows({"prompt": [system], "completion": [HI, YES]}, True)
    assert row == {"prompt": [system, HI], "responses": [[YES]]}


@pytest.mark.parametrize("record, message", [
    ({"messages": [HI]}, "^column 'messages' has no turn of the assistant$"),
    ({"messages": []}, "^column 'messages' has no turn of the assistant$"),
    ({"prompt": [HI, YES], "completion": [HI, YES]}, "^column 'completion' has no turn of the"),
    ({"prompt": IN_TEXT, "completion": "\n\nHuman: Go."}, "^the assistant says nothing"),
    ({"prompt": [HI], "completion": []}, "^column 'completion' has no turn of the assistant$"),
    ({"messages": [3]}, "^column 'messages' is not a list of chat messages"),
    ({"prompt": [HI], "completion": [GO]}, "^column 'completion' has no turn of the assistant$"),
    ({"messages": [HI, says("assistant", None)]}, "is not a list of chat messages"),
    ({"messages": None}, "^column 'messages' is missing, or is no list of chat messages$"),
    ({"text": "a"}, "^needs columns prompt and completion, or messages, or chosen and rejected, or "
                    "prompt and responses; has text$")])
def test_what_is_no_demonstration(record, message):
    with pytest.raises(ValueError, match=message):
        parse_rows(record, True)


def test_labels_of_demonstrations(tmp_path, hub_cache, capsys):
    """Unpaired preferences: what people did not like is not imitated; and it is said."""
    records = [{"prompt": "a", "completion": f" is {label}", "label": label}
               for label in (True, False, None, False)]
    wanted = [{"prompt": "a", "responses": [" is True"]},
              {"prompt": "a", "responses": [" is None"]}]
    assert list(load_rows(write(tmp_path / "a.jsonl", records), demonstrations=True)) == wanted
    assert capsys.readouterr().out == "2 demonstrations left out, as their label is false\n"
    (tmp_path / "a.csv").write_text("prompt,completion,label\na, is True,True\na, b,False\n")
    assert list(load_rows(str(tmp_path / "a.csv"), demonstrations=True)) == wanted[:1]
    with pytest.raises(InputError, match="the file has no rows"):
        list(load_rows(write(tmp_path / "a.jsonl", records[1:2]), demonstrations=True))


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
        {"prompt": [hi], "responses": replies("Yes?", "No."), "scores": [[8.5], [3.0]]}]


def test_a_bad_row_in_a_folder_of_files(tmp_path, hub_cache):
    write(tmp_path / "train.jsonl", [PAIR, {**PAIR, "chosen": ""}])
    with pytest.raises(InputError, match="row 2 of train.jsonl: the response 'chosen' is empty; "):
        list(load_rows(str(tmp_path)))
