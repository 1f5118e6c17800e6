"""The scripts, end to end on runs of a few steps: determinism, resuming, files, the report, and bad
input. (The numbers of a training step are in tests/test_training.py.)"""
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import data
import evaluate
import sample
import tinytldr
import train_policy
import train_rm
from losses import LOSSES, PREFERENCE_LOSSES, log_ratio_margin, needs
from model import GPT
from reward import RewardModel
from runs import score
from sample import prompts_to_answer, stream_reply
from support import run, tokens
from support.columns import sample as sample_replies
from support.columns import with_end
from support.flags import InputError, run_script, talk_flags
from support.report import accuracy_table, policy_table, training_curve, verdict
from support.rows import load_rows
from support.tokenizer import to_text
from support.tokens import prompt_tokens
from train_policy import learning_rate

ROOT = Path(__file__).parents[2]
REWARDED = [name for name in PREFERENCE_LOSSES if "rewards" in needs(name)]


def policy_flags(world, out_dir, loss="p-dpo", **flags):
    flags = {"max_steps": 6, "eval_every": 3, "batch_size": 8, "n_pairs": 60, "pool": 500,
             "n_eval": 16, **flags}
    if loss in REWARDED:
        flags.setdefault("rewards", f"{world}/rms" if loss == "e-dpo" else f"{world}/rm")
    return [f"--loss={loss}", f"--init_from={world}/sft", f"--out_dir={out_dir}",
            *(f"--{flag}={value}" for flag, value in flags.items())]


def reward_flags(world, out_dir, **flags):
    flags = {"max_steps": 6, "eval_every": 3, "batch_size": 8, "n_pairs": 60, "pool": 500,
             "n_eval": 16, **flags}
    return [f"--init_from={world}/sft", f"--out_dir={out_dir}",
            *(f"--{flag}={value}" for flag, value in flags.items())]


def read(path):
    return Path(path).read_text(encoding="utf-8")


def read_jsonl(path):
    return [json.loads(line) for line in read(path).splitlines()]


def metrics(folder):
    return read_jsonl(Path(folder) / "metrics.jsonl")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def strict_json(path):
    """JSON as everybody reads it: without NaN and Infinity."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(read(path), parse_constant=refuse)


# ------------------------------------------------------------------ training

@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_trains(world, tmp_path, loss, capsys):
    train_policy.main(policy_flags(world, tmp_path, loss, lr=2e-3))
    assert "step 0: policy == reference" in capsys.readouterr().out
    lines = metrics(tmp_path)
    first, last = lines[0], lines[-1]
    assert first["step"] == 0 and abs(first["train/chosen_change"]) < 1e-4
    assert last["step"] == 6 and abs(last["train/chosen_change"]) > 1e-3
    assert ("train/forward_kl" in first) == ("kl" in needs(loss))
    config = json.loads(read(tmp_path / "config.json"))
    assert config["nanopref"]["loss"] == loss and config["model_type"] == "gpt2"
    GPT.from_pretrained(str(tmp_path))


def test_a_loss_that_somebody_adds(world, tmp_path, monkeypatch, capsys):
    """A function is enough: the loss has its flag and its check at step 0, and it trains."""
    def hinge(logps, ref_logps, delta=1.0):
        return (delta - log_ratio_margin(logps, ref_logps)).clamp(min=0)

    monkeypatch.setitem(LOSSES, "hinge", hinge)
    train_policy.main(policy_flags(world, tmp_path / "run", "hinge", delta=2.5, lr=2e-3))
    assert "hinge loss 2.5000\n" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[0]["validation/loss"] == pytest.approx(2.5, abs=1e-3)
    assert abs(metrics(tmp_path / "run")[-1]["train/chosen_change"]) > 1e-3
    with pytest.raises(InputError, match="--delta: it would be ignored: .* by --loss=hinge"):
        train_policy.main(policy_flags(world, tmp_path / "other", "dpo", delta=2.5))


def test_same_seed_same_bytes(world, tmp_path):
    for name in ("first", "second"):
        train_policy.main(policy_flags(world, tmp_path / name))
    train_policy.main(policy_flags(world, tmp_path / "third", seed=1))
    first, second, third = [(tmp_path / name / "metrics.jsonl").read_bytes()
                            for name in ("first", "second", "third")]
    assert first == second != third


def test_evaluating_more_often_changes_nothing(world, tmp_path):
    for name, steps in (("often", 1), ("seldom", 6)):
        train_policy.main(policy_flags(world, tmp_path / name, eval_every=steps))
    often = [line for line in metrics(tmp_path / "often") if line["step"] in (0, 6)]
    assert often[-1] == metrics(tmp_path / "seldom")[-1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("often", "seldom")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("loss", ["sft", "p-dpo"])
def test_gradient_does_not_depend_on_micro_batches(world, demonstrations, tmp_path, loss):
    flags = policy_flags(world, tmp_path, loss, max_steps=2)
    if loss == "sft":
        flags = ["--loss=sft", f"--init_from={world}/sft", "--max_steps=2", "--batch_size=8",
                 "--n_eval=16", f"--data={demonstrations}"]
    for size in (8, 3):
        train_policy.main([*flags, f"--out_dir={tmp_path}/{size}", f"--micro_batch_size={size}"])
    for whole, parts in zip(metrics(tmp_path / "8"), metrics(tmp_path / "3"), strict=True):
        for line in (whole, parts):
            for name in list(line):     # at first a margin is zero but for rounding, whose sign
                if name.endswith("accuracy"):                               # decides accuracy
                    del line[name]
        assert whole == pytest.approx(parts, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """A file of 100 of TinyTLDR's demonstrations."""
    rows = [{"prompt": tinytldr.post(0, "train", i),
             "completion": tinytldr.demonstration(0, "train", i)} for i in range(100)]
    return write_jsonl(tmp_path_factory.mktemp("demonstrations") / "demonstrations.jsonl", rows)


# ------------------------------------------------------------------ the run folder

class Interrupted(Exception):
    pass


