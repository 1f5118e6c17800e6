"""What the README promises about itself."""
import re
from pathlib import Path

import evaluate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_glossary_is_the_report_s():
    assert evaluate.GLOSSARY in README


def test_nothing_is_left_to_fill_in():
    """No word in capitals that is not a known name: placeholders are written so."""
    words = set(re.findall(r"\b[A-Z_]{4,}\b", re.sub(r"```.*?```", "", README, flags=re.S)))
    assert words <= {"CUDA", "JSON", "JSONL", "NANOPREF_CACHE", "RLHF", "TIKTOKEN_CACHE_DIR", "TMLR"}


def test_files_and_images_that_it_names_exist():
    named = re.findall(r"\((?!http)([\w./-]+\.(?:md|png))\)", README) + re.findall(r"(?:bash|python) ([\w./-]+\.(?:sh|py))", README)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_flag_that_it_names_exists():
    sources = "".join((ROOT / name).read_text() for name in ("runtime.py", "data.py", "train_rm.py", "train_policy.py", "evaluate.py",
                                                         "bench.py", "reward.py", "sample.py", "runs/bench_trl.py",
                                                         "runs/protocol.py"))
    known = set(re.findall(r'"--(\w+)"', sources)) | set(re.findall(r'\("(\w+)", [\d.e-]+[,)]', sources)) | {"help"}
    assert set(re.findall(r"--(\w+)", re.sub(r"-{3,}", "", README))) <= known
