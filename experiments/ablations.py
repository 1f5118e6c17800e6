"""Measures which parts of the method matter: changes one thing at a time, on the built-in task.

    python experiments/ablations.py                             # all: hours on 2 cores; resumable
    python experiments/ablations.py --tables=members,gamma --rhos=0.2 --seeds=0
    python experiments/ablations.py --draw --results=results/ablations  # the tables of our runs

Betas are those of --chosen. Variations of e-DPO have e-DPO's beta. Every policy keeps its best
checkpoint on validation prompts (--select=oracle) and is scored on test prompts. With more pairs
there are more steps, so that the number of epochs stays the same. A row of runs.csv is a policy.
"""
import argparse
import json
import os
import shutil
import sys
from concurrent.futures import as_completed
from statistics import mean, stdev
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import train_policy
import train_rm
from data import Dataset, get_tokenizer
from experiments import figure2, trials
from losses import GAMMA, LOSSES, log_ratio_margin, p_dpo, reward_margin
from model import GPT
from reward import family_scores, load_reward_models, training_pairs
from support.columns import key, score
from support.device import setup
from support.flags import (
    InputError,
    Parser,
    comma_separated,
    fraction_or_all,
    naming,
    positive_int,
    run_script,
    seed,
)
from support.run import family_folders, read_json, run_flags
from train_rm import train_one

FAMILIES = {1: "0.5", 2: "0.2,0.8", 3: "0.2,0.5,0.8", 5: "0.2,0.4,0.5,0.6,0.8",
            8: "0.2,0.3,0.4,0.45,0.5,0.6,0.7,0.8"}      # 2 is a part of 3, 3 of 5, 5 of 8
COLUMNS = ["table", "setting", "rho", "seed", "loss", "validation", "test", "test_95", "length",
           "kl_pi_ref", "kl_ref_pi", "train_kl", "validation_kl", "rm_accuracy", "margin",
           "smallest_margin", "picked", "seconds", "commit", "reference"]


