"""Kills runs of every kind at many moments, resumes them, and compares every byte that they leave
with what an uninterrupted run leaves.

    bash dev/torture.sh        # 60 kills: about 10 minutes

Two of three kills come just before a file operation (opening, renaming, removing, making a folder),
spread over all those of a run. They are by SIGKILL, after which nothing is tidied up. The other
kills come at any time, half of them by SIGKILL, half by SIGTERM or Ctrl-C. A state.pt is compared
by what is in it, because equal tensors can be pickled in several ways.
"""
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import evaluate
import tinytldr
import train_policy
import train_rm
from support.flags import InputError, Parser, positive_int, run_script, seed
from support.run import TEMPORARY

STEPS = ["--max_steps=24", "--eval_every=8", "--batch_size=8", "--n_eval=16"]
DATA = ["--data=in/pairs.jsonl"]
PAIRS = [*STEPS, *DATA, "--init_from=in/sft"]
SAMPLES = ["--max_new_tokens=8"]
KINDS = {       # name: (script, flags)
    "sft": (train_policy, ["--loss=sft", *STEPS, *DATA, "--tokenizer=tinytldr", "--n_embd=32",
                           "--n_layer=1", "--select=loss"]),
    "rm": (train_rm, [*PAIRS, "--rho=0.4"]),
    "family": (train_rm, [*PAIRS, "--bias=0.4,0.6"]),
    "dpo": (train_policy, ["--loss=dpo", *PAIRS, *SAMPLES, "--select=in/rm"]),
    "e-dpo": (train_policy, ["--loss=e-dpo", *PAIRS, *SAMPLES, "--rewards=in/family"]),
    "report": (evaluate, ["--ref=in/sft", "in/dpo", *DATA, *SAMPLES, "--oracle=in/rm"])}
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")


def write_pairs(path):
    """Writes pairs of summaries of 300 of TinyTLDR's posts, by two persons each."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(300):
            post = tinytldr.post(0, "train", i)
            texts = {tinytldr.demonstration(0, "train", i, person) for person in (0, 1)}
            texts = sorted(texts, key=lambda text: tinytldr.oracle_reward(post, text))
            if len(texts) == 2:
                row = {"prompt": post, "chosen": texts[1], "rejected": texts[0]}
                file.write(json.dumps(row) + "\n")


# ------ one run


def run(kind, folder, flags, operations, kill_before):
    """Runs a script in this process. It reads from folder/in and writes to folder/out.

    operations: a shared number that counts its file operations there. kill_before: the process
    kills itself before the operation of this number; None: it runs to its end.
    """
    os.chdir(folder)
    os.environ["NANOPREF_CACHE"] = "in/tokens"
    torch.set_num_threads(1)

    def on_event(event, arguments):
        if event in OPERATIONS and str(arguments[0]).startswith(("in/", "out")):
            operations.value += 1
            if operations.value == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    script, own_flags = KINDS[kind]
    sys.argv = [script.__name__, *own_flags, "--out_dir=out", *flags]
    log = open("log.txt", "ab")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    run_script(script.main)


def start(kind, folder, flags=(), kill_before=None):
    """Starts `run` in a process of its own. Returns it and its number of file operations."""
    context = multiprocessing.get_context("fork")       # so that torch is loaded once
    operations = context.Value("i", 0)
    process = context.Process(target=run, args=(kind, folder, flags, operations, kill_before))
    process.start()
    return process, operations


def finish(kind, folder, flags=()):
    """Lets a run come to its end. Returns (number of its file operations, its seconds)."""
    began = time.time()
    process, operations = start(kind, folder, flags)
    process.join()
    if process.exitcode:
        with open(f"{folder}/log.txt", encoding="utf-8") as log:
            raise InputError(f"{kind} ended with exit code {process.exitcode}: {log.read()[-500:]}")
    return operations.value, time.time() - began


def kill(kind, folder, moment, operations, seconds, draw):
    """Starts a run and kills it at a moment between 0 and 1. Returns what was done, as text."""
    if moment < 2 / 3:
        number = 1 + int(moment * 3 / 2 * operations)
        process, _ = start(kind, folder, kill_before=number)
        how = f"before file operation {number} of {operations}"
    else:
        process, _ = start(kind, folder)
        delay = draw.uniform(0, seconds)
        time.sleep(delay)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if process.is_alive():
            os.kill(process.pid, number)
        how = f"by {number.name} after {delay:.1f} of {seconds:.1f} s"
    process.join()
    return f"{how} (exit code {process.exitcode})"


# ------ what runs leave


def new_folder(root, name, inputs):
    """Makes a folder with copies of the inputs, {name: path}. Returns its path."""
    folder = os.path.join(root, name)
    os.makedirs(os.path.join(folder, "in"))
    for name, path in inputs.items():
        copy = shutil.copytree if os.path.isdir(path) else shutil.copy
        copy(path, os.path.join(folder, "in", name))
    return folder


def contents(folder):
    """Reads all files in a folder, except for the log and for unfinished files in a cache (which
    are removed after a day). Returns {path: bytes, or for a state.pt what is in it, as text}."""
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if name == "log.txt" or TEMPORARY.search(name) or TEMPORARY.search(parent):
                continue
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                content = file.read()
            if name.endswith(".pt"):
                content = repr(plain(torch.load(io.BytesIO(content), weights_only=True)))
            files[os.path.relpath(path, folder)] = content
    return files


def plain(state):
    """Replaces every tensor in nested dictionaries and lists by its numbers."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if torch.is_tensor(state) else state


def can_be_resumed(folder):
    return any(name.endswith("state.pt") for name in contents(folder) if name.startswith("out/"))


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=positive_int, default=60)
    add("--seed", type=seed, default=0, help="of the moments to kill at")
    args = parser.parse_args(argv)
    draw, different = random.Random(args.seed), 0
    rounds = -(-args.kills // len(KINDS))
    with tempfile.TemporaryDirectory() as root:
        write_pairs(f"{root}/pairs.jsonl")
        inputs = {"pairs.jsonl": f"{root}/pairs.jsonl"}
        whole = {}          # {kind: (inputs, file operations, seconds, what it left)}
        for kind in KINDS:
            folder = new_folder(root, f"whole-{kind}", inputs)
            whole[kind] = (dict(inputs), *finish(kind, folder), contents(folder))
            inputs[kind] = os.path.join(folder, "out")

        for number in range(args.kills):
            kind = list(KINDS)[number % len(KINDS)]
            inputs, operations, seconds, expected = whole[kind]
            folder = new_folder(root, f"{number}-{kind}", inputs)
            moment = (number // len(KINDS) + draw.random()) / rounds
            how = kill(kind, folder, moment, operations, seconds, draw)
            finish(kind, folder, ["--resume"] if can_be_resumed(folder) else [])
            left = contents(folder)
            wrong = [path for path in sorted({*expected, *left})
                     if expected.get(path) != left.get(path)]
            different += bool(wrong)
            verdict = f"DIFFERENT: {' '.join(wrong)}" if wrong else "the same bytes"
            print(f"{number + 1:3} {kind:6} killed {how}: {verdict}", flush=True)
            shutil.rmtree(folder)
    print(f"{args.kills} kills, {different} with other bytes than an uninterrupted run")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    run_script(main)
