"""The rules of the house: five floors, the step in plain sight, plain lines. All of it is read
from the source, nothing is imported."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHOD = ["losses", "data", "model", "lora", "reward", "tinytldr", "train_policy", "train_rm",
          "evaluate", "sample"]
PRONOUNS = {"at", "one", "same", "who", "per", "known", "found"}       # names that name nothing

# What each floor of the house may import of the others; the root is the floor of the method.
BELOW = {
    "support": {"support"},
    "root": {"support", "root"},
    "runs": {"support", "root", "runs"},
    "experiments": {"support", "root", "runs", "experiments"},
    "dev": {"support", "root", "runs", "experiments", "dev"},
}
FLOORS = (*BELOW, "tests")

# {module: its file}, and those of each floor: "data", "support.flags", "runs.show"
SOURCES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
for floor in FLOORS:
    for path in sorted((ROOT / floor).rglob("*.py")):
        SOURCES[floor if path.stem == "__init__" else f"{floor}.{path.stem}"] = path
TEXTS = {module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()}
TREES = {module: ast.parse(text) for module, text in TEXTS.items()}


def floor_of(module):
    """The floor that a module is on, one of FLOORS."""
    folder = module.split(".")[0]
    return folder if folder in FLOORS else "root"


def imports(module):
    """The modules of this repository that a module imports, also inside its functions."""
    imported = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            imported.add(node.module)
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in imported if name in SOURCES or name in FLOORS}


def functions(module, *names):
    """The functions of a file with these names."""
    chosen = [node for node in TREES[module].body
              if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(chosen) == len(names), f"{module} has not all of {names}"
    return chosen


def line(module, node):
    return f"{SOURCES[module].relative_to(ROOT)}:{node.lineno}"


# ------------------------------------------------------------------ three floors

def test_the_root_is_the_method():
    """Ten files to read, and the zoo of other people's losses: what is not the method lives on
    another floor."""
    assert {m for m in SOURCES if floor_of(m) == "root"} == {*METHOD, "zoo"}


def test_imports_point_down():
    """support/ imports nothing of the root, neither of them anything of runs/, these nothing of the
    studies, and nobody a test: not even inside a function."""
    upwards = []
    for module in SOURCES:
        if floor_of(module) != "tests":
            upwards += [f"{module} imports {other}" for other in imports(module)
                        if floor_of(other) not in BELOW[floor_of(module)]]
    assert upwards == []


def test_no_import_is_hidden():
    """None by a string, which the test above could not see. (dev/walk.py runs cells of a file that
    it does see.)"""
    hidden = []
    for module, tree in TREES.items():
        if floor_of(module) == "tests":
            continue
        for node in ast.walk(tree):
            named = node.id if isinstance(node, ast.Name) else getattr(node, "name", None)
            if named in ("importlib", "__import__", "exec", "eval") and module != "dev.walk":
                hidden.append(f"{module}: {named}")
    assert hidden == []


def test_no_circle_of_imports():
    """Take away the files that import nothing that is left, again and again: nothing remains."""
    left = {module: imports(module) & set(SOURCES) - {module} for module in SOURCES}
    while left:
        free = [module for module, imported in left.items() if not imported & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for module in free:
            del left[module]


# ------------------------------------------------------------------ what a reader sees

@pytest.mark.parametrize("module", SOURCES)
def test_lines_are_at_most_100_columns(module):
    lines = enumerate(TEXTS[module].splitlines(), 1)
    assert [number for number, text in lines if len(text) > 100] == []


@pytest.mark.parametrize("module, names", [("train_policy", ["main"]),
                                           ("train_rm", ["main", "train_one"])])
def test_the_step_is_in_plain_sight(module, names):
    """Where training happens there is no closure, lambda or class to look behind; and the loop over
    the steps is there, with its backward pass and the optimizer's step."""
    hiding = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    calls = set()
    for function in functions(module, *names):
        inside = [node for statement in function.body for node in ast.walk(statement)]
        assert [line(module, node) for node in inside if isinstance(node, hiding)] == []
        for loop in [node for node in inside if isinstance(node, ast.For)]:
            calls |= {node.func.attr for node in ast.walk(loop)
                      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    assert {"rows", "batch", "backward", "step", "zero_grad"} <= calls


# ------------------------------------------------------------------ plain lines

def names_given(tree):
    """(node, name) of every variable, attribute, parameter, function, class and import that the
    code names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node, node.attr
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            yield node, node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield node, alias.asname


@pytest.mark.parametrize("module", SOURCES)
def test_names_say_what_they_are(module):
    assert [f"{line(module, node)} {name}" for node, name in names_given(TREES[module])
            if name in PRONOUNS] == []


@pytest.mark.parametrize("module", SOURCES)
def test_lambdas_are_small(module):
    """On one line, without a condition, and without a name: what is more is a function."""
    large = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Lambda):
            conditions = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
            if conditions or node.end_lineno > node.lineno:
                large.append(line(module, node))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
            large.append(line(module, node))
    assert large == []
