"""Writes docs/walk.md and the notebook docs/walk.ipynb, which follow one pair through the code.

    python dev/walk.py          # seconds

Their text and code are those of dev/walk_cells.py: a text between triple quotes becomes a cell of
Markdown, the lines up to the next one become a cell of code. The code is run, and what it prints
and draws stands below it. In a text, {data.collate} becomes a link to the line where it begins.
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

import data
import losses
import model
import tinytldr
import train_policy
from dev.walk_figures import Picture
from support.flags import Parser, run_script

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "dev" / "walk_cells.py"
METHOD = {"data": data, "losses": losses, "model": model, "tinytldr": tinytldr,
          "train_policy": train_policy}
HEADER = "<!-- Written by python dev/walk.py; its text is in dev/walk_cells.py. -->"


class Prose(string.Formatter):
    """Fills in a text: a function or a class becomes a link to where it begins."""

    def format_field(self, value, spec):
        value = inspect.unwrap(value)                       # a cached function
        path = Path(inspect.getsourcefile(value)).relative_to(ROOT).as_posix()
        line = inspect.getsourcelines(value)[1]
        return f"[`{value.__qualname__}`, {path}:{line}](../{path}#L{line})"


def read_cells(source):
    """Splits a script into cells, a list of (kind, finished text); kind: "markdown" or "code"."""
    lines, cells, end = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            cells.append(("code", "\n".join(lines[end:node.lineno - 1]).strip()))
            cells.append(("markdown", Prose().vformat(node.value.value.strip(), (), METHOD)))
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
    """Runs the cells, in order. Returns a list of (kind, text, printed, pictures)."""
    namespace, results = {}, []
    for kind, text in cells:
        outcome = run_cell(text, namespace) if kind == "code" else ("", [])
        results.append((kind, text, *outcome))
    return results


def page(results):
    """Returns the Markdown page. Its pictures are img/walk_1.png, img/walk_2.png, ..."""
    parts, n_pictures = [], 0
    for kind, text, printed, pictures in results:
        parts.append(text if kind == "markdown" else f"```python\n{text}\n```")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        for picture in pictures:
            n_pictures += 1
            parts.append(f"![{picture.about}](img/walk_{n_pictures}.png)")
    title, rest = "\n\n".join(parts).split("\n", 1)
    return f"{title}\n\n{HEADER}\n{rest}\n"


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
    (Path(args.out_dir) / "img").mkdir(parents=True, exist_ok=True)
    pictures = [picture for *_, pictures in results for picture in pictures]
    for number, picture in enumerate(pictures, 1):
        (Path(args.out_dir) / "img" / f"walk_{number}.png").write_bytes(picture.png)
    text = json.dumps(notebook(results), indent=1, ensure_ascii=False) + "\n"
    (Path(args.out_dir) / "walk.ipynb").write_text(text, encoding="utf-8")
    (Path(args.out_dir) / "walk.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
