"""What the README and the pages of docs/ promise: what they name is there."""
import ast
import csv
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import losses
import train_policy
import train_rm
from data import collate
from dev import draw
from losses import LOSSES, knobs
from model import GPT, GPTConfig
from reward import RewardModel
from support.flags import SHARED, InputError, comparison_flags, talk_flags
from support.run import SHOWN
from zoo import ZOO

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "runs" / "handouts").glob("*.md"))]
FOLDERS = (".", "support", "runs", "experiments", "dev")
TESTS = ("tests", "tests/plumbing")
CODE = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
ABBREVIATIONS = {"CUDA", "POST", "README", "JSON", "JSONL", "NANOPREF_CACHE", "RLHF", "TMLR",
                 "TIKTOKEN_CACHE_DIR", "LOSSES", "LICENSE", "GELU", "PEFT", "ROUGE", "TFLOP",
                 "DPOP", "ODPO", "ORPO", "REBEL", "RRHF", "SPPO", "VARIANT", "CHANGES"}
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
    """Links are relative to the page; a part of another page is named by one of its headings, a
    line of code by its number."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if target.suffix == ".py" and heading:
            assert 0 < int(heading.removeprefix("L")) <= len(text_of(target).splitlines()), link
            continue
        headings = re.findall(r"^#+ (.*)$", text_of(target), flags=re.M) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
        assert not heading or heading in anchors, link


@each_page
def test_source_files_that_it_names_exist(page):
    """In `code`: from the root, or by the name of a file somewhere in the house."""
    names = re.findall(r"`([\w./-]+\.(?:py|sh|toml|txt))[:`]", text_of(page))
    assert [name for name in names
            if not any((ROOT / folder / name).is_file() for folder in (*FOLDERS, *TESTS))] == []


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
    flags = {"help", "nproc_per_node", *SHARED}
    flags |= {knob for loss in LOSSES | ZOO for knob in knobs(loss)}
    for path in CODE:
        text = text_of(path)
        flags |= set(re.findall(r'"--(\w+)"', text))
        for table in re.findall(r"^NUMBERS = dict\((.*?)^\)", text, flags=re.S | re.M):
            flags |= set(re.findall(r"^ +(\w+)=", table, flags=re.M))
        for table in re.findall(r"^    sizes = \{(.*?)\}", text, flags=re.S | re.M):
            flags |= set(re.findall(r'"(\w+)":', table))        # of a model from scratch
    return flags


@each_page
def test_flags_that_it_names_exist(page):
    named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text_of(page)))
    assert named - all_flags() == set()


def test_the_numbers_on_scale_are_those_of_its_snippet(capsys):
    """Each line that the code in docs/scale.md prints stands in the page, and in the tables of the
    estimate there is no other."""
    text = text_of(ROOT / "docs" / "scale.md")
    exec(re.search(r"```python\n(.*?)```", text, flags=re.S).group(1), {})
    printed = capsys.readouterr().out.splitlines()
    estimate = text.partition("## LoRA, measured")[0]
    tables = [line for line in estimate.splitlines() if line.startswith("| ")]
    assert printed[0].removesuffix(" parameters") in text
    assert [line for line in tables if line not in printed] == [
        "| what | GB |", "| what | products, s | traffic, s | GPU hours |"]
    assert len(printed) == 1 + len(tables) - 2


# ------ what the README shows of the code and of the results


def test_the_readme_quotes_e_dpo_as_it_stands():
    source = inspect.getsource(losses.e_dpo)
    definition, docstring, body = source.split('"""')
    assert f"```python\n{definition.rstrip()}\n{body.strip(chr(10))}\n```\n" in text_of(README)


