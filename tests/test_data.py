"""Loading, splitting, truncating, batching and choosing pairs."""
import json

import numpy as np
import pytest

import data
from data import SPLITS, batch_order, batches, biased_subset, bucket_of, encode, fit, longer, select
from runtime import InputError
from tinytldr import tokenizer

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}


# ---------------------------------------------------------------- batches

def test_batches_are_a_pure_function_and_cover_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    plan = batches(lengths, 8, seed=1, epoch=2)
    assert sorted(np.concatenate(plan)) == list(range(1000))
    assert all(np.array_equal(a, b) for a, b in zip(plan, batches(lengths, 8, seed=1, epoch=2)))
    assert not all(np.array_equal(a, b) for a, b in zip(plan, batches(lengths, 8, seed=1, epoch=3)))
    assert not all(np.array_equal(a, b) for a, b in zip(plan, batches(lengths, 8, seed=2, epoch=2)))


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 100, 1024)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches(lengths, 16, seed=0, epoch=0))
    assert padded < 1.1 * lengths.sum()


def test_batches_of_equal_rows_are_the_shuffled_order_cut_up():
    """The sort is stable: rows of one length stay in the shuffled order. And a window is 32 batches by default."""
    lengths, order = np.arange(400) % 2, np.random.default_rng([5, 6]).permutation(400)
    expected = np.concatenate([part[lengths[part] == length] for part in (order[:320], order[320:]) for length in (0, 1)])
    assert set(map(tuple, batches(lengths, 10, seed=5, epoch=6))) == set(map(tuple, expected.reshape(40, 10)))
    ragged = np.random.default_rng(0).integers(1, 100, 400)
    same = zip(batches(ragged, 10, 5, 6), batches(ragged, 10, 5, 6, window=32))
    assert all(np.array_equal(a, b) for a, b in same)


def test_what_fills_no_batch():
    assert [len(rows) for rows in batches(np.ones(10), 4, 0, 0)] == [4, 4]
    assert [len(rows) for rows in batches(np.ones(3), 4, 0, 0)] == [3]
    left_out = {frozenset(range(10)) - frozenset(np.concatenate(batches(np.ones(10), 4, 0, epoch))) for epoch in range(20)}
    assert len(left_out) > 1                                     # not always the same rows


def test_batch_order_depends_on_the_step_alone():
    lengths = np.arange(20)
    forwards, backwards = batch_order(lengths, 4, 0), batch_order(lengths, 4, 0)
    there = [forwards(step).tolist() for step in range(12)]
    assert there == [backwards(step).tolist() for step in reversed(range(12))][::-1]
    assert sorted(sum(there[5:10], [])) == list(range(20))       # the second epoch


# ---------------------------------------------------------------- longer, D_rho

def test_longer_means_ten_percent():
    assert longer([[11, 10], [10, 11], [10, 10], [109, 100], [110, 100], [100, 110], [3, 4]]).tolist() == [1, -1, 0, 0, 1, -1, -1]
    assert longer(np.array([[3277, 3000]], np.int16)).tolist() == [0]       # 10 times that does not fit 16 bits