def e_dpo_worst(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Distils the member of the family that fits worst, e-DPO's opposite. Returns (B,)."""
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    targets = reward_margin(rewards)                                            # (B, M)
    return (targets - beta * h[:, None]).square().max(dim=1).values + gamma * kl


def e_dpo_per_batch(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Distils one member for the whole batch, the one that fits best on average. This is closer to
    the objective as the paper writes it, with the minimum outside the expectation. Returns (B,)."""
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    losses = (reward_margin(rewards) - beta * h[:, None]).square()              # (B, M)
    return losses[:, losses.mean(dim=0).argmin()] + gamma * kl


OWN_LOSSES = {"worst": e_dpo_worst, "per-batch": e_dpo_per_batch, "redrawn": p_dpo}


class Cell(NamedTuple):
    """Is one rho and one seed: the folder of its runs, the flags of its data, each loss's beta."""
    folder: str
    data: list
    betas: dict

    def reward_models(self, name, *flags):
        """Trains a reward model or a family on this cell's pairs. Returns its folder."""
        trials.train("train_rm", f"{self.folder}/{name}", *self.data, *flags)
        return f"{self.folder}/{name}"

    def reward_model(self, steps):
        return self.reward_models(f"rm-{steps}", f"--max_steps={steps}")

    def family(self, size=5):
        folder = self.reward_models("rms", f"--bias={FAMILIES[8]}")
        return ",".join(f"{folder}/{bias}" for bias in FAMILIES[size].split(","))


# ------ the tables: each yields (setting, loss, flags). Flags for other data are among them

def members(cell):
    for size in FAMILIES:
        yield size, "e-dpo", [f"--rewards={cell.family(size)}"]


def minimum(cell):
    family = f"--rewards={cell.family()}"
    yield "per example", "e-dpo", [family]
    yield "per batch", "per-batch", [family]
    yield "mean", "dp-dpo", [family, f"--beta={cell.betas['e-dpo']}"]
    yield "maximum", "worst", [family]


def family(cell):
    yield "by length bias", "e-dpo", [f"--rewards={cell.family()}"]
    yield "by seed", "e-dpo", [f"--rewards={seeds_family(cell)}"]


def gamma(cell):
    for value in ("0", "0.001", "0.01", "0.1"):
        yield value, "e-dpo", [f"--rewards={cell.family()}", f"--gamma={value}"]
    yield "0.0001,0.01", "e-dpo", [f"--rewards={cell.family()}"]        # the default


def pairs(cell, sizes=(500, 1000, 2000)):
    for n in sizes:
        if n == 1000:           # the default: what other tables have trained
            yield n, "dpo", []
            yield n, "e-dpo", [f"--rewards={cell.family()}"]
            continue
        data = [f"--n_pairs={n}", f"--pool={5 * n}"]
        rms = cell.reward_models(f"rms-{n}", *data, f"--max_steps={n // 5}",
                                 f"--bias={FAMILIES[5]}")
        steps = f"--max_steps={round(0.32 * n)}"
        yield n, "dpo", [*data, steps]
        yield n, "e-dpo", [*data, steps, f"--rewards={rms}"]


def many_pairs(cell):
    """Yields the largest number of pairs, which takes as long as half of all other tables."""
    yield from pairs(cell, sizes=(8000,))


def balance(cell):
    """Yields what tells a family from its balanced member, and a reward model from balanced pairs.
    It needs a rho of 0.2 or 0.8: then a balanced subset of 1,000 pairs has 400."""
    rms = cell.reward_models("rms-1000", f"--bias={FAMILIES[5]}")
    yield "all pairs", "dpo", []
    yield "balanced pairs", "dpo", ["--rho=0.5", "--n_pairs=400"]
    yield "balanced member", "dp-dpo", [f"--rewards={rms}/0.5"]
    yield "family's mean", "dp-dpo", [f"--rewards={rms}"]
    yield "family's minimum", "e-dpo", [f"--rewards={rms}"]


def noise(cell):
    yield 0, "dpo", []
    yield 0, "d-dpo", [f"--rewards={cell.reward_model(200)}"]
    yield 0, "e-dpo", [f"--rewards={cell.family()}"]
    for temperature in (1, 3):
        data = [f"--label_temperature={temperature}"]
        rm = cell.reward_models(f"rm-noise-{temperature}", *data)
        rms = cell.reward_models(f"rms-noise-{temperature}", *data, f"--bias={FAMILIES[5]}")
        yield temperature, "dpo", data
        yield temperature, "d-dpo", [*data, f"--rewards={rm}"]
        yield temperature, "e-dpo", [*data, f"--rewards={rms}"]


def quality(cell):
    for steps in (25, 50, 100, 200, 400):
        yield f"{steps} steps", "d-dpo", [f"--rewards={cell.reward_model(steps)}"]


def kl_samples(cell):
    for n in (1, 4):
        yield n, "p-dpo", ["--gamma=0.1", f"KL_SAMPLES={n}"]
    yield "redrawn", "redrawn", ["--gamma=0.1", "KL_SAMPLES=6"]


TABLES = {"members": members, "minimum": minimum, "family": family, "gamma": gamma,
          "noise": noise, "quality": quality, "pairs": pairs, "kl_samples": kl_samples,
          "many_pairs": many_pairs, "balance": balance}


def seeds_family(cell):
    """Trains five reward models on all pairs of the cell. They differ only in the order of their
    batches. Returns their folder."""
    folder = f"{cell.folder}/rms-seeds"
    for number in range(5):
        member = f"{folder}/{number}"
        if not os.path.exists(f"{member}/model.safetensors"):
            shutil.rmtree(member, ignore_errors=True)       # of a study that was interrupted
            args = train_rm.parse_flags([*cell.data, f"--out_dir={member}"])
            with trials.silence():
                train_member(args, args.seed + 100 + number)
    return folder


def train_member(args, order_seed):
    """Trains a reward model as train_rm.py does. order_seed: of the order of its batches."""
    device = setup(args)
    policy = GPT.from_pretrained(args.init_from).to(device)
    tokenizer = get_tokenizer(args.tokenizer)
    train, validation = training_pairs(args, tokenizer, policy, device)
    args.seed = order_seed
    train_one(args, policy, tokenizer, train, validation.first(args.n_eval), device)


class Redrawn(Dataset):
    """Holds training rows with one sample per epoch. A batch has only the sample of its epoch."""
    n_shown = 0         # number of rows so far

    def batch(self, rows):
        epoch = self.n_shown // len(self) % self.n_samples
        self.n_shown += len(rows)
        columns = self.ref_logps.shape[1]                   # K + S
        shown = [*range(columns - self.n_samples), columns - self.n_samples + epoch]
        part = self.take(rows)
        part.examples = [(prompt, [responses[k] for k in shown])
                         for prompt, responses in part.examples]
        part.ref_logps, part.n_samples = part.ref_logps[:, shown], 1
        return part.batch(np.arange(len(rows)))


def with_redrawn_samples(dataset, split, *arguments):
    """Takes the place of train_policy.with_columns, for the loss "redrawn"."""
    dataset = WITH_COLUMNS(dataset, split, *arguments)
    return Redrawn(**vars(dataset)) if split == "train" else dataset


WITH_COLUMNS = train_policy.with_columns


# ------ one run, and what is measured of it

def run(cell, loss, flags):
    """Trains one policy. flags: of train_policy.py; KL_SAMPLES=4 sets the number of that name.
    Returns its folder and its seconds. If two tables have the same run, it has one folder."""
    folder = f"{cell.folder}/policies/{key(loss, flags)}"
    like = {"worst": "e-dpo", "per-batch": "e-dpo", "redrawn": "p-dpo"}
    beta = cell.betas[like.get(loss, loss)]
    LOSSES.update(OWN_LOSSES)                                           # for this run alone
    if loss == "redrawn":
        train_policy.with_columns = with_redrawn_samples
    for flag in flags:
        if flag.startswith("KL_SAMPLES="):
            train_policy.KL_SAMPLES = int(flag.partition("=")[2])
    flags = [flag for flag in flags if flag.startswith("--")]
    seconds = trials.train("train_policy", folder, f"--loss={loss}", "--select=oracle", *cell.data,
                           f"--beta={beta}", *flags)
    for name in OWN_LOSSES:
        del LOSSES[name]
    train_policy.with_columns, train_policy.KL_SAMPLES = WITH_COLUMNS, 1
    return folder, seconds


def measured(folder, test):
    """Returns what the CSV says about one policy. test: its numbers on test prompts."""
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        last = [line for line in map(json.loads, file) if "train/margin" in line][-1]
    row = {"validation": figure2.selected_advantage(folder), "test": test["advantage"],
           "test_95": test["advantage_95"], "length": test["length"],
           "kl_pi_ref": test["kl_pi_ref"], "kl_ref_pi": test["kl_ref_pi"],
           "train_kl": last.get("train/forward_kl", ""),
           "validation_kl": last.get("validation/forward_kl", "")}
    with trials.silence():
        return row | of_reward_models(folder)


def of_reward_models(folder):
    """Measures the reward models that a policy was distilled from, on its training pairs: the mean
    |margin| of a member, the mean of the smallest |margin| of all members (with which e-DPO
    starts), and for each member the share of pairs that it fits best in the end."""
    flags = run_flags(folder)
    if not flags["rewards"]:
        return {}
    args = argparse.Namespace(**flags)
    device = setup(args)
    ref, policy = (GPT.from_pretrained(path).to(device) for path in (args.init_from, folder))
    tokenizer = get_tokenizer(args.tokenizer)
    train, _ = training_pairs(args, tokenizer, ref, device)
    models = load_reward_models(args.rewards, "--rewards", ref, tokenizer, device)
    rewards = family_scores(models, train, args.out_dir, "train")                   # (N, 2, M)
    margins = rewards[:, 0] - rewards[:, 1]                                         # (N, M)
    change = score(policy, train) - score(ref, train)                               # (N, 2)
    implicit = args.beta * (change[:, 0] - change[:, 1])                            # (N,)
    picked = np.abs(margins - implicit[:, None]).argmin(axis=1)
    shares = np.bincount(picked, minlength=margins.shape[1]) / len(picked)
    accuracies = []
    for member in family_folders(args.rewards):
        with open(f"{member}/metrics.jsonl", encoding="utf-8") as file:
            accuracies.append([line["validation/accuracy"] for line in map(json.loads, file)
                               if "validation/accuracy" in line][-1])
    return {"rm_accuracy": float(np.mean(accuracies)), "margin": float(np.abs(margins).mean()),
            "smallest_margin": float(np.abs(margins).min(axis=1).mean()),
            "picked": " ".join(f"{share:.2f}" for share in shares)}


def fill(args, table, rho, number, chosen):
    """Trains and measures all policies of one table in one cell. Returns their rows."""
    cell = Cell(f"{args.out_dir}/{rho}/{number}", figure2.data_flags(args, rho, number), chosen)
    runs = [(setting, loss, *run(cell, loss, flags))
            for setting, loss, flags in TABLES[table](cell)]
    folders = [folder for _, _, folder, _ in runs]
    numbers = trials.scores(folders, args.sft, "test", f"--n_prompts={args.n_prompts}")
    shared = {"table": table, "rho": rho, "seed": number, "commit": figure2.commit(),
              "reference": figure2.reference(args.sft)}
    return [{**shared, "setting": setting, "loss": loss, "seconds": seconds,
             **measured(folder, numbers[folder])} for setting, loss, folder, seconds in runs]


def summary(rows):
    """Returns Markdown: each table with its means and 95% intervals over seeds."""
    lines = []
    for table in TABLES:
        of_table = sorted([row for row in rows if row["table"] == table],
                          key=lambda row: row["rho"])
        if not of_table:
            continue
        lines += ["", f"**{table}**", "", "| setting | loss | rho | seeds | advantage | "
                  "KL(pi ‖ ref) | length | reward models' accuracy | mean margin, smallest | "
                  "KL, training and validation |", "|---" * 10 + "|"]
        groups = {}
        for row in of_table:
            groups.setdefault((row["setting"], row["loss"], row["rho"]), []).append(row)
        for setting, group in groups.items():
            cells = [figure2.with_interval([float(row["test"]) for row in group])]
            for columns in (("kl_pi_ref",), ("length",), ("rm_accuracy",),
                            ("margin", "smallest_margin"), ("train_kl", "validation_kl")):
                cells.append(", ".join(f"{np.mean([float(row[name]) for row in group]):.2f}"
                                       for name in columns if group[0][name]))
            lines.append(f"| {' | '.join(setting)} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


# What a row is compared with: this setting and loss of its table; where there is none, DPO's row of
# the same setting.
USUAL = {"members": ("5", "e-dpo"), "minimum": ("per example", "e-dpo"),
         "family": ("by length bias", "e-dpo"), "gamma": ("0.0001,0.01", "e-dpo"),
         "quality": ("200 steps", "d-dpo"), "kl_samples": ("1", "p-dpo"),
         "balance": ("balanced member", "dp-dpo")}


def differences(rows):
    """Returns Markdown: mean advantages, and in brackets their difference to the usual row, paired
    over rhos and seeds. A difference is "seen" if it is so many standard errors from 0 that chance
    alone gets there once in twenty times."""
    advantages = {}
    for row in rows:
        of_setting = advantages.setdefault((row["table"], row["setting"], row["loss"]), {})
        of_setting[row["rho"], row["seed"]] = float(row["test"])
    rhos = sorted({row["rho"] for row in rows})
    lines = ["| table | setting | loss | " + " | ".join(f"rho {rho}" for rho in rhos)
             + " | minus the usual | standard errors | |", "|---" * (6 + len(rhos)) + "|"]
    for (table, setting, loss), reached in advantages.items():
        usual = USUAL.get(table, (setting, "dpo"))
        base = advantages.get((table, *usual), {}) if (setting, loss) != usual else {}
        gained = {cell: reached[cell] - base[cell] for cell in reached if cell in base}
        cells = [table, setting, loss]
        for rho in rhos:
            earned = [value for cell, value in reached.items() if cell[0] == rho]
            more = [value for cell, value in gained.items() if cell[0] == rho]
            cells.append((f"{mean(earned):+.2f}" if earned else "")
                         + (f" ({mean(more):+.2f})" if more else ""))
        cells += compared(list(gained.values())) if len(gained) > 1 else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(gained):
    """Returns three cells: the mean, its distance from 0 in standard errors, and "seen"."""
    error = stdev(gained) / len(gained) ** 0.5
    seen = error and abs(mean(gained)) > figure2.t_quantile(len(gained)) * error
    return [f"{mean(gained):+.2f}", f"{mean(gained) / error:+.1f}" if error else "",
            "seen" if seen else ""]


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sft", default="out/sft", help="the reference: the speedrun's")
    add("--tables", type=comma_separated(str, "names"), default=list(TABLES),
        help=f"of {', '.join(TABLES)}")
    add("--rhos", type=comma_separated(fraction_or_all, "fractions, or all"), default=[0.2, 0.5])
    add("--seeds", type=comma_separated(seed, "seeds"), default=[0, 1, 2])
    add("--draw", action="store_true", help="print the tables, and train nothing")
    add("--out_dir", default="out/ablations", help="for the runs")
    add("--results", default="out/ablations", help="for runs.csv")
    add("--chosen", default="results/figure2/chosen.json", help="betas, from figure2.py --choose")
    add("--n_prompts", type=positive_int, default=1000, help="in each evaluation")
    add("--flags", default="", help="more flags for all training runs")
    add("--workers", type=positive_int, default=2, help="cells at a time, one thread each")
    args = parser.parse_args(argv)
    if not set(args.tables) <= set(TABLES):
        parser.error(f"--tables: of {', '.join(TABLES)}")
    path = f"{args.results}/runs.csv"
    if not args.draw:
        trials.check_models(sft=args.sft)
        with naming("--chosen"):
            chosen = read_json(args.chosen)["chosen"]
        os.makedirs(args.results, exist_ok=True)
        rows = figure2.read_rows(path)
        figure2.check_reference(rows, args.sft, path)
        figure2.check_settings(args, chosen)
        done = {(row["table"], row["rho"], row["seed"]) for row in rows}
        with trials.workers(args.workers) as pool:
            for table in args.tables:       # one after the other: a cell's tables share its runs
                jobs = [pool.submit(fill, args, table, rho, number, chosen)
                        for number in args.seeds for rho in args.rhos
                        if (table, str(rho), str(number)) not in done]
                for job in as_completed(jobs):
                    rows = job.result()
                    figure2.append(path, rows, COLUMNS)
                    print(f"{table}, rho {rows[0]['rho']}, seed {rows[0]['seed']}: "
                          + "  ".join(f"{row['setting']} {row['loss']} {row['test']:+.2f}"
                                      for row in rows), flush=True)
    rows = figure2.read_rows(path)
    if not rows:
        raise InputError(f"--results: there are no runs in {path}")
    print(f"{summary(rows)}\n\n{differences(rows)}")


if __name__ == "__main__":
    run_script(main)