def test_the_tree_in_the_readme_is_what_collate_makes():
    """Its three lines: the tokens of a row, their branches and their positions."""
    rows = {}
    for name in ("tokens", "branch", "position"):
        line = re.search(rf"^{name} +(.*)$", text_of(README), flags=re.M).group(1)
        rows[name] = [part.split() for part in line.split("|")]
    assert rows["tokens"] == draw.TREE

    prompt, *responses = [list(range(len(part))) for part in rows["tokens"]]
    batch = collate([(prompt, responses)])
    assert [int(x) for part in rows["branch"] for x in part] == batch.branch[0].tolist()
    assert [int(x) for part in rows["position"] for x in part] == batch.position[0].tolist()


@pytest.mark.parametrize("made, command", [
    ("docs/losses.md", "python experiments/zoo.py --draw"), ("docs/walk.md", "python dev/walk.py"),
    ("docs/walk.ipynb", "python dev/walk.py"), ("out/report/report.html", "python evaluate.py"),
    ("docs/img/report.png", "python dev/browser.py out/report/report.html docs/img/report.png")])
def test_what_is_generated_has_its_command(made, command):
    """In docs/setup.md, next to the name of what it makes: in the same paragraph, or the same point
    of a list. (tests/test_zoo.py, test_walk.py and test_page.py fail where one of these is stale.)
    """
    text = re.sub(r"```.*?```", "", text_of(ROOT / "docs" / "setup.md"), flags=re.S)
    parts = [" ".join(part.split()) for part in re.split(r"\n\n|\n(?=\* )", text)]
    assert any(made in part and f"`{command}`" in part for part in parts)


def test_the_pictures_are_drawn(tmp_path):
    draw.main([f"--out_dir={tmp_path}"])
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["advantage.png", "pipeline.png", "tree_mask.png"]
    for name in drawn:
        assert f"](assets/{name})" in text_of(README)


def means(path, **wanted):
    """The mean test advantage over seeds, of the rows of a runs.csv with these values."""
    with open(ROOT / "results" / path / "runs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["test"]) for row in rows
              if all(row[column] == value for column, value in wanted.items())]
    assert len(values) > 1
    return np.mean(values)


def test_the_findings_are_those_of_the_results():
    """Every number of "What we found", and of the caption of the first picture, from the CSVs."""
    text = " ".join(text_of(README).split())
    lead = means("figure2", method="e-dpo", rho="0.2") - means("figure2", method="dpo", rho="0.2")
    assert f"It earns {lead:.2f} more than DPO" in text

    d_dpo_leads = [means("figure2", method="d-dpo", rho=rho)
                   - means("figure2", method="e-dpo", rho=rho)
                   for rho in ("0.4", "0.5", "0.6", "0.7", "0.8", "all")]
    assert f"ahead of it, by {min(d_dpo_leads):.1f} to {max(d_dpo_leads):.1f}." in text

    mean_leads = [means("figure2-fresh", method="dp-dpo, family's mean", rho=rho)
                  - means("figure2-fresh", method="e-dpo", rho=rho)
                  for rho in ("0.2", "0.5", "0.8")]
    assert f"by {np.mean(mean_leads):.2f}, averaged over rho 0.2, 0.5 and 0.8" in text

    balanced = means("ablations", table="balance", rho="0.2", setting="balanced pairs")
    minimum = means("ablations", table="balance", rho="0.2", setting="family's minimum")
    assert f"equally often earns {balanced:+.2f}. e-DPO on all 1,000 pairs earns {minimum:+.2f}." \
        in text

    curves = draw.advantages(ROOT / "results" / "degeneracy" / "curves.csv")
    ends = {loss: values[:, -1].mean() for loss, (_, values) in curves.items()}
    assert f"DPO ends {-ends['dpo']:.0f} points below" in text
    assert f"falls too, to {ends['d-dpo']:.0f}." in text
    assert ends["e-dpo"] > 0 and ends["ipo"] > 0


