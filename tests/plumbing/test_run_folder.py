"""The run folder, the optimizer and the check before step 0, each without a training script. (Whole
runs, interrupted and resumed, are in test_runs.py.)"""
import builtins
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

import tinytldr
from data import Dataset
from model import GPT, GPTConfig
from support import device
from support import run as run_folder
from support.columns import cache_folder, cached, check_rounding, check_step_0, score
from support.device import computing, setup
from support.flags import InputError
from support.run import (
    LOCK,
    STATE,
    Run,
    duration,
    family_folders,
    family_to_train,
    load,
    lock_folder,
    print_prompt,
    print_reply,
    remove_leftovers,
    replacing,
    run_flags,
    run_names,
    write_json,
)
from support.tokenizer import check_same_tokens
from train_policy import adamw

ROOT = str(Path(__file__).parents[2])


def start(folder, constants="hash", **flags):
    """A Run of a model of three numbers, 6 steps long, evaluated every 3."""
    flags = {"out_dir": str(folder), "resume": False, "max_steps": 6, "eval_every": 3, "lr": 0.5,
             "gamma": (0.1, 0.2), **flags}
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=flags["lr"], momentum=0.9)
    return Run(SimpleNamespace(**flags), model, optimizer, constants)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refusal(call, *args, **options):
    """The message of the InputError that a call has to end in."""
    with pytest.raises(InputError) as error:
        call(*args, **options)
    return str(error.value)


@pytest.fixture
def clock(monkeypatch):
    """What the run folder takes for the time: clock.now, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def open_terminal(monkeypatch):
    """Makes standard error a terminal, on which what was drawn can be read."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


# ------------------------------------------------------------------ the beginning of a run

def test_a_new_run_writes_its_flags(tmp_path):
    """Also into a folder of a folder that is not there."""
    run = start(tmp_path / "a/b")
    assert run.first_step == 0
    flags = {"out_dir": f"{tmp_path}/a/b", "resume": False, "max_steps": 6, "eval_every": 3,
             "lr": 0.5, "gamma": [0.1, 0.2]}
    text = (tmp_path / "a/b/config.json").read_text()
    assert text == json.dumps({"nanopref": flags}, indent=2) + "\n"     # easy to read
    assert run_flags(tmp_path / "a/b") == flags


