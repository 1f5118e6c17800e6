"""report.html: its numbers are those of report.md, what people and policies wrote stays text, and a
real browser shows it (where there is one: Debian's chromium)."""
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import tinytldr
from data import Dataset
from dev import browser
from model import GPT, GPTConfig
from reward import RewardModel
from support import report
from support.columns import score
from support.report import (
    POSTS,
    TEMPLATE,
    clauses_of,
    colour_scale,
    curves,
    finite,
    json_in_html,
    markdown_table,
    token_logps,
    token_table,
)

ROOT = Path(__file__).parents[2]
HOSTILE = ("</script><b>bold</b><script>document.title = 'hacked'</script><!-- & \u2028 {{data}} "
           "${1} <img src=x onerror=alert(1)>")
NAME = "<img src=x onerror=alert(1)>"           # a folder may be called so
TOKENIZER = tinytldr.tokenizer()


def tiny(kind, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(GPTConfig(block_size=256, vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=1,
                               n_embd=8))
        for weight in model.parameters():       # models that differ in what they say
            weight.data += 0.3 * torch.randn_like(weight)
    return model


def evaluation(line):
    """A line of metrics.jsonl, with a number that is none."""
    return json.dumps({"step": line, "train/chosen_change": -0.5 * line,
                       "train/rejected_change": -line, "validation/reward": math.nan if line else 1,
                       "validation/accuracy": 0.5}) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs: a reference, two policies of which one has a hostile name and a curve, and a reward
    model. Two evaluations: "points" by the oracle of TinyTLDR; "scores" by the reward model, of
    prompts that try to leave the page's JSON."""
    root = tmp_path_factory.mktemp("page")
    for name, kind, seed in (("sft", GPT, 0), ("plain", GPT, 0), (NAME, GPT, 1),
                             ("rm", RewardModel, 2)):
        tiny(kind, seed).save_pretrained(root / name)
    (root / NAME / "metrics.jsonl").write_text("".join(map(evaluation, range(3))))
    rows = [{"prompt": f"{i} {HOSTILE}", "chosen": " my boss", "rejected": " broke"}
            for i in range(120)]
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    flags = [f"--ref={root}/sft", f"{root}/plain", f"{root}/{NAME}", "--n_prompts=26"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOPREF_CACHE", str(root / "cache"))
        for figure in ("advantage_figure", "logprob_figure", "margin_figure"):      # of report.md
            patch.setattr(report, figure, lambda *values: None)
        evaluate.main([*flags, f"--out_dir={root}/points", "--max_new_tokens=12",
                       "--missing_eos_penalty=0.5"])
        (root / "sft/config.json").write_text(with_flags(root / "sft", tokenizer="tinytldr"))
        evaluate.main([*flags, f"--out_dir={root}/scores", "--max_new_tokens=8",
                       f"--data={path}", f"--oracle={root}/rm", f"--rms={root}/rm"])
    return root


def with_flags(run, **flags):
    config = json.loads((run / "config.json").read_text())
    return json.dumps({**config, "nanopref": flags})


def page_of(folder):
    """The text of a report.html, and its data, read as JSON that has no NaN."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    text = (folder / "report.html").read_text(encoding="utf-8")
    content, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(content, parse_constant=refuse)


each = pytest.mark.parametrize("kind", ["points", "scores"])


# ------------------------------------------------------------------ the numbers

@each
def test_its_numbers_are_those_of_report_md(folder, kind):
    """Every table stands in report.md, cell by cell; the chart's numbers in results.json."""
    _, data = page_of(folder / kind)
    markdown = (folder / kind / "report.md").read_text()
    assert [table["title"] for table in data["tables"]] == [
        "Policies", "How they were trained", "Reward models"][:2 if kind == "points" else 3]
    for table in data["tables"]:
        assert markdown_table(table["header"], table["rows"]) in markdown
    assert data["about"] in markdown and data["verdict"] in markdown.replace("**", "")

    results = json.loads((folder / kind / "results.json").read_text())
    names = [policy["name"] for policy in data["policies"]]
    assert names == ["reference", "plain", NAME]
    for policy in data["policies"][1:]:
        numbers = results["policies"][policy.pop("name")]
        assert policy == {key: numbers[key] for key in policy}
    assert data["policies"][1]["kl_pi_ref"] == data["policies"][1]["kl_pi_ref_95"] == 0
    assert data["policies"][2]["kl_pi_ref_95"] > 0


def test_the_verdicts_are_the_oracles(folder):
    """Points add up to the reward, less the penalty of a sample that was cut off. The tokens are
    the reply's, and those of a clause hold its text."""
    _, data = page_of(folder / "points")
    assert len(data["posts"]) == POSTS and data["unit"] == "points"
    assert [post["number"] for post in data["posts"]] == [1 + i * 26 // POSTS for i in range(POSTS)]
    n_cut = 0
    for post in data["posts"]:
        for reply in post["replies"]:
            pieces = [text or "" for text, _, _ in reply["tokens"]]
            verdicts = tinytldr.judge(post["text"], "".join(pieces))
            points = sum(worth for _, worth, _, _ in reply["clauses"])
            assert reply["reward"] == points - 0.5 * reply["cut"]
            assert [clause[:2] for clause in reply["clauses"]] == [list(v[1:]) for v in verdicts]
            for (text, _, _), (_, _, first, end) in zip(verdicts, reply["clauses"], strict=True):
                assert text in "".join(pieces[first:end])
            assert reply["cut"] == (reply["tokens"][-1][0] is not None)
            n_cut += reply["cut"]
    assert 0 < n_cut


def test_a_reward_model_judges_the_whole_reply(folder):
    _, data = page_of(folder / "scores")
    assert data["unit"] == "reward" and HOSTILE in data["posts"][0]["text"]
    rewards = [reply["reward"] for post in data["posts"] for reply in post["replies"]]
    assert len(set(rewards)) > 10
    assert all(reply["clauses"] == [] for post in data["posts"] for reply in post["replies"])


def test_token_logps_by_hand():
    """They are log_softmax of the plain logits, at the token that came; and they add up to the
    response's log-prob."""
    model = tiny(GPT, 3)
    examples = [([5, 6, 7], [np.array([8, 9, 300])]), ([10], [np.array([11])]),
                ([1, 2], [np.array([3, 4, 5, 6, 7])])]
    dataset = Dataset(examples)
    values = token_logps(model, dataset)
    for (prompt, (reply,)), logps in zip(examples, values, strict=True):
        logits = model.logits(torch.tensor([[*prompt, *reply]]))[0, len(prompt) - 1:-1]
        wanted = logits.log_softmax(1)[range(len(reply)), reply.tolist()]
        np.testing.assert_allclose(logps, wanted.detach(), rtol=1e-5, atol=1e-5)
    sums = [logps.sum() for logps in values]
    np.testing.assert_allclose(sums, score(model, dataset)[:, 0], rtol=1e-5)


def test_the_reference_and_its_copy_did_not_move(folder):
    _, data = page_of(folder / "points")
    changes = [[own - ref for post in data["posts"] for _, own, ref in post["replies"][i]["tokens"]]
               for i in range(3)]
    assert not any(changes[0]) and not any(changes[1])
    assert max(map(abs, changes[2])) > 0.1
    assert np.quantile(np.abs(changes[1] + changes[2]), 0.95) <= data["scale"]


# ------------------------------------------------------------------ tokens as text

def test_a_letter_of_several_tokens_is_one_piece():
    """And its log-prob is their sum. The token that ends the reply has no text."""
    ids = [*TOKENIZER.encode_ordinary(" my boss é 😀"), TOKENIZER.eot_token]
    logps = np.arange(len(ids), dtype=np.float32)
    table = token_table(ids, logps, -logps, TOKENIZER)
    assert [text for text, _, _ in table] == [" my", " boss", " ", "é", " ", "😀", None]
    assert sum(own for _, own, _ in table) == logps.sum()
    assert [own for _, own, _ in table][3] == 3 + 4
    cut = token_table(ids[:-2], logps[:-2], logps[:-2], TOKENIZER)      # in the middle of a letter
    assert len(cut) == 6 and cut[-1][0] == "\ufffd"
    unknown = token_table([TOKENIZER.n_vocab + 1], np.zeros(1), np.zeros(1), TOKENIZER)
    assert unknown == [["", 0, 0]]              # of a padded vocabulary


@pytest.mark.parametrize("text", [" my boss; broke", "", ";", "broke; broke;", " my  boss ;;x"])
def test_every_token_belongs_to_one_clause(text):
    ids = TOKENIZER.encode_ordinary(text)
    table = token_table(ids, np.zeros(len(ids)), np.zeros(len(ids)), TOKENIZER)
    verdicts = tinytldr.judge("POST: My boss is at it again.", text)
    clauses = clauses_of(table, verdicts)
    assert len(clauses) == len(verdicts)
    places = [i for _, _, first, end in clauses for i in range(first, end)]
    assert places == list(range(len(table)))
    if text == " my boss; broke":
        assert [clause[2:] for clause in clauses] == [[0, 3], [3, 4]]


def test_the_colours_reach_what_one_token_in_twenty_exceeds():
    def posts(changes):
        return [{"replies": [{"tokens": []}, {"tokens": [["a", x, 0.0] for x in changes]}]}]

    assert colour_scale(posts([0.0])) == colour_scale(posts([])) == 0.5
    assert colour_scale(posts([0.1] * 99 + [50.0])) == 0.5
    assert colour_scale(posts([-1.5, math.nan])) == 2 and colour_scale(posts([99.0])) == 10


# ------------------------------------------------------------------ the file

class Tags(HTMLParser):
    """Collects the tags of a page, and checks that each is closed in its turn."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@each
def test_it_stands_alone_and_text_stays_text(folder, kind):
    """A browser sees the tags of the template, whatever was written into the data. Nothing is
    loaded from elsewhere, and nothing from the data becomes HTML."""
    text, _ = page_of(folder / kind)
    assert browser.hash_template(folder / kind / "report.html") == browser.hash_template(TEMPLATE)
    assert Tags(text).seen == Tags(TEMPLATE.read_text(encoding="utf-8")).seen
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", text.replace("img src=x", ""))
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert way not in text
    assert len(text) < 400_000


def test_json_survives_everything():
    value = {"a": [math.nan, -math.inf, 1.5, (None, True)], HOSTILE: HOSTILE, "lone": "\ud800"}
    text = json_in_html(value)
    assert not set("<>&\u2028") & set(text) and text.isascii()
    assert json.loads(text) == {"a": [None, None, 1.5, [None, True]], HOSTILE: HOSTILE,
                                "lone": "\ud800"}
    assert finite({"x": np.float64("nan")}) == {"x": None}


def test_curves(folder):
    """A number that is not finite is null; the kept checkpoint is the last, as --select says."""
    _, data = page_of(folder / "points")
    lines = {panel["title"]: panel["lines"] for panel in data["curves"]}
    assert len(lines) == 4
    reward, = lines["Reward of samples for validation prompts"]
    assert reward == {"policy": NAME, "kept": 2, "steps": [0, 1, 2], "values": [1, None, None]}


def test_a_folder_may_have_a_bar_in_its_name():
    """It would begin another column of report.md's tables, and move the numbers after it."""
    assert markdown_table(["policy", "length"], [["a|b", 3], ["c\nd", 4]]) == (
        "| policy | length |\n|---|---|\n| a\\|b | 3 |\n| c d | 4 |")


def test_a_run_on_labelled_responses_has_curves(tmp_path):
    """It has no chosen responses: its curves are of desirable and undesirable ones, and of the
    reward. report.md's figure and columns, which are of chosen ones, leave it out."""
    (tmp_path / "config.json").write_text('{"nanopref": {"select": "oracle"}}')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({
        "step": step, "validation/loss": 0.5, "validation/reward": reward,
        "train/desirable_change": 2 * reward, "train/undesirable_change": -reward}) + "\n"
        + '{"step": 7, "loss": 1, "desirable_change": 3}\n'
        for step, reward in ((0, 0), (10, 4), (20, 3))))
    panels = {panel["title"]: panel["lines"] for panel in curves([str(tmp_path)])}
    assert list(panels) == ["Reward of samples for validation prompts",
                            "Log-prob of desirable training responses",
                            "Log-prob of undesirable training responses"]
    line, = panels["Log-prob of desirable training responses"]
    assert (line["steps"], line["values"], line["kept"]) == ([0, 10, 20], [0, 8, 6], 1)
    assert report.training_curve(str(tmp_path))[:3] == ([], [], [])


# ------------------------------------------------------------------ a real browser

@pytest.fixture(scope="module")
def chromium():
    if browser.CHROMIUM is None:
        pytest.skip("needs chromium")
    with browser.Browser() as opened:
        yield opened


@each
def test_chromium_shows_it(folder, kind, chromium):
    """It loads without a complaint and asks for no other file; keys, clicks and buttons switch
    policies and prompts; tables are sorted; nothing hostile ran."""
    chromium.open(folder / kind / "report.html")
    def text(selector):
        return chromium.run(f"document.querySelector({selector!r}).textContent")

    pages = page_of(folder / kind)[1]
    assert text("#post") == pages["posts"][0]["text"]
    chromium.press("2")
    assert text("#seen").startswith(f"{NAME} earns ") and "(1 of " in text("#seen")
    chromium.press("k")
    assert text("#seen").startswith("plain earns ")
    chromium.click("#policies button:nth-child(3)")
    assert text("#seen").startswith(f"{NAME} earns ")
    chromium.press("ArrowRight")
    chromium.click("#next")
    assert text("#post") == pages["posts"][2]["text"]
    chromium.click("#grid tr:nth-child(1) td:nth-child(2)")
    assert text("#post") == pages["posts"][0]["text"] and text("#seen").startswith("plain earns ")
    chromium.press("ArrowLeft")
    assert text("#post") == pages["posts"][-1]["text"]
    assert chromium.run("document.querySelectorAll('.reply').length") == 2
    chromium.press("a")
    assert chromium.run("document.querySelectorAll('.reply').length") == 3

    column = pages["tables"][0]["header"].index("length") + 1
    cells = f"#tables tbody td:nth-child({column})"
    for order in (True, False):
        chromium.click(f"#tables th:nth-child({column}) button")
        values = chromium.run(f"[...document.querySelector('#tables section')"
                              f".querySelectorAll({cells!r})].map(cell => +cell.textContent)")
        assert values == sorted(values, reverse=order) and len(values) == 3

    chromium.click("#shown .token")
    assert "log pi −" in text("#tip") and chromium.run("!document.getElementById('tip').hidden")
    assert chromium.run("document.querySelectorAll('svg g.mark').length") >= 3 + 4
    assert chromium.run("document.title") == "nanoPref report"
    assert chromium.run("document.querySelectorAll('b, img, #post *').length") == 0
    assert chromium.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_the_switch(folder, chromium, scheme):
    page = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(250, 249, 246)", "dark": "rgb(21, 23, 27)"}
    other = {"light": "dark", "dark": "light"}[scheme]
    chromium.open(folder / "points" / "report.html", scheme=scheme)
    assert chromium.run(page) == colours[scheme]
    chromium.click("#theme")
    assert chromium.run(page) == colours[other]
    chromium.press("t")
    assert chromium.run(page) == colours[scheme]
    assert chromium.complaints() == []


@each
def test_a_phone_needs_no_sideways_scroll(folder, kind, chromium):
    """At a width of 380 pixels, and 320. Wide tables scroll in themselves."""
    for width in (380, 320):
        chromium.open(folder / kind / "report.html", width=width, height=800)
        assert chromium.run("innerWidth") == width
        assert chromium.run("document.documentElement.scrollWidth") == width
        assert chromium.run("document.querySelector('#scatter svg').clientWidth") < width
    assert chromium.complaints() == []


def test_numbers_that_are_not_there(folder, tmp_path, chromium):
    """Without KLs (at another temperature) and without curves, their panels are not shown. A number
    that is not finite is called so."""
    _, data = page_of(folder / "scores")
    data["curves"] = []
    for policy in data["policies"]:
        policy |= {"kl_pi_ref": None, "kl_pi_ref_95": None, "advantage": math.nan}
    for post in data["posts"]:
        for reply in post["replies"]:
            reply |= {"reward": math.inf, "tokens": [[text, math.nan, -math.inf]
                                                     for text, _, _ in reply["tokens"]]}
    path = tmp_path / "report.html"
    template = TEMPLATE.read_text(encoding="utf-8")
    path.write_text(template.replace("{{data}}", json_in_html(data)), encoding="utf-8")
    chromium.open(path)
    for panel in ("frontier", "training"):
        assert chromium.run(f"document.getElementById('{panel}').hidden")
    chromium.press("2")
    assert "earns not finite" in chromium.run("document.getElementById('seen').textContent")
    chromium.click("#shown .token")
    assert "log pi not finite" in chromium.run("document.getElementById('tip').textContent")
    assert chromium.complaints() == []


def test_the_picture_shows_this_page():
    """docs/img/report.png was made from the template as it is, and is small."""
    picture = (ROOT / "docs/img/report.png").read_bytes()
    assert browser.hash_template(TEMPLATE).encode() in picture, (
        "stale: run python evaluate.py, then the command in docs/setup.md")
    assert len(picture) < 200_000
