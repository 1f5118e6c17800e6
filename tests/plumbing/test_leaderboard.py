"""The leaderboard: what an entry may be, that it is trained as e-DPO is, and its points."""
from pathlib import Path

import pytest
import torch

import train_policy
from experiments import leaderboard, trials
from losses import LOSSES
from support.flags import InputError
from support.run import read_json

ROOT = Path(__file__).parents[2]
MEAN = '''
from losses import GAMMA, dp_dpo


def loss(kl, rewards, ref_logps, logps, beta=0.5, gamma=GAMMA):
    return dp_dpo(logps, ref_logps, rewards, kl, beta, gamma)
'''


@pytest.fixture(autouse=True)
def no_entry_stays(monkeypatch):
    monkeypatch.setitem(LOSSES, "entry", None)


def entry(folder, source):
    folder.mkdir()
    (folder / "entry.py").write_text(source, encoding="utf-8")
    return str(folder)


def test_the_template_is_dpo():
    """And it is a loss like others: the trainer knows its flag, its columns and its number."""
    leaderboard.read_entry(f"{ROOT}/experiments/entry.py")
    logps, ref_logps = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LOSSES["entry"](logps, ref_logps), LOSSES["dpo"](logps, ref_logps))
    args = train_policy.parse_flags(["--loss=entry", *leaderboard.BUDGET])
    assert (args.beta, args.gamma, args.rewards, args.max_steps) == (1.0, None, None, 320)


@pytest.mark.parametrize("source, message", [
    ("import tinytldr", r"line 1 imports tinytldr; an entry may import losses, math, torch"),
    ("def loss(logps):\n    from evaluate import main", "line 2 imports evaluate"),
    ("from . import data", "imports ."), ("loss = 3", "has no function `loss`"),
    ("def los(logps): pass", "has no function `loss`"), ("def loss(:", "can't read"),
    ("import torch\n1 / 0", "entry.py can't be run: ZeroDivisionError"),
    ("raise SystemExit(0)", "can't be run: SystemExit"), ("loss = los", "can't be run: NameError"),
    ("def loss(logps, lengths, oracle): pass", "`loss` needs oracle; a parameter"),
    ("def loss(logps): return logps.mean()", r"returns \[\] for 4 pairs, not \(4,\)"),
    ("def loss(logps): return logps", r"returns \[4, 2\] for 4 pairs"),
    ("def loss(logps): pass", "returns NoneType for 4 pairs"),
    ("def loss(logps): return logps[:, 0].log()", r"returns \[nan, nan, nan, nan\]"),
    ("def loss(ref_logps): return ref_logps[:, 0]", "does not depend on the policy's logps"),
    ("def loss(logps, beta='a'): return beta / logps[:, 0]", "fails with four made-up pairs: Type"),
])
def test_what_is_no_entry(source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        leaderboard.read_entry(entry(tmp_path / "ada", source))


def test_both_policies_have_the_same_budget(tmp_path, monkeypatch, capsys):
    """With each seed: a family of reward models, e-DPO, the entry, on the same pairs and posts."""
    calls, asked = [], []

    def scores(folders, ref, split, *flags):
        asked.append((ref, split, flags))
        leads = {"/3/": 0.2, "/4/": -0.1}
        return {folder: {"advantage": 3 + sum(lead for cell, lead in leads.items()
                                              if cell in folder and "e-dpo" not in folder)}
                for folder in folders}

    monkeypatch.setattr(trials, "train", lambda *words: calls.append(words))
    monkeypatch.setattr(trials, "scores", scores)
    monkeypatch.setattr(trials, "check_models", lambda ref: None)
    monkeypatch.chdir(tmp_path)
    leaderboard.main([entry(tmp_path / "ada", MEAN), "--seeds=3,4", "--split=test"])
    assert [script for script, *_ in calls] == 2 * ["train_rm", "train_policy", "train_policy"]
    for seed, (family, e_dpo, own) in zip((3, 4), (calls[:3], calls[3:])):
        assert family[1:] == (f"out/leaderboard/{seed}/rms", "--init_from=out/sft",
                              f"--seed={seed}", "--rho=0.2", "--n_pairs=1000",
                              "--bias=0.2,0.4,0.5,0.6,0.8")
        assert e_dpo[2] == "--loss=e-dpo" and own[2] == "--loss=entry"
        assert e_dpo[3:] == own[3:] == (
            "--init_from=out/sft", f"--seed={seed}", *leaderboard.BUDGET,
            f"--rewards=out/leaderboard/{seed}/rms")
        args = train_policy.parse_flags([*own[2:], f"--out_dir={own[1]}"])
        assert (args.gamma, args.beta) == ((1e-4, 1e-2), 0.5)
    assert asked == [("out/sft", "test", ("--n_prompts=1000", f"--seed={seed}"))
                     for seed in (3, 4)]
    assert "lead over e-DPO +0.050 (seeds: 2)" in capsys.readouterr().out
    report = read_json("results.json")
    assert [(test["score"], test["max_score"], test["visibility"])
            for test in report["tests"]] == [(6, 6, "visible"), (8, 8, "visible"),
                                             (0, 6, "visible")]
    assert {row["name"]: row["value"] for row in report["leaderboard"]} == {
        "lead over e-DPO": 0.05, "advantage": 3.05}


def test_points_of_an_earlier_entry_do_not_stay(tmp_path):
    (tmp_path / "results.json").touch()
    with pytest.raises(InputError, match="no function `loss`"):
        leaderboard.main([entry(tmp_path / "ada", ""), f"--results={tmp_path}/results.json"])
    assert not (tmp_path / "results.json").exists()


def test_another_file_is_another_entry(tmp_path):
    first = leaderboard.read_entry(entry(tmp_path / "ada", MEAN))
    assert first == leaderboard.read_entry(str(tmp_path / "ada" / "entry.py"))
    assert first != leaderboard.read_entry(entry(tmp_path / "bob", MEAN.replace("0.5", "0.6")))
