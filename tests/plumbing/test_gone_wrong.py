"""Preferences gone wrong in ways that people have met: read rightly, refused, or counted and said.
"""
import gzip
import io
import json

import pytest

from data import get_tokenizer
from support.flags import InputError
from support.rows import load_rows, parse_rows
from support.tokens import preparer

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}
TWO = {"prompt": "Say hello.", "responses": [" Go away.", " Hello!"]}
TURN = {"prompt": "Say hello.", "completion": " Hello!"}
HI = "\n\nHuman: Hi\n\nAssistant:"


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def parse_row(record, demonstrations):
    row, = parse_rows(record, demonstrations)
    return row


def read(path, content, demonstrations=False):
    """The rows of a file with this content, bytes or records, and what is said of it."""
    if not isinstance(content, bytes):
        content = "".join(json.dumps(record) + "\n" for record in content).encode()
    path.write_bytes(content)
    said = []
    rows = list(load_rows(str(path), demonstrations, say=said.append,
                          prepare=preparer(get_tokenizer("tinytldr"))))
    return rows, said


# ------------------------------------------------------------------ labels that would be ignored

@pytest.mark.parametrize("more", [
    {"winner_model_a": 0}, {"winner_tie": True}, {"human_prefers_chosen": False},
    {"preferred_model": "a"}, {"kto_tag": True}])
@pytest.mark.parametrize("layout", [PAIR, TWO])
def test_names_of_labels(layout, more):
    with pytest.raises(ValueError, match=f"^column '{[*more][0]}' looks like a label"):
        parse_rows({**layout, **more}, False)


@pytest.mark.parametrize("more", [{"rating": [1, 5]}, {"judge": [0.5, 1]}])
def test_numbers_for_each_response(more):
    with pytest.raises(ValueError, match="has a number for each of the 'responses' and would be"):
        parse_rows({**TWO, **more}, False)
    assert parse_rows({**TWO, "model": ["a", "b"], "notes": [{"by": 1}, {"by": 2}]}, False)


def test_scores_beside_a_pair():
    with pytest.raises(ValueError, match="next to 'chosen' and 'rejected' come"):
        parse_rows({**PAIR, "scores": [1, 5]}, False)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_not_to_be_imitated(mark):
    messages = [says("user", "Hi"), says("assistant", "No.", **mark), says("user", "Please?"),
                says("assistant", "Hello!")]
    rows = parse_rows({"messages": messages}, True)
    assert rows == [{"prompt": messages[:3], "responses": [messages[3:]]}]
    del messages[1][[*mark][0]]
    assert len(parse_rows({"messages": messages}, True)) == 2


def test_a_column_that_is_there_twice(tmp_path, hub_cache):
    """Either may be the one that is meant."""
    import pyarrow
    import pyarrow.parquet
    line = b'{"prompt": "a", "chosen": " b", "rejected": " c", "chosen": " d"}\n'
    names, parquet = ["prompt", "chosen", "rejected", "chosen"], io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], [" b"], [" c"], [" d"]], names),
                                parquet)
    table = (",".join(names) + "\na, b, c, d\n").encode()
    for name, content in (("a.jsonl", line), ("a.json", b"[" + line + b"]"), ("a.csv", table),
                          ("a.parquet", parquet.getvalue())):
        with pytest.raises(InputError, match="column 'chosen' is there twice"):
            read(tmp_path / name, content)


def test_ties_and_equal_responses_are_counted(tmp_path, hub_cache):
    tied = {**TWO, "ranks": [1, 1]}
    _, said = read(tmp_path / "a.jsonl", [tied, tied, {**TWO, "ranks": [2, 1]}])
    assert said == ["2 rows: a tie in their 'ranks' or 'scores' is broken by chance"]
    _, said = read(tmp_path / "a.jsonl", [{"prompt": "a", "responses": [" b", " b", " c"]}])
    assert said == ["1 row: two of the responses are the same; neither is better"]


def test_the_same_words_do_not_win_every_tie():
    """Or a preference for one of them would be learned from ties."""
    best = [parse_row({**TWO, "prompt": str(i), "ranks": [1, 1]}, False)["responses"][0]
            for i in range(40)]
    assert 8 <= best.count(" Hello!") <= 32


# ------------------------------------------------------------------ prompts and texts

def test_dialogues_with_another_prompt(tmp_path, hub_cache):
    def record(prompt):
        return {"prompt": prompt, "chosen": [says("user", "Hi"), says("assistant", "Yes")],
                "rejected": [says("user", "Hi"), says("assistant", "No")]}
    for prompt in ("Hi", " Hi\n", "<|user|>Hi"):
        assert read(tmp_path / "a.jsonl", [record(prompt)])[1] == []
    assert read(tmp_path / "a.jsonl", [record("What?")])[1] == [
        "warning: in 1 row the dialogues have another prompt than 'prompt'; theirs is taken"]


def test_a_demonstration_that_says_nothing():
    """Refused, other than a call of a tool."""
    asked, silent = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}
    for demonstration in ({"messages": [asked, silent]}, {"prompt": [asked], "completion": ""}):
        with pytest.raises(ValueError, match="^the response '(messages|completion)' is empty$"):
            parse_rows(demonstration, True)
    calls = [{**silent, "tool_calls": ["f"]}]
    assert len(parse_rows({"messages": [asked, *calls]}, True)) == 1


