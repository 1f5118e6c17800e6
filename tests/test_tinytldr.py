"""The embedded task: that it is what its docstring says."""
import importlib.util

import numpy as np
import pytest

import tinytldr
from model import GPT, GPTConfig
from support.tokenizer import END_OF_TEXT, word_encoding
from tinytldr import demonstration, facts_of, judge, oracle_reward, post

FIRST = ("POST: Sorry for the wall of text. My roommate is the problem here. Every night the "
         "speakers are on until two. I asked nicely and was laughed at. I am worn out by now. "
         "There is no money left for anything. Should I just pack up and leave?\n\nTL;DR:")


def perfect(seed, split, index):
    facts = facts_of(seed, split, index).items()
    return " " + "; ".join(tinytldr.SLOTS[slot][1][i][2] for slot, i in facts)


# ------------------------------------------------------------------ the world

def test_world_is_as_large_as_it_says():
    assert len(tinytldr.SLOTS) == 6
    assert all(len(facts) == 12 for _, facts in tinytldr.SLOTS.values())
    texts = [text for _, facts in tinytldr.SLOTS.values() for fact in facts for text in fact]
    texts += [text for chatter in tinytldr.CHATTER for text in chatter]
    assert len(texts) == 6 * 12 * 3 + 10 * 2 and len(set(texts)) == len(texts)
    assert not any(";" in text for text in texts)               # the separator of clauses


def test_no_wording_hides_in_another():
    """Reading facts by their sentences is exact: no sentence of the world is part of another."""
    sentences = []
    for _, facts in tinytldr.SLOTS.values():
        sentences += [text for fact in facts for text in fact[:2]]
    sentences += [sentence for sentence, _ in tinytldr.CHATTER]
    assert not [(a, b) for a in sentences for b in sentences if a != b and a in b]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_generator_is_pure_and_the_oracle_reads_what_it_wrote(split):
    for index in (0, 7, 399_999):
        prompt, summary = post(3, split, index), demonstration(3, split, index)
        assert prompt == post(3, split, index) and summary == demonstration(3, split, index)
        assert tinytldr.facts_in(prompt) == set(facts_of(3, split, index).items())


def test_splits_never_overlap():
    """The map from (split, index) to a combination of facts is one-to-one: its step is prime to the
    size of the world."""
    assert np.gcd(1_845_439, tinytldr.N_WORLDS) == 1
    combinations = {tuple(facts_of(0, split, i).values())
                    for split in tinytldr.SPLIT_START for i in range(20_000)}
    assert len(combinations) == 60_000
    with pytest.raises(ValueError):
        facts_of(0, "validation", 400_000)                      # it is the test split's first


# ------------------------------------------------------------------ the oracle

@pytest.mark.parametrize("summary, points", [
    (" my roommate", 1.5),
    (" exhausted", 0.25),
    (" my roommate; my roommate", 1.5),
    (" my sister", -1.0),
    (" sorry for the length", -1.0),
    (" my roomate", -1.0),
    (" my roommate;", 0.5),
    ("", -1.0),
    (" my roommate; loud music at night; asked nicely; exhausted; broke; move out?", 5.25)])
def test_oracle_by_hand(summary, points):
    assert sum(p for _, _, p in judge(FIRST, summary)) == points
    n_tokens = len(tinytldr.tokenizer().encode_ordinary(summary))
    assert oracle_reward(FIRST, summary) == pytest.approx(points - 0.02 * n_tokens)


def test_the_best_summary_states_all_six_facts():
    """No demonstration beats the perfect summary, and leaving a fact out of that makes it worse."""
    for index in range(200):
        prompt, best = post(0, "train", index), perfect(0, "train", index)
        highest = oracle_reward(prompt, best)
        assert highest >= oracle_reward(prompt, demonstration(0, "train", index))
        clauses = best[1:].split("; ")
        for left_out in range(6):
            rest = " " + "; ".join(clauses[:left_out] + clauses[left_out + 1:])
            assert oracle_reward(prompt, rest) < highest


