"""Rows of text as token ids: what is kept, cut, dropped and said; splits; the cache on disk."""
import hashlib
import importlib.util
import json
import os
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tiktoken

import data
from data import Dataset
from runs import show
from support import tokens
from support.flags import InputError
from support.tokenizer import as_tokenizer, encode_text
from support.tokens import (
    SPLITS,
    default_block_size,
    encode,
    example_lengths,
    fit,
    prompt_tokens,
    prompts_of,
    random_order,
    select,
    tokenised_file,
)
from tinytldr import tokenizer

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}


def row(prompt, *responses, **more):
    return {"prompt": prompt, "responses": list(responses), **more}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    return str(path)


def byte_encoding(name, end):
    """A tokenizer of bytes, its end-of-text token numbered as asked."""
    return as_tokenizer(tiktoken.Encoding(
        name, pat_str=".", special_tokens={"<|endoftext|>": end},
        mergeable_ranks={bytes([b]): b for b in range(256)}))


@pytest.fixture
def token_cache(tmp_path, hub_cache, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------ what fits

def test_the_prompt_loses_its_start_and_the_response_nothing():
    """Of four letters and responses of one and two, each with its end: what is left of the prompt;
    nothing if a response leaves no room."""
    arrays = encode([row("abcd", "ef", "g")], byte_encoding("bytes", 256))
    for block_size, prompt in [(7, "abcd"), (6, "bcd"), (4, "d"), (3, "")]:
        (ids, responses), = fit(arrays, block_size)
        assert bytes(ids.tolist()) == prompt.encode()
        assert [response.tolist() for response in responses] == [[*b"ef", 256], [*b"g", 256]]


def test_what_is_kept_is_the_end(capsys):
    """Responses whole, with their end-of-text token, prompts without their start; an empty prompt
    is the end-of-text token."""
    encoding = tokenizer()
    rows = [row("one two three", " ab"), row("one", " abcdefghijkl"), row("", " ab")]
    examples = select(encode(rows, encoding), 8, "some rows")["examples"]
    message = "some rows: 3 rows, 1 dropped (a response alone does not fit block_size 8)"
    assert message in capsys.readouterr().out
    assert [len(prompt) for prompt, _ in examples] == [5, 1]
    assert examples[1][0] == [encoding.eot_token]
    for prompt, (response,) in examples:
        assert encoding.decode(response[:-1]) == " ab" and response[-1] == encoding.eot_token
        assert 1 <= len(prompt) <= 8 - len(response)
    whole = encoding.encode_ordinary("one two three")
    prompt = examples[0][0].tolist()
    assert prompt == whole[-len(prompt):]


@pytest.mark.parametrize("K, what", [(2, "chosen and rejected"), (3, "all responses")])
def test_what_was_dropped_is_said(capsys, K, what):
    usable = row("a", *[" a"] * (K - 1), " b")
    equal = row("a", *[" a"] * K)
    long = row("a", *[" a"] * (K - 1), "abcdefghijkl")
    rows = [usable, equal, equal, long, long, long]
    assert len(select(encode(rows, tokenizer()), 8)["examples"]) == 1
    assert capsys.readouterr().out == (
        "data: 6 rows, 3 dropped (a response alone does not fit block_size 8), "
        f"2 dropped ({what} are the same)\n")
    assert len(select(encode(rows[:1], tokenizer()), 8, "these")["examples"]) == 1
    assert capsys.readouterr().out == "these: 1 rows\n"


@pytest.mark.parametrize("n_cut, warning", [
    (0, ""),
    (1, ", 1 prompts lose their start (block_size 6)\n"),
    (2, ", 2 prompts lose their start (block_size 6)\nwarning: data: 10% of the prompts lose their "
        "start; with block_size 64 it would be 1%\n")])
def test_prompts_that_lose_their_start_are_counted(capsys, n_cut, warning):
    """And from 5% on there is a warning."""
    rows = [row("abcd", "e")] * (20 - n_cut) + [row("abcde", "f")] * n_cut
    select(encode(rows, byte_encoding("bytes", 256)), 6)
    assert capsys.readouterr().out == "data: 20 rows" + (warning or "\n")


@pytest.mark.parametrize("letters, block_size", [(20, 192), (197, 256), (253, 256), (254, 320),
                                                 (2000, 1024)])
def test_the_block_size_that_a_file_needs(tmp_path, token_cache, capsys, letters, block_size):
    """All but the longest 1% of prompts fit before their responses, up to 1024 tokens."""
    rows = [{"prompt": "a" * letters, "completion": "bc"}] * 200
    rows.append({"prompt": "a" * 5000, "completion": "b"})
    args = SimpleNamespace(data=jsonl(tmp_path / "a.jsonl", rows), skip_bad_rows=None)
    assert default_block_size(args, byte_encoding("bytes", 256)) == block_size
    assert f"block_size {block_size}, by the length of its rows" in capsys.readouterr().out


@pytest.mark.parametrize("rows, said", [
    ([row("a", " b", " b")], "data: 1 rows, 1 dropped (chosen and rejected are the same)\n"),
    ([], "data: 0 rows\n")])
def test_no_usable_row(capsys, rows, said):
    with pytest.raises(InputError, match="^--data: data: no usable row$"):
        select(encode(rows, tokenizer()), 8)
    assert capsys.readouterr().out == said


def test_no_row_of_a_split():
    """A file with one prompt has one split."""
    arrays, refused = encode(3 * [row("a", " b", " c")], tokenizer()), []
    for split in ("train", "validation", "test"):
        try:
            select(arrays, 8, split=split)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) == 2
    assert all("no usable row: rows go to train, validation and test by" in text
               for text in refused)


