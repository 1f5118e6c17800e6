"""The embedded task: that it is what its docstring says."""
import numpy as np
import pytest

import tinytldr
from tinytldr import facts_of, judge, oracle_reward, post, demonstration

FIRST = "POST: Sorry for the wall of text. My roommate is the problem here. Every night the speakers are on until two. " \
        "I asked nicely and was laughed at. I am worn out by now. There is no money left for anything. " \
        "Should I just pack up and leave?\n\nTL;DR:"


def perfect(seed, split, index):
    return " " + "; ".join(tinytldr.SLOTS[slot][1][i][2] for slot, i in facts_of(seed, split, index).items())


def test_world_is_as_large_as_it_says():
    assert len(tinytldr.SLOTS) == 6
    texts = [text for _, facts in tinytldr.SLOTS.values() for fact in facts for text in fact]
    texts += [text for pair in tinytldr.CHATTER for text in pair]
    assert all(len(facts) == 12 for _, facts in tinytldr.SLOTS.values())
    assert len(set(texts)) == len(texts)
    assert not any(";" in text for text in texts)                             # the separator of clauses


def test_no_wording_hides_in_another():
    """Reading facts by their sentences is exact: no sentence of the world is part of another one."""
    sentences = [text for _, facts in tinytldr.SLOTS.values() for fact in facts for text in fact[:2]]
    sentences += [sentence for sentence, _ in tinytldr.CHATTER]
    assert not [(a, b) for a in sentences for b in sentences if a != b and a in b]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_generator_is_pure_and_the_oracle_reads_what_it_wrote(split):
    for index in (0, 7, 399_999):
        prompt = post(3, split, index)
        assert prompt == post(3, split, index) and demonstration(3, split, index) == demonstration(3, split, index)
        assert tinytldr.facts_in(prompt) == set(facts_of(3, split, index).items())


def test_splits_never_overlap():
    """The map from (split, index) to a combination of facts is one-to-one: its step is prime to the size of the world."""
    assert np.gcd(1_845_439, tinytldr.N_WORLDS) == 1
    seen = {tuple(facts_of(0, split, i).values()) for split in tinytldr.SPLIT_START for i in range(0, 20_000)}
    assert len(seen) == 60_000
    with pytest.raises(ValueError):
        facts_of(0, "validation", 400_000)                                    # this index is the test split's first


@pytest.mark.parametrize("summary, points", [
    (" my roommate", 1.5), (" exhausted", 0.25), (" my roommate; my roommate", 1.5), (" my sister", -1.0),
    (" sorry for the length", -1.0), (" my roomate", -1.0), (" my roommate;", 0.5), ("", -1.0),
    (" my roommate; loud music at night; asked nicely; exhausted; broke; move out?", 5.25)])
def test_oracle_by_hand(summary, points):
    assert sum(p for _, _, p in judge(FIRST, summary)) == points
    n_tokens = len(tinytldr.tokenizer().encode_ordinary(summary))
    assert oracle_reward(FIRST, summary) == pytest.approx(points + tinytldr.PER_TOKEN * n_tokens)


def test_the_best_summary_states_all_six_facts():
    """No demonstration beats the perfect summary, and leaving a fact out of that makes it worse."""
    for index in range(200):
        prompt, best = post(0, "train", index), perfect(0, "train", index)
        assert oracle_reward(prompt, best) >= oracle_reward(prompt, demonstration(0, "train", index))
        clauses = best[1:].split("; ")
        for left_out in range(6):
            assert oracle_reward(prompt, " " + "; ".join(clauses[:left_out] + clauses[left_out + 1:])) < oracle_reward(prompt, best)


def test_tokenizer_round_trips_any_text():
    encoding = tinytldr.tokenizer()
    for text in (FIRST, "  a \n\n\tb", "Ünï¢ode 漢字 🙂", "it's 42%; ok", "don't", " ' ", tinytldr.END_OF_TEXT, ""):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == encoding.eot_token + 1


def test_every_word_of_the_world_is_one_token():
    encoding = tinytldr.tokenizer()
    assert len(encoding.encode_ordinary(" my roommate; loud music at night")) == 7
    for index in range(50):
        text = post(0, "train", index) + demonstration(0, "train", index)
        words = text.replace("\n\n", " ").split(" ")
        assert len(encoding.encode_ordinary(text)) <= len(words) + sum(text.count(c) for c in ".?;:\n") + 1     # TL;DR


def test_labels():
    """Bradley-Terry draws at the documented temperature; 20,000 draws, false alarm (5 standard errors) below 1e-6."""
    rewards = np.tile([[0.5, 0.0]], (20_000, 1))
    wanted = 1 / (1 + np.exp(-0.5 / tinytldr.LABEL_TEMPERATURE))
    found = tinytldr.prefers_first(rewards, seed=0).mean()
    assert abs(found - wanted) < 5 * (wanted * (1 - wanted) / 20_000) ** 0.5
    assert tinytldr.prefers_first(rewards, seed=0, hard=True).all()
    assert not tinytldr.prefers_first(rewards[:, ::-1], seed=0, hard=True).any()