def interrupt(monkeypatch, script, call):
    """Makes a script stop in its training step number `call`, counted from 0."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise Interrupted
        return learning_rate(*args)

    monkeypatch.setattr(script, "learning_rate", interrupted)


@pytest.mark.parametrize("script, flags", [(train_policy, policy_flags), (train_rm, reward_flags)])
def test_resumed_run_equals_the_uninterrupted_one(world, tmp_path, monkeypatch, script, flags):
    """Killed in step 5, after the state was saved before step 3; the log, the weights and the
    reference are as if it had not been."""
    script.main(flags(world, tmp_path / "whole"))

    with monkeypatch.context() as patch:
        interrupt(patch, script, 5)
        with pytest.raises(Interrupted):
            script.main(flags(world, tmp_path / "parts"))
    assert not (tmp_path / "parts/model.safetensors").exists()
    state = torch.load(tmp_path / "parts/state.pt", weights_only=True)
    assert state["step"] == 3
    script.main(flags(world, tmp_path / "parts") + ["--resume"])
    for name in ("metrics.jsonl", "model.safetensors"):
        whole, parts = [(tmp_path / run / name).read_bytes() for run in ("whole", "parts")]
        assert whole == parts

    with pytest.raises(InputError, match="--resume: --lr was .* has to stay the same"):
        script.main(flags(world, tmp_path / "parts") + ["--resume", "--lr=0.5"])
    with pytest.raises(InputError, match="no state.pt"):
        script.main(flags(world, tmp_path / "nothing") + ["--resume"])
    assert not (tmp_path / "nothing").exists()


def test_what_was_logged_after_the_saved_state_is_logged_once(world, tmp_path, monkeypatch):
    """Also a line that the interruption cut in two."""
    train_policy.main(policy_flags(world, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, train_policy, 5)
        with pytest.raises(Interrupted):
            train_policy.main(policy_flags(world, tmp_path / "parts"))
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.5}\n{"step": 5, "lo')
    train_policy.main(policy_flags(world, tmp_path / "parts") + ["--resume"])
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_damaged_state_is_said(world, tmp_path):
    train_policy.main(policy_flags(world, tmp_path))
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="--resume: .*state.pt is damaged"):
        train_policy.main(policy_flags(world, tmp_path) + ["--resume"])


def test_interrupted_family_goes_on(world, tmp_path, monkeypatch):
    """Killed in the second of three members: the first is kept, the second resumed, the third
    begun."""
    def flags(folder, bias="0.2,0.4,0.6"):
        return reward_flags(world, folder, max_steps=8, eval_every=2, bias=bias)

    train_rm.main(flags(tmp_path / "whole"))        # 8 steps, then 4 on half of the pairs, then 3
    with monkeypatch.context() as patch:
        interrupt(patch, train_rm, 8 + 3)
        with pytest.raises(Interrupted):
            train_rm.main(flags(tmp_path / "parts"))
    assert sorted(os.listdir(tmp_path / "parts")) == ["0.2", "0.4"]
    train_rm.main(flags(tmp_path / "parts") + ["--resume"])
    for bias in ("0.2", "0.4", "0.6"):
        for name in ("metrics.jsonl", "model.safetensors"):
            whole, parts = [(tmp_path / run / bias / name).read_bytes()
                            for run in ("whole", "parts")]
            assert whole == parts
    with pytest.raises(InputError, match="would join this family"):
        train_rm.main(flags(tmp_path / "parts", bias="0.5,0.7"))


def test_resuming_needs_the_same_reference(world, tmp_path):
    shutil.copytree(f"{world}/sft", tmp_path / "sft")
    flags = policy_flags(tmp_path, tmp_path / "run")
    train_policy.main(flags)
    other = GPT.from_pretrained(str(tmp_path / "sft"))
    other.transformer.ln_f.bias.data += 0.1
    other.save_pretrained(tmp_path / "sft")
    with pytest.raises(InputError, match="the reference, the data or the rewards have changed"):
        train_policy.main(flags + ["--resume"])


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_of_a_run_have_the_same_access_rights(world, tmp_path, umask):
    """Those of any new file, also where a library makes it private."""
    before = os.umask(umask)
    try:
        train_policy.main(policy_flags(world, tmp_path / "run", "dpo", max_steps=1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes.keys() >= {"model.safetensors", "config.json", "metrics.jsonl", "state.pt",
                            "tokenizer.json"}
    assert set(modes.values()) == {0o666 & ~umask}


def test_a_diverged_run_is_not_saved(world, tmp_path):
    with pytest.raises(InputError, match="--lr: training diverged: at step 1 "):
        train_policy.main(policy_flags(world, tmp_path / "run", lr=1e12))
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_run_does_not_overwrite_its_reference(world):
    with pytest.raises(InputError, match="--out_dir: .* is also --init_from"):
        train_policy.main(policy_flags(world, f"{world}/sft"))
    GPT.from_pretrained(f"{world}/sft")


def test_a_folder_that_cannot_be_made(world, tmp_path):
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="--out_dir: .* is not a folder"):
            train_policy.main(policy_flags(world, out_dir))


# ------------------------------------------------------------------ what is logged and printed

def test_progress_without_a_terminal(world, tmp_path, monkeypatch, capsys):
    """Every ten steps, if half a minute has passed, a line with the loss and the time left."""
    clock = iter(range(0, 100_000, 31))
    monkeypatch.setattr(run, "time", SimpleNamespace(time=clock.__next__))
    train_policy.main(policy_flags(world, tmp_path, "dpo", max_steps=20, eval_every=100, lr=1e-3))
    line, = re.findall(r"^   10 .*", capsys.readouterr().out, flags=re.M)
    loss, = [m["loss"] for m in metrics(tmp_path) if m["step"] == 9]
    assert re.fullmatch(rf"   10    {loss:.4f} +\d+ s", line), line


def test_no_line_of_progress_in_between(world, tmp_path, monkeypatch, capsys):
    """If less than half a minute has passed since the last line."""
    monkeypatch.setattr(run, "time", SimpleNamespace(time=iter(range(1000)).__next__))
    train_policy.main(policy_flags(world, tmp_path, "dpo", max_steps=20, eval_every=100))
    assert re.findall(r"^ {3,4}(\d+) ", capsys.readouterr().out, flags=re.M) == ["0", "20"]


REPLY = re.compile(r"^ {6}([12])  +([+-]\S+)?  (.*)$", flags=re.M)


def test_a_policy_s_replies_are_shown_as_it_learns(world, tmp_path, monkeypatch, capsys):
    """With each evaluation, to the first two validation posts, which are shown before: sampled as
    ever by a generator of their own, with the oracle's points."""
    monkeypatch.setenv("COLUMNS", "1000")
    train_policy.main(policy_flags(world, tmp_path, "dpo", seed=3, lr=2e-3))
    printed = capsys.readouterr().out
    prompts = re.findall(r"^prompt \d:  (.*)$", printed, flags=re.M)
    posts = [tinytldr.post(3, "validation", i) for i in range(100)]
    assert len(prompts) == 2
    prompts = [next(post for post in posts if " ".join(post.split()) == prompt)
               for prompt in prompts]
    shown = REPLY.findall(printed)
    assert [number for number, _, _ in shown] == ["1", "2"] * 3        # steps 0, 3 and 6

    tokenizer = tinytldr.tokenizer()
    for folder, replies in ((world / "sft", shown[:2]), (tmp_path, shown[-2:])):
        samples = sample_replies(GPT.from_pretrained(str(folder)),
                                 list(map(tokenizer.encode_ordinary, prompts)), 64,
                                 tokenizer.eot_token, [3, 6])
        for prompt, reply, (_, points, text) in zip(prompts, samples, replies):
            summary = to_text(reply, tokenizer)
            end = "" if reply[-1] == tokenizer.eot_token else " ..."
            assert (run.in_words(summary + end) or "(empty)") == text
            assert int(points) == tinytldr.oracle_reward(prompt, summary)
    assert shown[:2] != shown[-2:]


