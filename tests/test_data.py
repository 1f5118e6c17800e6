"""Choosing, ordering and relabelling examples, and the columns of a data set. (Token ids are in
test_tokens.py, the tree batch in test_tree.py.)"""
import numpy as np
import pytest
from hints import assert_gives

from data import (
    BatchOrder,
    Dataset,
    batches,
    biased_subset,
    by_length,
    d_rho,
    longer,
    relabel,
)
from support import device
from support.flags import InputError


def equal(plan, other):
    return len(plan) == len(other) and all(map(np.array_equal, plan, other))


# ------------------------------------------------------------------ longer, D_rho

def test_longer_means_ten_percent():
    def sides(n, m):
        return longer([[n, m], [m, n]]).tolist()

    assert_gives(sides(20, 10), [1, -1], what="longer", mistakes={
        "chosen and rejected are swapped": [-1, 1],
        "no -1, where the rejected response is longer": [1, 0]})
    assert sides(10, 10) == [0, 0], "of two equal lengths neither is longer"
    assert sides(3, 2) == [1, -1], "10% is a fraction, not a number of tokens"
    assert sides(109, 100) == [0, 0], "less than 10% more is not longer"
    assert sides(1105, 1000) == [1, -1], "10% of the shorter response are enough"
    assert sides(110, 100) == [1, -1], (
        "exactly 10% more is enough; compare whole numbers, as 1.1 * 100 is above 110 in floats")
    assert longer(np.array([[3277, 3000]], np.int16)).tolist() == [0], (
        "ten times the length is beyond 16 bits: an overflow")


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8, 0, 1])
@pytest.mark.parametrize("n", [41, None])
def test_biased_subset(rho, n):
    """Different pairs, in order, in a fraction rho of which the longer response is chosen; as many
    as asked for, or else as there can be; a pure function of the seed."""
    lengths = np.random.default_rng(0).integers(5, 40, (500, 2))
    sides = longer(lengths)
    subset = biased_subset(lengths, rho, n, seed=3)
    size, chosen = len(subset), np.flatnonzero(sides == 1)
    assert n in (None, size), f"{size} pairs, not n = {n}"
    assert len(set(subset)) == size, "a pair is drawn twice"
    assert (sides[subset] != 0).all(), "pairs of about equal length are not left out"
    assert_gives((sides[subset] == 1).sum(), round(rho * size), {
        "rho is the fraction in which the longer one is chosen, not rejected":
            size - round(rho * size),
        "rho * n is rounded down, not to the nearest number": int(rho * size)
    }, "pairs whose longer response is chosen")
    assert (np.diff(subset) > 0).all(), "the pairs are not in order"
    if n is None:       # with a pair more it would not be possible
        too_many_longer = round(rho * (size + 1)) > len(chosen)
        too_many_shorter = size + 1 - round(rho * (size + 1)) > (sides == -1).sum()
        assert too_many_longer or too_many_shorter, "not as many as possible"
    else:
        first, drawn = chosen[:round(rho * n)].tolist(), subset[sides[subset] == 1].tolist()
        assert rho == 0 or first != drawn, "the first pairs, where pairs are drawn at random"
        other = biased_subset(lengths, rho, n, seed=4)
        assert not np.array_equal(subset, other), "another seed gives the same pairs"
    again = biased_subset(lengths, rho, n, seed=3)
    assert np.array_equal(subset, again), "the same seed gives other pairs"


def test_biased_subset_refuses():
    lengths = np.array([[10, 20]] * 9 + [[20, 10]])
    message = "^--rho, --bias, --n_pairs: no 4 pairs .* of 10, 1 have it chosen and 9 rejected$"
    with pytest.raises(InputError, match=message):
        biased_subset(lengths, 0.5, 4)
    with pytest.raises(ValueError, match="no such pairs in which"):
        biased_subset(np.array([[10, 10]]), 0.5)
    with pytest.raises(ValueError, match="subsets by length are of pairs"):
        biased_subset(np.array([[10, 20, 30]]), 0.5)


