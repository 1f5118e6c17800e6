"""The drivers of whole experiments: which commands they run, with the scripts themselves replaced:
runs/protocol.py, and the shell scripts."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from losses import LOSSES, knobs, needs
from runs import protocol
from support.flags import InputError, comparison_flags
from support.training_flags import policy_flags, reward_flags

ROOT = Path(__file__).parent.parent
PAPER = ["dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo"]


def check_flags(script, flags):
    """InputError if the script would refuse its flags."""
    if script == "train_policy.py":
        policy_flags(flags, "", list(LOSSES), needs, knobs)
    elif script == "train_rm.py":
        reward_flags(flags, "")
    else:
        assert script == "evaluate.py"
        comparison_flags(flags, "")


def flag_value(flags, name):
    value, = [flag.split("=", 1)[1] for flag in flags if flag.startswith(f"--{name}=")]
    return value


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """protocol.main on tmp_path/out with some flags. Returns the commands that it ran, a list of
    (script, {flag: value}); each finishes its run folder, and takes only flags that the script
    takes."""
    commands = []

    def run(script, *flags):
        check_flags(script, flags)
        values = dict(flag.removeprefix("--").split("=", 1) for flag in flags if "=" in flag)
        for member in values.get("bias", "").split(","):
            folder = os.path.join(values["out_dir"], member)
            os.makedirs(folder, exist_ok=True)
            open(os.path.join(folder, "model.safetensors"), "w").close()
        commands.append((script, values))

    def main(*flags):
        commands.clear()
        protocol.main(["--data=pairs", "--sft_data=demos", f"--out={tmp_path}/out", *flags])
        return list(commands)

    monkeypatch.setattr(protocol, "run", run)
    return main


def by_loss(commands):
    return {flags["loss"]: flags for _, flags in commands if "loss" in flags}


def test_all_stages_once(stages, tmp_path):
    """In the paper's order, on relabelled pairs; a second call with the same flags only
    evaluates."""
    commands = stages("--gamma=0.1", "--tau=2")
    out = f"{tmp_path}/out"
    ran = [(script, os.path.relpath(flags["out_dir"], out)) for script, flags in commands]
    assert ran == [("train_policy.py", "sft"), ("train_rm.py", "oracle"), ("train_rm.py", "rm"),
                   ("train_rm.py", "rms"), *(("train_policy.py", loss) for loss in PAPER),
                   ("evaluate.py", ".")]
    oracle = commands[1][1]
    assert "relabel" not in oracle and oracle["rho"] == "all"
    assert all(flags["relabel"] == f"{out}/oracle" for _, flags in commands[2:])
    assert commands[-1][1]["oracle"] == f"{out}/oracle"
    assert commands[-1][1]["rms"] == f"{out}/rm,{out}/rms"
    assert [script for script, _ in stages("--gamma=0.1", "--tau=2")] == ["evaluate.py"]


def test_losses_get_the_flags_that_they_use(stages, tmp_path):
    """And no others: a flag that would be ignored is refused by the script."""
    out = f"{tmp_path}/out"
    losses = by_loss(stages("--gamma=0.1", "--tau=2", "--beta=3", "--max_new_tokens=9",
                            f"--losses={','.join(protocol.PREFERENCE_LOSSES)}"))
    assert set(losses) == {"sft", *protocol.PREFERENCE_LOSSES}
    assert {loss: flags["rewards"] for loss, flags in losses.items() if "rewards" in flags} == {
        "d-dpo": f"{out}/rm", "dp-dpo": f"{out}/rm", "e-dpo": f"{out}/rms"}
    pessimistic = ["p-dpo", "dp-dpo", "e-dpo"]
    assert [loss for loss in losses if losses[loss].get("gamma") == "0.1,0.1"] == pessimistic
    assert all(flags["max_new_tokens"] == "9" and flags["select"] == f"{out}/oracle"
               for loss, flags in losses.items() if loss != "sft")
    of_tau = [loss for loss in losses if losses[loss].get("tau") == "2.0"]
    assert of_tau == ["ipo", "ipo-per-token"]
    of_beta = {loss for loss in losses if losses[loss].get("beta") == "3.0"}
    assert of_beta == set(losses) - {"sft", *of_tau}


def test_other_flags_need_another_folder(stages):
    stages()
    with pytest.raises(InputError, match="--out: .* was begun with --rho=0.2, not all"):
        stages("--rho=all")
    assert [script for script, _ in stages("--losses=dpo", "--n_prompts=5")] == ["evaluate.py"]


@pytest.mark.parametrize("flags, message", [
    (["--rho=2"], r"--rho: invalid fraction \(or all\) value: '2'"),
    (["--bias=a,b"], "--bias: invalid list of comma-separated fractions"),
    (["--gamma=1,2,3"], "--gamma: invalid FIRST,LAST"),
    (["--losses=dpo,xx"], "--losses: comma-separated, of dpo, ipo"),
    (["--losses=sft"], "--losses"),
    (["--steps=abc"], "--steps"),
    (["--seeds=1,2"], "--seeds: it would be ignored: it is used by --family=seeds"),
    (["--bias=0.2", "--family=seeds"], "--bias: it would be ignored"),
    (["--n_layer=2"], "--n_layer: it would be ignored: it is used by --init_from=scratch"),
    (["--foo=1"], "--foo")])
def test_bad_flags_are_refused_before_the_work(stages, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        stages(*flags)
    assert not (tmp_path / "out").exists()


def test_human_labels_and_a_family_by_seeds(stages, tmp_path):
    commands = stages("--labels=human", "--rho=all", "--family=seeds", "--seeds=3,4",
                      "--losses=e-dpo")
    assert not any("relabel" in flags for _, flags in commands)
    trained = [flags for script, flags in commands if script == "train_rm.py"]
    assert [flags["seed"] for flags in trained] == ["0", "3", "4"]          # the oracle, and two
    folders = [flags["out_dir"] for flags in trained[1:]]
    assert folders == [f"{tmp_path}/out/rms/3", f"{tmp_path}/out/rms/4"]


def test_scores_need_no_reward_models(stages):
    """And so the report has none, nor a --relabel for them, which evaluate.py would refuse."""
    commands = stages("--family=scores", "--losses=d-dpo,e-dpo")
    assert [script for script, _ in commands] == [
        "train_policy.py", "train_rm.py", "train_policy.py", "train_policy.py", "evaluate.py"]
    assert commands[2][1]["rewards"] == commands[3][1]["rewards"] == "scores"
    assert "rms" not in commands[4][1] and "relabel" not in commands[4][1]


@pytest.mark.parametrize("text, message", [
    ("{", "--out: .*protocol.json: damaged: Expecting"), ("[]", "damaged: a list, not a dict"),
    (None, "--out: .* is not a folder")])
def test_a_folder_that_is_none_of_its_own(stages, tmp_path, text, message):
    """A protocol.json that can't be read, and a file in the place of the folder."""
    if text is None:
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "protocol.json").write_text(text)
    with pytest.raises(InputError, match=message):
        stages()