@pytest.mark.parametrize("flag", ["rewards", "select", None])
def test_replies_to_other_prompts_have_the_mean_reward_of_the_models(world, tmp_path, monkeypatch,
                                                                     capsys, flag):
    """Those that are trained on, or that judge the checkpoints; without any there is no number."""
    monkeypatch.setenv("COLUMNS", "1000")
    words = ["my boss", "broke", "sad", "loud music", "move out?", "tell others?", "my cat"]
    rows = [{"prompt": f"{words[i % 7]}: {i}", "chosen": words[i % 5], "rejected": words[-i % 7]}
            for i in range(120) if words[i % 5] != words[-i % 7]]
    data_file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = [] if flag is None else [f"--{flag}={world}/rms"]
    train_policy.main([f"--loss={'d-dpo' if flag == 'rewards' else 'dpo'}", f"--data={data_file}",
                       f"--init_from={world}/sft", f"--out_dir={tmp_path}/run", "--max_steps=1",
                       "--batch_size=8", *flags])
    printed = capsys.readouterr().out
    rewards = [reward for _, reward, _ in REPLY.findall(printed)]
    assert len(rewards) == 4
    if flag is None:
        assert rewards == [""] * 4
        return
    tokenizer = tinytldr.tokenizer()
    prompts = re.findall(r"^prompt \d:  (.*)$", printed, flags=re.M)
    prompts = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    samples = sample_replies(GPT.from_pretrained(f"{world}/sft"), prompts, 64, tokenizer.eot_token,
                             [0, 6])
    examples = [(prompt, [with_end(prompt, reply, [tokenizer.eot_token], 192)[1]])
                for prompt, reply in zip(prompts, samples)]
    for number, example in enumerate(examples):
        scores = [RewardModel.from_pretrained(f"{world}/rms/{bias}")(data.collate([example]))
                  for bias in (0.2, 0.6)]
        mean = sum(scores).item() / 2
        assert float(rewards[number]) == pytest.approx(mean, rel=0.01, abs=1e-4)


def test_what_is_watched_changes_nothing(world, tmp_path, monkeypatch):
    """A run that is evaluated three times as often, or that shows no replies, ends in the same
    weights, and logs the same of its steps."""
    runs = {"seldom": 6, "often": 2, "silent": 6}
    for name, every in runs.items():
        if name == "silent":
            monkeypatch.setattr(train_policy, "show_samples", lambda *_: None)
        train_policy.main(policy_flags(world, tmp_path / name, "dpo", eval_every=every, lr=2e-3,
                                       max_steps=12))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1] == weights[2]
    logged = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in runs]
    assert logged[0] == logged[2]
    of_evaluations = [[line for line in metrics(tmp_path / name) if "validation/loss" in line]
                      for name in runs]
    assert of_evaluations[0] == of_evaluations[1][::3]


def test_metrics_are_in_the_glossary_and_have_no_times(world, tmp_path):
    """Every name in metrics.jsonl is explained; neither times nor the learning rate (a function of
    the step) are logged, so that the bytes repeat."""
    train_policy.main(policy_flags(world, tmp_path, "e-dpo"))
    train_rm.main(reward_flags(world, tmp_path / "rm"))
    lines = metrics(tmp_path) + metrics(tmp_path / "rm")
    names = {name.split("/")[-1] for line in lines for name in line}
    _, _, glossary = read(ROOT / "docs/glossary.md").partition("`metrics.jsonl`")
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"\*\*(.*?)\*\*", glossary))))
    assert names <= explained
    assert not [name for name in names if re.search("lr|learning|time|second|_s$", name)]


# ------------------------------------------------------------------ the report

@pytest.mark.parametrize("select, kept", [("last", 3), ("loss", 2), ("oracle", 1), ("out/rm", 1)])
def test_the_report_is_of_the_checkpoint_that_was_kept(tmp_path, select, kept):
    """The earliest of the best, and never the reference."""
    numbers = [(0.1, 9, -1), (0.5, 3, -2), (0.2, 2, -3), (0.3, 3, -4)]     # loss, reward, change
    lines = [{"step": step, "validation/loss": loss, "validation/reward": reward,
              "train/chosen_change": change, "train/rejected_change": change - 1}
             for step, (loss, reward, change) in enumerate(numbers)]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "config.json").write_text(json.dumps({"nanopref": {"select": select}}))
    assert training_curve(tmp_path) == ([0, 1, 2, 3], [-1, -2, -3, -4], [-2, -3, -4, -5], kept)


