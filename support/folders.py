"""A run's folder: nobody's work in it is overwritten, and one process at a time writes to it."""
import os

from support.files import lock, naming_file
from support.flags import InputError
from support.processes import starts_as_first

LOCK = ".lock"          # an empty file, locked by the process that writes to its folder
MODELS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
claimed = {}            # {real path of a folder: its open lock file}, of this process


def check_free(folder, resume=False, overwrite=False):
    """InputError if a new run in this folder would overwrite something, if there is none to resume,
    or if another process is at work there. A run that never came to its first evaluation is nothing
    to lose."""
    check_unused(folder)
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if resume and "state.pt" not in there:
        raise InputError(f"--resume: there is no state.pt in {folder!r}; leave --resume out to "
                         "start from the beginning")
    not_ours = "config.json" in there and LOCK not in there
    if resume or overwrite or not ("state.pt" in there or MODELS & there or not_ours):
        return
    what = "a model" if MODELS & there or not_ours else "an unfinished run (go on with --resume)"
    raise InputError(f"--out_dir: {folder!r} holds {what}; name another folder, or --overwrite, "
                     "which sets the old one aside")


def check_unused(folder):
    """InputError if another process writes to this folder. (Of several that torchrun has started,
    the first one writes, so that only it looks.)"""
    path = os.path.join(folder, LOCK)
    if starts_as_first() and os.path.realpath(folder) not in claimed and os.path.exists(path):
        with naming_file(path):
            held = lock_folder(path, folder, shared=True)
        if held is not None:
            os.close(held)


def claim(folder):
    """Makes a folder, for this process to write to: until it is released, or the process ends."""
    with naming_file(folder):
        os.makedirs(folder, exist_ok=True)
        if os.path.realpath(folder) not in claimed:
            path = os.path.join(folder, LOCK)
            open(path, "ab").close()
            claimed[os.path.realpath(folder)] = lock_folder(path, folder)


def release(folder):
    held = claimed.pop(os.path.realpath(folder))
    if held is not None:
        os.close(held)


def lock_folder(path, folder, shared=False):
    """`lock` of a folder's lock file. InputError if another process has it."""
    try:
        return lock(path, shared)
    except BlockingIOError:
        raise InputError(f"--out_dir: another process is at work in {folder!r}; wait for it, or "
                         "name another folder") from None


def set_aside(folder):
    """Moves the files of an earlier run into a folder old-1 (-2, ...) inside its own."""
    names = [name for name in sorted(os.listdir(folder))
             if name != LOCK and os.path.isfile(os.path.join(folder, name))]
    if not names:
        return
    number = 1
    while os.path.exists(os.path.join(folder, f"old-{number}")):
        number += 1
    aside = os.path.join(folder, f"old-{number}")
    os.mkdir(aside)
    for name in names:
        os.rename(os.path.join(folder, name), os.path.join(aside, name))
    print(f"--overwrite: the files of {folder} are in {aside} now")
