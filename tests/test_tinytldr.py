"""The built-in task: that it is what its docstring says."""
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tinytldr
from model import GPT, GPTConfig
from support import device
from support.tokenizer import END_OF_TEXT, to_text, word_encoding
from support.tokens import held_out_prompts
from tinytldr import demonstration, facts_of, oracle_reward, post

FIRST = ("POST: Sorry for the wall of text. My roommate is the problem. The music never stops. "
         "I made a polite request. I am worn out. There is no money left. "
         "Should I pack up and leave?\n\nTL;DR:")


def perfect(split, index):
    facts = facts_of(split, index).items()
    return " " + "; ".join(tinytldr.SLOTS[slot][i][2] for slot, i in facts)


# ------------------------------------------------------------------ the world

def test_world_is_as_large_as_it_says():
    assert len(tinytldr.SLOTS) == 6
    assert all(len(facts) == 8 for facts in tinytldr.SLOTS.values())
    texts = [text for facts in tinytldr.SLOTS.values() for fact in facts for text in fact]
    texts += tinytldr.CHATTER
    assert len(texts) == 6 * 8 * 3 + 8 and len(set(texts)) == len(texts)
    assert not any(";" in text for text in texts)               # the separator of clauses


def test_no_wording_hides_in_another():
    """Reading facts by their sentences is exact: no sentence of the world is part of another."""
    sentences = []
    for facts in tinytldr.SLOTS.values():
        sentences += [text for fact in facts for text in fact[:2]]
    sentences += tinytldr.CHATTER
    assert not [(a, b) for a in sentences for b in sentences if a != b and a in b]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_generator_is_pure_and_the_oracle_reads_what_it_wrote(split):
    for index in (0, 7, 29_999):
        prompt, summary = post(3, split, index), demonstration(3, split, index)
        assert prompt == post(3, split, index) and summary == demonstration(3, split, index)
        assert tinytldr.facts_in(prompt) == set(facts_of(split, index).items())


def test_splits_never_overlap():
    """The map from (split, index) to a combination of facts is one-to-one: its step is prime to the
    size of the world. It does not know of seeds, so no two seeds' splits overlap either."""
    assert np.gcd(162_013, tinytldr.N_WORLDS) == 1
    combinations = {tuple(facts_of(split, i).values())
                    for split in tinytldr.SPLIT_START for i in range(20_000)}
    assert len(combinations) == 60_000
    with pytest.raises(ValueError):
        facts_of("validation", 30_000)                          # it is the test split's first


# ------------------------------------------------------------------ the oracle

@pytest.mark.parametrize("summary, points", [
    (" my roommate", 1),
    (" exhausted", 1),
    (" my roommate; my roommate", 1),
    (" my sister", -3),
    (" sorry for the wall of text; broke", -2),
    (" my roomate", -3),
    (" my roommate;", -2),
    ("", -3),
    (" my roommate; loud music; asked nicely; exhausted; broke; move out?", 6)])
def test_oracle_by_hand(summary, points):
    assert oracle_reward(FIRST, summary) == points


def test_the_best_summary_states_all_six_facts():
    """No demonstration beats the perfect summary, and leaving a fact out of that makes it worse."""
    for index in range(200):
        prompt, best = post(0, "train", index), perfect("train", index)
        highest = oracle_reward(prompt, best)
        assert highest >= oracle_reward(prompt, demonstration(0, "train", index))
        clauses = best[1:].split("; ")
        for left_out in range(6):
            rest = " " + "; ".join(clauses[:left_out] + clauses[left_out + 1:])
            assert oracle_reward(prompt, rest) < highest


# ------------------------------------------------------------------ pairs

def test_labels():
    """Without noise, or Bradley-Terry draws at a temperature; 20,000 draws, false alarm (5 standard
    errors) below 1e-6."""
    rewards = np.tile([[3, 2]], (20_000, 1))
    assert tinytldr.prefers_first(rewards).all()
    assert not tinytldr.prefers_first(rewards[:, ::-1]).any()
    wanted = 1 / (1 + np.exp(-1 / 0.5))
    share = tinytldr.prefers_first(rewards, label_temperature=0.5).mean()
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 20_000) ** 0.5


@pytest.fixture
def pair_cache(tmp_path, monkeypatch):
    """A function that asks a copy of tinytldr.py for pairs, and says whether they were sampled
    rather than read from the cache. (What is sampled does not matter here.)"""
    policy = GPT(GPTConfig(8, 16, 1, 1, 4))
    sampled = []

    def sample_pairs(*args):
        sampled.append(args)
        return []

    def ask(module, **changes):
        monkeypatch.setattr(module, "sample_pairs", sample_pairs)
        before = len(sampled)
        flags = {"split": "train", "n": 10, "label_temperature": 0, "seed": 0,
                 "encoding": tinytldr.tokenizer(), **changes}
        module.pair_rows(policy=policy, cache=str(tmp_path / "cache"), **flags)
        return len(sampled) > before

    assert ask(tinytldr) and not ask(tinytldr)
    return ask


def changed_copy(folder, old, new):
    """The module of tinytldr.py with one text in it replaced."""
    with open(tinytldr.__file__, encoding="utf-8") as file:
        source = file.read()
    assert source.count(old) == 1
    path = folder / "changed_copy.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_copy", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_cached_pairs_survive_a_comment(tmp_path, pair_cache):
    first_line = "from functools import lru_cache"
    assert not pair_cache(changed_copy(tmp_path, first_line, f"# a comment\n{first_line}"))


