"""Keeps the folder of a training run: its flags, metrics and state, resuming, and the line on the
screen. Looks up for other scripts what is in such folders."""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time

import torch
from tqdm import tqdm

from support.device import compiled_graphs, sync
from support.files import (
    check_zip,
    lock,
    naming_file,
    read_json,
    remove_leftovers,
    replacing,
    write_json,
)
from support.flags import InputError, in_a_line
from support.processes import (
    add_up_numbers,
    any_of,
    full,
    is_first,
    load_whole,
    processes,
    progress_bar,
    starts_as_first,
    trained_state,
    wait,
    whole,
)

# Flags that may differ on --resume
MAY_CHANGE = ("out_dir", "resume", "overwrite", "device", "compile", "fsdp", "log",
              "gradient_checkpointing", "merge_lora")
LOG_EVERY = 10                                              # steps
# The columns on the screen, docs/glossary.md: {heading: (name in metrics.jsonl, format)}
SHOWN = {"loss": ("loss", ".4f"),
         "val/loss": ("validation/loss", ".4f"),
         "train/acc": ("train/accuracy", ".3f"),
         "val/acc": ("validation/accuracy", ".3f"),
         "train/chosen": ("train/chosen_change", ".2f"),
         "val/chosen": ("validation/chosen_change", ".2f"),
         "reward": ("validation/reward", ".2f")}
# What is in state.pt and in best.pt
STATE = {"model": dict, "optimizer": dict, "step": int, "reported": bool, "window": list,
         "constants": str, "rng": torch.Tensor, "metrics": str}
BEST = {"model": dict, "value": float, "step": int}
LOCK = ".lock"          # an empty file, locked by the process that writes to its folder
MODELS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
claimed = {}            # {real path of a folder: its lock}, of this process


