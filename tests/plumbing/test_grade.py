"""Grading by transplant: what goes into the reference, what it earns, and what a student's code may
try. The slow tests grade the reference, all variants and typical mistakes: pytest -m slow."""
import ast
import base64
import inspect
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
from mistakes import MISTAKES

import losses
import zoo
from runs import assignment, grade, variants
from runs.course import SETS
from runs.grade import NoPoints, Reference, Row
from support.flags import InputError

ROOT = Path(__file__).parents[2]
REFERENCE = '''
import math

SCALE = 2


def helper(x):
    return x


class Model:
    def forward(self, x):
        return helper(x) * SCALE

    def other(self, x):
        return x


def double(x):
    """Doubles x."""
    return 2 * x
'''


def transplanted(student, function="file.double"):
    return grade.transplant(REFERENCE, grade.parse(student, "file.py"), function)


def value(source, expression):
    names = {}
    exec(source, names)
    return eval(expression, names)


# ---------------------------------------------------------------- the transplant

def test_a_function_alone():
    """Its helpers, imports and constants come along. What is changed elsewhere stays behind."""
    source = transplanted("""
from functools import reduce
import nowhere
SCALE = 1000
TWO = 2
def add(x, y): return x + y
def unused(): return nowhere.x
def helper(x): return 1 / 0
def decorated(function): return function
@decorated
def double(x): return reduce(add, [x] * TWO)
""")
    assert "nowhere" not in source and "unused" not in source
    assert value(source, "double(4)") == 8 and value(source, "Model().forward(3)") == 6


def test_a_method_alone():
    """With the methods that the student added to its class, and no other."""
    source = transplanted("""
def thrice(x): return 3 * x
class Model:
    def twice(self, x): return 2 * x
    def unused(self): pass
    def other(self, x): return 1000
    def forward(self, x): return thrice(self.twice(x)) * SCALE
""", "file.Model.forward")
    assert "unused" not in source
    assert value(source, "Model().forward(1)") == 12 and value(source, "Model().other(1)") == 1


def test_the_second_of_two_definitions_counts():
    source = transplanted("def double(x): return 0\ndef double(x): return x + x")
    assert value(source, "double(4)") == 8


@pytest.mark.parametrize("student, reason", [
    ("def double(x)\n    return x", "file.py, line 1: expected ':'"),
    ("x = '\0'", "file.py"),
    ("def dubble(x): return x", "file.py has no function double"),
    ("double = lambda x: x", "file.py has no function double"),
    ("class double: pass", "file.py has no function double"),
    ("def double(x):\n    raise NotImplementedError('double: yours to write')", "not written yet"),
    ("def double(x):\n    'Doubles x.'\n    ...", "not written yet"),
    ("import sys\ndef double(x): sys.stdout", "it uses sys, which no function of the course needs"),
    ("def double(x): return open('file.py').read()", "it uses open, "),
    ("def double(x): return helper_(x)\ndef helper_(x): return eval(x)", "it uses eval, "),
    ("from os import _exit as f\ndef double(x): f(0)", "it uses os, "),
    ("def double(x):\n    import inspect as i", "it uses inspect, "),
    ("def double(x): return x.__globals__['open']", "it uses __globals__, ")])
def test_what_gets_no_points(student, reason):
    with pytest.raises(NoPoints) as error:
        transplanted(student)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_changes_that_are_ignored():
    """What differs and is not graded. A blank function is not a change."""
    student = REFERENCE.replace("return x\n", "return x + 1\n").replace("SCALE = 2", "SCALE = 3")
    student = student.replace("return 2 * x", "raise NotImplementedError()")
    trees = ast.parse(REFERENCE), ast.parse(student)
    assert grade.changes(*trees, {"helper"}) == ["SCALE", "Model.other"]
    assert grade.changes(trees[0], trees[0], set()) == []


# ---------------------------------------------------------------- the grade

