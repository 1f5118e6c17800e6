"""Several processes compute what a single one does, with whole weights and with parts of them, and
go on with each other's runs (torchrun on the CPU, gloo)."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import evaluate
import train_policy
import train_rm
from data import Dataset, collate
from model import GPT, GPTConfig
from support import device
from support.columns import score
from support.device import load_whole, place, unsharded, whole_on_cpu
from support.flags import OTHERS_ENDED, InputError, lost_processes

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = str(Path(__file__).parents[2])
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_processes
test_processes.session({folder!r}, "sharded", "alone", "--fsdp")
test_processes.session({folder!r}, "two", "sharded")
"""


class Interrupted(Exception):
    pass


def write_pairs(path):
    """Preferences between words, some long and some short, with rewards of two models."""
    draw = random.Random(0)
    words = ["my boss", "broke", "sad", "loud music", "move out?", "tell others?", "my cat"]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(120):
            chosen, rejected = ("; ".join(draw.choices(words, k=draw.randint(1, 4)))
                                for _ in range(2))
            record = {"prompt": f"POST: {' '.join(draw.choices(words, k=3))} {i}",
                      "chosen": chosen, "rejected": rejected + " no"}
            for side in ("chosen", "rejected"):
                record[f"score_{side}"] = [draw.gauss(0, 1), draw.gauss(0, 1)]
            file.write(json.dumps(record) + "\n")


LLAMA = GPTConfig(16, 31, 2, 2, 16, family="llama", n_kv_head=1, n_inner=24, mlp="swiglu",
                  norm="rms", qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=100.0)


def distil(folder, out, *flags):
    """e-DPO, 20 steps of 7 rows in micro-batches of 3: the shares of two processes are unequal."""
    train_policy.main([
        *training_flags(folder), "--loss=e-dpo", f"--init_from={folder}/alone/sft",
        "--rewards=scores", "--max_new_tokens=8", f"--select={folder}/alone/rm",
        f"--out_dir={folder}/{out}", *flags])


def training_flags(folder):
    return [f"--data={folder}/pairs.jsonl", "--tokenizer=tinytldr", "--max_steps=20",
            "--eval_every=10", "--batch_size=7", "--micro_batch_size=3", "--n_eval=13",
            "--device=cpu"]


def session(folder, name, resumed=None, *flags):
    """All that processes do together, into folder/name: SFT, a reward model, e-DPO from the models
    of the session "alone"; e-DPO again, killed in step 15; a report. resumed: the session whose
    killed run to go on with."""
    shutil.rmtree(f"{folder}/alone/sft/cache", ignore_errors=True)     # compute it all again
    out, start = f"{folder}/{name}", f"{folder}/alone/sft"
    train_policy.main([*training_flags(folder), "--loss=sft", f"--out_dir={out}/sft", "--lr=1e-3",
                       "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=48", *flags])
    train_rm.main([*training_flags(folder), f"--init_from={start}", f"--out_dir={out}/rm", *flags])
    distil(folder, f"{name}/e-dpo", *flags)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(train_policy, "learning_rate", learning_rate_until_15)
        patch.setattr(train_policy, "Run", noted_run)
        distil(folder, f"{name}/killed", *flags)
    if device.RANK == 0:
        RUNS.pop().lock.close()         # as the end of its process would
    if resumed is not None:
        distil(folder, f"{resumed}/killed", "--resume", *flags)
    if "--fsdp" in flags:
        check_parts(start)
        for model in (start, f"{folder}/llama"):
            check_bfloat16(model)
        return None
    evaluate.main([f"{folder}/alone/e-dpo", f"--ref={start}", f"--data={folder}/pairs.jsonl",
                   f"--oracle={folder}/alone/rm", "--max_new_tokens=8", f"--out_dir={out}/report",
                   "--device=cpu"])


def learning_rate_until_15(step, max_steps, peak):
    if step == 15:
        raise Interrupted
    return LEARNING_RATE(step, max_steps, peak)


LEARNING_RATE = train_policy.learning_rate
RUN, RUNS = train_policy.Run, []


def noted_run(*arguments):
    RUNS.append(RUN(*arguments))
    return RUNS[-1]