# ------------------------------------------------------------------ arrays

def test_types_of_the_arrays():
    """Small ones, as there may be 100,000 rows."""
    rows = [row("a", " b", " c", scores=[[0.5], [1]])] * 2500
    arrays = encode(rows, tokenizer())
    assert {name: array.dtype for name, array in arrays.items()} == {
        "tokens": np.uint16, "lengths": np.int32, "hash": np.uint8, "scores": np.float32}
    assert arrays["lengths"].shape == (2500, 3) and arrays["scores"].shape == (2500, 2, 1)
    assert len(arrays["tokens"]) == arrays["lengths"].sum()


@pytest.mark.parametrize("end, dtype", [(65_535, np.uint16), (65_536, np.int32)])
def test_16_bits_for_all_of_65536_tokens(end, dtype):
    ids = encode([row("a", "b")], byte_encoding("bytes", end))["tokens"]
    assert ids.dtype == dtype and ids.tolist() == [97, 98, end]


def test_scores_that_only_some_rows_have(capsys):
    pair = row("a", " b", " c")
    assert "scores" not in encode([pair, {**pair, "scores": [[1], [2]]}], tokenizer())
    assert capsys.readouterr().out == "scores: left out, as 1 of 2 rows have none\n"


def test_scores_stay_with_their_rows():
    """Through dropping, splitting and choosing."""
    rows = []
    for i in range(300):
        rejected = " b" if i % 3 == 0 else " c"         # every third is dropped
        rows.append(row(f"{i}", " b", rejected, scores=[[i, -i], [i + 0.5, 0]]))
    dataset = Dataset(**select(encode(rows, tokenizer()), 64, split="train"))
    assert dataset.rewards.shape == (len(dataset), 2, 2) and 100 < len(dataset) < 200
    taken = dataset.take(np.arange(0, len(dataset), 2))
    for (prompt, _), scores in zip(taken.examples, taken.rewards):
        i = int(tokenizer().decode(prompt.tolist()))
        assert scores.tolist() == [[i, -i], [i + 0.5, 0]] and i % 3


# ------------------------------------------------------------------ special tokens, long text

END = "<|endoftext|>"


def bytes_with(*specials):
    """A tokenizer of bytes with these special tokens, numbered from 256 on."""
    return as_tokenizer(tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={name: 256 + i for i, name in enumerate(specials)}))


@pytest.mark.parametrize("end", [END, END + "\n", END + END, f"{END} {END}", f"{END}[PAD][PAD]"])
def test_an_end_of_text_in_the_text_is_the_end(tmp_path, token_cache, capsys, end):
    """It is taken off the end of responses, so that there is one end-of-text token. It is said;
    from the cache too."""
    tokenizer = bytes_with(END, "[PAD]")
    records = [{"prompt": "a", "chosen": " goat" + end, "rejected": " cow"}, PAIR]
    path = jsonl(tmp_path / "a.jsonl", records)
    for _ in range(2):
        arrays = tokenised_file(path, tokenizer)
        _, (chosen, rejected) = fit(arrays, 64)[0]
        assert chosen.tolist() == [*b" goat", tokenizer.eot_token]
        assert rejected.tolist() == [*b" cow", tokenizer.eot_token]
        assert capsys.readouterr().out.endswith(
            f"{path}: 1 row: a special token such as end-of-text is written at the end of a "
            "response; it is taken off\n")
    chosen, = [responses[0] for _, responses in fit(tokenised_file(path, tokenizer, True), 64)][:1]
    assert chosen.tolist() == [*b" goat", tokenizer.eot_token]