def copy(folder, *edits):
    """A student's folder: the root's files with some edits, (file, old, new) each."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name, old, new in edits:
        source = (folder / name).read_text(encoding="utf-8")
        assert source.count(old) == 1, old
        (folder / name).write_text(source.replace(old, new), encoding="utf-8")
    return folder


FORMULA = "tests/test_losses.py::test_a_loss_is_its_formula"
FEW_TESTS = Reference({}, {
    "losses.d_dpo": [FORMULA, "tests/test_losses.py::test_a_row_of_the_table"],
    "losses.dpo": [FORMULA, "tests/test_losses.py::test_a_row_of_the_table"],
    "losses.ipo": [FORMULA], "losses.forward_kl": [FORMULA], "losses.sft": [FORMULA]})


FEW_TESTS_OF_DPO = Reference({}, {"losses.dpo": [FORMULA], "losses.ipo": [FORMULA]})


def test_a_grade(tmp_path, capsys):
    """A right function has all points, whatever stands around it. A wrong one has half of them,
    times the share of its tests that pass. Nothing that a student writes ends the grader."""
    folder = copy(tmp_path / "s1", (
        "losses.py", "    return -F.logsigmoid(beta * h)\n\n\ndef ipo(",
        "    print('a line', '!' * 10 ** 6)\n    return -F.logsigmoid(h)\n\n\ndef ipo("), (
        "losses.py", "return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=1)",
        "raise NotImplementedError"), (
        "losses.py", "return rewards[:, 0] - rewards[:, 1]", "return 0"), (
        "losses.py", "    return -logps.sum(dim=1)", "    while True:\n        pass"))
    points = {"losses.d_dpo": 3, "losses.dpo": 4, "losses.forward_kl": 3}
    rows = grade.grade(folder, points, FEW_TESTS)
    assert [row.points for row in rows] == [3, 1, 0]
    assert rows[0].note == ""
    assert rows[1].note.startswith("1 of 2 tests fail. test_a_loss_is_its_formula: ")
    assert rows[2].note == "not written yet"
    [endless] = grade.grade(folder, {"losses.sft": 1}, FEW_TESTS, seconds=1)
    assert endless.points == 0 and endless.note.startswith("stopped after 1 seconds")
    lines = grade.ignored(folder, points, FEW_TESTS)
    assert lines == ["losses.py: changes to reward_margin, sft are ignored; the reference's are "
                     "used"]


@pytest.mark.slow
@pytest.mark.parametrize("body, reason", [
    ("raise SystemExit(0)", "SystemExit"), ("raise KeyboardInterrupt", ""),
    ("import nowhere", "No module named 'nowhere'"), ("return dpo(logps, ref_logps)", "recursion"),
    ("while True: print('!' * 1000)", "stopped after 60 seconds|File too large"),   # the faster
    ("x = [0]\n    while True: x = x + x", ""),
    ("raise __builtins__['KeyError']", "it uses __builtins__"), ("return 3", ""),
    ("return undefined", "name 'undefined' is not defined")])
def test_whatever_a_student_writes(body, reason, tmp_path):
    """No points, and a line that says why; the other function has all of its points."""
    end = "\n\n\ndef ipo("
    folder = copy(tmp_path / "s1", (
        "losses.py", f"    return -F.logsigmoid(beta * h){end}", f"    {body}{end}"))
    wrong, right = grade.grade(folder, {"losses.dpo": 3, "losses.ipo": 3}, FEW_TESTS_OF_DPO, 60)
    assert wrong.points == 0 and wrong.note and re.search(reason, wrong.note)
    assert right.points == 3


def test_missing_files_and_folders(tmp_path):
    """A blank set has no points, a folder without the file neither; one that is not there at all
    is the teacher's mistake."""
    rows = grade.grade(tmp_path, {"losses.dpo": 3, "losses.ipo": 3}, FEW_TESTS)
    assert [row.points for row in rows] == [0, 0]
    assert {row.note for row in rows} == {"losses.py: No such file or directory"}
    (tmp_path / "losses.py").mkdir()
    [row] = grade.grade(tmp_path, {"losses.dpo": 1}, FEW_TESTS)
    assert row.note == "losses.py: Is a directory"
    (tmp_path / "zip").touch()
    with pytest.raises(InputError, match="is not a folder; unzip it first"):
        grade.main([f"{tmp_path}/zip", "pairs", f"--out={tmp_path}/results.json"])
    before = tmp_path / "results.json"      # of an earlier copy
    before.touch()
    with pytest.raises(InputError, match="folder: .* is not a folder"):
        grade.main([f"{tmp_path}/nowhere", "pairs", f"--out={before}"])
    assert not before.exists()


