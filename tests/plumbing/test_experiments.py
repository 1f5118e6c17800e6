"""The drivers of experiments in runs/: their arithmetic, and one small cell from end to end."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tinytldr
from data import biased_subset, longer
from experiments import ablations, degeneracy, figure2, real_text
from experiments import world as world_script
from losses import e_dpo
from support.flags import InputError

ROOT = str(Path(__file__).parents[2])


# ------ the world

def test_demonstrations_are_in_the_paper_s_regime():
    """What the criteria say of labels and lengths holds of demonstrations too, which the reference
    imitates: 2,500 posts, two persons each; no chance, the same posts every time."""
    encoding = tinytldr.tokenizer()
    rewards, lengths = [], []
    for i in range(2500):
        summaries = [tinytldr.demonstration(0, "train", i, person) for person in (0, 1)]
        rewards.append([tinytldr.oracle_reward(tinytldr.post(0, "train", i), text)
                        for text in summaries])
        lengths.append([len(encoding.encode_ordinary(text)) + 1 for text in summaries])
    rewards, lengths = np.array(rewards), np.array(lengths)
    assert np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1] >= 0.25
    first_longer, first_better = longer(lengths), np.sign(rewards[:, 0] - rewards[:, 1])
    decided = (first_longer != 0) & (first_better != 0)
    assert 0.58 <= (first_longer == first_better)[decided].mean() <= 0.64


def test_balanced_accuracy():
    """A judge that sees length only is right where the longer one is preferred, and nowhere else;
    pairs of equal length don't count, a tie counts half."""
    lengths = np.array([[20, 10], [20, 10], [20, 10], [10, 20], [10, 10]])
    assert world_script.balanced_accuracy(lengths[:, 0] - lengths[:, 1], lengths) == 0.5
    assert world_script.balanced_accuracy(np.array([1, 1, 1, 1, -1]), lengths) == 1
    assert world_script.balanced_accuracy(np.array([1, 1, -1, 0, -1]), lengths) == (2 / 3 + .5) / 2


MEASURED = {"longer preferred": 0.6, "correlation": 0.3, "length, best of 16": 12,
            "length, mean": 10, "reward model": 0.9, "reference at 0.7": 0.5,
            "reference at 0.5": 1.0, "reference at 0.3": 0.8,
            **{f"dpo natural, beta {beta}": 4 - beta for beta in world_script.BETAS},
            **{f"dpo biased, beta {beta}": 2 + 0.1 * beta for beta in world_script.BETAS},
            **{f"dpo natural, beta {beta}, judge": 0.8 for beta in world_script.BETAS}}


def test_criteria():
    """DPO's gain is that of its best beta, on each kind of pairs."""
    values = {name: value for name, value, *_ in world_script.criteria(MEASURED)}
    first, last = world_script.BETAS[0], world_script.BETAS[-1]
    assert values["share of DPO's gain that is lost on D_0.2"] == 1 - (2 + 0.1 * last) / (4 - first)
    assert values["share of DPO's gain that a lower temperature gives too"] == 1.0 / (4 - first)
    assert values["reward model, from length only (0) to the oracle (1)"] == pytest.approx(0.8)
    assert all(holds for *_, holds in world_script.criteria(MEASURED))


@pytest.mark.parametrize("name, value", [
    ("longer preferred", 0.57), ("longer preferred", 0.65), ("correlation", 0.24),
    ("length, best of 16", 9), ("reference at 0.5", 3), ("reward model", 0.87),
    (f"dpo natural, beta {world_script.BETAS[0]}, judge", 0.95),
    (f"dpo biased, beta {world_script.BETAS[0]}", 3.5)])
def test_each_criterion_can_fail(name, value):
    assert not all(holds for *_, holds in world_script.criteria({**MEASURED, name: value}))


# ------ figure 2