@pytest.mark.parametrize("rho", [1.5, -0.1])
def test_rho_is_a_fraction_between_0_and_1(rho):
    with pytest.raises(ValueError, match=f"^rho is a fraction between 0 and 1, not {rho}$"):
        biased_subset(np.array([[10, 20]] * 9 + [[20, 10]] * 9), rho, 4)


def test_biased_subset_of_one_pair():
    lengths = np.array([[10, 20], [10, 10]])
    assert biased_subset(lengths, 0.0).tolist() == biased_subset(lengths, 0.0, 1).tolist() == [0]


def test_biased_subset_defaults_to_seed_0():
    lengths = np.random.default_rng(0).integers(5, 40, (500, 2))
    subset = biased_subset(lengths, 0.5, 20)
    assert np.array_equal(subset, biased_subset(lengths, 0.5, 20, seed=0))
    assert not np.array_equal(subset, biased_subset(lengths, 0.5, 20, seed=1))


def test_d_rho_says_the_bias_that_it_has(capsys):
    """Which is that of whole pairs, 3 in 11, and not the 25% that were asked for; rho "all" leaves
    the pairs as they are, and says nothing."""
    dataset = Dataset([([0], [[1] * 2, [1]])] * 4 + [([0], [[1], [1] * 2])] * 8)
    assert len(d_rho(dataset, 0.25, None, seed=0)) == 11
    assert capsys.readouterr().out == ("D_rho: 11 of 12 training pairs, the longer response "
                                       "preferred in 27% of them\n")
    assert d_rho(dataset, "all", 5, seed=0).examples == dataset.examples[:5]
    assert d_rho(dataset, "all", None, seed=0).examples == dataset.examples
    assert capsys.readouterr().out == ""
    assert len(d_rho(dataset, "all", 13, seed=0)) == 12
    assert capsys.readouterr().out == "--n_pairs=13: there are 12 training rows, which are taken\n"


# ------------------------------------------------------------------ relabelling

def test_relabel(capsys):
    """The highest reward first, columns too; a row with a tie goes, and is said to."""
    rewards = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    rows = [([i], [[1], [2, 2]]) for i in range(3)]
    turned = [(prompt, responses[::-1]) for prompt, responses in rows]
    relabelled = relabel(Dataset(rows, rewards), np.array([[1.0, 0.0], [0.0, 0.5], [2.0, 2.0]]))
    assert_gives(relabelled.examples, [rows[0], turned[1]], what="relabelled", mistakes={
        "the lowest reward first, not the highest first": [turned[0], rows[1]],
        "the row with a tie is not dropped": [rows[0], turned[1], rows[2]]})
    assert_gives(relabelled.rewards.tolist(), [[[0], [1]], [[3], [2]]], what="rewards", mistakes={
        "they stay while the responses change places": [[[0], [1]], [[2], [3]]],
        "sorted by themselves: each belongs to a response": [[[1], [0]], [[3], [2]]]})
    assert capsys.readouterr().out == "relabelled: 1 dropped (the reward model is undecided)\n", (
        "the number of dropped rows is printed")


def test_relabel_a_ranking(capsys):
    ranking = relabel(Dataset([([0], [[1], [2], [3]])]), np.array([[0.5, -1.0, 0.7]]))
    assert ranking.examples == [([0], [[3], [1], [2]])] and ranking.rewards is None
    assert capsys.readouterr().out == ""
    for tie in ([2, 2, 1], [1, 2, 2], [2, 1, 2]):
        rows = Dataset([([0], [[1], [2], [3]])] * 2)
        left = relabel(rows, np.array([[0.5, -1.0, 0.7], tie]))
        assert len(left) == 1, f"a tie of any two responses: {tie}"


# ------------------------------------------------------------------ batch order

def plan_by_hand(lengths, batch_size, seeds, window=32, shuffle_rows=True, shuffle_batches=True,
                 sort="stable", keep_rest=False):
    """The docstring of `batches`, step by step. seeds: of the random numbers."""
    rng = np.random.default_rng(seeds)
    N = len(lengths)
    rows = rng.permutation(N).tolist() if shuffle_rows else list(range(N))
    if not keep_rest:
        rows = rows[:len(rows) - len(rows) % batch_size]
    plan = []
    for start in range(0, len(rows), window * batch_size):
        part = rows[start:start + window * batch_size]
        part = [part[i] for i in np.argsort([lengths[row] for row in part], kind=sort)]
        plan += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    numbers = np.arange(len(plan))
    if shuffle_batches:
        numbers = rng.permutation(numbers)
    return [plan[number] for number in numbers]