@pytest.mark.parametrize("place", ["pairs/losses.py", "losses (1).py", "losses_ada.py"])
def test_a_file_that_is_elsewhere(place, tmp_path):
    """A zip often has a folder more, and a second download another name: the table says so."""
    folder = tmp_path / "Übung [1] Müller"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).touch()
    [row] = grade.grade(folder, {"losses.dpo": 1}, FEW_TESTS)
    assert row.note == f"losses.py: No such file or directory; there is {place!r}"


@pytest.mark.parametrize("source, reason", [
    (REFERENCE.encode("utf-16"), "file.py: "), (b"x = " + b"-" * 100_000 + b"1", "file.py")])
def test_a_file_that_is_not_python(source, reason):
    with pytest.raises(NoPoints) as error:
        grade.parse(source, "file.py")
    assert str(error.value).startswith(reason) and "None" not in str(error.value)
    assert not str(error.value).rstrip().endswith(":")


@pytest.mark.parametrize("change", [
    lambda source: source.replace(b"\n", b"\r\n"), lambda source: source.replace(b"    ", b"\t"),
    lambda source: b"\xef\xbb\xbf" + source])
def test_windows_line_ends_tabs_and_a_byte_order_mark(change):
    student = grade.parse(change(REFERENCE.encode()), "file.py")
    assert ast.dump(student) == ast.dump(ast.parse(REFERENCE))


def test_a_message_in_a_line():
    """The first line that says something, and the next one after a colon."""
    assert grade.in_a_line("") == ""
    assert grade.in_a_line("test_x: \r\n\n  wrong\nmore") == "test_x:   wrong"
    assert grade.in_a_line("wrong\n got 3") == "wrong"
    assert len(grade.in_a_line("!" * 1000)) == grade.LONGEST_LINE


