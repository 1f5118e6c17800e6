"""Grades a student's copy: each function of a set, alone, in the reference repository.

    python runs/assignment.py pairs                         # a copy to fill in: out/pairs
    python runs/grade.py out/pairs pairs                    # a table, and results.json
    python runs/grade.py submission pairs --student=s1234   # the variant that this student has

Each function is taken out of the student's file, with the helpers, imports and constants that the
student added to it, and put into a copy of this repository. There the tests that execute it run in
a process of their own, with a time limit. So a right function earns its points whatever stands
around it, and a student's own tests and support files are never used. tests/executes.json lists
the tests of each function; dev/executes.py writes it.

A function that passes all of its tests has all of its points. Otherwise it has half of them, times
the fraction of its tests that pass. results.json is in Gradescope's format, and
runs/classroom.yml runs the same command on GitHub.

Python code can't be locked in. The grader refuses functions that name files, processes or Python's
own machinery. Beyond that, grade in a container, as Gradescope and GitHub do.
"""
import ast
import base64
import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from runs import variants
from runs.assignment import bodies_in_copy
from runs.course import SETS
from support.flags import InputError, Parser, positive_int, run_script

EXECUTES = os.path.join(ROOT, "tests", "executes.json")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "out",
                                    "__pycache__")
LIMITS = f"ulimit -d {16 * 2**20}; ulimit -f {2**20}"       # KiB of memory, and of a file
LONGEST_LINE = 160              # characters of a message in the table

# A function of the course computes. It needs none of these, and with them it could read the
# reference or end the grader.
REFUSED = {"breakpoint", "builtins", "compile", "ctypes", "eval", "exec", "exit", "fromfile", "gc",
           "globals", "importlib", "inspect", "load", "memmap", "open", "os", "pathlib", "pytest",
           "quit", "shutil", "signal", "socket", "subprocess", "sys", "threading"}
METHODS = {"eval", "compile"}
SPECIAL_METHODS = {"__init__", "__call__", "__len__", "__getitem__", "__iter__", "__name__"}


class NoPoints(Exception):
    """Is raised where a function gets no points. The message says why, in one line."""


# ------------------------------------------------------------------ the transplant


