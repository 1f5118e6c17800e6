"""The run folder of a training script: what it was started with, what was measured, and what
resuming needs. Also the line on the screen."""
import contextlib
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from support.device import compiled_graphs, compiles_every_shape, sync
from support.files import replacing, write_json
from support.flags import InputError
from support.logs import open_log
from support.processes import add_up_numbers, is_first, processes, progress_bar, wait

MAY_CHANGE = ("out_dir", "resume", "device", "compile", "log")  # flags that may differ on --resume
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
        if args.resume:
            self._resume(vars(args))
        self.also_log = open_log(vars(args).get("log"), self.dir, vars(args), self.first_step)
        if is_first() and not args.resume:
            os.makedirs(self.dir, exist_ok=True)
            for stale in ("model.safetensors", "state.pt", "best.pt", "metrics.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self._path(stale))
            write_json(self._path("config.json"), {"nanopref": vars(args)}, indent=2)
        wait()
        self.sums, self.window = {}, []     # of this step; of the steps since the last line
        self.started = self.printed = time.time()
        self.bar = progress_bar(total=args.max_steps, initial=self.first_step, desc=self.dir)

    def _path(self, name):
        return os.path.join(self.dir, name)

    # ---- in the loop

    def due(self, step):
        """Is there an evaluation before this step? Also before the first and after the last."""
        return step % self.eval_every == 0 or step == self.max_steps

    def watch(self, total, **values):
        """Adds values per example, (b,) of one micro-batch, to the means of this step. total: what
        the whole batch's sum is divided by."""
        for name, value in values.items():
            mean = (value.detach() / total).sum()
            self.sums[name] = self.sums.get(name, 0) + mean

    def end_step(self, step, **values):
        """After the optimizer's step. Every ten steps, and before an evaluation, a line of
        metrics.jsonl with the means since the last one: until then nothing waits for the device."""
        shares = {name: value / processes() for name, value in values.items()}  # the same in all
        self.window.append({**self.sums, **shares})
        self.sums = {}
        sync(self.device)
        self.bar.update()
        if (step + 1) % LOG_EVERY == 0 or self.due(step + 1):
            means = {}
            for name in self.window[0]:
                means[name] = sum(sums[name].item() for sums in self.window) / len(self.window)
            means = add_up_numbers(means)
            self.log(step, means)
            self.window = []
            if self.bar.disable and time.time() > self.printed + 30:       # there is no terminal
                self._print(step + 1, {"loss": means["loss"]})

    def report(self, step, results):
        """Logs and prints what an evaluation measured, and saves the state."""
        self.log(step, results)
        if self.select != "last" and step > 0:
            self._save_if_best(step, results)
        self.save_state(step)
        shown = {name: value for name, value in results.items()
                 if name.endswith(("loss", "accuracy", "chosen_change", "reward"))}
        self._print(step, shown)

    def log(self, step, values):
        """One line of metrics.jsonl. No times in it: the same seed gives the same bytes."""
        if not all(map(math.isfinite, values.values())):
            raise InputError(f"--lr: training diverged before step {step}: {values}; try a lower "
                             "learning rate")
        if is_first():
            with open(self._path("metrics.jsonl"), "a", encoding="utf-8") as file:
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
            best = torch.load(path, map_location="cpu", weights_only=True)
            if best["value"] >= value and best["step"] != step:
                return
        self._save(path, {"model": self.model.state_dict(), "value": value, "step": step})

    def restore_selected(self):
        """Gives the model the weights that --select asks for, once training is over."""
        if self.select != "last":
            wait()
            best = torch.load(self._path("best.pt"), map_location="cpu", weights_only=True)
            self.model.load_state_dict(best["model"])
            print(f"--select={self.select}: the model of step {best['step']}")

    def finish(self):
        wait()          # the model is written
        self.bar.close()
        compiled = f", {compiled_graphs()} graphs compiled" if self.compile else ""
        print(f"{self.max_steps - self.first_step} steps in {time.time() - self.started:.0f} s"
              f"{compiled} -> {self.dir}")

    # ---- resuming

    def save_state(self, step):
        """In one file, so that weights and optimizer always belong together."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "step": step, "constants": self.constants, "rng": torch.get_rng_state()}
        self._save(self._path("state.pt"), state)

    def _save(self, path, state):
        if not is_first():
            return
        if compiles_every_shape(self.device):       # its tensors can be read by torch_xla alone
            state = on_cpu(state)
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def _resume(self, flags):
        before = run_flags(self.dir)
        if not os.path.exists(self._path("state.pt")):
            raise InputError(f"--resume: there is no state.pt in {self.dir!r}; leave --resume out "
                             "to start from the beginning")
        for name, value in flags.items():
            if name not in MAY_CHANGE and before.get(name) != json.loads(json.dumps(value)):
                raise InputError(f"--resume: --{name} was {before.get(name)!r} and is {value!r}; "
                                 "it has to stay the same")
        try:
            state = torch.load(self._path("state.pt"), map_location="cpu", weights_only=True)
            with open(self._path("metrics.jsonl"), encoding="utf-8") as file:
                lines = file.readlines()
        except Exception as error:     # torch raises many kinds for a damaged file
            raise InputError(f"--resume: state.pt or metrics.jsonl in {self.dir!r} is missing or "
                             "damaged; leave --resume out to start from the beginning "
                             f"({type(error).__name__})") from error
        if state["constants"] != self.constants:
            raise InputError("--resume: the reference, the data or the rewards have changed since "
                             "the run began; start it again")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.first_step = state["step"]
        # What was logged after the saved state will be logged again.
        wait()
        if is_first():
            self._keep_metrics(lines)
        print(f"resumed {self.dir} at step {self.first_step}")

    def _keep_metrics(self, lines):
        with replacing(self._path("metrics.jsonl")) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                for line in lines:
                    if line.endswith("\n") and json.loads(line)["step"] < self.first_step:
                        file.write(line)


def on_cpu(state):
    """A copy of nested dictionaries and lists with every tensor on the CPU."""
    if isinstance(state, dict):
        return {name: on_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value) for value in state]
    return state.cpu() if torch.is_tensor(state) else state


def run_flags(folder):
    """The flags that a run was started with, from its config.json; {} if it is no run of ours."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            flags = json.load(file).get("nanopref") or {}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path}: 'nanopref' is not an object of flags")
    return flags


def check_same_tokens(what, folder, config, policy_config, tokenizer):
    """InputError if the model in a run folder can't read what the policy writes: another tokenizer,
    a smaller vocabulary, shorter texts. what: the beginning of the message; config,
    policy_config: a GPTConfig each; tokenizer: the name of the policy's."""
    trained_with = run_flags(folder).get("tokenizer", tokenizer)
    if trained_with != tokenizer:
        raise InputError(f"{what} reads {trained_with} tokens, the policy {tokenizer} tokens")
    for name in ("vocab_size", "block_size"):
        size, needed = getattr(config, name), getattr(policy_config, name)
        if size < needed:
            raise InputError(f"{what} has {name} {size}, the policy {needed}")


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
