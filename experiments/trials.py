"""Trains and evaluates for the experiments in this folder, in this process. Only warnings are
printed, and each result is kept on disk once it is finished."""
import contextlib
import glob
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

import evaluate
import train_policy
import train_rm
from support.flags import InputError
from support.run import Run, read_json, write_json

# ------ jobs on several cores

class Pool(ProcessPoolExecutor):
    """Is a pool of processes whose workers take no new job after a signal."""

    def submit(self, function, *args):
        return super().submit(until_signal, function, *args)


@contextlib.contextmanager
def workers(n):
    """Starts a pool of n processes with one thread each (small models gain little from more).
    Whatever ends the driver, such as Ctrl-C, also ends them: runs that have begun save their state,
    and jobs that wait are dropped."""
    with Pool(n, initializer=start_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


busy, stopped = False, False        # of a worker: has it a job in hand? has a signal come?
parent = None                       # the process that started it, which ends with the driver


def start_worker():
    """Prepares a process of the pool."""
    global parent
    parent = os.getppid()
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):       # not on Windows
        os.setpgrp()            # Ctrl-C reaches the driver alone
    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Ends this process when its parent has ended, whatever killed that. (Linux can send a signal
    then, but sends one for each thread of the parent, and a second signal would end a run that is
    still saving its state.)"""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def on_signal(number, frame):
    """Handles SIGTERM while no training run handles it by saving its state. If a worker died of the
    signal, the pool would end the others too, whose runs may still be saving. So it only stops
    taking jobs, unless the driver is gone."""
    global stopped
    stopped = True
    if os.getppid() != parent:
        os._exit(1)
    if busy:
        sys.exit(128 + number)


def until_signal(function, *args):
    """Does a job in a worker, unless a signal has come."""
    global busy, stopped
    if stopped:
        raise SystemExit
    busy = True
    try:
        return function(*args)
    except SystemExit:
        stopped = True
        if os.getppid() != parent:
            os._exit(1)
        raise
    finally:
        busy = False


# ------ runs that are kept

def check_models(**folders):
    """Raises InputError, before anything is trained, if one of the folders has no model in it or
    one level below. folders: {flag: folder}."""
    for flag, folder in folders.items():
        if not glob.glob(f"{glob.escape(folder)}/config.json") + glob.glob(
                f"{glob.escape(folder)}/*/config.json"):
            raise InputError(f"--{flag}: there is no model in {folder!r}; bash runs/speedrun.sh "
                             "trains those of the defaults")


warned = set()          # the warnings that this process has printed


@contextlib.contextmanager
def silence(folder=None):
    """Prints nothing in its block but new warnings, as they may explain a result, and draws no
    samples that would only be printed. All that would have been printed is added to output.txt in
    the folder, if there is one."""
    output = io.StringIO()
    try:
        with (contextlib.redirect_stdout(output),
              mock.patch.object(train_policy, "show_samples")):
            yield
    finally:
        if folder and os.path.isdir(folder):
            with open(os.path.join(folder, "output.txt"), "a", encoding="utf-8") as file:
                file.write(output.getvalue())
        for line in output.getvalue().splitlines():
            if "warning: " in line and line not in warned:
                warned.add(line)
                print(f"{folder}: {line}" if folder else line, flush=True)


def weights(folder):
    """Returns a hash of the weights in a folder, a model's or an adapter's, or None."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        path = os.path.join(folder, name)
        if folder and os.path.exists(path):
            with open(path, "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()[:16]
    return None


def kept(path, made_from):
    """Reads the result that an earlier call has kept in a file. Returns None if there is no such
    file. InputError if the result was made from something else."""
    if not os.path.exists(path):
        return None
    record = read_json(path)
    if record.get("made_from") != made_from:
        raise InputError(f"--out_dir: {os.path.dirname(path)} is from other flags or another "
                         "reference; remove it, or name another folder")
    return record["result"]


def train(script, folder, *flags, states=True):
    """Runs "train_policy" or "train_rm" with these flags, unless that run is finished. A run that
    was interrupted goes on where it stopped. With states=False it saves no state, and starts again.
    What it prints goes to output.txt in its folder. Returns its seconds."""
    path = os.path.join(folder, "finished.json")
    source, = [flag.partition("=")[2] for flag in flags if flag.startswith("--init_from=")] or [""]
    made_from = [script, *flags, weights(source)]
    seconds = kept(path, made_from)
    if seconds is None:
        start = time.time()
        begun = glob.glob(f"{glob.escape(folder)}/**/state.pt", recursive=True)
        without = contextlib.nullcontext() if states else mock.patch.object(Run, "save_state")
        with silence(folder), without:
            scripts = {"train_policy": train_policy, "train_rm": train_rm}
            scripts[script].main([*flags, f"--out_dir={folder}", *["--resume"][:len(begun)]])
        seconds = time.time() - start
        write_json(path, {"made_from": made_from, "result": seconds})
    return seconds


def score(folder, ref, split, *flags):
    """Returns evaluate.py's numbers for one policy, on prompts of a split."""
    return scores([folder], ref, split, *flags)[folder]


def scores(folders, ref, split, *flags):
    """Returns evaluate.py's numbers for several policies, {folder: numbers}. The reference answers
    the prompts once for all of them."""
    paths = {folder: os.path.join(folder, f"on_{split}.json") for folder in folders}
    made_from = {folder: [*flags, weights(folder), weights(ref)] for folder in paths}
    numbers = {folder: kept(paths[folder], made_from[folder]) for folder in paths}
    missing = [folder for folder in paths if numbers[folder] is None]
    if missing:
        report = os.path.join(missing[0], f"on_{split}")
        with silence(report):
            evaluate.main([f"--ref={ref}", *missing, f"--split={split}", "--show=0", *flags,
                           f"--out_dir={report}"])
        policies = read_json(os.path.join(report, "results.json"))["policies"]
        for folder, of_policy in zip(missing, policies.values(), strict=True):
            numbers[folder] = of_policy
            write_json(paths[folder], {"made_from": made_from[folder], "result": of_policy})
    return numbers
