"""Writes docs/walk.md and the notebook docs/walk.ipynb, which follow one pair through the code.

    python dev/walk.py          # seconds

Their text and code are those of dev/walk_cells.py: a text between triple quotes becomes a cell of
Markdown, the lines up to the next one become a cell of code. The code is run, and what it prints
and draws stands below it. In a text, {collate} becomes a link to the line where collate begins.
"""
import ast
import base64
import inspect
import io
import json
import os
import string
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dev.walk_figures import Picture
from support.flags import Parser, run_script

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "dev" / "walk_cells.py"
HEADER = "<!-- Written by python dev/walk.py; its text is in dev/walk_cells.py. -->"


class Prose(string.Formatter):
    """Fills in a text: a function or a class becomes a link to where it begins."""

    def format_field(self, value, spec):
        if not inspect.isroutine(value) and not inspect.isclass(value):
            return super().format_field(value, spec)
        value = inspect.unwrap(value)                       # of a cache
        path = Path(inspect.getsourcefile(value)).relative_to(ROOT).as_posix()
        line = inspect.getsourcelines(value)[1]
        return f"[`{value.__qualname__}`, {path}:{line}](../{path})"


def read_cells(source):
    """Splits a script into cells, a list of (kind, text); kind: "markdown" or "code"."""
    lines, cells, end = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            cells.append(("code", "\n".join(lines[end:node.lineno - 1]).strip()))
            cells.append(("markdown", node.value.value.strip()))
            end = node.end_lineno
    cells.append(("code", "\n".join(lines[end:]).strip()))
    return [(kind, text) for kind, text in cells if text]


def run_cell(code, namespace):
    """Runs a cell as a notebook does. Returns (what it printed, [Picture that it showed])."""
    shown, printed, displayhook = [], io.StringIO(), sys.displayhook
    sys.displayhook = shown.append
    try:
        with redirect_stdout(printed):
            tree = ast.Interactive(ast.parse(code).body)        # shows the value of an expression
            exec(compile(tree, "a cell of the walk", "single"), namespace)
    finally:
        sys.displayhook = displayhook
    return printed.getvalue(), [value for value in shown if isinstance(value, Picture)]


def run_cells(cells):
    """Runs all cells, in order. Returns a list of (kind, finished text, printed, pictures)."""
    namespace, results = {}, []
    for kind, text in cells:
        if kind == "markdown":
            results.append((kind, Prose().vformat(text, (), namespace), "", []))
        else:
            results.append((kind, text, *run_cell(text, namespace)))
    return results


def page(results):
    """Returns the Markdown page, and its pictures: {name of the file: PNG}."""
    parts, files = [], {}
    for kind, text, printed, pictures in results:
        parts.append(text if kind == "markdown" else f"```python\n{text}\n```")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        for picture in pictures:
            name = f"walk_{len(files) + 1}.png"
            files[name] = picture.png
            parts.append(f"![{picture.about}](img/{name})")
    title, rest = "\n\n".join(parts).split("\n", 1)
    return f"{title}\n\n{HEADER}\n{rest}\n", files


def notebook(results):
    """Returns the notebook as a dict, in Jupyter's format 4."""
    cells = []
    for kind, text, printed, pictures in results:
        cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
        if kind == "code":
            outputs = []
            if printed:
                outputs.append({"output_type": "stream", "name": "stdout",
                                "text": printed.splitlines(keepends=True)})
            for picture in pictures:
                data = {"image/png": base64.b64encode(picture.png).decode()}
                outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
            cell |= {"execution_count": None, "outputs": outputs}
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", default=str(ROOT / "docs"), help="for the page, the notebook")
    args = parser.parse_args(argv)
    results = run_cells(read_cells(CELLS.read_text(encoding="utf-8")))
    folder = Path(args.out_dir)
    (folder / "img").mkdir(parents=True, exist_ok=True)
    text, files = page(results)
    for name, png in files.items():
        (folder / "img" / name).write_bytes(png)
    (folder / "walk.md").write_text(text, encoding="utf-8")
    (folder / "walk.ipynb").write_text(json.dumps(notebook(results), indent=1, ensure_ascii=False)
                                       + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
