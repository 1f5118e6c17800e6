"""Rows of text as token ids: what is kept, cut, dropped and said; splits; the cache on disk."""
import hashlib
import importlib.util
import json

import numpy as np
import pytest
import tiktoken

import data
from data import Dataset
from runs import show
from support import tokens
from support.flags import InputError
from support.tokens import SPLITS, encode, fit, prompts_of, select, tokenised_file
from tinytldr import tokenizer

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}


def row(prompt, *responses, **more):
    return {"prompt": prompt, "responses": list(responses), **more}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    return str(path)


def byte_encoding(name, end):
    """A tokenizer of bytes, its end-of-text token numbered as asked."""
    return tiktoken.Encoding(name, pat_str=".", special_tokens={"<|endoftext|>": end},
                             mergeable_ranks={bytes([b]): b for b in range(256)})


# ------------------------------------------------------------------ what fits

def test_the_prompt_loses_its_start_and_the_response_nothing():
    assert fit([1, 2, 3, 4], [[5, 6], [7]], 6) == [1, 2, 3, 4]
    assert fit([1, 2, 3, 4], [[5, 6], [7]], 4) == [3, 4]
    assert fit([1, 2, 3, 4], [[5, 6, 7]], 4) == [4]
    assert fit([1, 2, 3, 4], [[5, 6, 7, 8]], 4) is None


def test_what_is_kept_is_the_end(capsys):
    """Responses whole, with their end-of-text token, prompts without their start; an empty prompt
    is the end-of-text token."""
    encoding = tokenizer()
    rows = [row("one two three", " ab"), row("one", " abcdefghijkl"), row("", " ab")]
    examples, _ = select(encode(rows, encoding), 8, "some rows")
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
    assert len(select(encode(rows, tokenizer()), 8)[0]) == 1
    assert capsys.readouterr().out == (
        "data: 6 rows, 3 dropped (a response alone does not fit block_size 8), "
        f"2 dropped ({what} are the same)\n")
    assert len(select(encode(rows[:1], tokenizer()), 8, "these")[0]) == 1
    assert capsys.readouterr().out == "these: 1 rows\n"


@pytest.mark.parametrize("rows, said", [
    ([row("a", " b", " b")], "data: 1 rows, 1 dropped (chosen and rejected are the same)\n"),
    ([], "data: 0 rows\n")])
def test_no_usable_row(capsys, rows, said):
    with pytest.raises(InputError, match="^--data: data: no usable row$"):
        select(encode(rows, tokenizer()), 8)
    assert capsys.readouterr().out == said


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


def test_rows_that_are_not_alike(capsys):
    pair = row("a", " b", " c")
    with pytest.raises(ValueError, match="row 2: 1 responses, the first row has 2"):
        encode([pair, row("a", " b")], tokenizer())
    with pytest.raises(ValueError, match="row 2: 2 scores for each response, the first row has 1"):
        encode([{**pair, "scores": [[1], [2]]}, {**pair, "scores": [[1, 2], [2, 1]]}], tokenizer())
    assert "scores" not in encode([pair, {**pair, "scores": [[1], [2]]}], tokenizer())
    assert "scores: left out, as 1 of 2 rows have none" in capsys.readouterr().out


def test_scores_stay_with_their_rows():
    """Through dropping, splitting and choosing."""
    rows = []
    for i in range(300):
        rejected = " b" if i % 3 == 0 else " c"         # every third is dropped
        rows.append(row(f"{i}", " b", rejected, scores=[[i, -i], [i + 0.5, 0]]))
    dataset = Dataset(*select(encode(rows, tokenizer()), 64, split="train"))
    assert dataset.rewards.shape == (len(dataset), 2, 2) and 100 < len(dataset) < 200
    taken = dataset.take(np.arange(0, len(dataset), 2))
    for (prompt, _), scores in zip(taken.examples, taken.rewards):
        i = int(tokenizer().decode(prompt.tolist()))
        assert scores.tolist() == [[i, -i], [i + 0.5, 0]] and i % 3


# ------------------------------------------------------------------ splits