def test_special_tokens_elsewhere_are_text_and_said(tmp_path, token_cache, capsys):
    tokenizer = bytes_with(END, "<|im_start|>")
    records = [{**PAIR, "prompt": f"What is {END}?"}, {**PAIR, "chosen": f" a{END} b"}, PAIR,
               {**PAIR, "rejected": " <|im_start|>user"}]
    path = jsonl(tmp_path / "a.jsonl", records)
    (prompt, _), (_, (chosen, _)), *_ = fit(tokenised_file(path, tokenizer), 64)
    assert bytes(prompt.tolist()).decode() == f"What is {END}?"
    assert bytes(chosen.tolist()[:-1]).decode() == f" a{END} b"
    assert capsys.readouterr().out == (
        f"{path}: warning: special tokens of the tokenizer are written in the text of 3 rows; "
        "there they are read as ordinary text\n")


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>\n"])
def test_the_end_of_text_of_another_model_is_said(tmp_path, token_cache, capsys, end):
    path = jsonl(tmp_path / "a.jsonl", [{**PAIR, "chosen": " goat" + end}] * 2)
    tokenised_file(path, bytes_with(END))
    assert capsys.readouterr().out == (
        f"{path}: warning: a response ends in {end.strip()} in 2 rows; to this tokenizer that is "
        "ordinary text, which the model would learn to write\n")


def test_a_response_of_nothing_but_end_of_text_is_a_bad_row(tmp_path, token_cache):
    path = jsonl(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": " " + END}])
    with pytest.raises(InputError, match=r"row 2: a response is nothing but <\|endoftext\|>"):
        tokenised_file(path, bytes_with(END))


def splitting_encoding():
    """A tokenizer of bytes that splits text as GPT-2's does, with its limits."""
    pattern = r" ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return as_tokenizer(tiktoken.Encoding(
        "split", pat_str=pattern, special_tokens={END: 256},
        mergeable_ranks={bytes([b]): b for b in range(256)}))


@pytest.mark.parametrize("column", ["prompt", "rejected"])
def test_text_that_the_tokenizer_cannot_read_is_a_bad_row(tmp_path, token_cache, capfd, column):
    """A million spaces between two words are too many for tiktoken, which would panic. Half as many
    are not."""
    few, many = [{**PAIR, column: "a" + " " * n + "b"} for n in (400_000, 1_000_000)]
    path = jsonl(tmp_path / "a.jsonl", [PAIR, many, few])
    message = ("row 2: more than 500,000 characters of white space in a row, which the tokenizer "
               "can't read")
    with pytest.raises(InputError, match=f"{message}; --skip_bad_rows leaves them out$"):
        tokenised_file(path, splitting_encoding())
    assert len(tokenised_file(path, splitting_encoding(), skip_bad_rows=True)["hash"]) == 2
    out, err = capfd.readouterr()
    assert out == f"{path}: 1 bad row skipped: {message}\n" and err == ""