def check_parts(start):
    """Each of two processes keeps half of a model, which is whole again where it has to be."""
    plain = GPT.from_pretrained(start)
    args = SimpleNamespace(fsdp=True, dtype="float32", gradient_checkpointing=False,
                           freeze=None)
    model = place(GPT.from_pretrained(start), torch.device("cpu"), args)
    kept = sum(p.to_local().numel() for p in model.parameters())
    assert kept == pytest.approx(sum(p.numel() for p in plain.parameters()) / 2, rel=0.01)
    rows = Dataset([([1, 2, 3], [[4], [5, 6]])])        # fewer batches than processes
    assert np.array_equal(score(model, rows), score(plain, rows))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    prompts = [[1, 2, 3], [4]]
    copy = unsharded(model)
    assert copy is not model and unsharded(plain) is plain
    if device.RANK == 0:               # the other has nothing to sample
        assert copy.generate(prompts, 5, 0) == plain.generate(prompts, 5, 0)
    nothing = whole_on_cpu(model.state_dict(), keep=False)
    assert list(nothing.values()) == [None] * len(plain.state_dict())
    other = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    load_whole(model, other)
    for name, tensor in whole_on_cpu(model.state_dict()).items():
        assert torch.equal(tensor, other[name])


def check_bfloat16(start):
    """Weights that are sent around in bfloat16 give the gradients of autocast, in float32."""
    plain = GPT.from_pretrained(start)
    args = SimpleNamespace(fsdp=True, dtype="bfloat16", gradient_checkpointing=True, freeze=None)
    model = place(GPT.from_pretrained(start), torch.device("cpu"), args)
    examples = [([1, 2, 3], [[4], [5, 6]]), ([7, 8], [[9, 10], [11]])]
    with torch.autocast("cpu", torch.bfloat16):
        model(collate([examples[device.RANK]])).sum().backward()
        device.add_up_gradients(model)
        for example in examples:
            plain(collate([example])).sum().backward()
    for parameter, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(whole_on_cpu(parameter.grad), expected.grad)


def torchrun(folder, code, *flags):
    """Starts two processes of a script with this code. Returns the Popen of torchrun; their output
    is in its stdout and stderr."""
    script = folder / "session.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(script), *flags]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory, hub_cache):
    """The folder of three sessions, and what the latter two print: alone, sharded (two processes
    with --fsdp), two (with whole weights). Each kills a run, with which the next goes on."""
    folder = tmp_path_factory.mktemp("sessions")
    write_pairs(folder / "pairs.jsonl")
    session(str(folder), "alone")
    GPT(LLAMA).save_pretrained(folder / "llama")
    code = SCRIPT.format(root=ROOT, tests=TESTS, folder=str(folder))
    with torchrun(folder, code) as process:
        printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "Warning" not in errors
    distil(str(folder), "two/killed", "--resume")
    return folder, printed


def assert_same_run(folder, other):
    """What is logged, and the weights, are equal to 1e-5."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()]
             for run in (folder, other)]
    assert len(lines[0]) == len(lines[1]) == 5
    for expected, logged in zip(*lines):
        if expected["step"] == 0:       # margins are rounding errors; accuracy counts their signs
            expected = {k: v for k, v in expected.items() if not k.endswith("accuracy")}
            logged = {k: v for k, v in logged.items() if not k.endswith("accuracy")}
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-5)
    weights = load_file(other / "model.safetensors")
    for key, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weights.pop(key), tensor, rtol=0, atol=1e-5)
    assert not weights


@pytest.mark.parametrize("run", ["sft", "rm", "e-dpo"])
@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_compute_what_a_single_one_does(sessions, name, run):
    """With whole weights, and with --fsdp; and each line is printed once. Replies are shown with
    whole weights alone: by sft, e-dpo, the run that is killed and the one that is resumed."""
    folder, printed = sessions
    assert_same_run(folder / "alone" / run, folder / name / run)
    assert len(re.findall(r"^   20 ", printed, flags=re.M)) == 2 * 4
    assert printed.count("prompt 1: ") == printed.count("prompt 2: ") == 4


@pytest.mark.parametrize("name", ["alone", "sharded", "two"])
def test_a_run_goes_on_with_another_number_of_processes(sessions, name):
    """From one process to two with --fsdp, from there to two without, from there to one: killed in
    step 15 and resumed from step 10, it is the run that was not killed."""
    folder, _ = sessions
    assert_same_run(folder / "alone/e-dpo", folder / name / "killed")


def test_two_processes_write_the_report_of_one(sessions):
    """Samples and scores are shared out; the first process writes."""
    folder, printed = sessions
    alone, two = [json.loads((folder / name / "report/results.json").read_text())
                  for name in ("alone", "two")]
    for numbers in (alone, two):
        assert numbers["evaluation"].pop("out_dir")
    assert two == alone
    assert printed.count("report.md") == 1


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_rm
from support.flags import run_script
from support.device import RANK

class Run(train_rm.Run):
    def end_step(self, step, *args, **values):
        super().end_step(step, *args, **values)
        if step == 15 and RANK == {killed}:
            print("killed at", time.time(), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

train_rm.Run = Run
run_script(train_rm.main)
"""