@pytest.fixture(scope="module")
def policies(world, tmp_path_factory):
    """Runs to compare: a policy that is the reference, and one that has moved."""
    root = tmp_path_factory.mktemp("policies")
    GPT.from_pretrained(f"{world}/sft").save_pretrained(root / "unmoved")
    train_policy.main(policy_flags(world, root / "e-dpo", "e-dpo", lr=1e-2))
    return root


def compare(world, policies, out_dir, *flags):
    evaluate.main([f"--ref={world}/sft", f"{policies}/unmoved", f"{policies}/e-dpo",
                   f"--out_dir={out_dir}", "--n_prompts=20", "--show=2", *flags])
    return strict_json(Path(out_dir) / "results.json")


def test_report(world, policies, tmp_path):
    """Every number that the report promises is there, for a policy that is the reference (its
    values are certain) and for one that is not."""
    results = compare(world, policies, tmp_path, f"--rms={world}/rm,{world}/rms")
    unmoved, moved = results["policies"]["unmoved"], results["policies"]["e-dpo"]
    assert unmoved["advantage"] == 0 and unmoved["win_rate"] == 0.5
    assert unmoved["kl_pi_ref"] == 0 and unmoved["kl_ref_pi"] == 0
    assert moved["kl_pi_ref"] != 0 and moved["advantage_95"] > 0
    assert "chosen_change" in moved and "chosen_change" not in unmoved
    assert list(results["reward_models"]) == [f"{world}/rm", f"{world}/rms/0.2", f"{world}/rms/0.6"]
    for numbers in results["reward_models"].values():
        assert numbers.keys() >= {"accuracy", "longer_chosen", "shorter_chosen"}
    report = read(tmp_path / "report.md")
    for heading in ("## Policies", "## Reward models", "## Samples", "**Prompt 2**", "## Glossary"):
        assert heading in report
    for figure in ("advantage.png", "logprob_change.png", "reward_margins.png"):
        assert f"({figure})" in report and (tmp_path / figure).stat().st_size > 1000


def test_a_report_keeps_no_figure_of_an_older_report(world, policies, tmp_path):
    compare(world, policies, tmp_path, f"--rms={world}/rm")
    assert (tmp_path / "reward_margins.png").exists()
    evaluate.main([f"--ref={world}/sft", f"{policies}/unmoved", f"--out_dir={tmp_path}",
                   "--n_prompts=20"])
    report = read(tmp_path / "report.md")
    for figure in ("reward_margins.png", "logprob_change.png"):     # nor is there a curve to draw
        assert not (tmp_path / figure).exists() and figure not in report
    assert (tmp_path / "advantage.png").exists() and "(advantage.png)" in report


def test_policies_are_compared_prompt_by_prompt(world, policies, tmp_path, monkeypatch):
    """"advantage" and "behind_best" are means of paired differences of rewards, with 1.96 standard
    errors of these differences."""
    seen = {}

    def spy(args, texts, results, replies, rewards, judged):
        seen.update(rewards=rewards, replies=replies, texts=texts)
        return write_report(args, texts, results, replies, rewards, judged)

    write_report = evaluate.write_report
    monkeypatch.setattr(evaluate, "write_report", spy)
    results = compare(world, policies, tmp_path)
    rewards = seen["rewards"]
    for name in ("reference", "unmoved", "e-dpo"):
        wanted = [tinytldr.oracle_reward(text, reply)
                  for text, reply in zip(seen["texts"], seen["replies"][name])]
        np.testing.assert_allclose(rewards[name], wanted)

    def interval(differences):
        n = len(differences)
        mean = sum(differences) / n
        variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
        return pytest.approx([mean, 1.96 * (variance / n) ** 0.5], rel=1e-6, abs=1e-9)

    best = max(rewards, key=lambda name: rewards[name].mean())
    numbers = {"reference": results["reference"], **results["policies"]}
    for name, values in numbers.items():
        assert values["behind_best"] == interval(rewards[best] - rewards[name])
        if name != "reference":
            assert [values["advantage"], values["advantage_95"]] == interval(
                rewards[name] - rewards["reference"])
    assert numbers[best]["behind_best"] == [0, 0]


def test_a_small_difference_on_every_prompt_is_a_difference():
    """Two policies whose intervals overlap are told apart if their difference, prompt by prompt, is
    clear; and are not if it is not."""
    rng = np.random.default_rng(0)
    luck = rng.normal(size=200)                     # of the prompt, the same for everybody
    rewards = {"best": 2 + luck, "close": 2 + luck - 0.1 + 0.01 * rng.normal(size=200),
               "level": 2 + luck - 0.01 + rng.normal(size=200)}
    policies = {}
    for name, values in rewards.items():
        advantage, half_width = evaluate.interval(values)
        policies[name] = {"reward": values.mean(), "advantage": advantage,
                          "advantage_95": half_width,
                          "behind_best": evaluate.interval(rewards["best"] - values)}
    best, close = policies["best"], policies["close"]
    assert close["advantage"] + close["advantage_95"] > best["advantage"] - best["advantage_95"]
    assert "best (mean reward" in verdict(policies)
    assert "can't be told from level." in verdict(policies) and "**" not in verdict(policies)
    del policies["level"]
    assert "Highest mean reward: **best**" in verdict(policies)


def test_verdict_when_the_reference_is_best():
    """It says so, where that is certain, and compares with the reference, not with the best of the
    policies."""
    numbers = {"reference": (0.0, (0.0, 0.0)), "a": (-0.5, (0.5, 0.6)), "b": (-0.51, (0.51, 0.1))}
    results = {name: {"reward": reward, "behind_best": behind}
               for name, (reward, behind) in numbers.items()}
    assert "No clear winner: " in verdict(results)
    assert "reference (mean reward +0.000) can't be told from a." in verdict(results)
    del results["a"]
    assert "Highest mean reward: **reference** (+0.000)" in verdict(results)


def test_a_policy_that_is_the_reference_is_no_winner(world, policies, tmp_path):
    evaluate.main([f"--ref={world}/sft", f"{policies}/unmoved", f"--out_dir={tmp_path}",
                   "--n_prompts=4"])
    assert "No clear winner" in read(tmp_path / "report.md")