def test_an_interrupted_stage_goes_on(stages, tmp_path, monkeypatch):
    """What has a state.pt and no model.safetensors is resumed, a family too."""
    flags = ["--losses=e-dpo", "--bias=0.2,0.5"]
    stages(*flags)
    for run in ("oracle", "rms/0.2", "rms/0.5"):
        (tmp_path / "out" / run / "state.pt").touch()
    for run in ("oracle", "rms/0.5"):
        (tmp_path / "out" / run / "model.safetensors").unlink()
    commands, resumed = [], []
    take = protocol.run

    def run(script, *flags):
        take(script, *flags)
        commands.append(os.path.basename(flag_value(flags, "out_dir")))
        resumed.append("--resume" in flags)

    monkeypatch.setattr(protocol, "run", run)
    stages(*flags)
    assert commands == ["oracle", "rms", "out"] and resumed == [True, True, False]


# ---------------- the shell scripts


@pytest.fixture
def shell(tmp_path):
    """Runs a script of runs/ with some flags and variables, in a copy of the repository whose
    Python only writes down what it was called with. Returns (exit code, standard error, a list of
    [script, *flags])."""
    repository, log = tmp_path / "a copy", tmp_path / "log"
    shutil.copytree(ROOT / "runs", repository / "runs")
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@" >> "$LOG"; echo >> "$LOG"\n')
    python.chmod(0o755)
    installed = ""
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, repository)
        installed += (ROOT / name).read_text()
    (repository / ".venv" / "installed.txt").write_text(installed)

    def run(script, *flags, **variables):
        log.write_text("")
        done = subprocess.run(["bash", repository / "runs" / script, *flags], capture_output=True,
                              text=True, env={**os.environ, "LOG": str(log), **variables})
        lines = log.read_text().splitlines()
        return done.returncode, done.stderr, [line.split("\t")[:-1] for line in lines]
    return run


