"""Counts what a reader of e-DPO's first optimizer step may have to read: the functions that run.

    python dev/first_step.py             # how many functions, in which files
    python dev/first_step.py --list      # and their names

A profiler hook notes every function of this repository that is called from train_policy.main to the
first step of AdamW, with empty caches, and again from there to the second step: the loop alone.
Methods count as functions; lambdas and comprehensions belong to the function around them.
"""
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_policy  # noqa: E402
import train_rm  # noqa: E402
from support.flags import Parser, run_script  # noqa: E402

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=192"]


def prepare():
    """Trains a tiny reference and a family of two reward models in the current folder. Returns the
    flags of e-DPO's run, which has two steps and evaluates before and after them."""
    common = ["--n_eval=16", "--max_new_tokens=64"]
    train_policy.main(["--loss=sft", "--max_steps=2", "--n_eval=16", *SMALL])
    data = ["--rho=all", "--n_pairs=32", "--pool=64", "--n_eval=16", "--batch_size=16"]
    train_rm.main(["--rho=0.5", "--n_pairs=4", "--pool=300", "--bias=0.25,0.75", "--max_steps=2",
                   "--n_eval=4", "--batch_size=2"])
    return ["--loss=e-dpo", *data, *common[1:], "--max_steps=3", "--eval_every=3"]


def record(flags):
    """Runs train_policy.main. Returns the functions, as (file, line, name, characters), that ran
    before the first step of the optimizer and those that ran from there to the second."""
    phases, current, step = [], set(), torch.optim.AdamW.step

    def note(frame, event, argument):
        code = frame.f_code
        path = code.co_filename
        ours = path.startswith(str(ROOT)) and ".venv" not in path and path != __file__
        if event == "call" and ours and not code.co_name.startswith("<"):
            current.add(code)

    def counted_step(self, *args, **options):
        phases.append(set(current))
        current.clear()
        return step(self, *args, **options)

    torch.optim.AdamW.step = counted_step
    sys.setprofile(note)
    try:
        train_policy.main(flags)
    finally:
        sys.setprofile(None)
        torch.optim.AdamW.step = step
    return phases[0], phases[1]


def characters(code):
    """Counts the characters of a function's source."""
    lines = Path(code.co_filename).read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(line for _, _, line in code.co_lines() if line) if code.co_lines() else 0
    return sum(map(len, lines[code.co_firstlineno - 1:last]))


def show(title, functions, names):
    """Prints how many functions ran in how many files, and with `names` which."""
    files = {}
    for code in functions:
        files.setdefault(str(Path(code.co_filename).relative_to(ROOT)), []).append(code)
    size = sum(map(characters, functions))
    print(f"{title}: {len(functions)} functions in {len(files)} files, {size:,} characters")
    for file, own in sorted(files.items()):
        line = f"  {file} {len(own)}"
        if names:
            own = sorted(own, key=lambda code: code.co_firstlineno)
            line += ": " + ", ".join(code.co_name for code in own)
        print(line)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--list", action="store_true", help="print the names of the functions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["NANOPREF_CACHE"] = folder
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            before, loop = record(prepare())
    show("up to the first step", before, args.list)
    show("the loop alone", loop, args.list)


if __name__ == "__main__":
    run_script(main)