@pytest.mark.parametrize("killed, flags", [(0, ["--fsdp"])])
def test_when_a_process_is_killed_the_other_says_so_and_ends(sessions, killed, flags):
    """In one line that names --resume. It hears of it from the broken connection, and its exit code
    is 2, or from torchrun's SIGTERM, and it is 143: which one comes first is chance. torchrun then
    says what it saw. The run goes on from its last saved state."""
    folder, _ = sessions
    flags = [*training_flags(folder), f"--init_from={folder}/alone/sft", *flags,
             f"--out_dir={folder}/killed{killed}"]
    with torchrun(folder, KILLED.format(root=ROOT, killed=killed), *flags) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert time.time() - float(errors.partition("killed at ")[2].split()[0]) < 60
    said = [line for line in errors.splitlines() if line.startswith("session.py: error: ")]
    assert said == [f"session.py: error: {OTHERS_ENDED}"] and "--resume" in said[0]
    codes = set(re.findall(r"exitcode  : (-?\d+)", errors))
    assert "-9" in codes and codes <= {"-9", "2", "143"}
    assert "session.py\", line" not in errors           # no traceback
    train_rm.main([flag for flag in flags if flag != "--fsdp"] + ["--resume"])
    assert_same_run(folder / "alone/rm", folder / f"killed{killed}")