def test_a_tokenizer_that_panics_on_a_text():
    """Also where nobody saw the limit coming. Ctrl-C stays Ctrl-C."""
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode_ordinary(self, text):
            raise PanicException

    with pytest.raises(ValueError, match="^the tokenizer can't read this text; is it very long"):
        encode_text("a", Panicking())

    class Interrupted:
        def encode_ordinary(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_text("a", Interrupted())


def test_a_prompt_that_the_tokenizer_cannot_read():
    for chat in (False, True):
        with pytest.raises(InputError, match="^the prompt: more than 500,000 characters of w"):
            prompt_tokens(["a" + " " * 10 ** 6 + "b"], splitting_encoding(), 64, chat)


# ------------------------------------------------------------------ splits

def test_a_prompt_has_one_split_everywhere():
    """It goes by the prompt's hash alone, not by its row or its file."""
    prompts = [f"prompt {i}" for i in range(2000)]
    splits = [SPLITS[hashlib.sha256(prompt.encode()).digest()[0]] for prompt in prompts]
    for numbers in (range(2000), range(1999, 1000, -1)):
        rows = [row(prompts[i], " a") for i in numbers]
        arrays = encode(rows, tokenizer())
        for split in ("validation", "test", "train"):
            examples = select(arrays, 64, split=split)["examples"]
            wanted = [prompts[numbers[i]] for i in random_order(len(numbers))
                      if splits[numbers[i]] == split]
            assert [tokenizer().decode(ids.tolist()) for ids, _ in examples] == wanted
    assert 1450 < splits.count("train") < 1750 and 130 < splits.count("test") < 280


def test_all_turns_of_a_dialogue_are_in_the_same_split():
    """It goes by the first turn, so that no dialogue is held out that goes on with one that trains,
    or the other way round."""
    rows, n = [], 300
    for i in range(n):
        opening = f"\n\nHuman: {i}\n\nAssistant:"
        rows += [row(opening, " a"), row(opening + " a\n\nHuman: b\n\nAssistant:", " c")]
    arrays = encode(rows, tokenizer())
    splits = SPLITS[arrays["hash"]].reshape(n, 2)
    assert (splits[:, 0] == splits[:, 1]).all() and len(set(splits[:, 0])) == 3
    greeting = "\n\nAssistant: Hello!"         # by the assistant, who speaks first in all of these
    rows = [row(f"{greeting}\n\nHuman: {i}\n\nAssistant:", " a") for i in range(n)]
    assert len(set(encode(rows, tokenizer())["hash"])) > 100


def dialogue(*turns):
    """A prompt: turns of a person, of the assistant, of the person ..., waiting for a reply."""
    names = ("Human", "Assistant")
    text = "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))
    return text + "\n\nAssistant:"


def splits_of(prompts):
    """{prompt: its split}, of a file with these prompts; whatever the order of its rows, and
    however often a prompt comes."""
    splits = []
    for rows in (prompts, [*reversed(prompts), *prompts[:3]]):
        hashes = encode([row(prompt, " a") for prompt in rows], tokenizer())["hash"]
        splits.append(dict(zip(rows, SPLITS[hashes])))
    assert splits[0] == splits[1]
    return splits[0]


@pytest.mark.parametrize("opening", [("Hello",), ("2+2?", "4", "3+3?", "6", "4+4?")])
@pytest.mark.parametrize("n_openings", [1, 2, 10])
@pytest.mark.parametrize("alone", [True, False])
def test_dialogues_that_begin_alike(opening, n_openings, alone):
    """With a greeting or with worked examples: they are split all the same, each dialogue as a
    whole. alone: is the greeting a prompt, too?"""
    prompts, n = [], 200
    openings = [(f"{i % n_openings} {opening[0]}", *opening[1:]) for i in range(n)]
    for i in range(n):
        prompts.append(dialogue(*openings[i], "Yes", f"question {i}"))
        prompts.append(dialogue(*openings[i], "Yes", f"question {i}", "So?", "Well"))
    if alone:
        prompts += sorted({dialogue(*opening) for opening in openings})
    splits = list(splits_of(prompts).values())
    assert splits[:2 * n:2] == splits[1:2 * n:2]
    for split, least, most in [("train", 130, 180), ("validation", 8, 40), ("test", 8, 40)]:
        assert least <= splits[:2 * n:2].count(split) <= most


def test_a_dialogue_that_branches_is_in_one_split():
    """Many openings, each a prompt with five ways to go on; and one long dialogue, every turn of
    which is a prompt."""
    openings = [(f"opening {i}",) for i in range(60)]
    prompts = [dialogue(*opening, *more) for opening in openings
               for more in [(), *[("Yes?", f"way {way}") for way in range(5)]]]
    splits = list(splits_of(prompts).values())
    assert all(len(set(splits[i:i + 6])) == 1 for i in range(0, len(splits), 6))
    assert len(set(splits)) == 3
    turns = [str(turn) for turn in range(101)]
    assert len(set(splits_of([dialogue(*turns[:n]) for n in range(1, 101, 2)]).values())) == 1


def test_the_first_turn_decides_as_long_as_it_tells_dialogues_apart():
    """So a prompt is in the same split in every file, whichever of a dialogue's turns are in it."""
    first = {f"{i}": dialogue(f"{i}") for i in range(300)}
    later = [dialogue(f"{i}", "Yes", f"and {i}?") for i in range(300)]
    splits = splits_of(later)
    for i, prompt in enumerate(later):
        digest = hashlib.sha256(f"\n\nHuman: {i}".encode()).digest()
        assert splits[prompt] == SPLITS[digest[0]]
    assert list(splits_of(list(first.values())).values()) == list(splits.values())


def test_prompts_of_a_split_come_once_each():
    rows = [row(f"prompt {i % 200}", f" {i}") for i in range(400)]
    arrays = encode(rows, tokenizer())
    prompts = [prompts_of(arrays, split) for split in ("train", "validation", "test")]
    texts = [tokenizer().decode(prompt) for prompt in sum(prompts, [])]
    assert sorted(texts) == sorted(f"prompt {i}" for i in range(200))
    train = [f"prompt {i}" for i in range(200)
             if SPLITS[hashlib.sha256(f"prompt {i}".encode()).digest()[0]] == "train"]
    in_order = [train[i] for i in random_order(len(train))]
    assert [tokenizer().decode(prompt) for prompt in prompts[0]] == in_order != train


# ------------------------------------------------------------------ the cache on disk

def test_tokens_are_cached_by_content(tmp_path, token_cache, capsys):
    """The same file under another name is not read again; another content, another tokenizer and
    another use are."""
    first = tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())
    again = tokenised_file(jsonl(tmp_path / "b.jsonl", [PAIR]), tokenizer())
    assert capsys.readouterr().out.count("tokens: from") == 1
    assert first.keys() == again.keys() == {"tokens", "lengths", "hash"}
    for name in first:
        assert np.array_equal(first[name], again[name]) and first[name].dtype == again[name].dtype

    changed = jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": "Say more."}])
    assert not np.array_equal(first["tokens"], tokenised_file(changed, tokenizer())["tokens"])
    tokenised_file(str(tmp_path / "b.jsonl"), tokenizer(), demonstrations=True)
    wide = byte_encoding("tinytldr", 70_000)
    assert tokenised_file(str(tmp_path / "b.jsonl"), wide)["tokens"].dtype == np.int32
    assert first["tokens"].dtype == np.uint16
    assert "tokens: from" not in capsys.readouterr().out
    assert len(list(token_cache.iterdir())) == 4


