"""Keeps the folder of a training run: its flags, its metrics, and the state from which it can be
resumed. Prints the run's table on the screen. Tells other scripts what is in such folders. Writes
files either whole or not at all."""
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import textwrap
import time
import zipfile

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from support.device import (
    PROCESSES,
    RANK,
    add_up,
    load_whole,
    progress_bar,
    sync,
    trained_state,
    wait,
    whole_on_cpu,
)
from support.flags import InputError, in_a_line

try:
    import fcntl
except ImportError:     # Windows has no such locks
    fcntl = None

# Flags that may be changed with --resume
MAY_CHANGE = ("out_dir", "resume", "device", "compile", "fsdp", "gradient_checkpointing")
LOG_EVERY = 10                                              # steps
# The columns on the screen, docs/glossary.md: {heading: (name in metrics.jsonl, format)}
SHOWN = {"loss": ("loss", ".4f"),
         "val/loss": ("validation/loss", ".4f"),
         "train/acc": ("train/accuracy", ".3f"),
         "val/acc": ("validation/accuracy", ".3f"),
         "train/chosen": ("train/chosen_change", ".2f"),
         "val/chosen": ("validation/chosen_change", ".2f"),
         "train/good": ("train/desirable_change", ".2f"),
         "train/bad": ("train/undesirable_change", ".2f"),
         "val/good": ("validation/desirable_change", ".2f"),
         "val/bad": ("validation/undesirable_change", ".2f"),
         "reward": ("validation/reward", ".2f")}
# What is in state.pt and in best.pt
STATE = {"model", "optimizer", "step", "reported", "window", "constants", "rng", "metrics"}
BEST = {"model", "value", "step"}
LOCK = ".lock"          # an empty file, locked by the process that writes to its folder
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")      # the names that `replacing` gives
A_DAY = 24 * 60 * 60
MODELS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}