@pytest.mark.parametrize("line", ["{\n", "5\n"])
def test_a_report_without_a_curve_that_is_damaged(tmp_path, capsys, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/chosen_change": 0}\n' + line)
    assert training_curve(tmp_path)[0] == []
    assert "metrics.jsonl: damaged, and left out of the report\n" in capsys.readouterr().out


def test_accuracy_table_by_hand():
    """Accuracy, in all and by which response is longer; a tie counts a half; no pair, no number."""
    rewards = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 4.0]])
    lengths = np.array([[20, 10], [20, 10], [20, 10], [10, 10]])
    table, margins, _, sides = accuracy_table({"rm": rewards}, lengths, data.longer)
    assert sides.tolist() == [1, 1, 1, 0]
    assert table["rm"] == {"accuracy": 2.5 / 4, "longer_chosen": 1.5 / 3, "shorter_chosen": None,
                           "longer_has_higher_reward": 1 / 3}
    assert margins["rm"].tolist() == [1, -3, 0, 1]


def pairs_file(path, n, rejected=" broke"):
    """Pairs whose chosen response is the longer one."""
    return write_jsonl(path, [{"prompt": f"{i}:", "chosen": " my boss" * (i % 3 + 2),
                               "rejected": rejected} for i in range(n)])


def test_results_are_json_where_a_group_is_empty(world, policies, tmp_path):
    """No pair has the shorter response chosen: its accuracy is null, and not NaN."""
    path = pairs_file(tmp_path / "pairs.jsonl", 120)
    results = compare(world, policies, tmp_path / "report", f"--data={path}", f"--rms={world}/rm",
                      f"--oracle={world}/rm", "--max_new_tokens=8")
    numbers = results["reward_models"][f"{world}/rm"]
    assert numbers["shorter_chosen"] is None and 0 <= numbers["longer_chosen"] <= 1


@pytest.mark.parametrize("rms", [True, False])
def test_nothing_is_loaded_or_tokenised_twice(world, policies, tmp_path, monkeypatch, rms):
    """Every policy, the reference too, is loaded once, and a file's rows are tokenised once."""
    loaded, encoded = [], []
    from_pretrained, encode = GPT.from_pretrained.__func__, tokens.encode

    def counted_load(cls, folder):
        loaded.append(str(folder))
        return from_pretrained(cls, folder)

    def counted_encode(rows, tokenizer):
        rows = list(rows)
        encoded.append(len(rows))
        return encode(rows, tokenizer)

    monkeypatch.setattr(GPT, "from_pretrained", classmethod(counted_load))
    monkeypatch.setattr(tokens, "encode", counted_encode)
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    path = pairs_file(tmp_path / "pairs.jsonl", 120)
    flags = [f"--data={path}", f"--oracle={world}/rm", "--max_new_tokens=8"]
    if rms:
        flags.append(f"--rms={world}/rms")
    compare(world, policies, tmp_path / "report", *flags)
    assert sorted(loaded) == sorted([f"{world}/sft", f"{policies}/unmoved", f"{policies}/e-dpo"])
    assert encoded == [120]


def test_the_table_has_a_row_for_everybody():
    """Also where numbers are missing: the reference, a policy without a curve."""
    behind = (0.25, 0.125)
    results = {"reference": {"length": 9.0, "unended": 0.0, "behind_best": behind},
               "dpo": {"advantage": 0.5, "advantage_95": 0.25, "win_rate": 0.75, "length": 8.0,
                       "unended": 0.1, "behind_best": (0.0, 0.0), "chosen_change": -3.0}}
    header, _, reference, dpo = policy_table(results).splitlines()
    assert header.count("|") == reference.count("|") == dpo.count("|")
    assert reference.startswith("| reference | 0 | 0.250 ± 0.125 |")
    assert dpo.startswith("| dpo | +0.500 ± 0.250 | 0.000 ± 0.000 | 0.750 | 8.0 | 0.100 |")
    assert "| -3.0 |" in dpo


# ------------------------------------------------------------------ files of one's own

def test_file_data_end_to_end(tmp_path, hub_cache):
    """SFT, an oracle reward model on a file's own labels, relabelling by it, a family, e-DPO, and
    evaluation by it."""
    rows = []
    for i in range(300):
        prompt = tinytldr.post(0, "train", i)
        pair = [tinytldr.demonstration(0, "train", i, person) for person in (0, 1)]
        if pair[0] != pair[1]:
            rejected, chosen = sorted(pair, key=lambda text: tinytldr.oracle_reward(prompt, text))
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)

    few = ["--max_steps=4", "--batch_size=8", "--n_eval=16", f"--data={path}"]
    train_policy.main([*few, "--loss=sft", "--tokenizer=tinytldr", f"--out_dir={tmp_path}/sft",
                       "--n_embd=32"])
    few.append(f"--init_from={tmp_path}/sft")
    train_rm.main([*few, f"--out_dir={tmp_path}/oracle"])
    few += [f"--relabel={tmp_path}/oracle", "--rho=0.5"]
    train_rm.main([*few, f"--out_dir={tmp_path}/rms", "--bias=0.4,0.6"])
    train_policy.main([*few, "--loss=e-dpo", f"--rewards={tmp_path}/rms",
                       f"--out_dir={tmp_path}/e-dpo", "--max_new_tokens=8"])
    evaluate.main([f"--ref={tmp_path}/sft", f"{tmp_path}/e-dpo", f"--data={path}",
                   f"--oracle={tmp_path}/oracle", f"--relabel={tmp_path}/oracle",
                   f"--rms={tmp_path}/rms,{tmp_path}/oracle", f"--out_dir={tmp_path}/report",
                   "--max_new_tokens=8"])
    results = strict_json(tmp_path / "report/results.json")
    assert results["policies"]["e-dpo"]["kl_ref_pi"] != 0 and len(results["reward_models"]) == 3
    # The oracle agrees with every label that it gave itself.
    assert results["reward_models"][f"{tmp_path}/oracle"]["accuracy"] == 1