def test_p_values():
    """Student's t with 4 degrees of freedom: tables say 2.776 for 5%; and Holm's correction."""
    assert figure2.t_quantile(5) == pytest.approx(2.776, abs=2e-3)
    assert figure2.t_quantile(2) == pytest.approx(12.706, abs=2e-2)
    assert figure2.t_p_value([1, 2, 3, 4, 5]) == pytest.approx(0.01324, abs=1e-4)
    assert figure2.t_p_value([-1, -2, -3, -4, -5]) == figure2.t_p_value([1, 2, 3, 4, 5])
    assert math.isnan(figure2.t_p_value([1]))
    assert figure2.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06})
    assert figure2.holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    for order in ("abc", "bac", "acb"):     # a difference without any spread was "p 0"
        p_values = {"a": 0.01, "b": math.nan, "c": 0.03}
        corrected = figure2.holm({name: p_values[name] for name in order})
        assert corrected == pytest.approx({"a": 0.03, "b": math.nan, "c": 0.06}, nan_ok=True)


def test_cells_of_other_flags_are_not_averaged_with_new_ones(tmp_path):
    """The same flags go on; others are refused, for a cell of a quick try would be skipped."""
    args = SimpleNamespace(results=str(tmp_path), flags="--max_steps=20", n_prompts=8)
    chosen = {"dpo": 0.3}
    for _ in range(2):
        figure2.check_settings(args, chosen)
    for changes, values, message in (({"flags": ""}, chosen, "--flags='--max_steps=20', not ''; "),
                                     ({"n_prompts": 9}, chosen, "--n_prompts=8, not 9; "),
                                     ({}, {"dpo": 1}, "--chosen={'dpo': 0.3}, not {'dpo': 1}; ")):
        with pytest.raises(InputError, match=f"^--results: the runs in .* are from {message}"):
            figure2.check_settings(SimpleNamespace(**{**vars(args), **changes}), values)


def test_frontier():
    """No point is kept that another one beats from nearer."""
    points = [(2, 5), (1, 3), (3, 4), (1.5, 2), (4, 6)]
    assert figure2.frontier(points) == [(1, 3), (2, 5), (4, 6)]


SMALL = "--n_pairs=40 --pool=300 --n_eval=16 --batch_size=8"
CONTROLS = ["reference at 0.7", "reference at 0.5", "reference at 0.3", "best of 16"]