def test_batches_step_by_step():
    """403 rows: two windows, the second one shorter, and three rows that are left out."""
    lengths = np.random.default_rng(0).integers(1, 20, 403)

    def plan(lengths=lengths, seeds=(5, 6), **changes):
        return plan_by_hand(lengths, 10, seeds, **changes)

    got = [list(map(int, rows)) for rows in batches(lengths, 10, seed=5, epoch=6)]
    assert_gives(got, plan(), what="batches", mistakes={
        "the order of the batches is not shuffled": plan(shuffle_batches=False),
        "the rows are not shuffled first": plan(shuffle_rows=False),
        "every epoch is the same: its random numbers are default_rng([seed, epoch])": plan(seeds=5),
        "the random numbers are not those of default_rng([seed, epoch])": plan(seeds=11),
        "they are not of similar length: the sort is missing": plan(0 * lengths),
        "they are not of similar length: a window is one batch": plan(window=1),
        "one window, where there is one for each 32 batches": plan(window=1000),
        "ties lose their order, as the sort is not stable": plan(sort="quicksort"),
        "the last rows are too few for a batch, and are not left out": plan(keep_rest=True),
        "the same rows are left out in every epoch: leave out after shuffling":
            plan(lengths[:400]),
        "the longest rows of a window come first, not the shortest": plan(-lengths),
        "the batches are shuffled by other random numbers than the rows":
            got if sorted(got) == sorted(plan()) else None})


def test_batches_are_a_pure_function_and_cover_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    plan = batches(lengths, 8, seed=1, epoch=2)
    assert sorted(np.concatenate(plan)) == list(range(1000)), "an epoch has each row once"
    assert equal(plan, batches(lengths, 8, seed=1, epoch=2)), "the same arguments, another plan"
    assert not equal(plan, batches(lengths, 8, seed=1, epoch=3)), "another epoch, the same plan"
    assert not equal(plan, batches(lengths, 8, seed=2, epoch=2)), "another seed, the same plan"


def test_batches_come_in_any_order():
    """Not the short ones first: of 32 batches in one window, neighbours are as often in order of
    length as not (fewer than 5 or more than 26 of 31 would be a false alarm once in 100,000)."""
    plan = batches(np.arange(320), 10, seed=0, epoch=0)
    in_order = sum(before[0] < after[0] for before, after in zip(plan, plan[1:]))
    assert 5 <= in_order <= 26, "the order of the batches is not shuffled"


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 100, 1024)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches(lengths, 16, seed=0, epoch=0))
    assert padded < 1.1 * lengths.sum()


def test_a_window_is_32_batches_by_default():
    ragged = np.random.default_rng(0).integers(1, 100, 400)
    assert equal(batches(ragged, 10, 5, 6), batches(ragged, 10, 5, 6, window=32))


def test_what_fills_no_batch():
    """It is left out, and is not always the same rows, such as the longest; fewer rows than a batch
    are one batch."""
    assert [len(rows) for rows in batches(np.ones(10), 4, 0, 0)] == [4, 4], (
        "the last rows are too few for a batch, and are left out")
    assert [len(rows) for rows in batches(np.ones(3), 4, 0, 0)] == [3], (
        "fewer rows than a batch are one batch")
    left_out = set()
    for epoch in range(20):
        used = np.concatenate(batches(np.arange(10), 4, 0, epoch))
        left_out.add(frozenset(range(10)) - frozenset(used))
    assert len(left_out) > 1, "the same rows are left out in every epoch"


