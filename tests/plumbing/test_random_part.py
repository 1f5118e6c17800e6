"""A limit takes a random part of a file, not its first rows, and every method the same one."""
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import reward
import train_policy
import train_rm
from data import d_rho, demonstrations, preferences
from runs import show
from support.tokens import held_out_prompts, random_order
from tinytldr import tokenizer

N = 3000


@pytest.fixture(scope="module")
def sorted_file(tmp_path_factory, hub_cache):
    """Pairs sorted by kind: the first half of the rows is of kind "a", the second of kind "b"."""
    path = tmp_path_factory.mktemp("sorted") / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(N):
            kind = "ab"[i >= N // 2]
            row = {"prompt": f"{kind} {i}:", "chosen": " sad broke", "rejected": " afraid"}
            file.write(json.dumps(row) + "\n")
    return str(path)


def kinds(examples):
    """How many prompts of each kind."""
    return Counter(tokenizer().decode(list(prompt))[0] for prompt, _ in examples)


def read(path, split, block_size=64):
    policy = SimpleNamespace(config=SimpleNamespace(block_size=block_size))
    return preferences(path, split, tokenizer(), policy, None)


def is_mixed(counts, n):
    """Of n rows, half of each kind, within 5 standard deviations of a draw."""
    assert sum(counts.values()) == n
    return abs(counts["a"] - n / 2) < 5 * (n / 4) ** 0.5


def test_the_order_depends_on_the_number_alone():
    order = random_order(1000)
    assert sorted(order) == list(range(1000)) and (order == random_order(1000)).all()
    assert (order != np.arange(1000)).mean() > 0.9


def test_the_first_rows_of_a_sorted_file_are_mixed(sorted_file):
    """--n_eval; --n_pairs where --rho is all, and where it is not; demonstrations."""
    for split, n in (("validation", 100), ("train", 400)):
        dataset = read(sorted_file, split)
        assert is_mixed(kinds(dataset.first(n).examples), n)
        assert is_mixed(kinds(d_rho(dataset, "all", n, seed=0).examples), n)
        demos = demonstrations(sorted_file, split, tokenizer(), 64)
        assert is_mixed(kinds(demos.first(n).examples), n)
    assert is_mixed(kinds(d_rho(read(sorted_file, "train"), 1.0, 400, seed=0).examples), 400)


def test_rows_that_are_dropped_change_no_order(sorted_file):
    """With another block_size other prompts are cut, and the rows are the same."""
    wide, narrow = read(sorted_file, "train"), read(sorted_file, "train", block_size=8)
    assert [prompt[-1] for prompt, _ in wide.examples] == [prompt[-1] for prompt, _ in
                                                           narrow.examples]
    for (whole, _), (end, _) in zip(wide.examples, narrow.examples):
        assert whole[-len(end):].tolist() == end.tolist()


def prompts_to_answer(path, **changed):
    args = SimpleNamespace(**{"data": path, "split": "test", "n_prompts": 80} | changed)
    texts, prompts, _ = held_out_prompts(args, tokenizer(), None)
    assert texts == [tokenizer().decode(prompt) for prompt in prompts]
    return texts


def test_the_held_out_prompts_of_a_sorted_file_are_mixed(sorted_file):
    """Whether they are read as demonstrations or, for --rms, as pairs, and for any --seed."""
    texts = prompts_to_answer(sorted_file)
    assert is_mixed(Counter(text[0] for text in texts), 80)
    assert texts == prompts_to_answer(sorted_file, rms="out/rms", seed=7)
    assert texts[:9] == prompts_to_answer(sorted_file, n_prompts=9)


def test_a_prompt_with_many_rows_is_not_taken_before_others(tmp_path, hub_cache):
    """Of 200 prompts with fifty rows each and 200 with one, about half are taken."""
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(400):
            for n in range(50 if i < 200 else 1):
                kind = "ab"[i >= 200]
                row = {"prompt": f"{kind} {i}:", "chosen": f" {n}", "rejected": f" -{n}"}
                file.write(json.dumps(row) + "\n")
    texts = prompts_to_answer(str(tmp_path / "pairs.jsonl"), n_prompts=20)
    assert is_mixed(Counter(text[0] for text in texts), 20)


def test_what_is_shown_of_a_sorted_file_is_mixed(sorted_file, capsys):
    show.main([f"--data={sorted_file}", "--tokenizer=tinytldr"])
    shown = [line for line in capsys.readouterr().out.splitlines() if ":\033" in line]
    assert len(shown) == 4 and len({line.removeprefix("\033[0m")[0] for line in shown}) == 2


def test_all_methods_see_the_same_rows(world, sorted_file, tmp_path, monkeypatch):
    """Two losses and a reward model, whatever the seed: the rows that validation watches are the
    same, and so are the pairs that are trained on with --rho=all. Both are mixed."""
    watched, trained = [], []
    take = reward.training_pairs

    def training_pairs(*values):
        train, validation = take(*values)
        trained.append([prompt.tolist() for prompt, _ in train.examples])
        return train, validation

    def noted(script):
        measure = script.evaluate

        def evaluate(model, dataset, *values):
            prompts = [prompt.tolist() for prompt, _ in dataset.examples]
            if len(prompts) == 50:      # 40 training rows are watched as well
                watched.append(sorted(prompts))
            return measure(model, dataset, *values)

        monkeypatch.setattr(script, "evaluate", evaluate)
        monkeypatch.setattr(script, "training_pairs", training_pairs)

    for script in (train_policy, train_rm):
        noted(script)
    shared = [f"--init_from={world}/sft", f"--data={sorted_file}", "--n_pairs=40", "--n_eval=50",
              "--max_steps=1", "--batch_size=8", "--eval_every=100", "--device=cpu"]
    train_policy.main([*shared, "--loss=dpo", f"--out_dir={tmp_path}/dpo"])
    train_policy.main([*shared, "--loss=ipo", "--seed=5", f"--out_dir={tmp_path}/ipo"])
    train_rm.main([*shared, "--seed=6", f"--out_dir={tmp_path}/rm"])
    assert len(watched) == 2 * 3 and all(rows == watched[0] for rows in watched)
    assert len(trained) == 3 and all(rows == trained[0] for rows in trained)
    for rows, n in ((watched[0], 50), (trained[0], 40)):
        assert is_mixed(kinds((prompt, None) for prompt in rows), n)
