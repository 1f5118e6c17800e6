"""Makes an assignment: a copy of the repository in which some functions are left to write.

    python runs/assignment.py losses.dpo losses.ipo --out_dir=out/homework
    cd out/homework && bash runs/test.sh tests/test_losses.py       # fails until they are written

A function is named by its file and itself, a method by its class too (reward.RewardModel.forward).
Its signature and docstring stay, its body becomes an error. docs/assignments.md has six, with the
tests that judge them.
"""
import ast
import os
import shutil
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from support.flags import InputError, Parser, run_script

LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "out",
                                     "__pycache__")


def find(source, names):
    """The syntax tree of a function. source: that of its file. names: its own, after those of the
    classes that it is in. InputError if there is none."""
    node = ast.parse(source)
    for name in names:
        inside = [child for child in node.body if getattr(child, "name", None) == name]
        if not inside:
            raise InputError(f"functions: there is no {'.'.join(names)} in that file")
        node = inside[0]
    if not isinstance(node, ast.FunctionDef):
        raise InputError(f"functions: {'.'.join(names)} is a class; name one of its methods")
    return node


def without_body(source, names):
    """The source of a file with one function left to write."""
    body = find(source, names).body
    lines = source.splitlines(keepends=True)
    first = body[0].lineno - 1
    if ast.get_docstring(find(source, names)) is not None:
        first = body[0].end_lineno
    indent = " " * body[0].col_offset
    error = f'{indent}raise NotImplementedError("{names[-1]}: yours to write")\n'
    return "".join([*lines[:first], error, *lines[body[-1].end_lineno:]])


def parse_flags(argv):
    parser = Parser(__doc__)
    parser.add_argument("functions", nargs="+", help="such as losses.dpo")
    parser.add_argument("--out_dir", default="out/homework", help="for the copy: a new folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    if os.path.lexists(args.out_dir):
        raise InputError(f"--out_dir: {args.out_dir} is there already; name a new folder")
    sources = {}                                            # {path: what the copy has there}
    for function in dict.fromkeys(args.functions):
        module, *names = function.split(".")
        path = f"{module}.py"
        there = module.isidentifier() and os.path.isfile(os.path.join(ROOT, path))
        if not (names and there):
            raise InputError(f"functions: {function}: name a file of the root and a function in "
                             "it, such as losses.dpo")
        if path not in sources:
            with open(os.path.join(ROOT, path), encoding="utf-8") as file:
                sources[path] = file.read()
        sources[path] = without_body(sources[path], names)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
        for path, source in sources.items():
            with open(os.path.join(copy, path), "w", encoding="utf-8") as file:
                file.write(source)
        shutil.move(copy, os.path.abspath(args.out_dir))
    print(f"to write: {', '.join(args.functions)} -> {args.out_dir}")


if __name__ == "__main__":
    run_script(main)