def test_batch_order_depends_on_the_step_alone():
    lengths = np.arange(20)
    order, reverse = BatchOrder(lengths, 4, seed=0), BatchOrder(lengths, 4, seed=0)
    forwards = [order.rows(step).tolist() for step in range(12)]
    backwards = [reverse.rows(step).tolist() for step in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert sorted(sum(forwards[5:10], [])) == list(range(20))       # the second epoch
    assert equal([order.rows(step) for step in range(5, 10)], batches(lengths, 4, 0, epoch=1))


# ------------------------------------------------------------------ the pairs of a batch

def test_rows_with_different_numbers_of_responses():
    """One of three responses, one of two, and a sample after each. A batch is as wide as its own
    rows are, in all columns."""
    examples = [([1], [[2], [3, 3], [4], [5, 5]]), ([1], [[6], [7, 7], [8]])]
    rewards = np.array([[1, 2, 3], [4, 5, 0]], np.float32)[:, :, None]
    ref_logps = -np.array([[1, 2, 3, 4], [5, 6, 7, 0]], np.float32)
    dataset = Dataset(examples, rewards, ref_logps, n_samples=1)
    assert dataset.response_lengths().tolist() == [[1, 2, 1, 2], [1, 2, 1, 0]]
    assert dataset.row_lengths().tolist() == [7, 5]

    batch = dataset.batch(np.array([1, 0]))
    assert batch.pairs.tolist() == [[0, 1], [0, 1], [0, 2], [1, 2]]
    assert batch.pair_row.tolist() == [0, 1, 1, 1]
    assert batch.samples.tolist() == [[2], [3]]
    assert batch.lengths.tolist() == [[1, 2, 1, 0], [1, 2, 1, 2]]
    assert batch.ref_logps.gather(1, batch.samples).tolist() == [[-7], [-4]]
    assert batch.pair_up(batch.ref_logps).tolist() == [[-5, -6], [-1, -2], [-1, -3], [-2, -3]]
    assert batch.pair_up(batch.rewards).tolist() == [[[4], [5]], [[1], [2]], [[1], [3]], [[2], [3]]]

    narrow = dataset.batch(np.array([1]))
    assert narrow.lengths.tolist() == [[1, 2, 1]] and narrow.ref_logps.tolist() == [[-5, -6, -7]]
    assert narrow.rewards.tolist() == [[[4], [5]]]


# ------------------------------------------------------------------ columns

def test_columns_stay_with_their_rows():
    """take, first, by_length and batch choose rows of all columns alike."""
    examples = [([i] * (5 - i), [[i], [i, i]]) for i in range(5)]
    rewards = np.arange(10, dtype=np.float32).reshape(5, 2, 1)
    ref_logps = -np.arange(10, dtype=np.float32).reshape(5, 2)
    dataset = Dataset(examples, rewards, ref_logps)

    taken = dataset.take(np.array([3, 1]))
    assert taken.examples == [examples[3], examples[1]]
    assert taken.rewards.tolist() == [[[6], [7]], [[2], [3]]]
    assert taken.ref_logps.tolist() == [[-6, -7], [-2, -3]]
    assert dataset.first(2).examples == examples[:2] and len(dataset.first(None)) == 5
    assert by_length(dataset).examples == examples[::-1]

    batch = dataset.batch(np.array([3, 1]))
    assert batch.tokens[:, 0].tolist() == [3, 1] and batch.samples.shape == (2, 0)
    assert batch.rewards.tolist() == taken.rewards.tolist()
    assert batch.ref_logps.tolist() == taken.ref_logps.tolist()


def test_samples_are_one_more_response():
    dataset = Dataset([([1], [[2], [3, 3]])], rewards=np.ones((1, 2, 3), np.float32))
    sampled = dataset.with_samples([[7, 8, 9]])
    assert sampled.response_lengths().tolist() == [[1, 2, 3]] and sampled.n_samples == 1
    assert sampled.row_lengths().tolist() == [7] and sampled.rewards.shape == (1, 2, 3)
    assert sampled.batch([0]).samples.tolist() == [[2]]
    assert dataset.n_samples == 0 and len(dataset.examples[0][1]) == 2      # left as it was


def test_single_responses_with_a_label():
    """Each row also gets the response of the next row, which loses its end where block_size is
    full; labels and their weights stay with their rows."""
    examples = [([1, 1, 1], [[2]]), ([1], [[3, 3]]), ([1], [[4, ~5, 6]]), ([1], [[7]])]
    dataset = Dataset(examples, desirable=np.array([True, False, False, False]))
    mismatched = dataset.with_mismatched(4)
    assert [list(map(list, responses)) for _, responses in mismatched.examples] == [
        [[2], [3]], [[3, 3], [4, ~5, 6]], [[4, ~5, 6], [7]], [[7], [2]]]
    batch = mismatched.batch(np.array([3, 0]))
    assert batch.desirable.tolist() == [False, True]
    assert batch.label_weight.tolist() == pytest.approx([4 / 3, 4])
    assert batch.pairs.shape == (0, 2) and batch.samples.tolist() == [[1], [1]]
    assert mismatched.take(np.array([1])).batch(np.array([0])).label_weight.tolist() == [1]
    with pytest.raises(InputError, match="--relabel: it orders the responses of a row"):
        relabel(dataset, np.ones((4, 1)))
    with pytest.raises(InputError, match="--rho, --bias: subsets by length are of pairs"):
        d_rho(dataset, 0.5, None, 0)


# ------------------------------------------------------------------ data sets

def small_dataset():
    """Three rows of 2 + 1, 2 + 2 and 1 + 1 response tokens; the last response is a sample."""
    examples = [([1, 2], [[3, 4], [5]]), ([1], [[2, 3], [4, 5]]), ([1, 2, 3], [[4], [5]])]
    ref_logps = np.arange(6, dtype=np.float32).reshape(3, 2)
    rewards = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    return Dataset(examples, rewards, ref_logps, n_samples=1)


def test_lengths_of_rows():
    dataset = small_dataset()
    assert dataset.response_lengths().tolist() == [[2, 1], [2, 2], [1, 1]]
    assert dataset.row_lengths().tolist() == [5, 5, 5]


def test_taking_rows_takes_their_columns():
    part = small_dataset().take(np.array([2, 0]))
    assert part.examples == [([1, 2, 3], [[4], [5]]), ([1, 2], [[3, 4], [5]])]
    assert part.rewards.ravel().tolist() == [2, 0] and part.ref_logps.tolist() == [[4, 5], [0, 1]]
    assert part.n_samples == 1 and len(small_dataset().first(2)) == 2


def test_a_batch_has_the_columns_of_its_rows(monkeypatch):
    """Its sizes are rounded up where they should be few."""
    batch = small_dataset().batch(np.array([1, 0]))
    assert batch.tokens.shape == (2, 5) and batch.target.shape == (7,)
    assert batch.samples.tolist() == [[1], [1]]
    assert batch.ref_logps.tolist() == [[2, 3], [0, 1]] and batch.rewards.ravel().tolist() == [1, 0]
    monkeypatch.setattr(device.computing, "multiple", 32)
    rounded = small_dataset().batch(np.array([1, 0]))
    assert rounded.tokens.shape == (2, 32) and rounded.target.shape == (32,)


def test_rows_by_length_keep_their_order_among_equals():
    lengths = np.random.default_rng(0).integers(1, 4, 200)
    dataset = Dataset([([i], [[0] * n]) for i, n in enumerate(lengths)])
    numbers = [prompt[0] for prompt, _ in by_length(dataset).examples]
    assert numbers == sorted(range(200), key=lambda i: (lengths[i], i))


def test_a_sample_is_one_more_response():
    plain = Dataset(small_dataset().examples, small_dataset().rewards)
    dataset = plain.with_samples([[7], [8, 9], [6]])
    assert [ids[-1].tolist() for _, ids in dataset.examples] == [[7], [8, 9], [6]]
    assert dataset.examples[0][1][-1].dtype == np.int32 and dataset.n_samples == 1
    assert dataset.rewards is plain.rewards and dataset.ref_logps is None


def test_relabelling_may_leave_nothing():
    with pytest.raises(InputError, match="^--relabel: no row is left$"):
        relabel(Dataset([([0], [[1], [2]])]), np.zeros((1, 2)))


def test_rankings_have_no_length_bias():
    message = ("^--rho, --bias: subsets by length are of pairs; with one response a row, or more "
               "than two, use --rho=all$")
    with pytest.raises(InputError, match=message):
        biased_subset(np.ones((4, 3)), 0.5)