def test_the_speedrun(shell):
    """Reference, reward models, the six policies, the report; the flags of the call go to every
    command, and the folder of OUT may have a space in its name."""
    code, errors, commands = shell("speedrun.sh", "--seed=3", "--device=cpu", OUT="my out")
    assert code == 0 and not errors
    folders = [flag_value(flags, "out_dir") for _, *flags in commands]
    losses = ["dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo"]
    trained = ["sft", "rm", "rms", *losses]
    assert folders == [f"my out/{name}" for name in (*trained, "report")]
    for script, *flags in commands:
        check_flags(script, flags)
        assert flags[-2:] == ["--seed=3", "--device=cpu"] and "--resume" not in flags
    assert [flag_value(flags, "loss") for _, *flags in commands[3:-1]] == losses
    assert all("--rho=0.2" in flags for _, *flags in commands[1:-1])
    assert commands[-1][4:10] == [f"my out/{loss}" for loss in PAPER]
    assert "--rms=my out/rm,my out/rms" in commands[-1]


def test_the_speedrun_fills_the_folders_that_the_scripts_read(shell, tmp_path):
    """Its folders are the scripts' defaults; what an earlier speedrun left there is gone on with,
    member by member of the family, and nothing else is."""
    for state in ("out/sft/state.pt", "out/rms/0.4/state.pt"):
        (tmp_path / "a copy" / state).parent.mkdir(parents=True)
        (tmp_path / "a copy" / state).touch()
    code, errors, commands = shell("speedrun.sh")
    assert code == 0 and not errors
    folders = [flag_value(flags, "out_dir") for _, *flags in commands]
    assert folders[:4] == ["out/sft", "out/rm", "out/rms", "out/dpo"]
    resumed = [flag_value(flags, "out_dir") for _, *flags in commands if "--resume" in flags]
    assert resumed == ["out/sft", "out/rms"]


def test_the_speedrun_says_how_to_start_afresh(shell, tmp_path):
    """Where a command stops, it stops too, with the command's exit code."""
    python = tmp_path / "a copy" / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 2\n")
    code, errors, _ = shell("speedrun.sh")
    assert code == 2 and errors.count("\n") == 1
    assert "out/sft" in errors and "To start afresh, remove out, or name another folder" in errors


@pytest.mark.parametrize("flags", [
    ["--max_steps=3"], ["--seed"], ["--seed="], ["--seed=1", "out"], ["--seed=1", "--resume"]])
def test_the_speedrun_refuses_other_flags(shell, flags):
    """What not every command has; before any work, in one line."""
    code, errors, commands = shell("speedrun.sh", *flags)
    assert code == 2 and not commands
    assert errors.startswith("speedrun.sh: error: ") and errors.count("\n") == 1
    assert f" {flags[-1]}: " in errors


@pytest.mark.parametrize("script, wanted", [
    ("tldr.sh", {"data": "trl-lib/tldr-preference", "labels": "oracle", "rho": 0.2,
                 "n_pairs": 30_000, "max_new_tokens": 64}),
    ("helpful.sh", {"data": "Anthropic/hh-rlhf/helpful-base", "labels": "human", "rho": "all",
                    "n_pairs": None, "max_new_tokens": 128})])
def test_the_paper_s_settings(shell, script, wanted):
    """TL;DR: labels of the oracle and a length bias. Helpfulness: people's labels, unbiased. Flags
    of the call win."""
    for given in ({}, {"labels": "oracle", "rho": 0.5}):
        flags = [f"--{name}={value}" for name, value in given.items()]
        _, _, ((protocol_py, *flags),) = shell(script, *flags)
        assert protocol_py == "runs/protocol.py"
        args = vars(protocol.parse_flags(flags))
        wanted = {**wanted, **given}
        assert {name: args[name] for name in wanted} == wanted
        assert args["losses"] == PAPER and args["steps"] == 10_000


def test_pytest_gets_the_flags_of_test_sh(shell):
    """And no script installs what another has installed: all share one environment."""
    _, _, commands = shell("test.sh", "-k", "tree and not slow")
    assert commands == [["-m", "pytest", "-q", "--numprocesses=auto", "--maxprocesses=4",
                         "--dist=loadfile", "-k", "tree and not slow"]]