def parse(source, path):
    """Returns the syntax tree of a student's file. source: its bytes."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        where = path if error.lineno is None else f"{path}, line {error.lineno}"
        raise NoPoints(f"{where}: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        raise NoPoints(f"{path} is not Python: {str(error) or 'it is nested too deeply'}")


def defined(body):
    """Lists what a module or a class defines: {name: its statement}. A name that is defined twice
    is the second one, as in Python."""
    statements = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name.split(".")[0] for alias in statement.names]
        else:
            names = [node.id for node in ast.walk(statement)
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        statements |= dict.fromkeys(names, statement)
    return statements


def find(tree, names):
    """Finds a function. names: its own, after that of its class. Returns (the node of the module or
    class that it is in, its own node), or None."""
    owner, node = None, tree
    for name in names:
        owner, node = node, defined(getattr(node, "body", [])).get(name)
    return (owner, node) if isinstance(node, ast.FunctionDef) else None


def mentioned(node):
    """Lists the names that some code mentions: variables, attributes and modules. (It may call
    the `eval` of a model, not that of Python.)"""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute) and part.attr not in METHODS:
            names.add(part.attr)
        elif isinstance(part, ast.ImportFrom):
            names.update((part.module or "").split("."))
            names.update(alias.name for alias in part.names)
        elif isinstance(part, ast.Import):
            names.update(name for alias in part.names for name in alias.name.split("."))
    return names


def with_helpers(node, added):
    """Lists a function and the statements that it needs of those that the student added, and that
    these need in turn. added: {name: statement}. Returns a list of nodes, the function first."""
    nodes = [node]
    for part in nodes:                          # which grows while it is read
        for name in mentioned(part) & set(added):
            if added[name] not in nodes:
                nodes.append(added[name])
    return nodes


def is_blank(function):
    """Says whether a function is still to write: it ends in that error, or does nothing."""
    nothing = all(isinstance(statement, ast.Pass) or isinstance(statement, ast.Expr)
                  and isinstance(statement.value, ast.Constant) for statement in function.body)
    return nothing or "NotImplementedError" in ast.unparse(function.body[-1])


def transplant(reference, student, function):
    """Returns the reference's source of a file with one function out of the student's.

    reference: source. student: syntax tree. function: such as "losses.dpo". NoPoints if there is
    nothing to put in, or nothing that may be run.
    """
    module, *names = function.split(".")
    location = find(student, names)
    if location is None:
        raise NoPoints(f"{module}.py has no function {'.'.join(names)}")
    student_owner, node = location
    if is_blank(node):
        raise NoPoints("not written yet")
    tree = ast.parse(reference)
    owner, old = find(tree, names)
    added = {**new_in(student, tree), **new_in(student_owner, owner)}
    nodes = with_helpers(node, added)
    for part in nodes:
        refused = sorted(filter(is_refused, mentioned(part)))
        if refused:
            raise NoPoints(f"it uses {refused[0]}, which no function of the course needs")
    helpers = nodes[1:]
    place = owner.body.index(old)
    owner.body[place:place + 1] = [*(part for part in student_owner.body if part in helpers), node]
    if owner is not tree:               # a method: helpers of the module go before its class
        place = tree.body.index(defined(tree.body)[names[0]])
        tree.body[place:place] = [part for part in student.body if part in helpers]
    return ast.unparse(tree)


def new_in(student, reference):
    """Lists what a student added to a module or class: {name: its statement}. student, reference:
    their nodes."""
    ours = defined(reference.body)
    return {name: part for name, part in defined(student.body).items() if name not in ours}


def is_refused(name):
    """Says whether a function may not mention a name."""
    return name in REFUSED or name.startswith("__") and name not in SPECIAL_METHODS


def changes(reference, student, graded):
    """Lists the functions and constants of a student's file that differ from the reference's and
    are not graded: they are ignored. reference, student: syntax trees. graded: their names, such
    as "RewardModel.forward". Returns names."""
    changed = []

    def compare(ours, theirs, prefix):
        for name in ours:
            old, new = ours[name], theirs.get(name)
            if new is None or prefix + name in graded or ast.dump(old) == ast.dump(new):
                continue
            if isinstance(old, ast.ClassDef) and isinstance(new, ast.ClassDef):
                compare(defined(old.body), defined(new.body), f"{prefix}{name}.")
            elif not (isinstance(new, ast.FunctionDef) and is_blank(new)):
                changed.append(prefix + name)

    compare(defined(reference.body), defined(student.body), "")
    return changed


# ------------------------------------------------------------------ the tests


class Outcome(NamedTuple):
    """Says whether all cases of a test function passed, and the first message if not."""
    passed: bool
    message: str = ""


def make_copy(folder, edited):
    """Copies the repository. edited: {path: its source in the copy}."""
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    for path, source in edited.items():
        with open(os.path.join(folder, path), "w", encoding="utf-8") as file:
            file.write(source)


def run_pytest(folder, tests, seconds):
    """Runs tests in a copy, in a process of their own. Returns what it printed. NoPoints if it
    takes longer than some seconds."""
    home = os.path.join(folder, "out")                  # whatever is written goes with the copy
    os.makedirs(home, exist_ok=True)
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": home, "TMPDIR": home,
                   "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                   "CI": "1"}           # then pytest shortens no message
    command = ["bash", "-c", f'{LIMITS}; exec "$@"', "bash", sys.executable, "-m", "pytest", "-v",
               "-p", "no:cacheprovider", "--tb=line", "--junitxml=out/results.xml", *tests]
    with open(os.path.join(home, "printed"), "w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            finished = True
        except subprocess.TimeoutExpired:
            finished = False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # and what it started
        process.wait()
        file.seek(0)
        printed = file.read()
    if not finished:
        started = [line.split()[0] for line in printed.splitlines() if line.startswith("tests/")]
        where = f" in {started[-1].split('::')[1]}" if started else ""
        raise NoPoints(f"stopped after {seconds} seconds{where}: an endless loop?")
    return printed


def run_tests(edited, tests, seconds):
    """Runs test functions in a copy of the repository. edited: {path: its source in the copy}.
    tests: such as "tests/test_losses.py::test_margins". seconds: how long they may take.

    Returns {test: Outcome}. NoPoints if the tests could not be run to the end.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "copy")
        make_copy(folder, edited)
        printed = run_pytest(folder, tests, seconds)
        try:
            report = xml.etree.ElementTree.parse(os.path.join(folder, "out", "results.xml"))
        except (OSError, xml.etree.ElementTree.ParseError):
            raise NoPoints("the process of the tests ended before they did")
    outcomes = {}
    for case in report.iter("testcase"):
        if not case.get("name"):            # the session was interrupted
            continue
        name = case.get("name").split("[")[0]
        test = f"{case.get('classname').replace('.', '/')}.py::{name}"
        message = next((part.get("message") or part.tag for part in case
                        if part.tag in ("failure", "error", "skipped")), None)
        before = outcomes.get(test, Outcome(True))
        if before.passed:
            outcomes[test] = Outcome(message is None, message or "")
    if not any(test in outcomes for test in tests):     # the file could not even be imported
        errors = [line[2:].strip() for line in printed.splitlines() if line.startswith("E ")]
        raise NoPoints(errors[-1] if errors else "the tests could not be run")
    return {test: outcomes.get(test, Outcome(False, "it did not run")) for test in tests}