@pytest.mark.parametrize("rho", [0, 0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("n", [40, None])
def test_biased_subset(rho, n):
    lengths = np.random.default_rng(0).integers(5, 40, (500, 2))
    who = longer(lengths)
    chosen = biased_subset(lengths, rho, n, seed=3)
    assert len(set(chosen)) == len(chosen) and (np.diff(chosen) > 0).all()
    assert (who[chosen] != 0).all()
    assert (who[chosen] == 1).sum() == round(rho * len(chosen))
    if n is None:      # one pair more would not be possible
        more = len(chosen) + 1
        assert round(rho * more) > (who == 1).sum() or more - round(rho * more) > (who == -1).sum()
    else:
        assert len(chosen) == n
        assert not np.array_equal(chosen, biased_subset(lengths, rho, n, seed=4))
    assert np.array_equal(chosen, biased_subset(lengths, rho, n, seed=3))


def test_biased_subset_refuses():
    lengths = np.array([[10, 20]] * 9 + [[20, 10]])
    with pytest.raises(ValueError, match="of 10 pairs, 1 have the longer one chosen and 9"):
        biased_subset(lengths, 0.5, 4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        biased_subset(lengths, 1.5, 4)
    with pytest.raises(ValueError, match="^no such pairs with"):
        biased_subset(np.array([[10, 10]]), 0.5)


def test_biased_subset_of_one():
    one = np.array([[10, 20], [10, 10]])
    assert biased_subset(one, 0.0).tolist() == biased_subset(one, 0.0, 1).tolist() == [0]


def test_biased_subset_defaults_to_seed_0():
    lengths = np.random.default_rng(0).integers(5, 40, (500, 2))
    assert np.array_equal(biased_subset(lengths, 0.5, 20), biased_subset(lengths, 0.5, 20, seed=0))
    assert not np.array_equal(biased_subset(lengths, 0.5, 20), biased_subset(lengths, 0.5, 20, seed=1))


def test_relabel(capsys):
    """The highest reward first, scores too; a row with a tie goes, and is said to."""
    scores = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    dataset = data.Dataset([([i], [[1], [2, 2]]) for i in range(3)], scores)
    again = data.relabel(dataset, [[1.0, 0.0], [0.0, 0.5], [2.0, 2.0]])
    assert again.examples == [([0], [[1], [2, 2]]), ([1], [[2, 2], [1]])]
    assert again.scores.tolist() == [[[0], [1]], [[3], [2]]]
    assert capsys.readouterr().out == "relabelled: 1 dropped (the reward model is undecided)\n"
    ranking = data.relabel(data.Dataset([([0], [[1], [2], [3]])]), [[0.5, -1.0, 0.7]])
    assert ranking.examples == [([0], [[3], [1], [2]])] and ranking.scores is None and capsys.readouterr().out == ""


# ---------------------------------------------------------------- tokens

def test_the_prompt_loses_its_start_and_the_response_nothing():
    assert fit([1, 2, 3, 4], [[5, 6], [7]], 6) == [1, 2, 3, 4]
    assert fit([1, 2, 3, 4], [[5, 6], [7]], 4) == [3, 4]
    assert fit([1, 2, 3, 4], [[5, 6, 7]], 4) == [4]
    assert fit([1, 2, 3, 4], [[5, 6, 7, 8]], 4) is None


def test_tokenise_keeps_the_end_and_counts_what_it_drops(capsys):
    encoding = tokenizer()
    rows = [{"prompt": "one two three", "responses": [" ab"]}, {"prompt": "one", "responses": [" abcdefghijkl"]},
            {"prompt": "", "responses": [" ab"]}]
    dataset = select(encode(rows, encoding), 8, "some rows")
    assert "some rows: 3 rows, 1 dropped (a response alone does not fit block_size 8)" in capsys.readouterr().out
    assert [len(prompt) for prompt, _ in dataset.examples] == [5, 1] and dataset.examples[1][0] == [encoding.eot_token]
    for prompt, (response,) in dataset.examples:
        assert encoding.decode(response[:-1]) == " ab" and response[-1] == encoding.eot_token
        assert 1 <= len(prompt) <= 8 - len(response)
    whole = encoding.encode_ordinary("one two three")
    assert dataset.examples[0][0].tolist() == whole[-len(dataset.examples[0][0]):]


def test_a_prompt_has_one_split_everywhere():
    splits = [SPLITS[bucket_of(f"prompt {i}")] for i in range(2000)]
    rows = [{"prompt": f"prompt {i}", "responses": [" a"]} for i in range(2000)]
    assert [len(select(encode(rows, tokenizer()), 64, split=split)) for split in ("validation", "test", "train")] == [
        splits.count("validation"), splits.count("test"), splits.count("train")]
    assert 1450 < splits.count("train") < 1750 and 130 < splits.count("test") < 280


def test_equal_responses_are_dropped(capsys):
    assert len(select(encode([{"prompt": "a", "responses": [" b", " b"]}], tokenizer()), 8)) == 0
    assert "1 dropped (chosen and rejected are the same)" in capsys.readouterr().out


@pytest.mark.parametrize("K, what", [(2, "chosen and rejected"), (3, "all responses")])
def test_what_was_dropped_is_said(capsys, K, what):
    good, same, long = [" a"] * (K - 1) + [" b"], [" a"] * K, [" a"] * (K - 1) + ["abcdefghijkl"]
    rows = [{"prompt": "a", "responses": responses} for responses in (good, same, same, long, long, long)]
    assert len(select(encode(rows, tokenizer()), 8)) == 1
    assert capsys.readouterr().out == ("data: 6 rows, 3 dropped (a response alone does not fit block_size 8), "
                                       f"2 dropped ({what} are the same)\n")
    assert len(select(encode(rows[:1], tokenizer()), 8, "these")) == 1 and len(select(encode([], tokenizer()), 8)) == 0
    assert capsys.readouterr().out == "these: 1 rows\ndata: 0 rows\n"


def test_types_of_the_arrays():
    """Small ones, as there may be 100,000 rows; 16 bits for all of 65,536 tokens."""
    arrays = encode([{"prompt": "a", "responses": [" b", " c"], "scores": [[0.5], [1]]}] * 2500, tokenizer())
    assert {name: array.dtype for name, array in arrays.items()} == {"tokens": np.uint16, "lengths": np.int32, "bucket": np.uint8, "scores": np.float32}
    assert arrays["lengths"].shape == (2500, 3) and arrays["scores"].shape == (2500, 2, 1) and len(arrays["tokens"]) == arrays["lengths"].sum()
    for last, dtype in ((65_535, np.uint16), (65_536, np.int32)):
        encoding = data.tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([b]): b for b in range(256)},
                                          special_tokens={"<|endoftext|>": last})
        tokens = encode([{"prompt": "a", "responses": ["b"]}], encoding)["tokens"]
        assert tokens.dtype == dtype and tokens.tolist() == [97, 98, last]


def test_rows_that_are_not_alike(capsys):
    row = {"prompt": "a", "responses": [" b", " c"]}
    with pytest.raises(ValueError, match="row 2: 1 responses, the first row has 2"):
        encode([row, {"prompt": "a", "responses": [" b"]}], tokenizer())
    with pytest.raises(ValueError, match="row 2: 2 scores for each response, the first row has 1"):
        encode([{**row, "scores": [[1], [2]]}, {**row, "scores": [[1, 2], [2, 1]]}], tokenizer())
    assert "scores" not in encode([row, {**row, "scores": [[1], [2]]}], tokenizer())
    assert "scores: left out, as 1 of 2 rows have none" in capsys.readouterr().out


def test_scores_stay_with_their_rows():
    """Through dropping, splitting and choosing."""
    rows = [{"prompt": f"{i}", "responses": [" b", " b" if i % 3 == 0 else " c"], "scores": [[i, -i], [i + 0.5, 0]]} for i in range(300)]
    dataset = select(encode(rows, tokenizer()), 64, split="train")
    chosen = dataset.take(np.arange(0, len(dataset), 2))
    assert dataset.scores.shape == (len(dataset), 2, 2) and 100 < len(dataset) < 200
    for (prompt, _), scores in zip(chosen.examples, chosen.scores):
        i = int(tokenizer().decode(prompt.tolist()))
        assert scores.tolist() == [[i, -i], [i + 0.5, 0]] and i % 3


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tokens_are_cached_by_content(tmp_path, hub_cache, capsys, monkeypatch):
    """The same file under another name is not read again; another content, another tokenizer and another use are."""
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    wide = data.tiktoken.Encoding("tinytldr", pat_str=".", mergeable_ranks={bytes([b]): b for b in range(256)},
                                  special_tokens={"<|endoftext|>": 70_000})
    first = data.tokenised_file(jsonl(tmp_path / "a.jsonl", [PAIR]), tokenizer())
    again = data.tokenised_file(jsonl(tmp_path / "b.jsonl", [PAIR]), tokenizer())
    assert capsys.readouterr().out.count("tokens from") == 1 and first.keys() == again.keys() == {"tokens", "lengths", "bucket"}
    assert all(np.array_equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    other = data.tokenised_file(jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": "Say more."}]), tokenizer())
    assert not np.array_equal(first["tokens"], other["tokens"])
    data.tokenised_file(str(tmp_path / "b.jsonl"), tokenizer(), demonstrations=True)
    assert data.tokenised_file(str(tmp_path / "b.jsonl"), wide)["tokens"].dtype == np.int32
    assert "tokens from" not in capsys.readouterr().out and first["tokens"].dtype == np.uint16
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_no_usable_pair(tmp_path, hub_cache):
    with pytest.raises(InputError, match="no usable row"):
        data.main([f"--data={jsonl(tmp_path / 'a.jsonl', [{**PAIR, 'rejected': PAIR['chosen']}])}", "--tokenizer=tinytldr"])


def test_show(tmp_path, hub_cache, capsys):
    data.main([f"--data={jsonl(tmp_path / 'a.jsonl', [PAIR])}", "--tokenizer=tinytldr", "--show"])
    out = capsys.readouterr().out
    coloured = out.replace("\033[32m", "<").replace("\033[31m", ">")
    assert "Say hello.< Hello!<|endoftext|>> Go away.<|endoftext|>" in coloured and "a.jsonl: 1 rows" in out and "chosen in 0 pairs, rejected in 1" in out
    data.main([f"--data={tmp_path}/a.jsonl", "--tokenizer=tinytldr", "--sft"])
    assert "response  tokens" in capsys.readouterr().out
    ranking = {"prompt": "a", "responses": [" b", " c", " d"], "scores": [1, 2, 3]}
    data.main([f"--data={jsonl(tmp_path / 'a.jsonl', [ranking])}", "--tokenizer=tinytldr", "--show"])
    out = capsys.readouterr().out
    assert "1 rows read, 1 used, 1 score(s) for each response" in out and "[1 prompt tokens, 3 + 3 + 3 response tokens]" in out
