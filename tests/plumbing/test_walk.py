"""docs/walk.md and docs/walk.ipynb: their code is run, and they say what comes out."""
import json
import sys

import torch

from dev import walk
from dev.walk_figures import Picture

DOCS = walk.ROOT / "docs"
STALE = "stale: python dev/walk.py writes it"


def test_the_walk_is_what_its_code_prints(monkeypatch):
    """The cells of the notebook are run one after the other, without Jupyter. The notebook, its
    links to lines included, and the page are those that the generator writes. Pictures are left
    out: they depend on matplotlib, and take seconds."""
    monkeypatch.setattr(Picture, "png", b"")
    monkeypatch.setattr(sys, "path", [*sys.path])       # the first cell appends to it
    stored = json.loads((DOCS / "walk.ipynb").read_text(encoding="utf-8"))
    for cell in stored["cells"]:
        for output in cell.get("outputs", []):
            if "data" in output:
                assert output["data"].pop("image/png")
                output["data"]["image/png"] = ""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    assert cells == walk.read_cells(walk.CELLS.read_text(encoding="utf-8")), STALE
    try:
        with torch.random.fork_rng():
            results = walk.run_cells(cells)
    finally:
        torch.set_default_dtype(torch.float32)
    assert walk.notebook(results) == stored, STALE
    assert walk.page(results) == (DOCS / "walk.md").read_text(encoding="utf-8"), STALE