def test_a_small_cell(world, tmp_path, monkeypatch):
    """Six methods and the controls on a few pairs, at what --choose chose: what the table needs is
    in the CSV; run again it is skipped, and from an empty folder it gives the same numbers."""
    methods = {name: figure2.METHODS[name]
               for name in ("d-dpo", "dp-dpo", "e-dpo", figure2.MEAN, figure2.BALANCED,
                            figure2.ORACLE)}
    methods[figure2.BALANCED] = ("dp-dpo", "rms/0.4")
    monkeypatch.setattr(figure2, "METHODS", methods)
    monkeypatch.setattr(figure2, "KNOB", dict.fromkeys(("d-dpo", "dp-dpo", "e-dpo"), "beta"))
    monkeypatch.setattr(figure2, "VALUES", (0.3,))
    monkeypatch.setattr(figure2, "FAMILY", "0.4,0.6")
    monkeypatch.setattr(figure2.trials, "workers", lambda n: SerialPool())
    flags = ["--sft", f"{world}/sft", "--rhos=0.2", "--seeds=0", "--n_prompts=8", "--workers=1",
             f"--flags=--max_steps=2 {SMALL}"]
    figure2.main([*flags, "--choose", f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/first"])
    shutil.move(tmp_path / "first/chosen.json", tmp_path)
    rows = []
    for name in ("first", "second"):
        for _ in range(2):
            figure2.main([*flags, f"--out_dir={tmp_path}/{name}_runs",
                          f"--results={tmp_path}/{name}", f"--chosen={tmp_path}/chosen.json"])
        there = figure2.read_rows(f"{tmp_path}/{name}/runs.csv")
        rows.append(sorted(there, key=lambda row: row["method"]))
    assert [row["method"] for row in rows[0]] == sorted([*methods, *CONTROLS])
    assert len({row["kl_ref_pi"] for row in rows[0] if row["method"] in methods}) == len(methods)
    for first, second in zip(*rows):
        assert list(first) == figure2.COLUMNS
        assert first["value"] == ("" if first["method"] in CONTROLS else "0.3")
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert (tmp_path / "first/figure2.png").exists()
    with pytest.raises(InputError, match="another reference"):
        figure2.main([*flags, f"--results={ROOT}/results/figure2"])


# ------ ablations, and the long run

@pytest.mark.parametrize("script", [figure2, ablations, degeneracy, real_text])
def test_nothing_to_draw(script, tmp_path):
    with pytest.raises(InputError, match="there are no runs"):
        script.main(["--draw", f"--results={tmp_path}"])


def test_a_small_ablation(world, tmp_path, monkeypatch, capsys):
    """Families of several sizes, and what takes the minimum's place, in few steps: a row for each,
    with what its reward models are like; a run that two tables share is the same run."""
    monkeypatch.setattr(ablations, "FAMILIES", {1: "0.5", 5: "0.4,0.6", 8: "0.4,0.5,0.6"})
    monkeypatch.setattr(ablations.trials, "workers", lambda n: SerialPool())
    (tmp_path / "chosen.json").write_text(json.dumps({"chosen": dict.fromkeys(figure2.KNOB, 0.3)}))
    ablations.main(["--sft", f"{world}/sft", "--rhos=0.2", "--seeds=0", "--n_prompts=8",
                    f"--flags=--max_steps=2 {SMALL}", "--tables=members,minimum",
                    f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/results",
                    f"--chosen={tmp_path}/chosen.json"])
    rows = figure2.read_rows(f"{tmp_path}/results/runs.csv")
    assert [(row["table"], row["setting"], row["loss"]) for row in rows] == [
        ("members", "1", "e-dpo"), ("members", "5", "e-dpo"), ("members", "8", "e-dpo"),
        ("minimum", "per example", "e-dpo"), ("minimum", "per batch", "per-batch"),
        ("minimum", "mean", "dp-dpo"), ("minimum", "maximum", "worst")]
    assert {**rows[1], "table": "", "setting": ""} == {**rows[3], "table": "", "setting": ""}
    for row in rows:
        shares = [float(share) for share in row["picked"].split()]
        assert len(shares) == {"1": 1, "8": 3}.get(row["setting"], 2)
        assert sum(shares) == pytest.approx(1, abs=0.02)
        assert 0 < float(row["smallest_margin"]) <= float(row["margin"])
    assert "| per batch | per-batch | 0.2 | 1 |" in capsys.readouterr().out
    figure2.append(f"{tmp_path}/results/runs.csv", [{"reference": "another"}], ablations.COLUMNS)
    with pytest.raises(InputError, match="another reference"):
        ablations.main(["--sft", f"{world}/sft", f"--results={tmp_path}/results",
                        f"--chosen={tmp_path}/chosen.json"])


def test_what_takes_the_minimum_s_place():
    """By hand, two pairs and two reward models: h is 1 and 2, and beta * h misses the rewards'
    margins by 1 and 5, and by 3 and 0. The first model fits the batch better on average."""
    logps, ref_logps = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2)
    rewards = torch.tensor([[[3.0, 7.0], [0.0, 0.0]], [[1.0, 4.0], [0.0, 0.0]]])    # (2, 2, 2)
    kl = torch.tensor([10.0, 20.0])
    worst, per_batch = [ablations.OWN_LOSSES[name](logps, ref_logps, rewards, kl, 2.0, 0.1)
                        for name in ("worst", "per-batch")]
    assert worst.tolist() == [26, 11] and per_batch.tolist() == [2, 11]
    assert (signature(ablations.e_dpo_worst) == signature(ablations.e_dpo_per_batch)
            == signature(e_dpo))


@pytest.mark.parametrize("rho", [0.2, 0.8])
def test_balanced_pairs_are_as_many_as_a_balanced_subset_has(rho):
    """Of the 1,000 pairs of a cell, so that reward model and policy learn from as many: 400, or 401
    where half of that rounds down."""
    long_won, short_won = [20, 10], [10, 20]
    lengths = round(1000 * rho) * [long_won] + round(1000 * (1 - rho)) * [short_won]
    assert len(biased_subset(np.array(lengths), 0.5)) in (400, 401)

    class Fake:
        def reward_models(self, name, *flags):
            return name
    flags = {setting: flags for setting, _, flags in ablations.balance(Fake())}
    assert flags["balanced pairs"] == ["--rho=0.5", "--n_pairs=400"]
    assert flags["balanced member"] == ["--rewards=rms-1000/0.5"]
    assert flags["family's mean"] == flags["family's minimum"] == ["--rewards=rms-1000"]


def test_differences_that_are_seen():
    """By hand: +1, +1.1 and +1.2 are 19 standard errors from 0, the critical value of three is 4.3;
    +1, -1 and 0 are none. A cell without its usual row does not count."""
    def row(table, setting, loss, seed, test):
        return {"table": table, "setting": setting, "loss": loss, "rho": "0.2", "seed": seed,
                "test": test}
    rows = [row("members", "5", "e-dpo", seed, 2.0) for seed in "012"]
    rows += [row("members", "1", "e-dpo", seed, test) for seed, test in zip("012", (3, 3.1, 3.2))]
    rows += [row("members", "1", "e-dpo", "3", 100)]
    rows += [row("noise", "1", "dpo", seed, 2.0) for seed in "012"]
    rows += [row("noise", "1", "e-dpo", seed, test) for seed, test in zip("012", (3, 1, 2))]
    assert ablations.differences(rows).splitlines()[2:] == [
        "| members | 5 | e-dpo | +2.00 |  |  |  |",
        "| members | 1 | e-dpo | +27.32 (+1.10) | +1.10 | +19.1 | seen |",
        "| noise | 1 | dpo | +2.00 |  |  |  |",
        "| noise | 1 | e-dpo | +2.00 (+0.00) | +0.00 | +0.0 |  |"]


def test_samples_that_are_redrawn():
    """Three rows with two responses and a sample for each of two epochs; then the first again."""
    examples = [([1], [[2], [3], [10 + i], [20 + i]]) for i in range(3)]
    ref_logps = np.arange(12, dtype=np.float32).reshape(3, 4)
    dataset = ablations.Redrawn(examples, None, ref_logps, 2)
    for sample, column in ((10, 2), (20, 3), (10, 2)):
        for rows in ([2, 0], [1]):
            batch = dataset.batch(np.array(rows))
            assert batch.samples.tolist() == [[2]] * len(rows)
            assert batch.tokens[:, 3].tolist() == [sample + i for i in rows]
            assert batch.ref_logps.tolist() == ref_logps[rows][:, [0, 1, column]].tolist()


def test_a_long_run_s_table():
    """By hand: two seeds, three evaluations; the last row has the mean over seeds of what the end
    of each run is and of its best, with Student's interval, 12.7 standard errors for two."""
    def rows(seed, rewards):
        return [{"loss": "dpo", "seed": seed, "step": str(step), "reward": str(reward),
                 **dict.fromkeys(set(degeneracy.CURVES) - {"reward"}, str(step))}
                for step, reward in zip((0, 5, 10), rewards)]
    curves = degeneracy.by_loss(rows("0", (1, 3, 2)) + rows("1", (2, 3, 1)))
    assert degeneracy.table(curves).splitlines()[-1] == (
        "| dpo | 10 | +10.0 | +10.0 | 10.0 | 10.00 | 10.00 | +0.00 ± 12.71 | +1.50 ± 6.35 |")


def test_a_short_long_run(world, tmp_path, monkeypatch):
    """Figure 1's driver: a row for each evaluation of each loss, from the reference on."""
    monkeypatch.setattr(degeneracy.trials, "workers", lambda n: SerialPool())
    monkeypatch.setattr(degeneracy, "LOSSES", ("dpo", "d-dpo"))

    def reward_models(folder, data):
        shutil.copytree(f"{world}/rm", f"{folder}/rm")
    monkeypatch.setattr(degeneracy.figure2, "reward_models", reward_models)
    degeneracy.main([f"--sft={world}/sft", "--seeds=3,4", "--steps=20", f"--flags={SMALL}",
                     f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/results"])
    rows = figure2.read_rows(f"{tmp_path}/results/curves.csv")
    assert [(row["loss"], row["seed"]) for row in rows[::21]] == [
        ("dpo", "3"), ("d-dpo", "3"), ("dpo", "4"), ("d-dpo", "4")]
    assert [int(row["step"]) for row in rows] == 4 * list(range(21))
    assert all(float(row["margin"]) == 0 for row in rows if row["step"] == "0")
    assert (tmp_path / "results/degeneracy.png").exists()


# ------ real text

@pytest.mark.parametrize("text, summary, f1", [
    ("The cat sat on the mat.", "the cat sat on the mat", 1),
    ("a b c d", "b x d", 4 / 7),                    # b d: 2 of 4 words and 2 of 3
    ("a b", "b a", 1 / 2), ("a b", "c d", 0), ("", "a b", 0), ("", "", 0),
    ("I'm 24", "i m 24 now", 6 / 7)])
def test_rouge_l(text, summary, f1):
    """By hand: the longest common subsequence counts, not the longest run, nor mere words."""
    assert real_text.rouge_l(text, summary) == pytest.approx(f1)


def test_agreement():
    """By hand: right in two of four pairs and half right in a tie; the longer one in two, and half
    in one of equal lengths."""
    margins, differences = np.array([2.0, -1.0, 0.0, 1.0]), np.array([5, -3, 2, 0])
    values = real_text.agreement(margins, differences)
    assert values["pairs"] == 4 and values["accuracy"] == values["longer"] == 2.5 / 4
    assert values["length_correlation"] == pytest.approx(np.corrcoef(margins, differences)[0, 1])
    assert real_text.agreement(np.zeros(4), differences)["length_correlation"] == 0


def test_jobs_that_fail(tmp_path, monkeypatch, capsys):
    """One that has no memory is tried again, once, in an empty folder; after another failure the
    jobs go on that do not need it; what was done before is not done again."""
    monkeypatch.setattr(real_text.trials, "workers", lambda n: SerialPool())
    monkeypatch.setattr(real_text, "finished", lambda args, name, *numbers: None)
    (tmp_path / "full").mkdir()
    tries = []

    def job(args, name, error=None, times=9):
        tries.append(name)
        if error and tries.count(name) <= times:
            assert (tmp_path / "full").exists() == (tries.count("full") < 2)
            raise error

    full = torch.OutOfMemoryError("CUDA out of memory")
    jobs = {"before": (job, ("before",), []),
            "full": (job, ("full", full, 1), ["before"]),
            "never": (job, ("never", full), []),
            "bug": (job, ("bug", KeyError("a")), []),
            "after bug": (job, ("after bug",), ["bug", "before"]),
            "after full": (job, ("after full",), ["full"])}
    args = SimpleNamespace(jobs=2, minutes=None, out_dir=str(tmp_path))
    failed, missing = real_text.run_jobs(args, jobs, {"before"}, time.time())
    assert sorted(failed) == ["bug", "never"] and missing == ["after bug"]
    assert sorted(tries) == ["after full", "bug", "full", "full", "never", "never"]
    assert "full: to be tried again: CUDA out of memory" in capsys.readouterr().out
    args.minutes = 1e-9
    assert real_text.run_jobs(args, jobs, set(), time.time() - 1) == ([], list(jobs))


def test_real_text_on_made_up_posts(tmp_path, monkeypatch, hub_cache, capsys):
    """All of it in small: which posts go where, a row for each run, again and nothing is done
    again, tables and figure from what is in the files."""
    monkeypatch.setattr(real_text.trials, "workers", lambda n: SerialPool())
    monkeypatch.setattr(real_text.figure2, "FAMILY", "0.4,0.6")
    monkeypatch.setattr(real_text, "SHARDS", 1)
    monkeypatch.setattr(real_text, "SMOKE", {**real_text.SMOKE, "lrs": [1e-3], "values": [0.5],
                                             "samples": 4, "steps": 2, "checkpoints": 1})
    flags = ["--smoke", "--rhos=0.4", "--seeds=0", "--methods=e-dpo,balanced",
             f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/results"]
    real_text.main(flags)
    posts = json.loads((tmp_path / "runs/posts.json").read_text())
    sft = [json.loads(line) for line in (tmp_path / "runs/sft.jsonl").read_text().splitlines()]
    dealt = [post for part in posts.values() for post, _ in part] + [row["prompt"] for row in sft]
    assert len(set(dealt)) == len(dealt) and {name: len(part) for name, part in posts.items()} == {
        "pool": 40, "validation": 8, "test": 8}
    pairs = [json.loads(line) for line in
             (tmp_path / "runs/0.4/0/pairs.jsonl").read_text().splitlines()]
    trained_on = {row["prompt"] for row in pairs} - {post for post, _ in posts["validation"]}
    assert trained_on <= {post for post, _ in posts["pool"]}

    rows = figure2.read_rows(f"{tmp_path}/results/runs.csv")
    assert sorted(row["run"] for row in rows if row["purpose"] == "run") == [
        "0.4/0/balanced", "0.4/0/e-dpo"]
    assert {row["run"] for row in rows if row["purpose"] == "collapse"} == {"collapse/0/e-dpo"}
    chosen = json.loads((tmp_path / "results/chosen.json").read_text())
    for row in rows:
        assert list(row) == real_text.COLUMNS
        if row["purpose"] == "run":
            assert float(row["lr"]) == chosen["lr"]
            assert float(row["value"]) == chosen["value"][row["loss"]]
    judges = figure2.read_rows(f"{tmp_path}/results/judges.csv")
    assert [row["model"] for row in judges] == ["oracle", "second", "rm", "rms/0.4", "rms/0.6"]
    assert judges[0]["oracle_accuracy"] == "1"          # of pairs that it has labelled itself
    assert "made up" not in (tmp_path / "results/samples.md").read_text()

    before = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.csv")
              if path.name != "stages.csv"}
    monkeypatch.setattr(real_text, "policy_run", None)
    real_text.main(flags)
    assert before == {path: path.read_bytes() for path in before}
    assert "e-dpo minus balanced" in capsys.readouterr().out
    assert (tmp_path / "results/real_text.png").exists()
    with pytest.raises(InputError, match="--results: .* was begun with --lora=None, not 4"):
        real_text.main([*flags, "--lora=4"])


class SerialPool:
    """A process pool without processes."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


DRIVER = """
import signal
import sys
import time

sys.path.insert(0, {root!r})
from experiments import trials
from support.flags import run_script

def job(number, seconds):
    \"""A run whose steps take some seconds, and which saves its state on a signal.\"""
    signals = []

    def on_signal(*arguments):
        signals.append(arguments)
        signal.signal(signal.SIGTERM, before)       # a second one acts as always

    before = signal.signal(signal.SIGTERM, on_signal)
    open(f"{{sys.argv[1]}}/{{number}} begun", "w").close()
    while not signals:
        time.sleep(seconds)
    open(f"{{sys.argv[1]}}/{{number}} saved", "w").close()
    sys.exit(143)

def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)    # off where a shell runs it with &
    with trials.workers(2) as pool:
        for future in [pool.submit(job, number, 0.1 + 1.5 * number) for number in range(6)]:
            future.result()

if __name__ == "__main__":
    run_script(main)
"""


def test_what_ends_a_driver_ends_its_jobs(tmp_path):
    """Two of six jobs have begun, one of them in a long step: both save their state, whatever it
    is that ends the driver, and none of the others begins."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(root=ROOT), encoding="utf-8")
    drivers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):      # all at once: it takes time
        folder = tmp_path / number.name
        folder.mkdir()
        drivers[number] = subprocess.Popen([sys.executable, script, folder],
                                           stderr=subprocess.PIPE, start_new_session=True)
    try:
        for number, driver in drivers.items():
            folder = tmp_path / number.name
            while len(os.listdir(folder)) < 2:
                assert driver.poll() is None
                time.sleep(0.05)
            driver.send_signal(number)
            _, said = driver.communicate(timeout=60)        # its workers hold that pipe open
            assert driver.returncode == (-number if number == signal.SIGKILL else 128 + number)
            assert said.decode().splitlines() == (
                ["driver.py: interrupted"] if number == signal.SIGINT else [])
            assert sorted(os.listdir(folder)) == ["0 begun", "0 saved", "1 begun", "1 saved"]
    finally:
        for driver in drivers.values():
            driver.kill()       # and with it its workers


def test_warnings_of_silent_runs_are_printed(tmp_path, capsys, monkeypatch):
    """Each once, with the folder of its run, where all of the output is; also if the run fails."""
    monkeypatch.setattr(figure2.trials, "warned", set())
    for _ in range(2):
        with figure2.trials.silence(f"{tmp_path}"):
            print("step 1\nrows.jsonl: warning: odd")
    with pytest.raises(InputError), figure2.trials.silence():
        print("warning: odder")
        raise InputError("no")
    assert capsys.readouterr().out == f"{tmp_path}: rows.jsonl: warning: odd\nwarning: odder\n"
    assert (tmp_path / "output.txt").read_text() == "step 1\nrows.jsonl: warning: odd\n" * 2


def test_what_is_kept_is_what_was_asked_for(world, tmp_path):
    """A finished run and its numbers are used again; with other flags, or from other weights, they
    are refused."""
    shutil.copytree(world / "sft", tmp_path / "sft")
    flags = [f"--init_from={tmp_path}/sft", "--loss=dpo", "--max_steps=2", *SMALL.split()]
    prompts, folder = "--n_prompts=8", f"{tmp_path}/run"
    seconds = figure2.trials.train("train_policy", folder, *flags)
    assert "step 0: policy == reference" in open(f"{folder}/output.txt").read()
    numbers = figure2.trials.score(folder, f"{tmp_path}/sft", "test", prompts)
    assert figure2.trials.train("train_policy", folder, *flags) == seconds
    assert figure2.trials.score(folder, f"{tmp_path}/sft", "test", prompts) == numbers
    with pytest.raises(InputError, match="--out_dir: .*run is from other flags"):
        figure2.trials.train("train_policy", folder, *flags, "--beta=3")
    with pytest.raises(InputError, match="--out_dir: .*run is from other flags"):
        figure2.trials.score(folder, f"{tmp_path}/sft", "test", "--n_prompts=9")
    shutil.copy(f"{folder}/model.safetensors", tmp_path / "sft")
    for again in (lambda: figure2.trials.train("train_policy", folder, *flags),
                  lambda: figure2.trials.score(folder, f"{tmp_path}/sft", "test", prompts)):
        with pytest.raises(InputError, match="or another reference"):
            again()
