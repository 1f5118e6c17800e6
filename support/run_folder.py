"""The run folder of a training script: what it was started with, what was measured, and what
resuming needs. Also the line on the screen."""
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time

import torch
from tqdm import tqdm

from support.device import compiled_graphs, sync
from support.files import check_zip, naming_file, remove_leftovers, replacing, write_json
from support.flags import InputError
from support.folders import check_free, claim, release, set_aside
from support.logs import open_log
from support.processes import add_up_numbers, any_of, is_first, processes, progress_bar, wait
from support.sharding import full, load_whole, whole

# flags that may differ on --resume
MAY_CHANGE = ("out_dir", "resume", "overwrite", "device", "compile", "fsdp", "log",
              "gradient_checkpointing")
# what is in state.pt and best.pt
STATE = {"model": dict, "optimizer": dict, "step": int, "reported": bool, "window": list,
         "constants": str, "rng": torch.Tensor, "metrics": dict}
BEST = {"model": dict, "value": float, "step": int}
LOG_EVERY = 10                                              # steps


class Run:
    """config.json (the flags, under "nanopref"), metrics.jsonl, and state.pt for resuming.

    constants: a hash of what training takes as given (reference, data, rewards), which has to be
    the same on --resume. `first_step` is 0, or where a resumed run goes on.
    """

    def __init__(self, args, model, optimizer, constants):
        self.dir, self.constants = args.out_dir, constants
        self.model, self.optimizer = model, optimizer
        self.max_steps, self.eval_every, self.first_step = args.max_steps, args.eval_every, 0
        self.select = vars(args).get("select", "last")
        self.compile = vars(args).get("compile", False)
        self.device = next(model.parameters()).device
        self.sums, self.window = {}, []     # of this step; of the steps since the last line
        self.reported = None                # the step whose evaluation is in the resumed state
        if args.resume:
            self._resume(vars(args))
        self.also_log = open_log(vars(args).get("log"), self.dir, vars(args), self.first_step)
        if is_first() and not args.resume:
            self._begin(vars(args))
        wait()
        self.stop_signal, self.handlers = None, {}
        with contextlib.suppress(ValueError):       # only the main thread can have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)
        self.started = self.printed = time.time()
        self.bar = progress_bar(total=args.max_steps, initial=self.first_step, desc=self.dir)

    def _path(self, name):
        return os.path.join(self.dir, name)

    def _begin(self, flags):
        check_free(self.dir, overwrite=flags.get("overwrite", False))
        claim(self.dir)
        if flags.get("overwrite"):
            set_aside(self.dir)
        remove_leftovers(self.dir)
        for name in ("best.pt", "metrics.jsonl"):   # of a run that never came to a state.pt
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._path(name))
        write_json(self._path("config.json"), {"nanopref": flags}, indent=2)

    # ---- in the loop

    def due(self, step):
        """Is there an evaluation before this step? Also before the first and after the last."""
        return step != self.reported and (step % self.eval_every == 0 or step == self.max_steps)

    def watch(self, total, **values):
        """Adds values per example, (b,) of one micro-batch, to the means of this step. total: what
        the whole batch's sum is divided by."""
        for name, value in values.items():
            mean = (value.detach() / total).sum()
            self.sums[name] = self.sums.get(name, 0) + mean

    def end_step(self, step, rows, **values):
        """After the optimizer's step, on these rows of the training set. Every ten steps, and
        before an evaluation, a line of metrics.jsonl with the means since the last one: until then
        nothing waits for the device. Then, too, it is seen whether all numbers are finite."""
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
            means = add_up_numbers(means)
            self.log(step, means)
            self.window = []
            if self.bar.disable and time.time() > self.printed + 30:       # there is no terminal
                self._print(step + 1, {"loss": means["loss"]})
        if processes() == 1 or logs:        # several have to talk about it, which takes time
            if any_of(self.stop_signal):
                self._stop(step + 1)

    def _numbers_of_window(self):
        """What was watched in each step since the last line of metrics.jsonl: [{name: number}].
        InputError for the first step in which one is not finite."""
        steps = []
        for watched in self.window:
            numbers = {name: float(value) for name, value in watched.items()
                       if name not in ("step", "rows")}
            if not all(map(math.isfinite, numbers.values())):
                raise self._diverged(watched["step"], numbers, watched["rows"])
            steps.append(numbers)
        return steps

    def _diverged(self, step, numbers, rows=()):
        """The InputError for numbers that are not finite."""
        where = f"at step {step} "
        if len(rows):
            where += f"(training rows {' '.join(map(str, sorted(rows)))}) "
        where += ", ".join(f"{name} is {value}" for name, value in numbers.items()
                           if not math.isfinite(value))
        if step == 0:
            return InputError(f"--rewards, --beta, --gamma: too large: {where}")
        return InputError(f"--lr: training diverged: {where}; try a lower learning rate; "
                          f"{self._path('state.pt')} is the last good state")

    def report(self, step, results):
        """Logs and prints what an evaluation measured, and saves the state."""
        self.log(step, results)
        if self.select != "last" and step > 0:
            self._save_if_best(step, results)
        self.save_state(step, reported=True)
        shown = {name: value for name, value in results.items()
                 if name.endswith(("loss", "accuracy", "chosen_change", "reward", "unended"))}
        self._print(step, shown)

    def log(self, step, values):
        """One line of metrics.jsonl. No times in it: the same seed gives the same bytes."""
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(step, values)
        if is_first():
            path = self._path("metrics.jsonl")
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.also_log:
            self.also_log(step, values)

    def _print(self, step, values):
        rate = (time.time() - self.started) / max(1, step - self.first_step)
        line = f"step {step:5d}  " + "  ".join(f"{name} {v:.4f}" for name, v in values.items())
        if step > self.first_step:
            line += f"  lr {self.optimizer.param_groups[0]['lr']:.1e}"
        if self.first_step < step < self.max_steps:
            line += f"  {rate * (self.max_steps - step):.0f} s left"
        tqdm.write(line, file=sys.stdout)
        self.printed = time.time()

    def _save_if_best(self, step, results):
        """--select: best.pt is the best model so far, by validation loss or by its judges."""
        value = -results["validation/loss"]
        if self.select != "loss":
            value = results["validation/reward"]
        path = self._path("best.pt")
        if os.path.exists(path):
            best = load(path, BEST)
            if best["value"] >= value and best["step"] != step:
                return
        self._save(path, {"model": self.model.state_dict(), "value": value, "step": step})

    def restore_selected(self):
        """Gives the model the weights that --select asks for, once training is over."""
        if self.select != "last":
            wait()
            best = load(self._path("best.pt"), BEST)
            load_whole(self.model, best["model"])
            print(f"--select={self.select}: the model of step {best['step']}")

    def finish(self):
        wait()          # the model is written
        self.bar.close()
        self._restore_handlers()
        if is_first():
            release(self.dir)
        compiled = f", {compiled_graphs()} graphs compiled" if self.compile else ""
        print(f"{self.max_steps - self.first_step} steps in {time.time() - self.started:.0f} s"
              f"{compiled} -> {self.dir}")

    # ---- stopping and resuming

    def _on_signal(self, number, frame):
        """Ctrl-C or SIGTERM: the step is finished first. A second one acts as always."""
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
        """In one file, so that weights and optimizer always belong together. reported: is the
        evaluation before this step in it?"""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "step": step, "reported": reported,
                 "window": [add_up_numbers(numbers) for numbers in self._numbers_of_window()],
                 "constants": self.constants, "rng": torch.get_rng_state()}
        if is_first():
            state["metrics"] = describe(self._metrics())
        self._save(self._path("state.pt"), state)

    def _metrics(self, size=None):
        """What is in metrics.jsonl, or its first bytes."""
        path = self._path("metrics.jsonl")
        if not os.path.exists(path):
            return b""
        with open(path, "rb") as file:
            return file.read(size)

    def _save(self, path, state):
        state = whole(state, keep=is_first())
        if not is_first():
            return
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)     # which, given a name, would write it into the file

    def _resume(self, flags):
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
        try:
            logged = self._take(state)
        except InputError:
            raise
        except Exception as error:      # what is in it may be anything
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{of_another_version(path)} ({reason})") from error
        self.first_step = state["step"]
        if state["reported"]:
            self.reported = self.first_step
        wait()
        if is_first():
            remove_leftovers(self.dir)
            # What was logged after the saved state will be logged again.
            path = self._path("metrics.jsonl")
            with replacing(path) as temporary, open(temporary, "wb") as file:
                file.write(logged)
        print(f"resumed {self.dir} at step {self.first_step}")


    def _take(self, state):
        """Goes on from a state: fills the model, the optimizer, the random numbers and the window.
        Returns what of metrics.jsonl belongs to it, as bytes."""
        logged = self._metrics(state["metrics"]["bytes"])
        if describe(logged) != state["metrics"]:
            raise InputError(f"--resume: {self._path('metrics.jsonl')} is damaged: it does not "
                             "begin with what the run logged; start again with --overwrite")
        if state["constants"] != self.constants:
            raise InputError("--resume: the reference, the data or the rewards have changed since "
                             "the run began; start it again")
        load_whole(self.model, state["model"], self.optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.window = [{name: number / processes() for name, number in numbers.items()}
                       for numbers in state["window"]]
        return logged


def describe(content):
    """By which some bytes are known again."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def load(path, layout):
    """What torch.save wrote, on the CPU: a dictionary of {name: type}. InputError if it is damaged
    or of another layout."""
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


def run_flags(folder):
    """The flags that a run was started with, from its config.json; {} if it is no run of ours."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            flags = json.load(file).get("nanopref") or {}
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path}: 'nanopref' is not an object of flags")
    return flags