class Run:
    """Keeps a training run in its folder: config.json (with --lora run.json) has its flags (under
    "nanopref"), metrics.jsonl its numbers, state.pt what resuming needs.

    constants: a hash of what training takes as given (reference, data, rewards), which has to be
    the same on --resume. `first_step` is 0, or where a resumed run goes on.
    """

    def __init__(self, args, model, optimizer, constants):
        flags = vars(args)
        self.dir, self.constants = args.out_dir, constants
        self.model, self.optimizer = model, optimizer
        self.max_steps, self.eval_every, self.first_step = args.max_steps, args.eval_every, 0
        self.select = flags.get("select", "last")
        self.compile = flags.get("compile", False)
        self.device = next(model.parameters()).device
        self.sums, self.window = {}, []     # of this step; of the steps since the last line
        self.means, self.columns = {}, []   # the last line's; the headings on the screen
        self.reported = None                # the step whose evaluation is in the resumed state
        logged = self._load_state(flags) if args.resume else ""
        # wandb may refuse, so it is opened before anything is written
        self.also_log = open_log(flags.get("log"), self.dir, flags, self.first_step)
        if is_first():
            self._prepare_folder(flags, logged)
        wait()
        self.stop_signal, self.handlers = None, {}
        with contextlib.suppress(ValueError):       # only the main thread can have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)
        self.started = self.printed = time.time()
        self.bar = progress_bar(total=args.max_steps, initial=self.first_step, desc=self.dir)

    def _path(self, name):
        return os.path.join(self.dir, name)

    def _prepare_folder(self, flags, logged):
        """Makes the folder ready to write to. logged: the text of metrics.jsonl up to a resumed
        state; what came later will be logged again."""
        if not flags["resume"]:
            check_free(self.dir, overwrite=flags.get("overwrite", False))
        claim(self.dir)
        remove_leftovers(self.dir)
        if flags["resume"]:
            self._write_metrics(logged)
            return
        if flags.get("overwrite"):
            set_aside(self.dir)
        # of a run that never came to a state.pt
        for name in ("best.pt", "metrics.jsonl", "config.json", "run.json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._path(name))
        name = "run.json" if flags.get("lora") else "config.json"
        write_json(self._path(name), {"nanopref": flags}, indent=2)

    # ---- in the loop

    def due(self, step):
        """Says whether to evaluate before this step; also before the first and after the last."""
        return step != self.reported and (step % self.eval_every == 0 or step == self.max_steps)

    def watch(self, total, **values):
        """Adds values of a micro-batch, {name: one for each row or pair}, to the means of this
        step. total: what the whole batch's sum is divided by."""
        for name, value in values.items():
            mean = (value.detach() / total).sum()
            self.sums[name] = self.sums.get(name, 0) + mean

    def end_step(self, step, rows, **values):
        """Ends an optimizer step on these rows of the training set. values: {name: number}, to log
        as well. Every ten steps, and before an evaluation, a line of metrics.jsonl gets the means
        since the last line, and all numbers are checked: in between nothing waits for the device.
        """
        shares = {}         # of values that are the same in all processes
        for name, value in values.items():
            shares[name] = full(value) / processes()
        self.window.append({"step": step, "rows": rows, **self.sums, **shares})
        self.sums = {}
        sync(self.device)
        self.bar.update()
        logs = (step + 1) % LOG_EVERY == 0 or self.due(step + 1)
        if logs:
            steps = self._numbers_of_window()
            means = {name: sum(numbers[name] for numbers in steps) / len(steps)
                     for name in steps[0]}
            self.means = add_up_numbers(means)
            self.log(step, self.means)
            self.window = []
            if self.bar.disable and time.time() > self.printed + 30:       # there is no terminal
                self._print(step + 1, {})
        if processes() == 1 or logs:        # several have to talk about it, which takes time
            if any_of(self.stop_signal):
                self._stop(step + 1)

    def _numbers_of_window(self):
        """Returns what was watched in each step since the last line of metrics.jsonl, [{name:
        number}]. InputError for the first step in which a number is not finite."""
        steps = []
        for watched in self.window:
            numbers = {name: float(value) for name, value in watched.items()
                       if name not in ("step", "rows")}
            if not all(map(math.isfinite, numbers.values())):
                raise self._diverged(watched["step"], numbers, watched["rows"])
            steps.append(numbers)
        return steps

    def _diverged(self, step, numbers, rows=()):
        """Returns the InputError for numbers that are not finite."""
        where = f"at step {step} "
        if len(rows):
            where += f"(training rows {' '.join(map(str, sorted(rows)))}) "
        where += ", ".join(f"{name} is {value}" for name, value in numbers.items()
                           if not math.isfinite(value))
        if step == 0:
            return InputError(f"--rewards, --beta, --gamma: too large: {where}; if they are not, "
                              "the loss itself gives no number")
        return InputError(f"--lr: training diverged: {where}; try a lower learning rate; "
                          f"{self._path('state.pt')} is the last good state")

    def report(self, step, results):
        """Logs and prints what an evaluation measured, {name: number}, and saves the state."""
        self.log(step, results)
        if self.select != "last" and step > 0:
            self._save_if_best(step, results)
        self.save_state(step, reported=True)
        self._print(step, results)

    def log(self, step, values):
        """Adds a line to metrics.jsonl. It has no times: the same seed gives the same bytes."""
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(step, values)
        if is_first():
            path = self._path("metrics.jsonl")
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.also_log:
            self.also_log(step, values)

    def _print(self, step, results):
        """Prints a row of the table: the training loss of late, what an evaluation measured, and
        the time left."""
        values = {**self.means, **results}
        columns = [heading for heading, (name, _) in SHOWN.items()
                   if name in results or heading == "loss"]
        if len(columns) > len(self.columns):        # the first row; of a resumed run a later one
            self.columns = columns
            tqdm.write("  ".join([" step", *map("{:>8}".format, columns), "  left"]),
                       file=sys.stdout)
        row = f"{step:5d}"
        for heading in self.columns:
            name, form = SHOWN[heading]
            number = format(values[name], form) if name in values else ""
            row += f"  {number:>{max(8, len(heading))}}"
        now = time.time()
        if self.first_step < step < self.max_steps:
            rate = (now - self.started) / (step - self.first_step)
            row += f"  {duration(rate * (self.max_steps - step)):>6}"
        tqdm.write(row.rstrip(), file=sys.stdout)
        self.printed = now

    def _save_if_best(self, step, results):
        """Keeps the best model so far for --select, by validation loss or by the judges' reward."""
        value = -results["validation/loss"]
        if self.select != "loss":
            value = results["validation/reward"]
        path = self._path("best.pt")
        if os.path.exists(path):
            best = load(path, BEST)
            if best["value"] >= value and best["step"] != step:
                return
        self._save(path, {"model": trained_state(self.model), "value": value, "step": step})

    def restore_selected(self):
        """Gives the model the weights that --select asks for, once training is over."""
        if self.select != "last":
            wait()
            best = load(self._path("best.pt"), BEST)
            load_whole(self.model, best["model"])
            print(f"--select={self.select}: the model of step {best['step']}")

    def finish(self):
        """Ends the run, after its model was written; others may use the folder from now on."""
        wait()
        self.bar.close()
        self._restore_handlers()
        if is_first():
            release(self.dir)
        compiled = f", {compiled_graphs()} graphs compiled" if self.compile else ""
        print(f"{self.max_steps - self.first_step} steps in {time.time() - self.started:.0f} s"
              f"{compiled} -> {self.dir}")

    # ---- stopping and resuming

    def _on_signal(self, number, frame):
        """Notes Ctrl-C or SIGTERM: the step is finished first. A second one ends the process at
        once."""
        self.stop_signal = number
        self._restore_handlers()

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _stop(self, step):
        self.save_state(step)
        self.bar.close()
        print(f"stopped after {step} steps; the same command with --resume goes on", flush=True)
        sys.exit(128 + (self.stop_signal or signal.SIGTERM))

    def save_state(self, step, reported=False):
        """Saves all that resuming needs in one file, so that its parts always belong together.
        reported: whether the evaluation before this step is logged already."""
        state = {"model": trained_state(self.model), "optimizer": self.optimizer.state_dict(),
                 "step": step, "reported": reported,
                 "window": [add_up_numbers(numbers) for numbers in self._numbers_of_window()],
                 "constants": self.constants, "rng": torch.get_rng_state()}
        if is_first():
            state["metrics"] = self._read_metrics()
        self._save(self._path("state.pt"), state)

    def _read_metrics(self):
        path = self._path("metrics.jsonl")
        if not os.path.exists(path):
            return ""
        with open(path, encoding="utf-8") as file:
            return file.read()

    def _write_metrics(self, text):
        path = self._path("metrics.jsonl")
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    def _save(self, path, state):
        state = whole(state, keep=is_first())
        if not is_first():
            return
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)     # which, given a name, would write it into the file

    def _load_state(self, flags):
        """Goes on from state.pt. Returns the text of metrics.jsonl up to there."""
        check_free(self.dir, resume=True)
        before = run_flags(self.dir)
        for name, value in flags.items():
            if name not in MAY_CHANGE and before.get(name) != json.loads(json.dumps(value)):
                raise InputError(f"--resume: --{name} was {before.get(name)!r} and is {value!r}; "
                                 "it has to stay the same")
        if is_first():
            claim(self.dir)
        path = self._path("state.pt")
        state = load(path, STATE)
        if not 0 <= state["step"] <= self.max_steps:
            raise InputError(of_another_version(path))
        if state["constants"] != self.constants:
            raise InputError("--resume: the reference, the data or the rewards have changed since "
                             "the run began; start it again")
        try:
            load_whole(self.model, state["model"], self.optimizer, state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.window = [{name: number / processes() for name, number in numbers.items()}
                           for numbers in state["window"]]
        except Exception as error:      # these parts may hold anything
            raise InputError(f"{of_another_version(path)} ({in_a_line(error)})") from error
        self.first_step = state["step"]
        if state["reported"]:
            self.reported = self.first_step
        print(f"resumed {self.dir} at step {self.first_step}")
        return state["metrics"]


# ------------------------------------------------------------------ on the screen


def count_parameters(model):
    """Writes how many parameters a model has, and how many of them are trained if not all are."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")


def print_prompt(number, text):
    """Prints a prompt under its number; of a long one the last four lines."""
    lines = textwrap.wrap(in_words(text), max(20, columns_of_terminal() - 16))
    if len(lines) > 4:
        lines = ["... " + lines[-4], *lines[-3:]]
    for start, line in zip([f"prompt {number}:", "", "", ""], lines):
        tqdm.write(f"{start:9}  {line}", file=sys.stdout)


def print_reply(number, reward, text):
    """Prints a reply in one line, cut to the terminal's width. number: its prompt's; reward: a
    number, or None."""
    reward = "" if reward is None else f"{reward:+.3g}"
    line = f"{number:7}  {reward:>5}  {in_words(text) or '(empty)'}"
    tqdm.write(line[:columns_of_terminal() - 1].rstrip(), file=sys.stdout)


def in_words(text):
    """Returns a text's words with one space between them. What could steer the terminal, as
    newlines do, is a space too."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def columns_of_terminal():
    """Returns the terminal's width in columns, or 100 where there is no terminal."""
    return shutil.get_terminal_size((100, 24)).columns


def duration(seconds):
    """Writes a time in the unit that suits it: "95 s", "12 min", "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------ saved states


def load(path, layout):
    """Reads a file of torch.save's onto the CPU. layout: {name: type} of what has to be in it.
    InputError if it is damaged or something else."""
    if os.path.exists(path) and not os.path.isfile(path):      # a FIFO would be waited for
        raise InputError(f"--resume: {path} is not a file")
    try:
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"--resume: {path} can't be read: {error.strerror}") from error
    except Exception as error:     # torch raises many kinds
        raise InputError(f"--resume: {path} is damaged ({type(error).__name__}); start again with "
                         "--overwrite") from error
    if not isinstance(state, dict) or state.keys() != layout.keys():
        raise InputError(of_another_version(path))
    for name, kind in layout.items():
        if not isinstance(state[name], kind):
            raise InputError(of_another_version(path))
    return state


def of_another_version(path):
    return (f"--resume: {path} is not what this version of nanoPref writes there; resume with the "
            "version that wrote it, or start again with --overwrite")


# ------------------------------------------------------------------ whose folder it is


def check_free(folder, resume=False, overwrite=False):
    """Raises InputError if a new run in this folder would overwrite something, if there is none to
    resume, or if another process is at work there. A run that never came to its first evaluation
    may be overwritten."""
    check_unused(folder)
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if resume and "state.pt" not in there:
        raise InputError(f"--resume: there is no state.pt in {folder!r}; leave --resume out to "
                         "start from the beginning")
    not_ours = "config.json" in there and LOCK not in there
    model = MODELS & there or "adapter_config.json" in there or not_ours
    if resume or overwrite or not ("state.pt" in there or model):
        return
    what = "a model" if model else "an unfinished run (go on with --resume)"
    raise InputError(f"--out_dir: {folder!r} holds {what}; name another folder, or --overwrite, "
                     "which sets the old one aside")


def check_unused(folder):
    """Raises InputError if another process writes to this folder. (Of several that torchrun has
    started, the first one writes, so that only it looks.)"""
    path, first = os.path.join(folder, LOCK), starts_as_first()
    if first and os.path.realpath(folder) not in claimed and os.path.exists(path):
        held = lock_folder(folder)
        if held is not None:
            os.close(held)


def claim(folder):
    """Makes a folder, for this process alone to write to, until it releases it or ends."""
    if os.path.realpath(folder) not in claimed:
        with naming_file(folder):
            os.makedirs(folder, exist_ok=True)
            open(os.path.join(folder, LOCK), "ab").close()
        claimed[os.path.realpath(folder)] = lock_folder(folder)


def lock_folder(folder):
    """Locks a run folder. Returns what `lock` does. InputError if another process has it."""
    try:
        return lock(os.path.join(folder, LOCK))
    except BlockingIOError:
        raise InputError(f"--out_dir: another process is at work in {folder!r}; wait for it, or "
                         "name another folder") from None
    except OSError as error:
        raise InputError(f"--out_dir: {folder!r} can't be used: {error.strerror}") from error


def release(folder):
    held = claimed.pop(os.path.realpath(folder))
    if held is not None:
        os.close(held)


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


# ------------------------------------------------------------------ what is in a folder


def run_flags(folder):
    """Returns the flags that a run was started with, from its config.json, or run.json with --lora;
    {} if it is no run of ours."""
    paths = [os.path.join(folder, name) for name in ("run.json", "config.json")]
    path = next(filter(os.path.exists, paths), None)
    flags = read_json(path).get("nanopref") or {} if path is not None else {}
    if not isinstance(flags, dict):
        raise InputError(f"{path}: 'nanopref' is not an object of flags")
    return flags


def family_folders(folders, flag="--rewards"):
    """Returns the folders of the reward models that `--rewards=A,B` means: each of these is one, or
    has one in each of its subfolders, which are sorted by name."""
    models = []
    for folder in folders.split(","):
        inside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        members = [os.path.join(folder, name) for name in inside]
        members = [member for member in members if holds_model(member)]
        if holds_model(folder):
            members = [folder]
        if not members:
            raise InputError(f"{flag}: no reward model in {folder!r}: train one with python "
                             f"train_rm.py --out_dir={folder}")
        models += members
    return models


def holds_model(folder):
    """Returns whether a folder holds a model, or a run that may have one."""
    names = ("config.json", "adapter_config.json", "run.json")
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


def models_named(folders, flag):
    """Returns `family_folders`; [] for None, and for a word that the flag takes instead."""
    words = {"--rewards": ["scores"], "--select": ["last", "loss", "oracle"]}
    return [] if folders in (None, *words.get(flag, [])) else family_folders(folders, flag)


def family_to_train(args):
    """Returns the members of train_rm.py's family, [(bias, run folder, resume?)]. InputError if
    there is nothing to resume, or if another reward model would join this family."""
    folders = {bias: os.path.join(args.out_dir, str(bias)) for bias in args.bias}
    begun = [folder for folder in folders.values()
             if os.path.exists(os.path.join(folder, "state.pt"))]
    if args.resume and not begun:
        raise InputError(f"--resume: there is no state.pt in {', '.join(folders.values())}; leave "
                         "--resume out")
    there = [args.out_dir]
    if os.path.isdir(args.out_dir):
        there += [os.path.join(args.out_dir, name) for name in sorted(os.listdir(args.out_dir))]
    for folder in there:
        if holds_model(folder) and folder not in folders.values():
            raise InputError(f"--out_dir: {folder} holds another reward model, which would join "
                             "this family; name another folder")
    return [(bias, folder, args.resume and folder in begun) for bias, folder in folders.items()]


def run_names(folders):
    """Returns {name: folder}: a run is called as its folder; if that name is taken, by its path."""
    names = {}
    for folder in folders:
        name = os.path.basename(os.path.normpath(folder))
        taken = name in names or name == "reference"
        names[folder if taken else name] = folder
    return names


# ------------------------------------------------------------------ --log


def log_package(name):
    """Imports what --log needs, an optional package. InputError says how to get it."""
    try:
        if name == "tensorboard":
            from torch.utils import tensorboard
            return tensorboard
        import wandb
        return wandb
    except ImportError as error:
        raise InputError(f"--log={name} needs {name}: pip install {name}") from error


def open_log(name, folder, flags, first_step):
    """Returns a function of (step, {name: number}) that shows a run's metrics in tensorboard or
    wandb; None without --log, and in all processes but the first.

    tensorboard reads them from the run folder. Where a run goes on or begins again, what was there
    from first_step on is no longer shown. At wandb every start is a run of its own, in one group.
    """
    if name is None or not is_first():
        return None
    package = log_package(name)
    os.makedirs(folder, exist_ok=True)
    if name == "tensorboard":
        writer = package.SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=first_step)

        def show(step, values):
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()      # an interrupted run has what it logged
        return show
    try:
        run = package.init(project="nanopref", name=folder, group=folder, dir=folder, config=flags,
                           reinit="finish_previous")    # the members of a family
    except package.Error as error:
        raise InputError(f"--log=wandb: {in_a_line(error)} (WANDB_MODE=offline needs no account)"
                         ) from error

    def log(step, values):
        run.log(values, step=step)
    return log