# ------------------------------------------------------------------ the grade


class Row(NamedTuple):
    """Is the grade of a function. note: why points are missing."""
    function: str
    points: float
    out_of: int
    note: str


class Reference(NamedTuple):
    """Describes the repository that a student's functions are put into. edited: {path: source}
    where a variant differs from this repository. tests: {function: the tests that execute it}."""
    edited: dict
    tests: dict

    def source(self, path):
        if path in self.edited:
            return self.edited[path]
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            return file.read()


def read_tests():
    """Reads which tests judge each function: {function: tests}. InputError if one is missing."""
    with open(EXECUTES, encoding="utf-8") as file:
        judges = json.load(file)
    there = {}
    for path, name in {tuple(test.split("::")) for tests in judges.values() for test in tests}:
        if path not in there:
            there[path] = defined(ast.parse(Reference({}, {}).source(path)).body)
        if name not in there[path]:
            raise InputError(f"tests/executes.json: {path} has no {name} any more; run "
                             "dev/executes.py")
    return judges


def for_student(name, student=None):
    """Returns ({function: points} of a set, the Reference): those of a student's variant, or of the
    set as it stands here."""
    if student is None:
        return SETS[name], Reference({}, read_tests())
    variant = variants.draw(student, name, SETS[name])
    tests = {function: [test for test in tests if test not in variant.without]
             for function, tests in read_tests().items()}
    return variant.points, Reference(variant.edited, tests)


def grade_function(function, out_of, folder, reference, seconds):
    """Grades one function of a student's folder. out_of: its points. Returns a Row."""
    path = f"{function.split('.')[0]}.py"
    tests = reference.tests[function]
    try:
        source = transplant(reference.source(path), read_student(folder, path), function)
        outcomes = run_tests({**reference.edited, path: source}, tests, seconds)
    except NoPoints as error:
        return Row(function, 0, out_of, str(error))
    failed = [test for test in tests if not outcomes[test].passed]
    if not failed:
        return Row(function, out_of, out_of, "")
    share = (len(tests) - len(failed)) / len(tests)
    name = failed[0].split("::")[1]
    message = outcomes[failed[0]].message.removeprefix("AssertionError: ")
    return Row(function, int(50 * out_of * share) / 100, out_of,
               f"{len(failed)} of {len(tests)} tests fail. {name}: {message}")


def read_student(folder, path):
    """Returns the syntax tree of a student's file. NoPoints if there is none."""
    try:
        with open(os.path.join(folder, path), "rb") as file:
            return parse(file.read(), path)
    except OSError as error:
        raise NoPoints(f"{path}: {error.strerror}{elsewhere(folder, path)}")


def elsewhere(folder, path):
    """Says where a student's file may be instead: a folder further down, as in many zips, or under
    the name of a second download."""
    stem = path.removesuffix(".py")
    paths = sorted(glob.glob(f"{glob.escape(folder)}/*/{path}")
                   + glob.glob(f"{glob.escape(folder)}/{stem}[ _(-]*.py"))
    return f"; there is {os.path.relpath(paths[0], folder)!r}" if paths else ""


