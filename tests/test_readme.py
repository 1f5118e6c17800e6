"""What the README and the pages of docs/ promise: what they name is there."""
import ast
import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from losses import LOSSES
from support.flags import InputError, comparison_flags, talk_flags
from support.training_flags import policy_flags, reward_flags

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for folder in (".", "support", "runs") for path in (ROOT / folder).glob("*.py")]
ABBREVIATIONS = {"CUDA", "POST", "README", "JSON", "JSONL", "NANOPREF_CACHE", "RLHF", "TMLR",
                 "TIKTOKEN_CACHE_DIR", "LOSSES", "GELU"}
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def text_of(page):
    return page.read_text(encoding="utf-8")


@each_page
def test_nothing_is_left_to_fill_in(page):
    """No @PLACEHOLDER@, and outside of code no word in capitals that is not a name."""
    text = text_of(page)
    assert re.findall(r"@\w+@", text) == []
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert set(re.findall(r"\b[A-Z_]{4,}\b", prose)) <= ABBREVIATIONS


@each_page
def test_files_and_images_that_it_links_to_exist(page):
    """Links are relative to the page; a part of another page is named by one of its headings."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", text_of(target), flags=re.M) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
        assert not heading or heading in anchors, link


@each_page
def test_source_files_that_it_names_exist(page):
    """In `code`: from the root, or by the name of a file somewhere in the house."""
    names = re.findall(r"`([\w./-]+\.(?:py|sh|toml|txt))[:`]", text_of(page))
    folders = ("", "support", "runs", "tests")
    assert [name for name in names
            if not any((ROOT / folder / name).is_file() for folder in folders)] == []


@each_page
def test_commands_that_it_names_exist(page):
    text = text_of(page)
    names = re.findall(r"\b(?:bash|python3?) ([\w./-]+\.(?:sh|py))\b", text)
    for files in re.findall(r"\bdiff ([\w./-]+\.py) ([\w./-]+\.py)", text):
        names += files
    assert [name for name in names if not (ROOT / name).is_file()] == []
    if page == README:
        assert len(names) > 10


def all_flags():
    """The flags of all scripts: read from the source, as those of the losses are from the table;
    and torchrun's."""
    flags = {"help", "nproc_per_node"} | {knob for loss in LOSSES.values() for knob in loss.knobs}
    for path in CODE:
        text = text_of(path)
        flags |= set(re.findall(r'"--(\w+)"', text))
        for table in re.findall(r"^    sizes = \{(.*?)\}", text, flags=re.S | re.M):
            flags |= set(re.findall(r'"(\w+)":', table))        # of a model from scratch
    return flags


@each_page
def test_flags_that_it_names_exist(page):
    named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text_of(page)))
    assert named - all_flags() == set()


def test_the_numbers_on_scale_are_those_of_its_snippet(capsys):
    """Each line that the code in docs/scale.md prints stands in the page."""
    text = text_of(ROOT / "docs" / "scale.md")
    exec(re.search(r"```python\n(.*?)```", text, flags=re.S).group(1), {})
    printed = capsys.readouterr().out.splitlines()
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert printed[0].removesuffix(" parameters") in text
    assert [line for line in tables if line not in printed] == [
        "| what | GB |", "| what | products, s | traffic, s | GPU hours |"]
    assert len(printed) == 1 + len(tables) - 2


def flag_parser(script):
    """The function that reads a script's flags, or None if it has no such function."""
    root_parsers = {"train_policy": partial(policy_flags, doc="", losses=LOSSES),
                    "train_rm": partial(reward_flags, doc=""),
                    "evaluate": partial(comparison_flags, doc=""),
                    "sample": partial(talk_flags, doc="")}
    if script in root_parsers:
        return root_parsers[script]
    module = importlib.import_module(script.replace("/", "."))
    return getattr(module, "parse_flags", None)


def commands():
    """(where, script, flags) of every python command in the pages and in docstrings."""
    texts = {page.name: text_of(page) for page in PAGES}
    texts |= {path.name: ast.get_docstring(ast.parse(text_of(path))) or "" for path in CODE}
    for where, text in texts.items():
        text = text.replace("\\\n", " ")             # a command that goes on in the next line
        for script, flags in re.findall(r"\bpython ((?:runs/)?\w+)\.py([^`#\n]*)", text):
            flags = shlex.split(flags)
            if (ROOT / f"{script}.py").is_file() and "--help" not in flags:
                yield where, script, flags


def test_commands_are_accepted(tmp_path, monkeypatch):
    """Every python command, with its flags, as far as can be said before it reads or makes
    anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "runs")
    tried = 0
    for where, script, flags in commands():
        parse = flag_parser(script)
        if parse is not None:
            try:
                parse(flags)
            except InputError as error:
                raise AssertionError(f"{where}: python {script}.py {flags}: {error}") from error
            tried += 1
    assert tried > 20