def test_the_report(tmp_path, capsys, monkeypatch):
    """The table on the screen, a line for each function, and Gradescope's results.json."""
    rows = [Row("losses.dpo", 3, 3, ""), Row("losses.ipo", 0.75, 3, "1 of 2 " + 300 * "x" + "\ny")]
    monkeypatch.setattr(grade, "grade", lambda *_: rows)
    monkeypatch.setenv("GITHUB_OUTPUT", f"{tmp_path}/output")
    grade.main([str(copy(tmp_path / "s1")), "pairs", f"--out={tmp_path}/r.json", "--leaderboard"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[1:]] == [
        ["losses.dpo", "3", "3"], ["losses.ipo", "0.75", "3"], ["total", "3.75", "6"]]
    assert max(map(len, printed)) < 200
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["score"] == 3.75 and results["visibility"] == "visible"
    assert results["leaderboard"] == [{"name": "points", "value": 3.75}]
    first, second = results["tests"]
    assert first == {"name": "losses.dpo", "score": 3, "max_score": 3, "status": "passed",
                     "output": "All tests pass.", "visibility": "visible"}
    assert second["status"] == "failed" and second["output"] == rows[1].note
    name, _, encoded = (tmp_path / "output").read_text().partition("=")
    results = json.loads(base64.b64decode(encoded))
    assert (name, results["status"], results["max_score"]) == ("result", "fail", 6)
    assert [(test["status"], test["score"]) for test in results["tests"]] == [("pass", 3),
                                                                              ("fail", 0.75)]


def test_the_workflow_calls_the_same_command():
    workflow = (ROOT / "runs/classroom.yml").read_text(encoding="utf-8")
    [command] = re.findall(r"run: .venv/bin/python runs/grade.py (.*)", workflow)
    args = grade.parse_flags(command.replace('"$SET"', "pairs").split())
    assert (args.folder, args.set, args.out) == ("../student", "pairs", "results.json")
    for name in ("runs/venv.sh", "requirements-dev.txt"):
        assert name in workflow and (ROOT / name).is_file()


# ---------------------------------------------------------------- the tests that judge

FUNCTIONS = [function for points in SETS.values() for function in points]
FUNCTIONS += [function for names in variants.ZOO.values() for function in names]


def test_every_function_has_tests():
    """tests/executes.json knows all functions, and the tests that it names are there; if not, run
    dev/executes.py."""
    tests = grade.read_tests()
    assert list(tests) == FUNCTIONS and all(tests.values())


def test_a_test_that_is_gone(tmp_path, monkeypatch):
    """Nobody loses points for it."""
    (tmp_path / "executes.json").write_text('{"losses.dpo": ["tests/test_losses.py::test_gone"]}')
    monkeypatch.setattr(grade, "EXECUTES", str(tmp_path / "executes.json"))
    with pytest.raises(InputError, match="test_losses.py has no test_gone any more; run dev/exe"):
        grade.read_tests()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_reference_in_itself(function):
    """Transplanting a function of the reference gives the reference, so that a set's other
    functions do not matter; a blank one has no points, and what it is judged by may be run."""
    source = FEW_TESTS.source(f"{function.split('.')[0]}.py")
    tree = ast.parse(source)
    assert grade.transplant(source, tree, function) == ast.unparse(tree)
    _, node = grade.find(tree, function.split(".")[1:])
    node.body = ast.parse("raise NotImplementedError").body
    with pytest.raises(NoPoints, match="not written yet"):
        grade.transplant(source, tree, function)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_reference_has_full_marks(name):
    for row in grade.grade(ROOT, *grade.for_student(name), seconds=600):
        assert row.points == row.out_of, row


# ---------------------------------------------------------------- mistakes

def with_mistake(folder, mistake):
    module, *names = mistake.function.split(".")
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    _, node = grade.find(ast.parse(source), names)
    lines = source.splitlines(keepends=True)
    before, after = "".join(lines[:node.lineno - 1]), "".join(lines[node.end_lineno:])
    own = "".join(lines[node.lineno - 1:node.end_lineno])
    assert own.count(mistake.old) == 1
    copy(folder)
    wrong = before + own.replace(mistake.old, mistake.new) + after
    (folder / f"{module}.py").write_text(wrong, encoding="utf-8")


def some_mistakes():
    """60 of them, of all functions: the first of each, then the second, and so on."""
    by_function = [[mistake for mistake in MISTAKES if mistake.function == function]
                   for function in FUNCTIONS]
    in_turn = [mistakes[turn] for turn in range(10) for mistakes in by_function
               if turn < len(mistakes)]
    return in_turn[:60]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", some_mistakes(), ids=lambda m: f"{m.function}: {m.name}")
def test_a_mistake_costs_points_in_its_own_function(mistake, tmp_path):
    """And nowhere else: with every other function of its file, what is judged is the reference."""
    with_mistake(tmp_path / "s1", mistake)
    reference = Reference({}, grade.read_tests())
    row = grade.grade_function(mistake.function, 100, tmp_path / "s1", reference, 600)
    print(f"{row.points:6.2f}  {mistake.function}: {mistake.name}. {grade.in_a_line(row.note)}")
    assert row.points <= 50 and row.note
    path = f"{mistake.function.split('.')[0]}.py"
    source, student = reference.source(path), grade.read_student(tmp_path / "s1", path)
    for function in FUNCTIONS:
        if function.startswith(path[:-2]) and function != mistake.function:
            assert grade.transplant(source, student, function) == ast.unparse(ast.parse(source))


# ---------------------------------------------------------------- variants

def test_a_variant_is_drawn_from_the_id():
    """The same each time, and another one for somebody else."""
    drawn = [variants.draw(f"s{i}", "pairs", SETS["pairs"]) for i in range(10)]
    assert drawn[3] == variants.draw("s3", "pairs", SETS["pairs"])
    assert len({variant.seed for variant in drawn}) > 7
    assert len({tuple(variant.points) for variant in drawn}) > 3
    assert len({variant.notes[0] for variant in drawn}) == len(variants.CHANGES["losses.ipo"])
    assert list(drawn[0].points)[:3] == list(SETS["pairs"])


ALL_CHANGES = [change for changes in variants.CHANGES.values() for change in changes]


@pytest.mark.parametrize("change", ALL_CHANGES, ids=lambda change: change.note)
def test_a_change_can_be_made(change):
    """Its old texts are there, docstrings and tests among them, and its functions differ."""
    edited = variants.apply([change])
    assert any(path.startswith("tests/") for path in edited)
    for function in change.note.split(": ")[0].split(", "):
        path, *names = function.split(".")
        old, new = [grade.find(ast.parse(source), names)[1] for source in (
            FEW_TESTS.source(f"{path}.py"), edited[f"{path}.py"])]
        assert ast.get_docstring(old) != ast.get_docstring(new)
        assert ast.unparse(old.body[1:]) != ast.unparse(new.body[1:])
    for test in change.without:
        path, name = test.split("::")
        assert f"def {name}(" not in edited[path]


@lru_cache(maxsize=None)
def first_students():
    """(set, student) for every change: the first student who has it."""
    first = {}
    for name in SETS:
        for i in range(6):
            note = variants.draw(f"s{i}", name, SETS[name]).notes[0]
            if note.split(": ")[0].split(", ")[0] in variants.CHANGES:
                first.setdefault(note, (name, f"s{i}"))
    return list(first.values())


def test_every_change_is_drawn():
    assert len(first_students()) == len(ALL_CHANGES)


def test_the_copy_of_a_student(tmp_path, capsys):
    """It says what is different: in a file of its own, in docstrings and in tests. The tests that
    hold no longer are left out, and those of the zoo stay behind."""
    assignment.main(["distillation", "--student=s0", f"--out_dir={tmp_path}/s0"])
    variant = variants.draw("s0", "distillation", SETS["distillation"])
    page = (tmp_path / "s0/VARIANT.md").read_text(encoding="utf-8")
    assert all(note in page for note in variant.notes) and variant.loss in capsys.readouterr().out
    source = (tmp_path / "s0/losses.py").read_text(encoding="utf-8")
    assert source.count("yours to write") == 4
    _, right = grade.find(ast.parse(variant.edited["losses.py"]), ["e_dpo"])
    _, blank = grade.find(ast.parse(source), ["e_dpo"])
    assert ast.get_docstring(blank) == ast.get_docstring(right) != losses.e_dpo.__doc__
    assert (tmp_path / "s0/zoo.py").read_text() == variants.zoo_file(variant.loss)
    for test in variant.without:
        path, name = test.split("::")
        copied = tmp_path / "s0" / path
        assert not copied.exists() or f"def {name}(" not in copied.read_text(encoding="utf-8")
    for words in (["losses.dpo"], ["pairs", "bias"], ["leaderboard"]):
        with pytest.raises(InputError, match="--student: there are variants of each set"):
            assignment.main([*words, "--student=s0", f"--out_dir={tmp_path}/other"])


@pytest.mark.slow
@pytest.mark.parametrize("name, student", first_students())
def test_a_variant(name, student, tmp_path):
    """Where it differs, its own solution has full marks, and the solution of the set as it stands
    here loses them. The loss that is added has its points."""
    points, reference = grade.for_student(name, student)
    variant = variants.draw(student, name, SETS[name])
    different = variant.notes[0].split(": ")[0].split(", ")
    judged = {function: points[function] for function in [*different, variant.loss] if function}
    folder = copy(tmp_path / "s1")
    for row in grade.grade(folder, dict.fromkeys(different, 10), reference, 600):
        assert row.points <= 5, row
    for path in ROOT.glob("*.py"):
        if path.name in variant.edited:
            (folder / path.name).write_text(variant.edited[path.name], encoding="utf-8")
    for row in grade.grade(folder, judged, reference, 600):
        assert row.points == row.out_of, row


@pytest.mark.parametrize("loss", sum(variants.ZOO.values(), ()))
def test_the_zoo_of_a_copy(loss, monkeypatch):
    """It has one loss, which is left to write, under its name in the table."""
    monkeypatch.setattr(losses, "MORE", {})         # to which the file adds its loss
    source = variants.zoo_file(loss)
    names = {}
    exec(source, names)
    [(name, function)] = names["ZOO"].items()
    assert loss == f"zoo.{function.__name__}" and losses.MORE == names["ZOO"]
    assert function.__doc__ == getattr(zoo, function.__name__).__doc__
    with pytest.raises(NotImplementedError, match="yours to write"):
        function(*inspect.signature(function).parameters)
    assert max(map(len, source.splitlines())) <= 100
