"""Which test fails first, and what it says, in a copy of the repository with a mistake in it.

It imports nothing of the repository, so that its processes start without it.
"""
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ["README.md", "pyproject.toml", "docs", "runs", "support", "tests",
          *sorted(path.name for path in ROOT.glob("*.py"))]
SECONDS = 240               # a mistake may well make a loop endless
PRELOADED = ["torch", "numpy", "pytest", "hypothesis", "tiktoken", "safetensors.torch", "sympy"]


class Recorder:
    """A pytest plugin that keeps the first failure: (test, its message)."""
    failure = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.failure = report.nodeid.split("::")[-1], message

    pytest_collectreport = pytest_runtest_logreport


def time_is_up(*_):
    raise TimeoutError(f"not finished after {SECONDS} seconds")


def first_failure(file, source, tests):
    """Runs test files in this order until one test fails, in a copy in which a file has another
    source. Returns (name of the test, its message), or None if all pass."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as copy:
        for name in COPIED:
            make = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            make(ROOT / name, Path(copy) / name)
        (Path(copy) / file).write_text(source, encoding="utf-8")
        os.chdir(copy)
        sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(ROOT)
                       or "site-packages" in entry or ".venv" in entry]
        signal.signal(signal.SIGALRM, time_is_up)
        signal.alarm(SECONDS)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
                        plugins=[recorder])
        signal.alarm(0)
        os.chdir(ROOT)
    return recorder.failure


def first_failures(tasks, processes):
    """Yields first_failure of each of some tasks, its three arguments each, in their order. Each
    runs in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap(call, tasks)


def call(task):
    return first_failure(*task)