def test_scores_from_a_file_are_as_good_as_reward_models(world, tmp_path, hub_cache):
    """runs/score.py adds the family's scores to the pairs; distilling these columns gives the
    metrics that distilling from the family itself gives, but for rounding (they were scored in
    other batches)."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"{i}:", "chosen": " my boss" * (i % 3 + 1), "rejected": f" broke {i}"}
        for i in range(120)])
    scored_path = tmp_path / "scored.jsonl"
    score.main([f"--data={pairs}", f"--rewards={world}/rms", f"--out={scored_path}"])
    scored = read_jsonl(scored_path)
    assert len(scored) == 120
    kept = {name: scored[7][name] for name in ("prompt", "chosen", "rejected")}
    assert kept == read_jsonl(pairs)[7]
    assert len(scored[7]["score_chosen"]) == len(scored[7]["score_rejected"]) == 2

    flags = ["--loss=e-dpo", f"--init_from={world}/sft", "--max_steps=4", "--batch_size=8",
             "--max_new_tokens=8"]
    train_policy.main([*flags, f"--data={pairs}", f"--rewards={world}/rms",
                       f"--out_dir={tmp_path}/family"])
    train_policy.main([*flags, f"--data={scored_path}", "--rewards=scores",
                       f"--out_dir={tmp_path}/columns"])
    for family, columns in zip(metrics(tmp_path / "family"), metrics(tmp_path / "columns"),
                               strict=True):
        assert family == pytest.approx(columns, rel=1e-3, abs=1e-4)

    score.main([f"--data={pairs}", f"--rewards={world}/rm", f"--out={tmp_path}/single.jsonl"])
    assert isinstance(read_jsonl(tmp_path / "single.jsonl")[0]["score_chosen"], float)
    with pytest.raises(InputError, match="--rewards=scores: .*pairs.jsonl has no score_chosen"):
        train_policy.main([*flags, f"--data={pairs}", "--rewards=scores",
                           f"--out_dir={tmp_path}/none"])


# ------------------------------------------------------------------ rankings

@pytest.fixture(scope="module")
def rankings(world, tmp_path_factory):
    """Three responses for each prompt, with scores that like "broke"."""
    rows = [{"prompt": f"{i}:", "responses": [" my boss", " broke" * (i % 4 + 1), " exhausted"],
             "scores": [0, i % 4 + 1, -1]} for i in range(120)]
    return write_jsonl(tmp_path_factory.mktemp("rankings") / "rankings.jsonl", rows)


def test_a_reward_model_learns_a_ranking(world, rankings, tmp_path):
    """Bradley-Terry of its pairs from ln 2 down; and its scores rank the responses."""
    train_rm.main([f"--data={rankings}", f"--init_from={world}/sft", "--max_steps=30",
                   "--batch_size=16", "--lr=1e-2", f"--out_dir={tmp_path}/rm"])
    lines = metrics(tmp_path / "rm")
    assert lines[0]["validation/loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[-1]["validation/loss"] < 0.25 and lines[-1]["validation/accuracy"] > 0.9

    scored_path = tmp_path / "scored.jsonl"
    score.main([f"--data={rankings}", f"--rewards={tmp_path}/rm", f"--out={scored_path}"])
    scored = read_jsonl(scored_path)
    assert len(scored) == 120
    assert all(row["responses"][0].startswith(" broke") for row in scored)
    right = [row["scores"] == sorted(row["scores"], reverse=True) for row in scored]
    assert np.mean(right) > 0.9
    # The order is still the ranking's, also where the scores differ.
    again = [row["responses"] for row in load_rows(str(scored_path))]
    assert again == [row["responses"] for row in load_rows(rankings)]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_trains_on_rankings(world, rankings, tmp_path, loss):
    flags = [f"--loss={loss}", f"--data={rankings}", f"--init_from={world}/sft", "--max_steps=20",
             "--batch_size=16", "--lr=1e-3", f"--out_dir={tmp_path}"]
    if loss in REWARDED:
        flags.append("--rewards=scores")
    if "kl" in needs(loss):
        flags.append("--max_new_tokens=8")
    train_policy.main(flags)
    last = [line for line in metrics(tmp_path) if "validation/accuracy" in line][-1]
    assert last["validation/accuracy"] > 0.9
    assert last["validation/chosen_change"] > last["validation/rejected_change"]


@pytest.mark.parametrize("script, flags", [(train_policy, ["--loss=dpo", "--rho=0.2"]),
                                           (train_rm, ["--bias=0.2,0.5"])])
def test_length_bias_needs_pairs(world, rankings, tmp_path, script, flags):
    with pytest.raises(InputError, match="--rho, --bias: subsets by length are of pairs"):
        script.main([f"--data={rankings}", f"--init_from={world}/sft", f"--out_dir={tmp_path}/out",
                     *flags])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ talking to the result

def test_sample_streams_what_generate_gives(world, capsys):
    prompt = "POST: My boss.\n\nTL;DR:"
    sample.main([f"{world}/sft", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=8"])
    policy, tokenizer = GPT.from_pretrained(f"{world}/sft"), data.get_tokenizer("tinytldr")
    ids, = policy.generate([tokenizer.encode_ordinary(prompt)], 8, temperature=0,
                           stop=tokenizer.eot_token)
    wanted = tokenizer.decode([token for token in ids if token != tokenizer.eot_token])
    ending = "" if ids[-1] == tokenizer.eot_token else " ..."
    assert capsys.readouterr().out == f"[{world}/sft]{wanted}{ending}\n\n"


def test_sample_from_the_likely_tokens(world, capsys):
    """--top_k=1 says what --temperature=0 says, --top_k=50 does not."""
    said = []
    for flags in (["--temperature=0"], ["--top_k=1"], ["--top_p=0.000001"], ["--top_k=50"]):
        sample.main([f"{world}/sft", "--prompt=POST: My boss.", "--max_new_tokens=8", *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != said[3]


def test_a_token_beyond_the_tokenizer_is_not_printed(capsys):
    """A vocabulary that was padded lets a model say it."""
    tokenizer = tinytldr.tokenizer()
    said = [*tokenizer.encode_ordinary(" a b"), tokenizer.n_vocab + 5, tokenizer.eot_token]

    def generate(*_, on_token, **__):
        for token in said:
            on_token([token])
        return [said]

    args = SimpleNamespace(max_new_tokens=9, temperature=1.0, top_k=None, top_p=None)
    assert stream_reply(SimpleNamespace(generate=generate), tokenizer, [1], args, None) == said
    assert capsys.readouterr().out == "a b\n\n"


def test_sample_beside_the_reference(world, tmp_path, capsys):
    """With --compare the reference answers too; a policy that has not moved says the same."""
    train_policy.main(policy_flags(world, tmp_path / "run", "dpo", max_steps=1, lr=1e-12))
    capsys.readouterr()
    sample.main([f"{tmp_path}/run", "--compare", "--n=2", "--max_new_tokens=8"])
    out = capsys.readouterr().out
    assert out.startswith("POST: ") and out.count(f"[{tmp_path}/run]") == 2
    of_policy, *of_ref = out.split(f"[the reference, {world}/sft]")
    of_policy = of_policy.split(f"[{tmp_path}/run]")[1:]
    assert [part.strip() for part in of_policy] == [part.strip() for part in of_ref]
    with pytest.raises(InputError, match="--compare: .* was trained from no reference"):
        sample.main([f"{world}/sft", "--compare"])


def asked(flags, tokenizer="gpt2"):
    """The prompts that sample.py would answer with these flags; posts are called by their place."""
    args = talk_flags(["policy", *flags], "")
    tokenizer = SimpleNamespace(name=tokenizer, encode_ordinary=list, start=[], template=None)
    return [text for text, _ in prompts_to_answer(args, tokenizer, "{} {} {}".format)]


def test_a_file_is_a_single_prompt(tmp_path):
    """Whatever blank lines it has; only the ends of lines at its end are dropped."""
    (tmp_path / "post.txt").write_text(" Erste Zeile: \u00fc\n\nTL;DR:\n\n", encoding="utf-8")
    assert asked([f"--prompt_file={tmp_path}/post.txt"]) == [" Erste Zeile: \u00fc\n\nTL;DR:"]


@pytest.mark.parametrize("content, reason", [
    (None, "No such file"), (b"", "there is no prompt in it"), (b"\xff\xfe", "not UTF-8 text")])
def test_a_file_that_is_no_prompt(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "post.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"--prompt_file: .*post.txt: {reason}"):
        asked([f"--prompt_file={tmp_path}/post.txt"])


def test_what_is_piped_in_is_split_at_blank_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nA post\nof two lines.\n \n\n  second\n\n"))
    assert asked([]) == ["A post\nof two lines.", "  second"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n\n"))
    with pytest.raises(InputError, match="standard input: there is no prompt"):
        asked([])


def test_what_is_typed_is_a_prompt_line_by_line(monkeypatch, capsys):
    """Each is answered before the next is read; an empty line asks for nothing."""
    typed = io.StringIO("first\n\nsecond\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    assert asked([]) == ["first", "second"]
    assert capsys.readouterr().out == "one prompt per line; Ctrl-D ends\n"


def test_a_post_of_the_embedded_task_by_its_seed(monkeypatch, capsys):
    """Without reading standard input; it is printed, since nobody has seen it."""
    monkeypatch.setattr(sys, "stdin", None)
    assert asked(["--seed=1002"], "tinytldr") == ["0 test 2"]
    assert capsys.readouterr().out == "0 test 2\n\n"


def test_held_out_prompts_to_answer(tmp_path, hub_cache, capsys):
    """Those of a split, each once, in full; of a file and of the built-in task. Says how many there
    are if they are fewer."""
    prompts = [f"POST: {i}\n\nTL;DR:" for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": " a", "rejected": f" {n}"}
                                           for prompt in prompts for n in "bc"])
    flags, tokenizer = [f"--data={tmp_path}/pairs.jsonl", "--n_prompts=50"], tinytldr.tokenizer()
    held_out = {}
    for split in ("validation", "test"):
        args = talk_flags(["policy", *flags, f"--split={split}"], "")
        held_out[split] = [text for text, ids in prompts_to_answer(args, tokenizer, None)
                           if ids == tokenizer.encode_ordinary(text)]
        out = capsys.readouterr().out
        assert f"--n_prompts=50: the {split} split of" in out
        assert f"has {len(held_out[split])}, which are taken" in out
    for split, wanted in (("validation", range(0, 26)), ("test", range(26, 52))):
        there = [prompt for prompt in prompts
                 if hashlib.sha256(prompt.encode()).digest()[0] in wanted]
        assert held_out[split] == [there[i] for i in tokens.random_order(len(there))]
        assert len(held_out[split]) > 1
    args = talk_flags(["policy", *flags[:1], "--n_prompts=1"], "")
    (text, _), = prompts_to_answer(args, tokenizer, None)
    assert [text] == held_out["test"][:1]
    assert "which are taken" not in capsys.readouterr().out
    assert asked(["--data=tinytldr", "--n_prompts=2"]) == ["0 test 0", "0 test 1"]


def test_a_long_prompt_loses_its_start_and_that_is_said(capsys):
    tokenizer = tinytldr.tokenizer()
    ids = tokenizer.encode_ordinary("a long prompt")
    assert prompt_tokens(["a long prompt"], tokenizer, len(ids), chat=False) == ids
    assert capsys.readouterr().out == ""
    assert prompt_tokens(["a long prompt"], tokenizer, 3, chat=False) == ids[-3:]
    assert capsys.readouterr().out == (
        f"(room for 3 of the prompt's {len(ids)} tokens: it loses its start)\n")


def test_a_dialogue_loses_its_oldest_turns():
    """What the policy sees begins with a turn of the user, and keeps the newest; only where that
    does not fit alone is it cut within a turn."""
    tokenizer = tinytldr.tokenizer()
    dialogue = ["a", " x", "b", " c", "d"]

    def seen(room):
        turns = list(dialogue)
        ids = prompt_tokens(turns, tokenizer, room, chat=True)
        assert len(ids) <= room
        return tokenizer.decode(ids), turns

    whole = "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    size = len(tokenizer.encode_ordinary(whole))
    assert seen(size) == (whole, dialogue)
    assert seen(size - 1) == (whole[whole.index("\n\nHuman: b"):], dialogue[2:])
    last = whole[whole.index("\n\nHuman: d"):]
    size = len(tokenizer.encode_ordinary(last))
    assert seen(size) == (last, ["d"])
    cut, turns = seen(size - 1)
    assert last.endswith(cut) and cut != last and turns == ["d"]


def test_a_dialogue_goes_on(world, tmp_path, monkeypatch, capsys):
    """Every turn is answered with all of the dialogue before it in sight: with --compare each
    policy its own."""
    train_policy.main(policy_flags(world, tmp_path / "run", "dpo", max_steps=20, lr=3e-2))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nwhat else?\n\nbye\n"))
    tokenizer, flags = tinytldr.tokenizer(), ["--max_new_tokens=6", "--temperature=0"]
    monkeypatch.setattr(tokenizer, "name", "letters")      # no model of TinyTLDR, which has posts
    monkeypatch.setattr(sample, "get_tokenizer", lambda name: tokenizer)
    capsys.readouterr()
    sample.main([f"{tmp_path}/run", "--chat", "--compare", *flags])
    turns = capsys.readouterr().out.split(f"[{tmp_path}/run]")[1:]
    printed = [turn.split(f"[the reference, {world}/sft]") for turn in turns]
    assert len(printed) == 3
    for column, folder in enumerate((f"{tmp_path}/run", f"{world}/sft")):
        policy, text = GPT.from_pretrained(folder), ""
        for question, replies in zip(("hi", "what else?", "bye"), printed):
            text += f"\n\nHuman: {question}\n\nAssistant:"
            ids = tokenizer.encode_ordinary(text)
            assert len(ids) <= policy.config.block_size - 6
            reply, = policy.generate([ids], 6, temperature=0, stop=tokenizer.eot_token)
            reply = to_text(reply, tokenizer)
            assert replies[column].removesuffix(" ...\n\n").strip() == reply.strip()
            text += f" {reply.strip()}"
    assert [ours for ours, _ in printed] != [of_ref for _, of_ref in printed]


# ------------------------------------------------------------------ bad input

def test_bad_input_from_the_shell(tmp_path):
    """Exit code 2, one line that names the script, and nothing is written: all four scripts run
    their main in the same way."""
    done = subprocess.run([sys.executable, str(ROOT / "train_policy.py"), "--loss=ppo"], text=True,
                          capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_policy.py: error: argument --loss: invalid choice: 'ppo'")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    for script in ("train_policy", "train_rm", "evaluate", "sample"):
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        assert source.endswith('if __name__ == "__main__":\n    run_script(main)\n')


@pytest.mark.parametrize("script, flags, message", [
    (train_policy, ["--los=dpo"], "unrecognized arguments: --los=dpo"),
    (train_policy, ["--lr=fast"],
     "argument --lr: invalid positive float (1e-12 to 1e12) value: 'fast'"),
    (train_policy, ["--init_from=./nowhere"], "nowhere: no such folder"),
    (train_policy, ["--loss=sft", "--data=none.jsonl"], "none.jsonl: no such file"),
    (train_rm, ["--bias=0.2,x"], "argument --bias: invalid list of comma-separated fractions"),
    (evaluate, ["--data=x.jsonl"], "--oracle: only --data=tinytldr has an oracle")])
def test_bad_input(tmp_path, hub_cache, monkeypatch, capsys, script, flags, message):
    """The same, without a process for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags, "--out_dir=out"])
    monkeypatch.setattr(data, "read_tokenizer", lambda name: tinytldr.tokenizer())
    with pytest.raises(SystemExit) as stop:
        run_script(script.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{script.__name__}.py: error: ")
    assert message in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, message", [
    (["--ref=./none"], "--ref: ./none: no such folder"),
    (["--ref={world}/rm"], "--ref: {world}/rm: this is a reward model"),
    (["--ref={world}/sft", "--oracle=none"], "--oracle: no reward model in 'none'"),
    (["--ref={world}/sft", "--oracle={world}/sft"], "--oracle: {world}/sft: this is a language"),
    (["--ref={world}/sft", "--rms={world}/sft"], "--rms: {world}/sft: this is a language model"),
    (["--ref={world}/sft", "--rms={world}/rm", "--relabel={world}/sft"], "--relabel: {world}/sft")])
