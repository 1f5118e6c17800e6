"""Real files, where there are some: NANOPREF_DATA names a folder with TL;DR and HH comparisons (and
tiktoken's cache, unless TIKTOKEN_CACHE_DIR names another)."""
import json
import os
import re

import numpy as np
import pytest

from data import Dataset, biased_subset, get_tokenizer, longer
from support.rows import load_rows
from support.tokens import SPLITS, encode, select, tokenised_file

FOLDER = os.environ.get("NANOPREF_DATA", "")
pytestmark = [pytest.mark.real_data,
              pytest.mark.skipif(not os.path.isdir(FOLDER),
                                 reason="NANOPREF_DATA names no folder with real data")]


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ["TIKTOKEN_CACHE_DIR"]:
            patch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(FOLDER, "tiktoken_cache"))
        return get_tokenizer("gpt2")


@pytest.mark.parametrize("name, demonstrations, n", [("tldr_preference", False, 759),
                                                     ("tldr_sft", True, 7104),
                                                     ("hh_helpful-base", False, 2320)])
def test_every_row_is_read_and_no_response_is_cut(hub_cache, gpt2, name, demonstrations, n):
    """All rows load; in a context of 256 tokens, only prompts lose tokens, from their start, and
    every response ends."""
    rows = list(load_rows(os.path.join(FOLDER, f"{name}.jsonl.gz"), demonstrations))
    assert len(rows) == n
    rows = rows[:300]
    examples = select(encode(rows, gpt2), 256)["examples"]
    fits = 0
    for row in rows:
        if max(len(gpt2.encode_ordinary(response)) for response in row["responses"]) > 254:
            continue
        prompt, responses = examples[fits]
        fits += 1
        assert len(prompt) + max(map(len, responses)) <= 256
        assert gpt2.encode_ordinary(row["prompt"])[-len(prompt):] == prompt.tolist()
        for ids, text in zip(responses, row["responses"]):
            assert ids[-1] == gpt2.eot_token and gpt2.decode(ids[:-1].tolist()) == text
    assert fits == len(examples) > 0.9 * len(rows)


def test_hh_prompts_end_where_the_assistant_speaks(hub_cache, gpt2, capsys):
    """The implicit prompt is right in every dialogue; the two pairs of equal responses are dropped,
    and said to be."""
    rows = list(load_rows(os.path.join(FOLDER, "hh_helpful-base.jsonl.gz")))
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert not any("\n\nHuman:" in response for response in row["responses"])
    examples = select(encode(rows, gpt2), 4096)["examples"]
    assert len(examples) == 2318
    assert "2 dropped (chosen and rejected are the same)" in capsys.readouterr().out


def test_implicit_prompts_of_posts_are_the_posts(hub_cache, tmp_path):
    """The same comparisons as whole texts, without a column for the prompt: every prompt is its
    post, so none is held out whose post trains."""
    rows = list(load_rows(os.path.join(FOLDER, "tldr_preference.jsonl.gz")))
    with open(tmp_path / "whole.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            whole = [row["prompt"] + response for response in row["responses"]]
            file.write(json.dumps(dict(zip(("chosen", "rejected"), whole))) + "\n")
    assert list(load_rows(str(tmp_path / "whole.jsonl"))) == rows


def test_no_real_dialogue_is_held_out_that_goes_on_with_one_that_trains(hub_cache, gpt2):
    """Comparisons of several turns of a dialogue are rows of their own, in the same split."""
    rows = list(load_rows(os.path.join(FOLDER, "hh_helpful-base.jsonl.gz")))
    splits = SPLITS[encode(rows, gpt2)["hash"]]
    train = {row["prompt"] for row, split in zip(rows, splits) if split == "train"}
    beginnings = 0
    for row, split in zip(rows, splits):
        turns = [match.end() for match in re.finditer("\n\nAssistant:", row["prompt"])]
        beginnings += len(turns)
        if split != "train":
            assert train.isdisjoint(row["prompt"][:end] for end in turns)
    assert beginnings > 1.5 * len(rows)


def test_biased_subset_of_real_pairs(hub_cache, gpt2):
    arrays = tokenised_file(os.path.join(FOLDER, "tldr_preference.jsonl.gz"), gpt2)
    lengths = Dataset(**select(arrays, 1024)).response_lengths()
    subset = biased_subset(lengths, 0.2)
    assert np.mean(longer(lengths[subset]) == 1) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("name, demonstrations", [("tldr_preference", False), ("tldr_sft", True),
                                                  ("hh_helpful-base", False)])
def test_nothing_looks_odd_in_good_data(name, demonstrations):
    """The only thing said is the column of TL;DR that is not read."""
    said = []
    path = os.path.join(FOLDER, f"{name}.jsonl.gz")
    for _ in load_rows(path, demonstrations, say=said.append):
        pass
    unread = ["columns that are not read: 'confidence'"] if name == "tldr_preference" else []
    assert said == unread
