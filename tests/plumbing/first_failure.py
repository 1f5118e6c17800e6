"""Makes each typical mistake of mistakes.py, runs the tests in the order in which one learns, and
prints which of them fails first, what it says, and whether that names the idea.

    python tests/plumbing/first_failure.py                      # all of them: some minutes
    python tests/plumbing/first_failure.py losses.dpo tree      # those of a function, of a set

The tests are collected once. Each mistake then gets a process of its own, a fork, in which its
function runs the wrong code.
"""
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from mistakes import MISTAKES  # noqa: E402

from runs.course import SETS  # noqa: E402

# The test files of each set, in the order in which one learns.
FILES = {
    "pairs": ["test_losses"],
    "distillation": ["test_losses"],
    "bias": ["test_data"],
    "reward": ["test_losses", "test_data", "test_tree"],
    "tree": ["test_attention", "test_tree"],
    "generation": ["test_generation", "test_estimators"],
    "training": ["test_step"],
}
SET_OF = {function: name for name, functions in SETS.items() for function in functions}
SECONDS = 240                           # a mistake may make a loop endless
os.environ["OMP_NUM_THREADS"] = "1"     # forks don't survive a pool of threads


def find(function):
    """Returns a function by its name, such as "losses.dpo"."""
    module, *names = function.split(".")
    value = importlib.import_module(module)
    for name in names:
        value = getattr(value, name)
    return value


def wrong_source(mistake):
    """Returns the source of a function with a mistake in it."""
    source = inspect.getsource(find(mistake.function))
    assert source.count(mistake.old) == 1, f"{mistake.function} has not once: {mistake.old}"
    return textwrap.dedent(source.replace(mistake.old, mistake.new))


def make(mistake):
    """Makes a mistake in this process: whoever has imported the function runs the wrong code."""
    function, namespace = find(mistake.function), {}
    exec(wrong_source(mistake), function.__globals__, namespace)
    function.__code__ = namespace[function.__name__].__code__


def names_the_idea(mistake, failure):
    """Says whether the name of a test, or the first line of its message, has one of the phrases."""
    test, message = failure
    said = f"{test.replace('_', ' ')} {message}".lower()
    return any(idea.lower() in said for idea in mistake.idea)


class FirstFailures:
    """A pytest plugin that replaces the loop over the tests by one over mistakes. failures: for
    each mistake (test, first line of its message), or None where no test fails."""

    def __init__(self, mistakes):
        self.mistakes, self.failures, self.failure = mistakes, [], None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.failure = report.nodeid.split("::")[-1], (message.splitlines() or [""])[0]

    def pytest_runtestloop(self, session):
        for mistake in self.mistakes:
            files = FILES[SET_OF[mistake.function]]
            tests = [item for file in files for item in session.items if item.path.stem == file]
            reader, writer = os.pipe()
            process = os.fork()
            if process == 0:
                session.config.pluginmanager.unregister(name="terminalreporter")
                signal.alarm(SECONDS)           # which kills this process
                try:
                    self.run(mistake, tests)
                    os.write(writer, json.dumps(self.failure).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            with open(reader, "rb") as pipe:
                answer = pipe.read()
            os.waitpid(process, 0)
            self.failures.append(json.loads(answer or '["all tests", "died, or took too long"]'))
            show(mistake, self.failures[-1])
        return True

    def run(self, mistake, tests):
        """Runs the tests until the first one fails."""
        make(mistake)
        for item, following in zip(tests, [*tests[1:], None]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failure is not None:
                return


def show(mistake, failure):
    """Prints a line of the table."""
    if failure is None:
        line = "NO TEST FAILS"
    else:
        verdict = "yes" if names_the_idea(mistake, failure) else "no "
        line = f"{verdict} | {failure[0]} | {failure[1]}"
    print(f"{mistake.function} | {mistake.name} | {line}", flush=True)


def first_failures(mistakes):
    """Returns the first failure of each mistake, see FirstFailures."""
    files = {file for mistake in mistakes for file in FILES[SET_OF[mistake.function]]}
    paths = [str(ROOT / "tests" / f"{file}.py") for file in sorted(files)]
    plugin = FirstFailures(mistakes)
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *paths], plugins=[plugin])
    return plugin.failures


def main(*chosen):
    """Prints the table. Exits with an error if a mistake is not caught, or if fewer than three
    quarters of the first failures name the idea."""
    mistakes = [mistake for mistake in MISTAKES
                if not chosen or {mistake.function, SET_OF[mistake.function]} & set(chosen)]
    failures = first_failures(mistakes)
    caught = [pair for pair in zip(mistakes, failures) if pair[1] is not None]
    named = sum(names_the_idea(*pair) for pair in caught)
    print(f"{len(mistakes)} mistakes: {len(caught)} caught, {named} named "
          f"({named / len(mistakes):.0%})")
    if len(caught) < len(mistakes) or named < 0.75 * len(mistakes):
        sys.exit("the tests are not good enough")


if __name__ == "__main__":
    main(*sys.argv[1:])
