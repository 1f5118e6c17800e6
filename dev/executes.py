"""Writes tests/executes.json, the tests by which runs/grade.py judges each function of the course.

    python dev/executes.py              # two minutes; again after you add or rename tests

It runs the tests of the method once and notes which functions of the course each of them executes.
Tests that take seconds, and those that need the runs of the fixture `world`, are left out. The
order is that in which one learns: the first message is the clearest.
"""
import ast
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from runs.course import SETS
from runs.grade import EXECUTES, Reference, find, make_copy
from runs.variants import ZOO
from support.flags import Parser, run_script

TESTS = [f"tests/test_{name}.py" for name in (       # in the order in which one learns
    "losses", "data", "attention", "tree", "generation", "model", "step", "estimators", "theory",
    "training", "zoo")]
SLOW = 2.0                      # seconds
OF_A_PAGE = "test_the_page_is_up_to_date"       # it is no judge of a function

# What is added to tests/conftest.py.
RECORDER = '''

import recorder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    recorder.start()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call":
        recorder.write(item.nodeid, report, "world" in item.fixturenames)
'''
RECORDER_MODULE = '''
import json
import time

seen, began = set(), [0]


def start():
    seen.clear()
    began[0] = time.process_time()      # which does not depend on what else runs


def write(test, report, world):
    usable = report.passed and not world
    row = [test.split("[")[0], sorted(seen), time.process_time() - began[0], usable]
    with open("out/recorded.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
'''


def recording(source, functions):
    """Returns the source of a file whose functions note that they were called."""
    tree = ast.parse(source)
    for function in functions:
        _, node = find(tree, function.split(".")[1:])
        note = ast.parse(f"__import__('recorder').seen.add({function!r})").body
        place = 0 if ast.get_docstring(node) is None else 1
        node.body[place:place] = note
    return ast.unparse(tree)


def by_file(functions):
    """Groups functions by their files. Returns {path: functions}."""
    files = {}
    for function in functions:
        files.setdefault(f"{function.split('.')[0]}.py", []).append(function)
    return files


def record(functions, folder):
    """Runs the tests in a copy. Returns {test: the functions that it executes}, without those that
    are slow, in the order in which they stand."""
    reference = Reference({}, {})
    edited = {path: recording(reference.source(path), names)
              for path, names in by_file(functions).items()}
    edited["tests/conftest.py"] = reference.source("tests/conftest.py") + RECORDER
    edited["recorder.py"] = RECORDER_MODULE
    make_copy(folder, edited)
    os.makedirs(os.path.join(folder, "out"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=folder, env=environment,
                   check=True)
    executes, seconds, left_out = {}, {}, set()
    with open(os.path.join(folder, "out", "recorded.jsonl"), encoding="utf-8") as file:
        for line in file:
            test, seen, took, usable = json.loads(line)
            executes.setdefault(test, set()).update(seen)
            seconds[test] = seconds.get(test, 0) + took
            if not usable:
                left_out.add(test)
    return {test: seen for test, seen in executes.items()
            if test not in left_out and seconds[test] < SLOW and not test.endswith(OF_A_PAGE)}


def main():
    Parser(__doc__).parse_args()        # it has no flags but --help
    functions = [function for points in SETS.values() for function in points]
    functions += [function for names in ZOO.values() for function in names]
    with tempfile.TemporaryDirectory() as folder:
        executes = record(functions, os.path.join(folder, "copy"))
    table = {}
    for function in functions:
        table[function] = [test for test in executes if function in executes[test]]
        print(f"{function}: {len(table[function])} tests")
    with open(EXECUTES, "w", encoding="utf-8") as file:
        json.dump(table, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    run_script(main)