def test_the_flag_of_a_model_that_is_none(world, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(world=world) for flag in flags]
    with pytest.raises(InputError, match=f"^{message.format(world=world)}"):
        evaluate.main([*flags, f"{world}/sft"])
    assert list(tmp_path.iterdir()) == []


def test_reward_model_of_another_kind(world, tmp_path):
    with pytest.raises(InputError, match="this is a language model, not a reward model"):
        train_policy.main(policy_flags(world, tmp_path / "run", "d-dpo", rewards=f"{world}/sft"))
    shutil.copytree(f"{world}/rm", tmp_path / "rm")
    config = json.loads(read(tmp_path / "rm/config.json"))
    config["nanopref"] = {"tokenizer": "gpt2"}
    (tmp_path / "rm/config.json").write_text(json.dumps(config))
    message = "--rewards: .* reads gpt2 tokens, the policy tinytldr tokens"
    with pytest.raises(InputError, match=message):
        train_policy.main(policy_flags(world, tmp_path / "run", "d-dpo", rewards=f"{tmp_path}/rm"))
    assert not (tmp_path / "run").exists()


def test_too_few_pairs_for_the_bias(world, tmp_path):
    with pytest.raises(InputError, match="--rho, --bias, --n_pairs: no 399 pairs"):
        train_policy.main(policy_flags(world, tmp_path, n_pairs=399))


def test_tokenizer_that_the_model_has_no_room_for(world, tmp_path, monkeypatch):
    large = tiktoken.Encoding("large", pat_str=".", special_tokens={"<|endoftext|>": 99_999},
                              mergeable_ranks={bytes([b]): b for b in range(256)})
    monkeypatch.setattr(train_policy, "get_tokenizer", lambda name: large)
    message = "--tokenizer: the model knows .* tokens, and large has 100000"
    with pytest.raises(InputError, match=message):
        train_policy.main(policy_flags(world, tmp_path, tokenizer="large"))