def changed_copy(module, folder):
    """The module of a file with another comment in it."""
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    path = folder / "changed_copy.py"
    path.write_text(source + "\n# another comment\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_copy", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_cached_tokens_survive_another_text_of_the_code(tmp_path, token_cache, capsys):
    """An entry goes by what is in it, and by LAYOUT: a comment in tokens.py or data.py is not worth
    tokenising everything again."""
    path = jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": f"Say {i}."} for i in range(20)])
    tokenised_file(path, tokenizer(), demonstrations=True)
    assert "tokens: from" not in capsys.readouterr().out
    changed_copy(tokens, tmp_path).tokenised_file(path, tokenizer(), demonstrations=True)
    assert "tokens: from" in capsys.readouterr().out
    changed_copy(data, tmp_path).demonstrations(path, "train", tokenizer(), 64)
    assert "tokens: from" in capsys.readouterr().out


def test_cached_tokens_do_not_survive_another_layout(tmp_path, token_cache, monkeypatch, capsys):
    path = jsonl(tmp_path / "a.jsonl", [PAIR])
    tokenised_file(path, tokenizer())
    monkeypatch.setattr(tokens, "LAYOUT", tokens.LAYOUT + 1)
    tokenised_file(path, tokenizer())
    assert "tokens: from" not in capsys.readouterr().out
    tokenised_file(path, tokenizer())
    assert "tokens: from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "folder"])
def test_what_is_in_the_file_now_is_what_is_read(tmp_path, token_cache, name):
    """Also if its path, size and time are those of what was there before."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        path = path / "train.jsonl"
    for text in ("before", "after!"):
        frame = pandas.DataFrame({"prompt": [text], "chosen": [" b"], "rejected": [" c"]})
        if name == "a.csv":
            frame.to_csv(path, index=False)
        elif name == "a.parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=name != "a.json")
        os.utime(path, (10 ** 9, 10 ** 9))
        arrays = tokenised_file(str(tmp_path / name), tokenizer())
        prompt, = [prompt for prompt, _ in fit(arrays, 64)]
        assert tokenizer().decode(prompt.tolist()) == text


def test_a_file_that_changes_while_it_is_read(tmp_path, token_cache):
    """It is refused, and its rows are not kept under either content."""
    path = jsonl(tmp_path / "a.jsonl", [PAIR] * 3000)

    class Tokenizer:
        """Something else writes to the file while the first rows are tokenised."""
        def __getattr__(self, attribute):
            return getattr(tokenizer(), attribute)

        def encode_ordinary_batch(self, *args, **options):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(PAIR) + "\n")
            return tokenizer().encode_ordinary_batch(*args, **options)

    with pytest.raises(InputError, match="a.jsonl: it changed while it was read"):
        tokenised_file(path, Tokenizer())
    assert not token_cache.exists()


def test_the_cache_loses_what_a_killed_process_left(tmp_path, token_cache):
    """It goes after a day: until then, another process may be at work on it."""
    (token_cache / "0123.0123abcd.tmp").mkdir(parents=True)
    (token_cache / "0123.0123abcd.tmp/tokens.npy").touch()
    os.utime(token_cache / "0123.0123abcd.tmp", (0, 0))
    tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())
    entry, = token_cache.iterdir()
    assert not entry.name.endswith(".tmp")


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, token_cache, capsys):
    token_cache.touch()         # a file, where the folder should be
    for _ in range(2):
        assert len(tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())["hash"]) == 1
        out = capsys.readouterr().out
        assert out.startswith("warning: not kept for the next run: ") and out.count("\n") == 1


def test_without_a_home_the_cache_is_here(tmp_path, hub_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOPREF_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())
    assert len(os.listdir(".cache/nanopref")) == 1


def test_skipped_rows_are_said_again(tmp_path, token_cache, capsys):
    """With or without bad rows are two entries; from the cache too it is said what was skipped."""
    path = jsonl(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": ""}])
    message = f"{path}: 1 bad row skipped: row 2: the response 'chosen' is empty\n"
    for _ in range(2):
        assert len(tokenised_file(path, tokenizer(), skip_bad_rows=True)["hash"]) == 1
        assert capsys.readouterr().out.endswith(message)
        with pytest.raises(InputError, match="row 2: the response 'chosen' is empty"):
            tokenised_file(path, tokenizer())


# ------------------------------------------------------------------ examples

def test_examples_are_those_of_a_list():
    """What a data set asks of examples is the same of those that are cut out of flat arrays."""
    rng = np.random.default_rng(0)
    rows = [row("a" * rng.integers(1, 9), *["b" * n for n in rng.integers(1, 9, 3)])
            for _ in range(30)]
    flat = fit(encode(rows, byte_encoding("bytes", 256)), 12)
    listed = list(flat)
    assert len(listed) == len(flat) == 30
    for rows in (np.array([3, 1, 4, 1]), np.arange(5)):
        taken, wanted = (Dataset(examples).take(rows).examples for examples in (flat, listed))
        assert as_lists(taken) == as_lists(wanted)
    assert np.array_equal(example_lengths(flat), example_lengths(listed))


def as_lists(examples):
    return [[ids.tolist() for ids in (prompt, *responses)] for prompt, responses in examples]


# ------------------------------------------------------------------ what became of every row

def test_show_refuses_a_file_of_no_use(tmp_path, hub_cache):
    path = jsonl(tmp_path / "a.jsonl", [{**PAIR, "rejected": PAIR["chosen"]}])
    with pytest.raises(InputError, match="no usable row"):
        show.main([f"--data={path}", "--tokenizer=tinytldr"])


def test_show(tmp_path, hub_cache, capsys):
    """A batch in colour, and what was read, for pairs, demonstrations and rankings."""
    path = jsonl(tmp_path / "a.jsonl", [PAIR])
    show.main([f"--data={path}", "--tokenizer=tinytldr"])
    out = capsys.readouterr().out
    coloured = out.replace("\033[32m", "<").replace("\033[31m", ">")
    assert "Say hello.< Hello!<|endoftext|>> Go away.<|endoftext|>" in coloured
    assert "a.jsonl: 1 rows" in out and "chosen in 0 pairs, rejected in 1" in out
    show.main([f"--data={path}", "--tokenizer=tinytldr", "--sft"])
    assert "response  tokens" in capsys.readouterr().out

    ranking = row("a", " b", " c", " d", scores=[1, 2, 3])
    show.main([f"--data={jsonl(tmp_path / 'a.jsonl', [ranking])}", "--tokenizer=tinytldr"])
    out = capsys.readouterr().out
    assert "1 rows read, 1 used, 1 score(s) for each response" in out
    assert "[1 prompt tokens, 3 + 3 + 3 response tokens]" in out