class Run:
    """Keeps a training run in its folder. config.json (with --lora run.json) has its flags, under
    "nanopref"; metrics.jsonl has its numbers, and state.pt all that resuming needs.

    constants: a hash of what training and --select take as given (reference, data, rewards,
    judges). It has to be the same on --resume. `first_step` is 0, or the step from which a resumed
    run continues.
    """

    def __init__(self, args, model, optimizer, constants):
        flags = vars(args)
        self.dir, self.constants = args.out_dir, constants
        self.model, self.optimizer = model, optimizer
        self.max_steps, self.eval_every, self.first_step = args.max_steps, args.eval_every, 0
        self.select = flags.get("select", "last")
        self.device = next(model.parameters()).device
        self.sums, self.window = {}, []     # of this step; of the steps since the last line
        self.means, self.columns = {}, []   # the last line's; the headings on the screen
        self.metrics = ""                   # the text of metrics.jsonl
        self.reported = None                # the step whose evaluation is in the resumed state
        self.metrics_path = os.path.join(self.dir, "metrics.jsonl")
        self.state_path = os.path.join(self.dir, "state.pt")
        self.best_path = os.path.join(self.dir, "best.pt")
        if RANK == 0:
            check_free(self.dir, args.resume)
            self.lock = lock_folder(self.dir)
        if args.resume:
            self._resume(flags)
        elif RANK == 0:
            for name in ("best.pt", "metrics.jsonl", "config.json", "run.json"):
                with contextlib.suppress(FileNotFoundError):    # left by a run without a state yet
                    os.remove(os.path.join(self.dir, name))
            name = "run.json" if flags.get("lora") else "config.json"
            write_json(os.path.join(self.dir, name), {"nanopref": flags}, indent=2)
        wait()
        self.stop_signal, self.handlers = None, {}
        with contextlib.suppress(ValueError):       # only the main thread can have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)
        self.started = self.printed = time.time()
        self.bar = progress_bar(total=args.max_steps, initial=self.first_step, desc=self.dir)

    # ---- in the loop

    def due(self, step):
        """Says whether to evaluate before this step. An evaluation is due every eval_every steps,
        before the first step and after the last."""
        return step != self.reported and (step % self.eval_every == 0 or step == self.max_steps)

    def watch(self, total, **values):
        """Adds values of a micro-batch to the means of this step. values: {name: a tensor with a
        number for each row or pair}. total: what the sum over the whole batch is divided by."""
        for name, value in values.items():
            mean = (value.detach() / total).sum()
            self.sums[name] = self.sums.get(name, 0) + mean

    def end_step(self, step, rows, **values):
        """Ends an optimizer step. rows: the training rows that it used. values: more
        numbers to log. Only every ten steps, and before an evaluation, does this wait for the
        device: then the numbers are checked, and their means since the last line are logged."""
        self.window.append({"step": step, "rows": rows, "sums": self.sums, "same": values})
        self.sums = {}
        if self.device.type == "xla":
            sync()
        self.bar.update()
        logs = (step + 1) % LOG_EVERY == 0 or self.due(step + 1)
        if logs:
            steps = self._numbers_of_window()
            means = {name: sum(numbers[name] for numbers in steps) / len(steps)
                     for name in steps[0]}
            self.means = add_up(means)
            self.log(step, self.means)
            self.window = []
            if self.bar.disable and time.time() > self.printed + 30:       # there is no terminal
                self._print(step + 1, {})
        told = self.stop_signal is not None
        if PROCESSES > 1:       # asking the other processes takes time: only when a line is logged
            told = logs and add_up({"told": told})["told"] > 0
        if told:
            self._stop(step + 1)

    def _numbers_of_window(self):
        """Returns this process's numbers of each step since the last line of metrics.jsonl,
        [{name: number}]. InputError for the first one that is not finite."""
        steps = []
        for watched in self.window:
            numbers = {name: float(value) for name, value in watched["sums"].items()}
            for name, value in watched["same"].items():         # which all processes have
                value = value.full_tensor() if isinstance(value, DTensor) else value
                numbers[name] = float(value) / PROCESSES
            self._check_finite(watched["step"], numbers, watched["rows"])
            steps.append(numbers)
        return steps

    def _check_finite(self, step, numbers, rows=()):
        """Raises InputError if one of {name: number} is not finite."""
        wrong = [f"{name} is {value}" for name, value in numbers.items()
                 if not math.isfinite(value)]
        if not wrong:
            return
        where = f"at step {step} "
        if len(rows):
            where += f"(training rows {' '.join(map(str, sorted(rows)))}) "
        where += ", ".join(wrong)
        if step == 0:
            raise InputError(f"--rewards, --beta, --gamma: too large: {where}; if they are not, "
                             "the loss itself gives no number")
        raise InputError(f"--lr: training diverged: {where}; try a lower learning rate; "
                         f"{self.state_path} is the last good state")

    def report(self, step, results):
        """Logs and prints what an evaluation measured, {name: number}, and saves the state."""
        self.log(step, results)
        if self.select != "last" and step > 0:
            self._save_if_best(step, results)
        self.save_state(step, reported=True)
        self._print(step, results)

    def log(self, step, values):
        """Adds a line to metrics.jsonl. No times are in it, so that the same seed gives the same
        bytes."""
        self._check_finite(step, values)
        line = json.dumps({"step": step, **values}) + "\n"
        if RANK == 0:
            with (naming_file(self.metrics_path),
                  open(self.metrics_path, "a", encoding="utf-8") as file):
                file.write(line)
        self.metrics += line

    def _print(self, step, results):
        """Prints a row of the table, with what an evaluation measured and the time left."""
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
        if os.path.exists(self.best_path):
            best = load(self.best_path, BEST)
            if best["value"] >= value and best["step"] != step:
                return
        save(self.best_path, {"model": trained_state(self.model), "value": value, "step": step})

    def restore_selected(self):
        """Gives the model the weights that --select asks for, once training is over."""
        if self.select != "last":
            wait()
            best = load(self.best_path, BEST)
            load_whole(self.model, best["model"])
            print(f"--select={self.select}: the model of step {best['step']}")

    def finish(self):
        """Ends the run, after its model was written. From now on others may write to the folder."""
        wait()
        self.bar.close()
        self._restore_handlers()
        if RANK == 0:
            self.lock.close()
        print(f"{self.max_steps - self.first_step} steps in {time.time() - self.started:.0f} s"
              f" -> {self.dir}")

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
        save(self.state_path, {
            "model": trained_state(self.model), "optimizer": self.optimizer.state_dict(),
            "step": step, "reported": reported, "metrics": self.metrics,
            "window": [add_up(numbers) for numbers in self._numbers_of_window()],
            "constants": self.constants, "rng": torch.get_rng_state()})

    def _resume(self, flags):
        """Continues from state.pt, with metrics.jsonl as it was then. InputError if this is another
        run, or if the state can't be used."""
        before = run_flags(self.dir)
        for name, value in flags.items():
            if name not in MAY_CHANGE and before.get(name) != json.loads(json.dumps(value)):
                raise InputError(f"--resume: --{name} was {before.get(name)!r} and is {value!r}; "
                                 "it has to stay the same")
        state = load(self.state_path, STATE)
        if state["constants"] != self.constants:
            raise InputError("--resume: the reference, the data or the rewards have changed since "
                             "the run began; start it again")
        try:
            load_whole(self.model, state["model"], self.optimizer, state["optimizer"])
            torch.set_rng_state(state["rng"])
            for numbers in state["window"]:
                shares = {name: number / PROCESSES for name, number in numbers.items()}
                self.window.append({"step": None, "rows": (), "sums": shares, "same": {}})
            self.metrics += state["metrics"]
            self.first_step = state["step"]
            if not 0 <= self.first_step <= self.max_steps:
                raise ValueError
        except Exception as error:      # these parts may hold anything
            raise another_version(self.state_path) from error
        if state["reported"]:
            self.reported = self.first_step
        if RANK == 0:
            with (replacing(self.metrics_path) as temporary,
                  open(temporary, "w", encoding="utf-8") as file):
                file.write(self.metrics)
        print(f"resumed {self.dir} at step {self.first_step}")