@pytest.mark.parametrize("message, lost", [
    ("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17131.", True),
    ("[/gloo/transport/tcp/pair.cc:526] Read error [127.0.0.1]:3: Connection reset by peer", True),
    ("NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote "
     "process exited prematurely.", True),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", False)])
def test_a_lost_process_is_told_from_a_bug(message, lost, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError if not lost else InputError) as error, lost_processes():
        raise RuntimeError(message)
    assert str(error.value) == (OTHERS_ENDED if lost else message)
    assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if lost else before)


def test_a_process_that_is_alone_loses_no_other():
    """A bug may say what torch says of a lost process."""
    with pytest.raises(RuntimeError, match="Broken pipe") as error, lost_processes():
        raise RuntimeError("Broken pipe")
    assert not isinstance(error.value, InputError)


def test_joining_and_leaving_the_others(monkeypatch, capsys):
    """Whatever ends a process that has joined, its group is left before Python ends. torchrun's
    SIGTERM, where there is nothing to save, is told in the same line."""
    group = []
    monkeypatch.setattr(device, "BY_TORCHRUN", True)
    monkeypatch.setattr(device.dist, "is_initialized", lambda: bool(group))
    monkeypatch.setattr(device.dist, "init_process_group", group.append)
    monkeypatch.setattr(device.dist, "destroy_process_group", group.clear)
    at_exit = []
    monkeypatch.setattr(device.atexit, "register", at_exit.append)
    for _ in range(2):                  # a script that trains several models joins once
        assert device.join("cpu") == torch.device("cpu")
        assert group == ["gloo"]
    monkeypatch.setattr(sys, "argv", ["some/train_rm.py"])
    with pytest.raises(SystemExit) as exit:
        signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 143
    assert capsys.readouterr().err == f"train_rm.py: error: {OTHERS_ENDED}\n"
    (leave,) = at_exit
    leave()
    assert not group
    leave()                             # nobody is left


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["0", "1"])
def test_a_rank_without_torchrun(monkeypatch, tmp_path, variable, value):
    """Several processes that do not know of each other would each train the whole model."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^{variable} is set, but torchrun did not start this"):
        train_policy.main(["--loss=sft", f"--out_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_torchrun_where_processes_cannot_share_the_device(monkeypatch):
    monkeypatch.setattr(device, "BY_TORCHRUN", True)
    for name in ("mps", "xla"):
        with pytest.raises(InputError, match=f"^--device={name}: torchrun's processes can't"):
            device.join(name)


def test_without_torchrun_there_is_a_single_process():
    rows = np.arange(5)
    assert device.PROCESSES == 1 and device.RANK == 0
    assert [part.tolist() for part in device.micro_batches(rows, 2)] == [[0, 1], [2, 3], [4]]
    assert device.add_up({"loss": 2.0}) == {"loss": 2.0}
    assert device.own_share(3) == [0, 1, 2] and device.own_share(0) == []
    assert device.all_shares({0: "a", 1: "b"}) == ["a", "b"]


def in_each_process(monkeypatch, n, function, *args):
    """What the function returns in each of n processes."""
    results = []
    monkeypatch.setattr(device, "PROCESSES", n)
    for number in range(n):
        monkeypatch.setattr(device, "RANK", number)
        results.append(function(*args))
    return results


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_process_has_as_many_micro_batches(monkeypatch, n, size):
    """None of them empty or, but for what the docstring says, too large; together all rows."""
    for n_rows in range(n, 20):
        shares = in_each_process(monkeypatch, n, device.micro_batches, np.arange(n_rows), size)
        assert len({len(parts) for parts in shares}) == 1
        sizes = [len(part) for parts in shares for part in parts]
        assert min(sizes) >= 1 and max(sizes) <= max(size, 1 + (n_rows % n > 0))
        assert sorted(np.concatenate([row for parts in shares for row in parts])) == list(
            range(n_rows))


def test_compiled_code_of_weights_that_come_and_go(monkeypatch):
    monkeypatch.setattr(device, "PROCESSES", 2)
    args = SimpleNamespace(device="cpu", dtype="float32", seed=0, fsdp=True, compile=False)
    device.setup(args)
    args.compile = True
    with pytest.raises(InputError, match="--compile: it doesn't work with --fsdp"):
        device.setup(args)


def test_rows_that_not_every_process_can_share(monkeypatch):
    with pytest.raises(InputError, match="--data: 1 rows are too few for 2 processes"):
        in_each_process(monkeypatch, 2, device.micro_batches, np.arange(1), 3)


def test_every_process_computes_as_many_parts(monkeypatch):
    """One that has nothing left computes the last part again; all get all results, in order."""
    for rank, computed in ((0, [0, 2]), (1, [1, 2])):
        def gather(everyone, mine):
            everyone[:] = [{0: 50, 2: 70}, {1: 60, 2: 70}]
            assert everyone[rank] == mine

        monkeypatch.setattr(device, "PROCESSES", 2)
        monkeypatch.setattr(device, "RANK", rank)
        monkeypatch.setattr(device.dist, "all_gather_object", gather)
        assert device.own_share(3) == computed
        assert device.all_shares({part: 50 + 10 * part for part in computed}) == [50, 60, 70]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no such signal elsewhere")
def test_a_killed_driver_takes_its_run_with_it():
    """Whatever kills it: the run gets a SIGTERM, which it answers by saving its state."""
    run = "import time; print('begun', flush=True); time.sleep(60)"
    driver = (f"import subprocess, sys; sys.path.insert(0, {ROOT!r})\n"
              "from support.flags import end_with_parent\n"
              f"subprocess.run([sys.executable, '-c', {run!r}], preexec_fn=end_with_parent)")
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        killed = time.time()
        process.kill()
        process.stdout.read()           # until the run, which had it open, has ended
    assert time.time() - killed < 30
