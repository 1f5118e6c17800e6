"""What the experiments in this folder share: training runs and their evaluation, in this process
and without a word on the screen, each kept on disk once it is finished."""
import contextlib
import glob
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

import evaluate
import train_policy
import train_rm
from support.files import read_json, write_json
from support.flags import InputError
from support.processes import end_with_parent


class Pool(ProcessPoolExecutor):
    """Its workers end on a signal, instead of going on with the next job."""

    def submit(self, function, *args):
        return super().submit(until_signal, function, *args)


def until_signal(function, *args):
    try:
        return function(*args)
    except SystemExit:          # a run that has saved its state, or what SIGTERM does elsewhere
        os._exit(1)


@contextlib.contextmanager
def workers(n):
    """A pool of n processes with one thread each: small models gain little from more. Whatever ends
    the driver, Ctrl-C too, ends them: the run in hand is kept, jobs that wait are dropped."""
    with Pool(n, initializer=start_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker():
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):       # not on Windows
        os.setpgrp()            # Ctrl-C reaches the driver alone
    end_with_parent()


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
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def train(script, folder, *flags):
    """One training run: "train_policy" or "train_rm" with these flags, unless it is finished. What
    was interrupted goes on where it was. Returns its seconds."""
    path = os.path.join(folder, "seconds.json")
    if not os.path.exists(path):
        start = time.time()
        begun = glob.glob(f"{glob.escape(folder)}/**/state.pt", recursive=True)
        with silence():
            scripts = {"train_policy": train_policy, "train_rm": train_rm}
            scripts[script].main([*flags, f"--out_dir={folder}", *["--resume"][:len(begun)]])
        write_json(path, time.time() - start)
    return read_json(path, float)


def score(folder, ref, split, *flags):
    """evaluate.py's numbers for one policy, on prompts of a split."""
    return scores([folder], ref, split, *flags)[folder]


def scores(folders, ref, split, *flags):
    """The same for some policies, {folder: numbers}; the reference answers for all of them once."""
    paths = {folder: os.path.join(folder, f"on_{split}.json") for folder in folders}
    missing = [folder for folder in paths if not os.path.exists(paths[folder])]
    if missing:
        report = os.path.join(missing[0], f"on_{split}")
        with silence():
            evaluate.main([f"--ref={ref}", *missing, f"--split={split}", "--show=0", *flags,
                           f"--out_dir={report}"])
        policies = read_json(os.path.join(report, "results.json"))["policies"]
        for folder, numbers in zip(missing, policies.values(), strict=True):
            write_json(paths[folder], numbers)
    return {folder: read_json(path) for folder, path in paths.items()}
