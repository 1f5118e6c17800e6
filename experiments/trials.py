"""What the experiments in this folder share: training runs and their evaluation, in this process
and without a word on the screen, each kept on disk once it is finished."""
import contextlib
import glob
import hashlib
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
    """Its workers take no other job after a signal."""

    def submit(self, function, *args):
        return super().submit(until_signal, function, *args)


@contextlib.contextmanager
def workers(n):
    """A pool of n processes with one thread each: small models gain little from more. Whatever ends
    the driver, Ctrl-C too, ends them: the runs in hand are kept, jobs that wait are dropped."""
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
    global parent
    parent = os.getppid()
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):       # not on Windows
        os.setpgrp()            # Ctrl-C reaches the driver alone
    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Whatever kills it. (Linux can send a signal then, but sends one for each thread of the
    parent, and a second signal ends a run that is still saving its state.)"""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def on_signal(number, frame):
    """SIGTERM, where no run answers it by saving its state. A worker that died of it would take the
    other ones along, whose runs may still be saving theirs; without a driver nothing is lost."""
    global stopped
    stopped = True
    if os.getppid() != parent:
        os._exit(1)
    if busy:
        sys.exit(128 + number)


def until_signal(function, *args):
    """What a worker does with a job."""
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
    """InputError, before anything is trained, if there is no model in one of these folders, nor in
    a folder in it. folders: by their flags."""
    for flag, folder in folders.items():
        if not glob.glob(f"{glob.escape(folder)}/config.json") + glob.glob(
                f"{glob.escape(folder)}/*/config.json"):
            raise InputError(f"--{flag}: there is no model in {folder!r}; bash runs/speedrun.sh "
                             "trains those of the defaults")


@contextlib.contextmanager
def silence():
    """Nothing is printed, and no samples are drawn that would be."""
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          mock.patch.object(train_policy, "show_samples")):
        yield


def weights(folder):
    """A hash of the weights in a folder, a model's or an adapter's; None if there are none."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        path = os.path.join(folder, name)
        if folder and os.path.exists(path):
            with open(path, "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()[:16]
    return None


def kept(path, made_from):
    """What a file holds that an earlier call has made, or None. InputError if it was made from
    something else."""
    if not os.path.exists(path):
        return None
    record = read_json(path)
    if record.get("made_from") != made_from:
        raise InputError(f"--out_dir: {os.path.dirname(path)} is from other flags or another "
                         "reference; remove it, or name another folder")
    return record["result"]


def train(script, folder, *flags, states=True):
    """One training run: "train_policy" or "train_rm" with these flags, unless it is finished. What
    was interrupted goes on where it was; with states=False, which saves no state, it starts again.
    Returns its seconds."""
    path = os.path.join(folder, "finished.json")
    source, = [flag.partition("=")[2] for flag in flags if flag.startswith("--init_from=")] or [""]
    made_from = [script, *flags, weights(source)]
    seconds = kept(path, made_from)
    if seconds is None:
        start = time.time()
        begun = glob.glob(f"{glob.escape(folder)}/**/state.pt", recursive=True)
        without = contextlib.nullcontext() if states else mock.patch.object(Run, "save_state")
        with silence(), without:
            scripts = {"train_policy": train_policy, "train_rm": train_rm}
            scripts[script].main([*flags, f"--out_dir={folder}", *["--resume"][:len(begun)]])
        seconds = time.time() - start
        write_json(path, {"made_from": made_from, "result": seconds})
    return seconds


def score(folder, ref, split, *flags):
    """evaluate.py's numbers for one policy, on prompts of a split."""
    return scores([folder], ref, split, *flags)[folder]


def scores(folders, ref, split, *flags):
    """The same for some policies, {folder: numbers}; the reference answers for all of them once."""
    paths = {folder: os.path.join(folder, f"on_{split}.json") for folder in folders}
    made_from = {folder: [*flags, weights(folder), weights(ref)] for folder in paths}
    numbers = {folder: kept(paths[folder], made_from[folder]) for folder in paths}
    missing = [folder for folder in paths if numbers[folder] is None]
    if missing:
        report = os.path.join(missing[0], f"on_{split}")
        with silence():
            evaluate.main([f"--ref={ref}", *missing, f"--split={split}", "--show=0", *flags,
                           f"--out_dir={report}"])
        policies = read_json(os.path.join(report, "results.json"))["policies"]
        for folder, of_policy in zip(missing, policies.values(), strict=True):
            numbers[folder] = of_policy
            write_json(paths[folder], {"made_from": made_from[folder], "result": of_policy})
    return numbers