# ------------------------------------------------------------------ saved states


def save(path, state):
    """Writes nested dictionaries and lists of tensors and numbers to a file, by torch.save."""
    state = whole_on_cpu(state, keep=RANK == 0)
    if RANK == 0:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)     # which, given a name, would write it into the file


def load(path, names):
    """Reads a file that `save` has written onto the CPU: a dictionary with these names. InputError
    if the file is damaged or something else."""
    if os.path.exists(path) and not os.path.isfile(path):      # a FIFO would be waited for
        raise InputError(f"--resume: {path} is not a file")
    try:
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"--resume: {path} can't be read: {error.strerror}") from error
    except Exception as error:     # torch raises many kinds
        raise InputError(f"--resume: {path} is damaged ({type(error).__name__}); remove the "
                         "folder, and start again without --resume") from error
    if not isinstance(state, dict) or state.keys() != names:
        raise another_version(path)
    return state


def another_version(path):
    """Returns the InputError for a file that another version of `save` may have written."""
    return InputError(f"--resume: {path} is not what this version of nanoPref writes there; resume "
                      "with the version that wrote it, or remove the folder and start again")


# ------------------------------------------------------------------ on the screen


def count_parameters(model):
    """Returns a text that says how many parameters a model has, and, if not all of them are
    trained, how many are."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")


def print_prompt(number, text):
    """Prints a prompt after its number. Of a long one, prints the last four lines."""
    width = shutil.get_terminal_size((100, 24)).columns         # 100 where there is no terminal
    lines = textwrap.wrap(in_words(text), max(20, width - 16))
    if len(lines) > 4:
        lines = ["... " + lines[-4], *lines[-3:]]
    for start, line in zip([f"prompt {number}:", "", "", ""], lines):
        tqdm.write(f"{start:9}  {line}", file=sys.stdout)


def print_reply(number, reward, text):
    """Prints a reply in one line, cut to the terminal's width. number: its prompt's; reward: a
    number, or None."""
    width = shutil.get_terminal_size((100, 24)).columns
    reward = "" if reward is None else f"{reward:+.3g}"
    line = f"{number:7}  {reward:>5}  {in_words(text) or '(empty)'}"
    tqdm.write(line[:width - 1].rstrip(), file=sys.stdout)


def in_words(text):
    """Returns a text's words with one space between them. Characters that could steer the terminal,
    such as newlines, become spaces too."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def duration(seconds):
    """Writes a time in the unit that suits it: "95 s", "12 min", "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------ whose folder it is


def check_free(folder, resume=False):
    """Raises InputError if a new run in this folder would overwrite something, or with `resume` if
    there is no run to resume. A run that never came to its first evaluation may be overwritten."""
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if resume:
        if "state.pt" not in there:
            raise InputError(f"--resume: there is no state.pt in {folder!r}; leave --resume out to "
                             "start from the beginning")
        return
    models = {*MODELS, "adapter_config.json"}
    model = models & there or "config.json" in there and LOCK not in there
    if model or "state.pt" in there:
        what = "a model" if model else "an unfinished run (go on with --resume)"
        raise InputError(f"--out_dir: {folder!r} holds {what}; name another folder, or remove this "
                         "one")


def lock_folder(folder):
    """Makes a folder that only this process may write to, and removes what a killed one has left
    unfinished there. Returns a file; closing it lets others write. InputError if another process
    is at work in the folder."""
    with naming_file(folder):
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, LOCK), "ab")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out_dir: another process is at work in {folder!r}; wait for it, or "
                         "name another folder") from None
    except OSError:     # the file system has no locks, which is no reason not to train there
        pass
    remove_leftovers(folder, age=0)
    return file


# ------------------------------------------------------------------ what is in a folder


def run_flags(folder):
    """Returns the flags that a run was started with, from its config.json, or with --lora from its
    run.json. Returns {} if the folder is not a run of ours."""
    paths = [os.path.join(folder, name) for name in ("run.json", "config.json")]
    path = next(filter(os.path.exists, paths), None)
    flags = read_json(path).get("nanopref") or {} if path is not None else {}
    if not isinstance(flags, dict):
        raise InputError(f"{path}: 'nanopref' is not an object of flags")
    return flags


def family_folders(folders, flag="--rewards"):
    """Returns the folders of the reward models that `--rewards=A,B` stands for. Each of A and B is
    a reward model, or a family with one in each of its subfolders, which are sorted by name. Words
    that the flag takes instead of folders, and None, stand for no reward model: []."""
    models, words = [], {"--rewards": ["scores"], "--select": ["last", "loss", "oracle"]}
    if folders in (None, *words.get(flag, [])):
        return []
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
    """Names runs: each has the name of its folder, or its path as it was given if that name is
    taken, or else its whole path. Returns {name: folder}."""
    names = {}
    for folder in folders:
        name = os.path.basename(os.path.normpath(folder))
        for longer_name in (folder, os.path.abspath(folder)):
            if name in names or name == "reference":
                name = longer_name
        names[name] = folder
    return names


# ------------------------------------------------------------------ files that are written whole


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name, to write a file to. When the block ends, what was written is on the
    disk and gets the name `path`; if the block fails, nothing is left. InputError names the file if
    the system can't write it, because the disk is full for example."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"    # two processes may write the same file
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)     # as of any new file: safetensors makes it private
        with open(temporary, "rb") as file:
            os.fsync(file)
        os.replace(temporary, path)
    except InputError:
        raise
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        raise InputError(f"{path}: can't be written: {reason}") from error
    finally:
        remove(temporary)


def system_reason(error):
    """Returns why the system could not write, such as "No space left on device"; None if the error
    is of another kind. torch and safetensors each have their own way to say it."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)     # numpy says how much it could write
        in_rust = re.search(r"\(os error (\d+)\)", str(error))
        if in_rust:
            return os.strerror(int(in_rust[1]))
        error = error.__context__
    return None


@contextlib.contextmanager
def naming_file(path):
    """Turns the system's refusal to write a file into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror or error}") from error


def remove_leftovers(folder, age=A_DAY):
    """Removes files that killed processes did not finish writing by `replacing`: those that nobody
    has written to for `age` seconds, by default a day."""
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):      # gone already, or somebody else's
                if TEMPORARY.search(name) and os.stat(path).st_mtime <= time.time() - age:
                    remove(path)


def remove(path):
    """Removes a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def write_json(path, value, indent=None):
    """Writes a JSON file. ValueError for NaN and infinity, which JSON does not have."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, allow_nan=False)
        file.write("\n")


def read_json(path):
    """Returns the object in a JSON file, a dict. InputError if there is none."""
    try:
        with open(path, "rb") as file:
            return json_object(file.read(), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def json_object(content, path):
    """Returns the object in the content of a JSON file, bytes, as a dict. InputError names the file
    if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {in_a_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def check_zip(path):
    """Raises ValueError if a zip file is not as it was written: torch.save's files are zip files,
    whose checksums torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"{damaged} is not what its checksum says")