def test_a_new_run_removes_what_a_run_left_that_was_killed_before_its_first_evaluation(tmp_path):
    """Nothing else."""
    start(tmp_path)
    for name in ("best.pt", "metrics.jsonl", "notes.txt", "my.tmp", "state.pt.0123abcd.tmp"):
        (tmp_path / name).write_text("old")
    start(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "my.tmp", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "old"


@pytest.mark.parametrize("there, what", [
    ("state.pt", "an unfinished run (go on with --resume)"), ("model.safetensors", "a model"),
    ("pytorch_model.bin", "a model"), ("config.json", "a model")])
def test_nobodys_work_is_overwritten(tmp_path, there, what):
    """Neither a run of ours nor somebody's model."""
    (tmp_path / there).write_text("old")
    assert refusal(start, tmp_path) == (
        f"--out_dir: '{tmp_path}' holds {what}; name another folder, or remove this one")
    assert os.listdir(tmp_path) == [there]


def test_a_folder_is_written_to_by_one_process(tmp_path):
    """Another one refuses at once, to resume too; when the first has ended, however, it may."""
    code = (f"import fcntl, time; file = open({str(tmp_path / LOCK)!r}, 'ab'); "
            "fcntl.lockf(file, fcntl.LOCK_EX); print('mine', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        message = (f"--out_dir: another process is at work in '{tmp_path}'; wait for it, or name "
                   "another folder")
        assert refusal(lock_folder, str(tmp_path)) == refusal(start, tmp_path) == message
        (tmp_path / "state.pt").touch()
        assert refusal(start, tmp_path, resume=True) == message
        other.kill()
    (tmp_path / "state.pt").unlink()
    start(tmp_path)


# ------------------------------------------------------------------ metrics.jsonl

def test_when_an_evaluation_is_due(tmp_path):
    """Before the first step, every eval_every steps and after the last."""
    run = start(tmp_path, max_steps=7, eval_every=3)
    assert [step for step in range(8) if run.due(step)] == [0, 3, 6, 7]


def test_means_over_steps(tmp_path):
    """Every ten steps, and before an evaluation, the means of what was watched since the last line:
    per step the sum over micro-batches, divided by the total."""
    run = start(tmp_path, max_steps=25, eval_every=12)
    for step in range(25):
        run.watch(4, loss=torch.tensor([step, step + 4.0]), margin=torch.tensor([2.0, 2.0]))
        run.watch(4, loss=torch.tensor([step, step]), margin=torch.tensor([4.0, 8.0]))
        run.end_step(step, [], grad_norm=torch.tensor(2.0 * step))
    middles = {9: 4.5, 11: 10.5, 19: 15.5, 23: 21.5, 24: 24.0}      # of the steps of each line
    assert metrics(tmp_path) == [
        {"step": step, "loss": middle + 1, "margin": 4.0, "grad_norm": 2 * middle}
        for step, middle in middles.items()]


def test_what_is_watched_keeps_no_graph(tmp_path):
    run = start(tmp_path)
    run.watch(1, loss=torch.ones(1, requires_grad=True))
    assert not run.sums["loss"].requires_grad


def test_numbers_that_are_not_finite_end_a_run(tmp_path):
    run = start(tmp_path)
    run.log(0, {"loss": 1.0})
    for number in (float("nan"), float("inf")):
        values = {"loss": 1.0, "margin": number}
        assert refusal(run.log, 3, values) == (
            f"--lr: training diverged: at step 3 margin is {number}; try a lower learning rate; "
            f"{tmp_path}/state.pt is the last good state")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_a_report_is_logged_and_saved_and_its_main_numbers_are_shown(tmp_path, capsys):
    run = start(tmp_path)
    results = {"validation/loss": 0.5, "validation/margin": 1.0, "validation/accuracy": 0.25,
               "validation/chosen_change": -2.0, "validation/rejected_change": -3.0,
               "validation/forward_kl": 4.0, "validation/reward": 1.5}
    run.report(0, results)
    assert metrics(tmp_path) == [{"step": 0, **results}]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 0
    assert capsys.readouterr().out == (
        " step      loss  val/loss   val/acc  val/chosen    reward    left\n"
        "    0              0.5000     0.250       -2.00      1.50\n")


def test_text_is_utf_8_whatever_the_machine_says(tmp_path, monkeypatch):
    """No file is opened in the machine's own encoding, which another machine would not read."""
    encodings = []

    def spy(path, mode="r", **options):
        if "b" not in mode:
            encodings.append(options.get("encoding"))
        return builtins.open(path, mode, **options)

    monkeypatch.setattr(run_folder, "open", spy, raising=False)
    start(tmp_path).report(0, {"loss": 0.5})
    start(tmp_path, resume=True)
    assert {str(name).lower() for name in encodings} == {"utf-8"}


# ------------------------------------------------------------------ on the screen

def test_a_line_says_the_time_left(tmp_path, capsys, clock):
    """Not before the first step, nor after the last."""
    run = start(tmp_path, lr=0.00123)
    clock.now += 5      # what happens before the first step is no step's time
    run.report(0, {"loss": 0.5})
    for step, now in ((1, 1012), (3, 1030), (6, 1066)):
        clock.now = now
        run.report(step, {"loss": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        " step      loss    left",
        "    0    0.5000",
        "    1    0.2500    60 s",
        "    3    0.2500    30 s",
        "    6    0.2500"]


def test_a_resumed_run_measures_its_own_time(tmp_path, capsys, clock):
    start(tmp_path).report(3, {"loss": 0.5})
    run = start(tmp_path, resume=True)
    capsys.readouterr()
    run.report(3, {"loss": 0.5})
    clock.now += 10
    run.report(5, {"loss": 0.5})
    clock.now += 10
    run.finish()
    assert capsys.readouterr().out.splitlines() == [
        " step      loss    left", "    3    0.5000", "    5    0.5000     5 s",
        f"3 steps in 20 s -> {tmp_path}"]


def ten_steps(run):
    """Ten steps in which nothing is evaluated, so that their means are logged."""
    for step in range(10):
        run.watch(1, loss=torch.tensor([2.0]))
        run.end_step(step, [])


@pytest.mark.parametrize("seconds, line", [
    (1, ""), (30, ""), (30.5, " step      loss    left\n   10    2.0000    92 s\n")])
def test_progress_without_a_terminal(tmp_path, capsys, clock, seconds, line):
    """If more than half a minute has passed since the last line; and no bar."""
    run = start(tmp_path, max_steps=40, eval_every=40)
    clock.now += seconds
    ten_steps(run)
    run.finish()
    shown = capsys.readouterr()
    assert shown.out == line + f"40 steps in {seconds:.0f} s -> {tmp_path}\n"
    assert shown.err == ""


def test_a_table_of_a_policy_fits_a_terminal(tmp_path, capsys, clock):
    """All columns, in at most 90 characters: the training loss is the mean of the last ten steps.
    Where training has begun in between, as in a resumed run, the headings are those of what there
    is, and then those of all."""
    run = start(tmp_path, max_steps=40, eval_every=20)
    results = {"validation/loss": 12.5, "train/loss": 1.0, "train/margin": 2.0}
    for split in ("train", "validation"):
        results |= {f"{split}/accuracy": 0.75, f"{split}/chosen_change": -123.456}
    clock.now += 31
    ten_steps(run)
    run.report(20, {**results, "validation/reward": -10.125, "validation/unended": 0.5})
    clock.now += 3600
    run.report(30, results)
    printed = capsys.readouterr().out
    assert printed == """\
 step      loss    left
   10    2.0000    93 s
 step      loss  val/loss  train/acc   val/acc  train/chosen  val/chosen    reward    left
   20    2.0000   12.5000      0.750     0.750       -123.46     -123.46    -10.12    31 s
   30    2.0000   12.5000      0.750     0.750       -123.46     -123.46            20 min
"""
    assert max(map(len, printed.splitlines())) <= 90


@pytest.mark.parametrize("seconds, written", [
    (0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")])
def test_times_are_written_in_the_unit_that_suits_them(seconds, written):
    assert duration(seconds) == written


def test_prompts_and_replies_fit_the_terminal(monkeypatch, capsys):
    """Newlines, and what would steer the terminal, are spaces. Of a long prompt the last four
    lines are shown; a reply is cut."""
    monkeypatch.setenv("COLUMNS", "40")
    print_prompt(1, "Who is it?\n\n\x1b[31mMy sister,\tI\u2028think. TL;DR:")
    print_prompt(2, " ".join(map(str, range(100, 200))))
    print_reply(1, -2.0, " my\nsister")
    print_reply(2, None, "a reply of more than forty characters")
    print_reply(2, 0.12345, "")
    assert capsys.readouterr().out.splitlines() == [
        "prompt 1:  Who is it? [31mMy",
        "           sister, I think. TL;DR:",
        "prompt 2:  ... 178 179 180 181 182 183",
        "           184 185 186 187 188 189",
        "           190 191 192 193 194 195",
        "           196 197 198 199",
        "      1     -2  my sister",
        "      2         a reply of more than fo",
        "      2  +0.123  (empty)"]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys, clock):
    """It says where the run is, instead of a line, and is gone when the run is over."""
    terminal = open_terminal(monkeypatch)
    run = start(tmp_path, max_steps=40, eval_every=40)
    clock.now += 1000
    ten_steps(run)
    assert capsys.readouterr().out == ""
    run.bar.refresh()
    assert re.search(rf"\r{re.escape(str(tmp_path))}:  25%\|.*\| 10/40 ", terminal.getvalue())
    run.finish()
    assert terminal.getvalue().split("\r")[-2].isspace()      # what was drawn last is wiped
    assert terminal.getvalue().endswith("\r")


def test_the_bar_of_a_resumed_run_goes_on(tmp_path, monkeypatch):
    start(tmp_path).report(3, {"loss": 0.5})
    terminal = open_terminal(monkeypatch)
    start(tmp_path, resume=True).bar.close()
    assert f"{tmp_path}:  50%|" in terminal.getvalue() and "| 3/6 " in terminal.getvalue()


# ------------------------------------------------------------------ resuming

def test_a_resumed_run_has_what_the_saved_state_had(tmp_path, capsys):
    """Weights, the optimizer's moments, the random numbers, the step."""
    run = start(tmp_path)
    run.model(torch.ones(2)).sum().backward()
    run.optimizer.step()
    run.report(3, {"loss": 0.5})
    random = torch.rand(3)
    torch.manual_seed(1)
    capsys.readouterr()
    resumed = start(tmp_path, resume=True)
    assert capsys.readouterr().out == f"resumed {tmp_path} at step 3\n"
    assert resumed.first_step == 3
    assert torch.equal(torch.rand(3), random)
    assert torch.equal(resumed.model.weight, run.model.weight)
    assert torch.equal(resumed.model.bias, run.model.bias)
    moments = resumed.optimizer.state[resumed.model.weight]["momentum_buffer"]
    assert moments.tolist() == [[1, 1]]


def test_resuming_keeps_the_lines_before_the_saved_state(tmp_path):
    """And its own evaluation; what came later will be written again, and the last was cut off."""
    run = start(tmp_path)
    for step in (0, 2):
        run.log(step, {"loss": 1.0})
    run.report(3, {"loss": 0.5})
    before = (tmp_path / "metrics.jsonl").read_text()
    run.log(5, {"loss": 0.25})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "loss": 1.0}')
    resumed = start(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not resumed.due(3) and resumed.due(6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_after_its_step(tmp_path, capsys, number):
    """The state is saved and one line says how to go on; the means of the steps since the last line
    of metrics.jsonl are not lost. A second signal acts as always."""
    flags = {"max_steps": 20, "eval_every": 20}
    whole = start(tmp_path / "whole", **flags)
    ten_steps(whole)
    run = start(tmp_path / "stopped", **flags)
    before = signal.getsignal(number)
    for step in range(4):
        run.watch(1, loss=torch.tensor([2.0]))
        if step == 3:
            os.kill(os.getpid(), number)
            with pytest.raises(SystemExit) as exit:
                run.end_step(step, [])
        else:
            run.end_step(step, [])
    assert exit.value.code == 128 + number and signal.getsignal(number) != before
    assert capsys.readouterr().out == (
        "stopped after 4 steps; the same command with --resume goes on\n")
    run = start(tmp_path / "stopped", resume=True, **flags)
    assert run.first_step == 4
    for step in range(4, 10):
        run.watch(1, loss=torch.tensor([2.0]))
        run.end_step(step, [])
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_step_that_is_not_finite_is_named_with_its_rows(tmp_path):
    """Within ten steps, before the state could be saved."""
    run = start(tmp_path, max_steps=40, eval_every=40)
    with pytest.raises(InputError) as error:
        for step in range(10):
            run.watch(1, loss=torch.tensor([float("nan") if step >= 4 else 1.0]))
            run.end_step(step, [20 + step, 10 + step], grad_norm=torch.tensor(1.0))
    assert step == 9 and str(error.value) == (
        "--lr: training diverged: at step 4 (training rows 14 24) loss is nan; try a lower "
        f"learning rate; {tmp_path}/state.pt is the last good state")
    run = start(tmp_path / "first", max_steps=1)
    run.watch(1, loss=torch.tensor([float("inf")]))
    assert refusal(run.end_step, 0, [3]) == (
        "--rewards, --beta, --gamma: too large: at step 0 (training rows 3) loss is inf; if they "
        "are not, the loss itself gives no number")


def test_where_a_run_is_resumed_may_change(tmp_path):
    """Its folder, its device, and whether it is compiled; its config.json stays as it was."""
    start(tmp_path / "old", device="cpu", compile=False).report(3, {"loss": 0.5})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    before = (tmp_path / "new/config.json").read_bytes()
    run = start(tmp_path / "new", resume=True, device="cuda", compile=True)
    assert run.first_step == 3 and (tmp_path / "new/config.json").read_bytes() == before


def test_other_flags_have_to_stay_the_same(tmp_path):
    start(tmp_path).report(3, {"loss": 0.5})
    message = "--resume: --{} was {} and is {}; it has to stay the same"
    assert refusal(start, tmp_path, resume=True, lr=0.1) == message.format("lr", 0.5, 0.1)
    assert refusal(start, tmp_path, resume=True, gamma=(0.1, 0.3)) == message.format(
        "gamma", "[0.1, 0.2]", "(0.1, 0.3)")
    assert refusal(start, tmp_path, resume=True, beta="x") == message.format("beta", None, "'x'")


def test_nothing_to_resume(tmp_path):
    """Nothing is written either."""
    message = (f"--resume: there is no state.pt in '{tmp_path}/none'; leave --resume out to start "
               "from the beginning")
    assert refusal(start, tmp_path / "none", resume=True) == message
    assert os.listdir(tmp_path) == []


def test_resuming_needs_the_same_constants(tmp_path):
    start(tmp_path, constants="old").report(3, {"loss": 0.5})
    assert refusal(start, tmp_path, constants="new", resume=True) == (
        "--resume: the reference, the data or the rewards have changed since the run began; start "
        "it again")


def test_a_state_that_is_damaged(tmp_path):
    """By one bit, or cut off; or made by somebody else: a pickle that would run code is not
    unpickled."""
    path = tmp_path / "state.pt"
    start(tmp_path).report(3, {"loss": 0.5})
    good = path.read_bytes()
    message = (f"--resume: {path} is damaged ({{}}); remove the folder, and start again without "
               "--resume")
    weight = good.index(load(path, STATE)["model"]["weight"].numpy().tobytes())
    flipped = good[:weight] + bytes([good[weight] ^ 1]) + good[weight + 1:]
    for content in (flipped, good[:-1], good[:100], b"", b"not a zip file"):
        path.write_bytes(content)
        assert refusal(start, tmp_path, resume=True) == message.format("ValueError")
    torch.save({"constants": SimpleNamespace()}, path)
    assert refusal(start, tmp_path, resume=True) == message.format("UnpicklingError")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("change", [
    lambda state: without(state, "rng"), lambda state: without(state, "metrics"),
    lambda state: {**state, "scheduler": {}}, lambda state: {**state, "step": "3"},
    lambda state: {**state, "step": -1}, lambda state: {**state, "step": 10 ** 9},
    lambda state: {**state, "model": None}, lambda state: {**state, "metrics": {}},
    lambda state: {**state, "model": without(state["model"], "bias")},
    lambda state: {**state, "model": {**state["model"], "bias": torch.zeros(7)}},
    lambda state: {**state, "model": {**state["model"], "bias": 1.0}},
    lambda state: {**state, "optimizer": {}}, lambda state: {**state, "rng": torch.zeros(3)},
    lambda state: {**state, "optimizer": {"state": {9: {}}, "param_groups": []}},
    lambda state: {**state, "window": [1]}, lambda state: state["model"], lambda state: [state],
    lambda state: state["rng"], lambda state: 7])
def test_a_state_of_another_version(tmp_path, change):
    """Older or newer, or not a state at all: one line, which says what to do."""
    path = tmp_path / "state.pt"
    start(tmp_path).report(3, {"loss": 0.5})
    torch.save(change(load(path, STATE)), path)
    assert refusal(start, tmp_path, resume=True).startswith(
        f"--resume: {path} is not what this version of nanoPref writes there; resume with the "
        "version that wrote it, or remove the folder and start again")


def test_a_state_that_is_no_file(tmp_path):
    """A FIFO would be waited for."""
    start(tmp_path).report(3, {"loss": 0.5})
    (tmp_path / "state.pt").unlink()
    os.mkfifo(tmp_path / "state.pt")
    assert refusal(start, tmp_path, resume=True) == f"--resume: {tmp_path}/state.pt is not a file"


def test_a_best_model_of_another_version(tmp_path):
    run = start(tmp_path, select="loss", max_steps=1, eval_every=1)
    torch.save({"model": run.model.state_dict()}, tmp_path / "best.pt")
    assert f"{tmp_path}/best.pt is not what this version" in refusal(run.restore_selected)


@pytest.mark.parametrize("content", [None, "", '{"step": 3, "loss": 0.4}\n'])
def test_metrics_that_are_damaged(tmp_path, content):
    """Missing, cut off, or with another number in them: the state has them too."""
    path = tmp_path / "metrics.jsonl"
    start(tmp_path).report(3, {"loss": 0.5})
    before = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(content)
    start(tmp_path, resume=True)
    assert path.read_text() == before


# ------------------------------------------------------------------ disks that are full

@contextlib.contextmanager
def full_disk(size=1000):
    """No file may become larger, which torch, numpy and safetensors meet as they do a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_zeros(save):
    """A function that writes a megabyte to a temporary file with one library or another."""
    def write(path):
        with replacing(path) as temporary:
            save(temporary)
    return write


ZEROS = np.zeros(125_000)


def save_with_torch(path):
    with open(path, "wb") as file:
        torch.save(torch.from_numpy(ZEROS), file)


def save_with_numpy(path):
    with open(path, "wb") as file:
        np.save(file, ZEROS)


WRITERS = {
    "json": lambda path: write_json(path, ZEROS.tolist()), "torch": save_zeros(save_with_torch),
    "numpy": save_zeros(save_with_numpy),
    "safetensors": save_zeros(partial(save_file, {"zeros": torch.from_numpy(ZEROS)}))}


@pytest.mark.parametrize("size", [0, 100, 100_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_file(tmp_path, name, size):
    """Whoever writes; and nothing half-written is left."""
    path = str(tmp_path / "file")
    with full_disk(size):
        message = refusal(WRITERS[name], path)
    assert message == f"{path}: can't be written: File too large" or (      # numpy's way to say it
        name == "numpy" and re.search("can't be written: .* requested and", message))
    assert os.listdir(tmp_path) == []
    WRITERS[name](path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_no_space_left_on_device(tmp_path, error):
    def fail():
        with replacing(f"{tmp_path}/a"):
            raise error
    assert refusal(fail) == f"{tmp_path}/a: can't be written: No space left on device"


def test_a_bug_stays_a_bug(tmp_path):
    """An error that is not the system's comes out as it is."""
    for error in (ValueError("NaN"), KeyError("a"), RuntimeError("shapes")):
        with pytest.raises(type(error)), replacing(f"{tmp_path}/a"):
            raise error
    assert os.listdir(tmp_path) == []


def test_a_run_on_a_full_disk(tmp_path):
    """It names the file, metrics.jsonl too; the last saved state is still good."""
    run = start(tmp_path)
    run.report(3, {"loss": 0.5})
    with full_disk(1000):
        assert refusal(run.save_state, 4) == (
            f"{tmp_path}/state.pt: can't be written: File too large")
    with full_disk(10):
        assert refusal(run.log, 5, {"loss": 0.5}) == (
            f"{tmp_path}/metrics.jsonl: can't be written: File too large")
    assert start(tmp_path, resume=True).first_step == 3


def test_a_file_of_somebody_else(tmp_path, monkeypatch):
    """What the system does not let this user write is named, in one line."""
    run = start(tmp_path / "run")
    os.remove(tmp_path / "run/config.json")
    (tmp_path / "run/metrics.jsonl").mkdir()
    assert refusal(run.log, 0, {"loss": 0.5}) == (
        f"{tmp_path}/run/metrics.jsonl: can't be written: Is a directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").mkdir()
    assert refusal(start, tmp_path / "other") == (
        f"{tmp_path}/other: can't be written: Is a directory")
    (tmp_path / "file").touch()
    assert refusal(start, tmp_path / "file/run") == (
        f"{tmp_path}/file/run: can't be written: Not a directory")


# ------------------------------------------------------------------ temporary names

def test_processes_with_the_same_number_do_not_meet(tmp_path):
    """Such as those of two containers that share a cache: each has a temporary name of its own."""
    path = f"{tmp_path}/a.json"
    with replacing(path) as first, replacing(path) as second:
        for name, text in ((first, "1"), (second, "2")):
            with open(name, "w", encoding="utf-8") as file:
                file.write(text)
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "1"


def test_what_a_kill_leaves_goes_and_what_lives_stays(tmp_path):
    """What nobody has written to for a day, and nothing but what has such a name."""
    (tmp_path / "folder.0123abcd.tmp").mkdir()
    for name in ("old.0123abcd.tmp", "new.0123abcd.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    for name in ("folder.0123abcd.tmp", "old.0123abcd.tmp", "mine.tmp"):
        os.utime(tmp_path / name, (10 ** 9, 10 ** 9))
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["mine.tmp", "new.0123abcd.tmp"]


# ------------------------------------------------------------------ what is cached

VALUES = {
    "array": np.array([[1.5, 0.5], [0.1, 2.5], [3.0, 4.0]], np.float32),
    "arrays": {"tokens": np.arange(70, dtype=np.uint16), "said": np.array(["a", "é"])},
    "samples": [[1, 2, 3], [], [4]], "rows": [{"prompt": "café", "scores": [[0.5], [1.0]]}]}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("damage", [
    lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    lambda content: content[:-9], lambda content: b"", lambda content: b"null",
    lambda content: content[:100]])
def test_a_damaged_cache_is_computed_anew(tmp_path, capsys, kind, damage):
    """One bit changed, cut off, empty, another file: it is named, and mended."""
    value, folder = VALUES[kind], str(tmp_path / "cache")
    path = tmp_path / "cache/scores-abc.npz"

    def check(said):
        again = cached(folder, "scores", "abc", lambda: value)
        assert capsys.readouterr().out == said and type(again) is type(value)
        assert again == value if kind in ("samples", "rows") else np.array_equal(again, value) if (
            kind == "array") else all(np.array_equal(again[name], value[name]) for name in value)

    check("")
    check(f"scores: from {path}\n")
    path.write_bytes(damage(path.read_bytes()))
    check(f"{path}: damaged, so it is computed again\n")
    check(f"scores: from {path}\n")


@pytest.mark.parametrize("value", [[1.0, float("nan")], np.array([1.0, np.inf])])
def test_numbers_that_are_not_finite_are_not_cached(tmp_path, value):
    with pytest.raises(InputError, match="^scores: the model gives numbers that are not finite$"):
        cached(str(tmp_path / "cache"), "scores", "abc", lambda: value)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, capsys):
    """On a full disk, or where there is a file in the place of the folder."""
    (tmp_path / "file").touch()
    with full_disk(10):
        assert cached(str(tmp_path / "cache"), "scores", "abc", lambda: [1.0]) == [1.0]
    assert cached(str(tmp_path / "file"), "scores", "abc", lambda: [1.0]) == [1.0]
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (f"warning: not kept for the next run: {tmp_path}/cache/scores-abc.npz: can't "
                     "be written: File too large")
    assert rest[-1].startswith("warning: not kept for the next run: ")
    assert os.listdir(tmp_path / "cache") == []


def test_the_cache_loses_what_a_killed_run_left(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "scores-abc.npz.0123abcd.tmp").touch()
    os.utime(folder / "scores-abc.npz.0123abcd.tmp", (10 ** 9, 10 ** 9))
    cached(str(folder), "scores", "abc", lambda: [1.0])
    assert os.listdir(folder) == ["scores-abc.npz"]


def test_a_reference_that_cannot_be_written_to(tmp_path, monkeypatch):
    """Its cache goes to the run's folder; also where a file is in its place.
    (An administrator may write anywhere: so os.access.)"""
    (tmp_path / "ref").mkdir()
    assert cache_folder(str(tmp_path / "ref"), "run") == str(tmp_path / "ref/cache")
    (tmp_path / "ref/cache").touch()
    assert cache_folder(str(tmp_path / "ref"), "run") == "run/cache"
    (tmp_path / "ref/cache").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_folder(str(tmp_path / "ref"), "run") == "run/cache"
    assert cache_folder("gpt2", "run") == "run/cache"


# ------------------------------------------------------------------ --select

def train_and_select(folder, select, results):
    """A run that is evaluated at steps 0, 1, ... with the given results; its model's bias is the
    step. Returns the bias that is chosen."""
    run = start(folder, select=select, max_steps=4, eval_every=1)
    for step, values in enumerate(results):
        run.model.bias.data.fill_(step)
        run.report(step, values)
    run.restore_selected()
    return run.model.bias.item()


LOSSES = [{"validation/loss": loss, "validation/reward": reward}
          for loss, reward in ((0.1, 9.0), (0.5, 1.0), (0.25, 2.0), (0.25, 4.0), (0.75, 3.0))]


@pytest.mark.parametrize("select, chosen", [("last", 4), ("loss", 2), ("oracle", 3), ("rm", 3)])
def test_the_selected_model(tmp_path, select, chosen, capsys):
    """The last; that of the lowest validation loss (the first of two); or of the highest reward.
    Never the one that was not trained."""
    assert train_and_select(tmp_path, select, LOSSES) == chosen
    says = f"--select={select}: the model of step {chosen}"
    assert (capsys.readouterr().out.splitlines()[-1] == says) == (select != "last")
    assert (tmp_path / "best.pt").exists() == (select != "last")


def test_a_resumed_run_selects_among_the_steps_of_before_too(tmp_path):
    """An evaluation that is made again replaces its own, though it is no better."""
    train_and_select(tmp_path, "loss", LOSSES[:3])
    for steps, chosen in (((3,), 2), ((2, 3), 7)):      # in the same process: as if killed
        run = start(tmp_path, select="loss", max_steps=4, eval_every=1, resume=True)
        run.model.bias.data.fill_(7)
        for step in steps:
            run.report(step, {"validation/loss": 0.25})
        run.restore_selected()
        assert run.model.bias.item() == chosen


# ------------------------------------------------------------------ what is in a folder

def test_run_flags(tmp_path):
    """Those of config.json; none where there is none, or for a model that is not ours."""
    assert run_flags(tmp_path) == {}
    for config, flags in (({"nanopref": {"lr": 1}, "n_embd": 8}, {"lr": 1}), ({"n_embd": 8}, {}),
                          ({"nanopref": None}, {})):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert run_flags(tmp_path) == flags


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
          "(char 1)"),
    ("[1]", "not a JSON object"),
    ('{"nanopref": [1]}', "'nanopref' is not an object of flags")])
def test_a_config_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    assert refusal(run_flags, tmp_path) == f"{tmp_path}/config.json: {message}"


TINY = tinytldr.tokenizer()


def sizes(vocab_size, block_size):
    return SimpleNamespace(vocab_size=vocab_size, block_size=block_size)


def test_a_model_that_reads_what_the_policy_writes(tmp_path):
    """Its tokens, or a model's of which nothing is known; as many and as long texts, or more."""
    for config in ({"nanopref": {"tokenizer": "tinytldr"}}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_same_tokens("--rms: rm", tmp_path, sizes(50, 8), sizes(50, 8), TINY)
        check_same_tokens("--rms: rm", tmp_path, sizes(51, 9), sizes(50, 8), TINY)


@pytest.mark.parametrize("tokenizer, config, message", [
    ("gpt2", sizes(50, 8), "reads gpt2 tokens, the policy tinytldr tokens"),
    ("tinytldr", sizes(49, 8), "has vocab_size 49, the policy 50"),
    ("tinytldr", sizes(50, 7), "has block_size 7, the policy 8")])
def test_a_model_that_does_not(tmp_path, tokenizer, config, message):
    (tmp_path / "config.json").write_text(json.dumps({"nanopref": {"tokenizer": tokenizer}}))
    assert refusal(check_same_tokens, "--rms: rm", tmp_path, config, sizes(50, 8),
                   TINY) == f"--rms: rm {message}"


def make_models(root, *folders, files=("config.json",)):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in files:
            (root / folder / name).write_text("{}")


def test_family_folders(tmp_path):
    """A model, or the models of a family, by name; in the order of the list. What is no model is
    left out, and so are models in a model's own folder."""
    make_models(tmp_path, "rm", "rm/older", "rms/0.6", "rms/0.2", "single/0.5")
    (tmp_path / "rms/cache").mkdir()
    folders = f"{tmp_path}/single,{tmp_path}/rms,{tmp_path}/rm"
    assert family_folders(folders) == [f"{tmp_path}/{name}" for name in
                                       ("single/0.5", "rms/0.2", "rms/0.6", "rm")]


def test_words_that_a_flag_takes_in_place_of_folders(tmp_path):
    make_models(tmp_path, "rm")
    assert family_folders(f"{tmp_path}/rm", "--select") == [f"{tmp_path}/rm"]
    assert family_folders(None, "--rms") == family_folders("scores", "--rewards") == []
    assert [family_folders(word, "--select") for word in ("last", "loss", "oracle")] == [[], [], []]
    message = refusal(family_folders, "oracle", "--relabel")
    assert "--relabel: no reward model in 'oracle'" in message


@pytest.mark.parametrize("flag", ["--rewards", "--rms"])
def test_folders_without_a_model(tmp_path, flag):
    """A folder that is not there, or has none; --rewards is the flag if no other is named."""
    make_models(tmp_path, "rm", "empty/run", files=())
    for name in ("none", "empty", "empty/run"):
        folder = f"{tmp_path}/{name}"
        options = {} if flag == "--rewards" else {"flag": flag}
        assert refusal(family_folders, folder, **options) == (
            f"{flag}: no reward model in '{folder}': train one with python train_rm.py "
            f"--out_dir={folder}")


def family(folder, resume=False, bias=(0.2, 0.6)):
    return family_to_train(SimpleNamespace(out_dir=str(folder), bias=list(bias), resume=resume))


def test_a_family_to_train(tmp_path):
    """A folder for each bias; those that were begun are resumed, if that was asked for."""
    names = [f"{tmp_path}/rms/0.2", f"{tmp_path}/rms/0.6"]
    assert family(tmp_path / "rms") == [(0.2, names[0], False), (0.6, names[1], False)]
    make_models(tmp_path, "rms/0.2", files=("config.json", "state.pt"))
    make_models(tmp_path, "rms/0.6", "rms/cache", files=())     # nothing in them yet
    assert family(tmp_path / "rms") == [(0.2, names[0], False), (0.6, names[1], False)]
    assert family(tmp_path / "rms", resume=True) == [(0.2, names[0], True), (0.6, names[1], False)]


def test_no_family_to_resume(tmp_path):
    make_models(tmp_path, "0.2")
    assert refusal(family, tmp_path, resume=True) == (
        f"--resume: there is no state.pt in {tmp_path}/0.2, {tmp_path}/0.6; leave --resume out")


@pytest.mark.parametrize("there", ["rms", "rms/0.5"])
def test_a_model_that_would_join_the_family(tmp_path, there):
    """In the family's own folder, or next to its members."""
    make_models(tmp_path, there)
    assert refusal(family, tmp_path / "rms") == (
        f"--out_dir: {tmp_path}/{there} holds another reward model, which would join this family; "
        "name another folder")


def test_run_names():
    """By their folders, unless that name is taken: by another run, or by the reference."""
    assert run_names(["out/dpo", "out/ipo/"]) == {"dpo": "out/dpo", "ipo": "out/ipo/"}
    assert run_names(["a/dpo", "b/dpo", "out/reference"]) == {
        "dpo": "a/dpo", "b/dpo": "b/dpo", "out/reference": "out/reference"}
    here = os.getcwd()          # the path that was given may be a name that is taken, too
    assert run_names(["out/dpo", "dpo", "reference"]) == {
        "dpo": "out/dpo", f"{here}/dpo": "dpo", f"{here}/reference": "reference"}


# ------------------------------------------------------------------ the optimizer

def test_the_optimizer():
    """AdamW of all parameters, without weight decay."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4),
                                torch.nn.Linear(4, 3))
    group, = adamw(model, 0.25).param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in model.parameters()]
    assert group["lr"] == 0.25 and group["betas"] == (0.9, 0.95) and group["fused"]
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((9, 0), "bfloat16")])
def test_cuda(monkeypatch, capability, dtype):
    """As far as it can be set up without one: bfloat16 where fused attention has it, and not by
    cuDNN."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args = SimpleNamespace(device="auto", dtype="auto", seed=0)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        device = setup(args)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert device == torch.device("cuda") and (args.device, args.dtype) == ("cuda", dtype)


def test_mps_is_for_who_asks_and_has_a_torch_that_computes_right_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = SimpleNamespace(device="auto", dtype="auto", seed=0)
    assert setup(args) == torch.device("cpu") and args.device == "cpu"
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.1"))
    args = SimpleNamespace(device="mps", dtype="auto", seed=0)
    assert setup(args) == torch.device("mps") and args.dtype == "float32"
    monkeypatch.setattr(device, "BY_TORCHRUN", True)
    with pytest.raises(InputError, match="--device=mps: torchrun's processes can't share one"):
        setup(args)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    with pytest.raises(InputError, match="--device=mps: torch 2.11.0.* install 2.12 or newer"):
        setup(args)


@pytest.mark.parametrize("device, fused", [("cpu", True), ("cuda", True), ("mps", False),
                                           ("xla", False)])
def test_where_all_parameters_are_updated_by_a_single_kernel(monkeypatch, device, fused):
    parameter = SimpleNamespace(device=SimpleNamespace(type=device), requires_grad=True)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *arguments, **options: options["fused"])
    assert adamw(SimpleNamespace(parameters=lambda: iter([parameter])), 0.25) is fused


# ------------------------------------------------------------------ the check before step 0

def check(change=0.0, error=0.0, ref_logp=-1000.0, dtype="float32", beta=None, gamma=None):
    """Two pairs; a log-prob is off by `change`, a loss, which should be 0.5, by `error`."""
    ref_logps = torch.tensor([[ref_logp, 0], [0, 0]], dtype=torch.float64)
    logps = ref_logps + torch.tensor([[0, 0], [0, change]])
    args = SimpleNamespace(loss="dpo", dtype=dtype, beta=beta, gamma=gamma)
    check_step_0(torch.tensor([0.5, 0.5 + error]), torch.tensor([0.5, 0.5]), logps, ref_logps, args)


@pytest.mark.parametrize("ref_logp, dtype, largest", [
    (0.0, "float32", 0.001), (-1000.0, "float32", 0.011), (-1000.0, "bfloat16", 1.5),
    (-100.0, "bfloat16", 0.6)])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_of_log_probs_is_let_through(ref_logp, dtype, largest, sign):
    """A thousandth of a nat and 1e-5 of the longest text's; bfloat16: half a nat and 1e-3."""
    check(0.99 * largest * sign, ref_logp=ref_logp, dtype=dtype)
    with pytest.raises(AssertionError, match="^before step 0, "):
        check(1.01 * largest * sign, ref_logp=ref_logp, dtype=dtype)


@pytest.mark.parametrize("change, beta, gamma, slack", [
    (0.0, None, None, 0.0001), (0.0005, None, None, 0.0011), (-0.0005, 0.3, None, 0.0011),
    (0.0005, 20, (0.1, 0.2), 0.0201), (0.0005, 0.3, (1, 30), 0.0301),
    (0.0005, 3000, None, 3.0001)])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_of_losses_is_let_through(change, beta, gamma, slack, sign):
    """Twice the change, times beta or gamma, and 1e-4: of h, whose square may be the loss."""
    largest = 1.5 * slack + slack ** 2
    check(change, 0.99 * largest * sign, beta=beta, gamma=gamma)
    with pytest.raises(AssertionError, match="^at the reference, dpo is "):
        check(change, 1.01 * largest * sign, beta=beta, gamma=gamma)


@pytest.mark.parametrize("wrong, rows, verdict", [
    (0.0, 1, "fine"), (0.5, 1, "fine"), (1.0, 1, "warned of"), (-1.0, 1, "warned of"),
    (4.0, 1, "warned of"), (1.0, 40, "warned of"), (4.0, 30, "refused"), (-4.0, 30, "refused"),
    (math.nan, 1, "refused")])
def test_bfloat16_log_probs_are_compared_with_float32(monkeypatch, capsys, wrong, rows, verdict):
    """The data set's column, in some rows from the first to the last: half a nat and a few
    thousandths are let through, and of a nat it warns. Four of some ten nats are refused if most
    rows are that far off, as they are with the cache of another model. (SmolLM2, fine-tuned in
    bfloat16 on summaries, gave a single token -2.7 in place of -1.1.)"""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(16, 31, 2, 2, 16))
    dataset = Dataset([([1, 2], [[3, 4], [5, 6, number % 31]]) for number in range(40)])
    monkeypatch.setattr(computing, "dtype", "bfloat16")
    dataset.ref_logps = score(policy, dataset)
    dataset.ref_logps[-rows:] += wrong
    if verdict == "refused":
        with pytest.raises(AssertionError, match="^the reference's train log-probs in bfloat16 "):
            check_rounding(policy, dataset, "train")
        return
    check_rounding(policy, dataset, "train")
    advice = "; --dtype=float32 is exact, and slower" if verdict == "warned of" else ""
    said = capsys.readouterr().out.removeprefix("warning: " if advice else "")
    assert re.fullmatch(r"train log-probs in bfloat16: within \S+ nats of float32, "
                        rf"in 16 rows{advice}\n", said)
    assert 0 < float(said.split()[5]) < 0.6 + abs(wrong)


def test_what_the_check_says(capsys):
    check(0.0005)
    assert capsys.readouterr().out == ("step 0: policy == reference to 5e-04 nats, "
                                       "dpo loss 0.5000\n")
    with pytest.raises(AssertionError) as error:
        check(0.25)
    assert str(error.value) == ("before step 0, the policy's log-probs differ from the reference's "
                                "by up to 0.25 nats")
    with pytest.raises(AssertionError) as error:
        check(error=1.0)
    assert str(error.value) == ("at the reference, dpo is 1.5000, not 0.5000")