@pytest.mark.parametrize("response", ["\u200b", " \ufeff", "\u200e\n"])
def test_a_response_that_nobody_sees_is_empty(response):
    with pytest.raises(ValueError, match="^the response 'rejected' is empty$"):
        parse_row({**PAIR, "rejected": response}, False)


@pytest.mark.parametrize("text", [
    '[{"from": "human", "value": "Hi"}]',
    " [{'content': 'Hi', 'role': 'user'}\n {'content': 'Yes', 'role': 'assistant'}]",
    "array([{'content': 'Hi', 'role': 'user'}], dtype=object)"])
def test_messages_that_were_written_as_text(text):
    with pytest.raises(ValueError, match="has a list of chat messages written out as text"):
        parse_row({**PAIR, "prompt": text}, False)


@pytest.mark.parametrize("text", [
    '{"role": "user", "content": "Hi"}', '{"content": "goat", "price": 3}', '{"role": "user"}',
    '[{"role": "user"', "[1, 2]"])
def test_text_that_is_json_all_the_same(text):
    assert parse_row({**PAIR, "chosen": text}, False)["responses"][0] == text


def test_an_empty_prompt(tmp_path, hub_cache):
    _, said = read(tmp_path / "a.jsonl", [{**PAIR, "prompt": ""}] * 2)
    assert said == ["warning: in 2 of 2 rows the prompt is empty"]


@pytest.mark.parametrize("token", [
    "<pad>", "<EOS>", "[PAD]", "<\uff5cend\u2581of\u2581text\uff5c>"])
def test_other_models_special_tokens_at_the_end(tmp_path, hub_cache, token):
    _, said = read(tmp_path / "a.jsonl", [{**PAIR, "chosen": " Hello!" + token}])
    assert said[0].startswith(f"warning: a response ends in {token} in 1 row")


def test_parts_of_messages_and_pictures_that_are_not_read(tmp_path, hub_cache):
    record = {"prompt": [says("user", "Hi", name=None)], "images": ["a.png"], "context": ["Goats."],
              "chosen": [says("assistant", "Yes", reasoning_content="Hm")],
              "rejected": [says("assistant", "No")]}
    assert read(tmp_path / "a.jsonl", [record])[1] == [
        "1 row: 'reasoning_content' of their messages is not read by the chat layout",
        "columns that are not read: 'context', 'images'"]


def test_many_columns_are_one_line(tmp_path, hub_cache):
    _, said = read(tmp_path / "a.jsonl", [{**PAIR, **{f"c{i}": 1 for i in range(1000)}}])
    assert len(said) == 1 and said[0].endswith(" and 980 more")


@pytest.mark.parametrize("record, message", [
    ({**PAIR, "chosen": [" Hello!", " Hi!"]}, "^column 'chosen' is not a list of chat messages"),
    ({"prompt": "a", "responses": [" b", None]}, "^column 'responses' is missing one of its texts"),
    ({**TWO, "scores": [1, None]}, "^column 'scores' is missing one of its numbers")])
def test_the_column_that_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        parse_row(record, False)


# ------------------------------------------------------------------ files

LINE = (json.dumps(PAIR) + "\n").encode()
FIELDS, BOM = b"Say hello., Hello!, Go away.\n", b"\xef\xbb\xbf"
PACKED = gzip.compress(LINE, mtime=0)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", BOM + LINE + BOM + LINE),       # two files, one after the other
    ("A.JSONL", LINE * 2), ("A.CSV", b"prompt,chosen,rejected\n" + FIELDS * 2),
    ("a.Jsonl.GZ", PACKED * 2), ("a.csv", b"prompt, chosen ,rejected\n" + FIELDS * 2)])
def test_files_that_are_read(tmp_path, hub_cache, name, content):
    wanted = {"prompt": "Say hello.", "responses": [" Hello!", " Go away."]}
    assert read(tmp_path / name, content) == ([wanted] * 2, [])


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", LINE.decode().encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
    ("a.csv", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "it is UTF-16 text; save it as"),
    ("a.jsonl", PACKED, "it is packed with gzip"),
    ("a.parquet", PACKED, "it is packed with gzip"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd", "it is packed with zstd; unpack it"),
    ("a.json", b"PAR1", "it is Parquet"), ("a.csv", b"PK\x03\x04", "it is a zip file or a spread"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
    ("a.csv", b"prompt;chosen;rejected\na; b; c\n", "not separated by commas"),
    ("a.csv", b"prompt\tchosen\trejected\na\t b\t c\n", "not separated by commas"),
    ("a.jsonl", json.dumps([PAIR], indent=1).encode(), "belongs into a file that ends in .json"),
    ("a.jsonl", json.dumps([PAIR]).encode(), "belongs into a file that ends in .json")])
def test_files_that_are_something_else(tmp_path, hub_cache, name, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        read(tmp_path / name, content)
    assert "\n" not in str(refusal.value)


def folder_said(folder, *names):
    for name in names:
        (folder / name).write_bytes(LINE)
    said = []
    rows = list(load_rows(str(folder), say=said.append))
    return len(rows), said


@pytest.mark.parametrize("names", [
    ["part-1.jsonl", "part-2.jsonl", "part-10.jsonl"], ["0000.jsonl", "0001.jsonl"]])
def test_parts_of_a_split_without_a_name(tmp_path, names):
    assert folder_said(tmp_path, *names)[0] == len(names)


def test_names_in_capitals(tmp_path):
    assert folder_said(tmp_path, "Train.JSONL", "Test.JSONL") == (
        1, ["reads Train.JSONL; not read: Test.JSONL"])