def test_the_expected_output_is_the_table_of_the_results():
    """The lines that the speedrun prints last, in the README, are those of docs/results.md."""
    shown, = [block for block in text_of(README).split("```") if "whole speedrun took" in block]
    lines = re.findall(r"^(\S+) +advantage (\S+ ± \S+)$", shown, flags=re.M)
    assert [name for name, _ in lines] == ["dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo"]
    for name, advantage in lines:
        assert f"| {name} | {advantage} |" in text_of(ROOT / "docs" / "results.md")


def test_the_table_of_the_first_look_has_the_headings_that_a_run_prints():
    """In docs/glossary.md, which explains them: those of a policy that the oracle judges; the rows
    fit below them."""
    glossary = text_of(ROOT / "docs" / "glossary.md")
    shown, = [block for block in glossary.split("```") if "train/chosen  " in block]
    heading, *rows = re.findall(r"^ step .*|^ +\d+  +\d+\.\d{4}  .*", shown, flags=re.M)
    of_pairs = [name for name in SHOWN if not name.endswith(("/good", "/bad"))]
    assert heading.split() == ["step", *of_pairs, "left"]
    assert len(rows) > 1 and all(len(row.split()) >= len(of_pairs) for row in rows)


def test_the_post_in_the_readme_is_the_first_that_tinytldr_prints():
    shown = re.search(r"```\n(POST: .*?)\n```", text_of(README), flags=re.S).group(1).splitlines()
    output = subprocess.run([sys.executable, "tinytldr.py"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout
    printed = output.splitlines()
    assert printed[0].startswith(shown[0].removesuffix("..."))
    assert printed[1:len(shown)] == shown[1:]


# ------ commands


def flag_parser(script):
    """The function that reads a script's flags, or None if it has no such function."""
    root_parsers = {"train_policy": train_policy.parse_flags,
                    "train_rm": train_rm.parse_flags,
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
        for script, flags in re.findall(r"\bpython ((?:\w+/)?\w+)\.py([^`#\n]*)", text):
            flags = shlex.split(flags)
            if (ROOT / f"{script}.py").is_file() and "--help" not in flags:
                yield where, script, flags


@pytest.fixture
def after_the_speedrun(tmp_path, monkeypatch):
    """A folder with an out/ as the speedrun leaves it, as far as flags are checked against it:
    each run's flags in its config.json, and its weights (tiny ones); and the report."""
    monkeypatch.chdir(tmp_path)
    config = GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8)
    runs = {"sft": GPT, "rm": RewardModel}
    runs |= {f"rms/{bias}": RewardModel for bias in (0.2, 0.4, 0.5, 0.6, 0.8)}
    runs |= {loss: GPT for loss in ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")}
    for name, kind in runs.items():
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        flags = {"nanopref": {"tokenizer": "tinytldr"}}
        (folder / "config.json").write_text(json.dumps(flags))
        (folder / "state.pt").touch()
        kind(config).save_pretrained(folder)
    (tmp_path / "out" / "report").mkdir()
    (tmp_path / "out" / "report" / "report.html").touch()


def test_commands_run_after_the_speedrun(after_the_speedrun):
    """Every python command of the pages and docstrings, with its flags, is accepted as it stands
    where the speedrun has been. What it reads from out/ is there, or an earlier command of the same
    page has made it; and it writes to no folder that holds a run. (As far as can be said before it
    reads data of one's own or trains.)"""
    refused, tried, made = [], 0, {}        # made: {page: what its commands have written}
    for where, script, flags in commands():
        there = made.setdefault(where, [])
        parse = flag_parser(script)
        if parse is None:
            continue
        tried += 1
        try:
            args = vars(parse(flags))
        except InputError as error:
            refused.append(f"{where}: python {script}.py {' '.join(flags)}: {error}")
            continue
        written = {args.get("out_dir"), args.get("out")}
        for path in re.findall(r"\bout/[\w./-]+", " ".join(flags)):
            if path not in written and not os.path.exists(path) and path not in there:
                refused.append(f"{where}: python {script}.py {' '.join(flags)}: there is no {path}")
        there += written
    assert not refused, "\n".join(refused)
    assert tried > 20