def family_folders(folders, flag="--rewards"):
    """The reward models that `--rewards=A,B` means: each folder is one (it holds a config.json) or
    has one in each of its subfolders. Returns their folders, sorted by name within a family."""
    models = []
    for folder in folders.split(","):
        inside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        members = [os.path.join(folder, name) for name in inside]
        members = [member for member in members if os.path.exists(f"{member}/config.json")]
        if "config.json" in inside:
            members = [folder]
        if not members:
            raise InputError(f"{flag}: no reward model in {folder!r}: train one with python "
                             f"train_rm.py --out_dir={folder}")
        models += members
    return models


def models_named(folders, flag):
    """family_folders; none for None, and for a word that the flag takes in their place."""
    words = {"--rewards": ["scores"], "--select": ["last", "loss", "oracle"]}
    return [] if folders in (None, *words.get(flag, [])) else family_folders(folders, flag)


def family_to_train(args):
    """The run folders of the members of train_rm.py's family: [(bias, folder, resume?)]. InputError
    if there is nothing to resume, or if another reward model would join this family."""
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
        is_model = os.path.exists(os.path.join(folder, "config.json"))
        if is_model and folder not in folders.values():
            raise InputError(f"--out_dir: {folder} holds another reward model, which would join "
                             "this family; name another folder")
    return [(bias, folder, args.resume and folder in begun) for bias, folder in folders.items()]


def run_names(folders):
    """{name: folder}: a run is called as its folder; where two are called alike, by their paths."""
    names = {}
    for folder in folders:
        name = os.path.basename(os.path.normpath(folder))
        taken = name in names or name == "reference"
        names[folder if taken else name] = folder
    return names