def test_a_prompt_has_one_split_everywhere():
    """It goes by the prompt's hash alone, not by its row or its file."""
    prompts = [f"prompt {i}" for i in range(2000)]
    splits = [SPLITS[hashlib.sha256(prompt.encode()).digest()[0]] for prompt in prompts]
    for numbers in (range(2000), range(1999, 1000, -1)):
        rows = [row(prompts[i], " a") for i in numbers]
        arrays = encode(rows, tokenizer())
        for split in ("validation", "test", "train"):
            examples, _ = select(arrays, 64, split=split)
            wanted = [prompts[i] for i in numbers if splits[i] == split]
            assert [tokenizer().decode(ids.tolist()) for ids, _ in examples] == wanted
    assert 1450 < splits.count("train") < 1750 and 130 < splits.count("test") < 280


def test_prompts_of_a_split_come_once_each():
    rows = [row(f"prompt {i % 200}", f" {i}") for i in range(400)]
    arrays = encode(rows, tokenizer())
    prompts = [prompts_of(arrays, split) for split in ("train", "validation", "test")]
    texts = [tokenizer().decode(prompt) for prompt in sum(prompts, [])]
    assert sorted(texts) == sorted(f"prompt {i}" for i in range(200))
    train, _ = select(arrays, 64, split="train")
    in_order = dict.fromkeys(tokenizer().decode(prompt.tolist()) for prompt, _ in train)
    assert [tokenizer().decode(prompt) for prompt in prompts[0]] == list(in_order)


# ------------------------------------------------------------------ the cache on disk

@pytest.fixture
def token_cache(tmp_path, hub_cache, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tokens_are_cached_by_content(tmp_path, token_cache, capsys):
    """The same file under another name is not read again; another content, another tokenizer and
    another use are."""
    first = tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())
    again = tokenised_file(jsonl(tmp_path / "b.jsonl", [PAIR]), tokenizer())
    assert capsys.readouterr().out.count("tokens from") == 1
    assert first.keys() == again.keys() == {"tokens", "lengths", "hash"}
    for name in first:
        assert np.array_equal(first[name], again[name]) and first[name].dtype == again[name].dtype

    changed = jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": "Say more."}])
    assert not np.array_equal(first["tokens"], tokenised_file(changed, tokenizer())["tokens"])
    tokenised_file(str(tmp_path / "b.jsonl"), tokenizer(), demonstrations=True)
    wide = byte_encoding("tinytldr", 70_000)
    assert tokenised_file(str(tmp_path / "b.jsonl"), wide)["tokens"].dtype == np.int32
    assert first["tokens"].dtype == np.uint16
    assert "tokens from" not in capsys.readouterr().out
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
    tokenising everything anew."""
    path = jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": f"Say {i}."} for i in range(20)])
    tokenised_file(path, tokenizer(), demonstrations=True)
    assert "tokens from" not in capsys.readouterr().out
    changed_copy(tokens, tmp_path).tokenised_file(path, tokenizer(), demonstrations=True)
    assert "tokens from" in capsys.readouterr().out
    changed_copy(data, tmp_path).demonstrations(path, "train", tokenizer(), 64)
    assert "tokens from" in capsys.readouterr().out


def test_cached_tokens_do_not_survive_another_layout(tmp_path, token_cache, monkeypatch, capsys):
    path = jsonl(tmp_path / "a.jsonl", [PAIR])
    tokenised_file(path, tokenizer())
    monkeypatch.setattr(tokens, "LAYOUT", tokens.LAYOUT + 1)
    tokenised_file(path, tokenizer())
    assert "tokens from" not in capsys.readouterr().out
    tokenised_file(path, tokenizer())
    assert "tokens from" in capsys.readouterr().out


def test_a_damaged_entry_is_written_anew(tmp_path, token_cache, capsys):
    path = jsonl(tmp_path / "a.jsonl", [PAIR])
    first = tokenised_file(path, tokenizer())
    entry, = token_cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    again = tokenised_file(path, tokenizer())
    assert f"{entry}: damaged" in capsys.readouterr().out
    assert np.array_equal(first["tokens"], again["tokens"])
    tokenised_file(path, tokenizer())
    assert "tokens from" in capsys.readouterr().out


def test_a_cache_folder_that_cannot_be_made(tmp_path, hub_cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="^NANOPREF_CACHE: the folder .* can't be made"):
        tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())


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