BYTES = word_encoding("bytes", [])


@pytest.mark.parametrize("changes", [{"split": "validation"}, {"n": 11},
                                     {"label_temperature": 1},
                                     {"seed": 1}, {"encoding": BYTES}])
def test_cached_pairs_are_for_what_was_asked(pair_cache, changes):
    assert pair_cache(tinytldr, **changes)


@pytest.mark.parametrize("name", ["STATED", "UNSUPPORTED", "CHATTERED", "BROKEN"])
def test_cached_pairs_do_not_survive_another_reward(pair_cache, monkeypatch, name):
    monkeypatch.setattr(tinytldr, name, 3 * getattr(tinytldr, name))
    assert pair_cache(tinytldr)


@pytest.mark.parametrize("old, new", [
    ("if rng.random() < 0.3:", "if rng.random() < 0.9:"),           # how posts are made
    ('"train": 100_000,', '"train": 110_000,')])                    # which posts are for pairs
def test_cached_pairs_do_not_survive_another_world(tmp_path, pair_cache, old, new):
    assert pair_cache(changed_copy(tmp_path, old, new))


def test_cached_pairs_do_not_survive_another_wording(pair_cache, monkeypatch):
    survived = []
    for slot, facts in tinytldr.SLOTS.items():
        for j in range(3):
            fact = (*facts[0][:j], facts[0][j] + " indeed", *facts[0][j + 1:])
            with monkeypatch.context() as patch:
                patch.setitem(tinytldr.SLOTS, slot, [fact, *facts[1:]])
                if not pair_cache(tinytldr):
                    survived.append(fact[j])
    assert survived == []


def test_pairs_are_sampled_in_the_policy_s_own_tokens(tmp_path, monkeypatch):
    """A policy that reads bytes is asked in bytes and stopped at its own end of text. --dtype does
    not change the pairs."""
    monkeypatch.setattr(device.computing, "dtype", "bfloat16")
    policy = GPT(GPTConfig(600, BYTES.n_vocab, 1, 1, 4))
    asked = []

    def generate(prompts, max_new_tokens, temperature, stop, generator):
        asked.append((prompts, stop))
        assert not torch.is_autocast_enabled("cpu")
        return [BYTES.encode_ordinary(f" my boss{'; broke' * (i % 2)}") + [BYTES.eot_token]
                for i in range(len(prompts))]

    policy.generate = generate
    rows = tinytldr.pair_rows("train", 3, policy, BYTES, str(tmp_path))
    (prompts, stop), = asked
    texts = [post(0, "train", tinytldr.PAIRS_FROM["train"] + i) for i in range(3)]
    assert [BYTES.decode(prompt) for prompt in prompts[::2]] == texts and stop == [BYTES.eot_token]
    assert [sorted(row["responses"]) for row in rows] == [[" my boss", " my boss; broke"]] * 3


def test_pairs_are_asked_for_as_policies_are_trained(tmp_path):
    """A tokenizer may begin a text with a token of its own, and the model may end in several."""
    policy, asked = GPT(GPTConfig(600, 300, 1, 1, 4)), []
    own = word_encoding("own", [])
    own.start, own.ends = [299], [own.eot_token, 298]

    def generate(prompts, max_new_tokens, temperature, stop, generator):
        asked.append((prompts, stop))
        return [BYTES.encode_ordinary(" my boss") + [298]] * len(prompts)

    policy.generate = generate
    tinytldr.pair_rows("train", 1, policy, own, str(tmp_path))
    text = post(0, "train", tinytldr.PAIRS_FROM["train"])
    args = SimpleNamespace(data="tinytldr", seed=0, split="test", n_prompts=1)
    (held_out,), (ids,), _ = held_out_prompts(args, own, post)
    assert asked == [([[299, *text.encode()]] * 2, [own.eot_token, 298])]
    assert ids == [299, *held_out.encode()]


# ------------------------------------------------------------------ the tokenizer

def test_tokenizer_round_trips_any_text():
    encoding = tinytldr.tokenizer()
    texts = (FIRST, "  a \n\n\tb", "Ünï¢ode 漢字 🙂", "it's 42%; ok", "don't", " ' ", END_OF_TEXT,
             "")
    for text in texts:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == encoding.eot_token + 1


def test_every_word_of_the_world_is_one_token():
    encoding = tinytldr.tokenizer()
    assert len(encoding.encode_ordinary(" my roommate; loud music at night")) == 7
    for index in range(50):
        text = post(0, "train", index) + demonstration(0, "train", index)
        words = text.replace("\n\n", " ").split(" ")
        marks = sum(text.count(c) for c in ".?;:\n")
        assert len(encoding.encode_ordinary(text)) <= len(words) + marks + 1        # TL;DR


def test_ids_beyond_the_tokenizer_are_left_out_of_a_text():
    """A model whose vocabulary is padded may sample them."""
    encoding = tinytldr.tokenizer()
    ids = encoding.encode_ordinary(" my boss") + [encoding.n_vocab, encoding.eot_token]
    assert to_text(ids, encoding) == " my boss"