# ------------------------------------------------------------------ pairs

def test_labels():
    """Bradley-Terry draws at the documented temperature; 20,000 draws, false alarm (5 standard
    errors) below 1e-6."""
    assert tinytldr.LABEL_TEMPERATURE == 0.5
    rewards = np.tile([[0.5, 0.0]], (20_000, 1))
    wanted = 1 / (1 + np.exp(-0.5 / 0.5))
    share = tinytldr.prefers_first(rewards, seed=0).mean()
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 20_000) ** 0.5
    assert tinytldr.prefers_first(rewards, seed=0, hard=True).all()
    assert not tinytldr.prefers_first(rewards[:, ::-1], seed=0, hard=True).any()


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
        flags = {"split": "train", "n": 10, "hard": False, "seed": 0,
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


@pytest.mark.parametrize("changes", [{"split": "validation"}, {"n": 11}, {"hard": True},
                                     {"seed": 1}, {"encoding": BYTES}])
def test_cached_pairs_are_for_what_was_asked(pair_cache, changes):
    assert pair_cache(tinytldr, **changes)


@pytest.mark.parametrize("name", ["LABEL_TEMPERATURE", "UNSUPPORTED", "CHATTERED", "BROKEN",
                                  "PER_TOKEN"])
def test_cached_pairs_do_not_survive_another_reward(pair_cache, monkeypatch, name):
    monkeypatch.setattr(tinytldr, name, 3 * getattr(tinytldr, name))
    assert pair_cache(tinytldr)


@pytest.mark.parametrize("old, new", [
    ("if rng.random() < 0.3:", "if rng.random() < 0.9:"),           # how posts are made
    ('"train": 200_000,', '"train": 300_000,'),                     # which posts are for pairs
    ('"tried": (0.25,', '"tried": (0.5,')])                         # what a fact is worth
def test_cached_pairs_do_not_survive_another_world(tmp_path, pair_cache, old, new):
    assert pair_cache(changed_copy(tmp_path, old, new))


def test_cached_pairs_do_not_survive_another_wording(pair_cache, monkeypatch):
    """Neither a common one, nor one that none of the first hundred posts and summaries has."""
    common = "".join(post(0, "train", i) + demonstration(0, "train", i) for i in range(100))
    places = [(slot, i, j, text) for slot, (_, facts) in tinytldr.SLOTS.items()
              for i, fact in enumerate(facts) for j, text in enumerate(fact)]
    rare = [place for place in places if place[-1] not in common]
    assert rare
    survived = []
    for slot, i, j, text in [places[0], *rare]:
        weight, facts = tinytldr.SLOTS[slot]
        fact = (*facts[i][:j], text + " indeed", *facts[i][j + 1:])
        with monkeypatch.context() as patch:
            patch.setitem(tinytldr.SLOTS, slot, (weight, [*facts[:i], fact, *facts[i + 1:]]))
            if not pair_cache(tinytldr):
                survived.append(text)
    assert survived == []


def test_pairs_are_sampled_in_the_policy_s_own_tokens(tmp_path):
    """A policy that reads bytes is asked in bytes and stopped at its own end of text."""
    policy = GPT(GPTConfig(600, BYTES.n_vocab, 1, 1, 4))
    asked = []

    def generate(prompts, max_new_tokens, temperature, stop, generator):
        asked.append((prompts, stop))
        return [BYTES.encode_ordinary(f" my boss{'; broke' * (i % 2)}") + [BYTES.eot_token]
                for i in range(len(prompts))]

    policy.generate = generate
    rows = tinytldr.pair_rows("train", 3, policy, BYTES, str(tmp_path))
    (prompts, stop), = asked
    texts = [post(0, "train", tinytldr.PAIRS_FROM["train"] + i) for i in range(3)]
    assert [BYTES.decode(prompt) for prompt in prompts[::2]] == texts and stop == BYTES.eot_token
    assert [sorted(row["responses"]) for row in rows] == [[" my boss", " my boss; broke"]] * 3


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