def grade(folder, points, reference, seconds=120):
    """Grades the functions of a set. points: {function: points}. Returns a list of Rows."""
    def row(function):
        return grade_function(function, points[function], folder, reference, seconds)

    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        return list(pool.map(row, points))


def ignored(folder, points, reference):
    """Says what else the student changed in the files of a set. Returns lines."""
    lines = []
    files = {f"{function.split('.')[0]}.py" for function in points}
    for path in sorted(files - {"zoo.py"}):             # a copy has only one loss of that
        graded = {function.split(".", 1)[1] for function in bodies_in_copy(points)}
        try:
            student = read_student(folder, path)
        except NoPoints:
            continue
        names = changes(ast.parse(reference.source(path)), student, graded)
        if names:
            lines.append(f"{path}: changes to {', '.join(names)} are ignored; the reference's are "
                         "used")
    return lines


# ------------------------------------------------------------------ the report


def in_a_line(text):
    """Cuts a message: its first line that says something, at most LONGEST_LINE characters."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE - 3]}..."


def table(rows):
    """Returns the lines of the table on the screen."""
    width = max(len(row.function) for row in rows)
    lines = [f"{'function':{width}}  points   of  first message"]
    for row in rows:
        line = f"{row.function:{width}}  {row.points:6g}  {row.out_of:3}  {in_a_line(row.note)}"
        lines.append(line.rstrip())
    total, out_of = sum(row.points for row in rows), sum(row.out_of for row in rows)
    return [*lines, f"{'total':{width}}  {total:6g}  {out_of:3}"]


def gradescope(rows, lines, leaderboard):
    """Returns the grade in the form of Gradescope's results.json. lines: for the whole."""
    score = round(sum(row.points for row in rows), 2)
    results = {"score": score, "output": "\n".join(lines), "visibility": "visible", "tests": [
        {"name": row.function, "score": row.points, "max_score": row.out_of,
         "status": "passed" if row.points == row.out_of else "failed",
         "output": row.note[:2000] or "All tests pass.", "visibility": "visible"}
        for row in rows]}
    if leaderboard:
        results["leaderboard"] = [{"name": "points", "value": score}]
    return results


def classroom(rows):
    """Returns the grade in the form that GitHub Classroom's reporter reads, for $GITHUB_OUTPUT."""
    results = {"version": 1, "max_score": sum(row.out_of for row in rows),
               "status": "pass" if all(row.points == row.out_of for row in rows) else "fail",
               "tests": [{"name": row.function, "score": row.points, "message": row.note[:2000],
                          "status": "pass" if row.points == row.out_of else "fail"}
                         for row in rows]}
    return f"result={base64.b64encode(json.dumps(results).encode()).decode()}\n"


def parse_flags(argv):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="the student's copy")
    parser.add_argument("set", choices=list(SETS), metavar="SET", help=f"one of {', '.join(SETS)}")
    parser.add_argument("--student", help="the ID with which the copy was made, for its variant")
    parser.add_argument("--out", default="results.json", help="the file for Gradescope "
                        "(default: results.json)")
    parser.add_argument("--seconds", type=positive_int, default=120, help="how long the tests of a "
                        "function may take (default: 120)")
    parser.add_argument("--leaderboard", action="store_true", help="show the points on "
                        "Gradescope's leaderboard")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    if os.path.isfile(args.out):        # of an earlier copy: it must not pass for this one's
        os.remove(args.out)
    if not os.path.isdir(args.folder):
        unzip = "unzip it first" if os.path.isfile(args.folder) else "name the student's copy"
        raise InputError(f"folder: {args.folder!r} is not a folder; {unzip}")
    points, reference = for_student(args.set, args.student)
    rows = grade(args.folder, points, reference, args.seconds)
    lines = ignored(args.folder, points, reference)
    print("\n".join([*table(rows), *lines]))
    try:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(gradescope(rows, lines, args.leaderboard), file, indent=1)
    except OSError as error:
        raise InputError(f"--out: {args.out!r}: {error.strerror}")
    if "GITHUB_OUTPUT" in os.environ:           # in runs/classroom.yml
        with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
            file.write(classroom(rows))


if __name__ == "__main__":
    run_script(main)
