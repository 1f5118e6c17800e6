"""The drivers of whole experiments: which commands they run, with the scripts themselves replaced:
runs/protocol.py, and the shell scripts."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_policy
import train_rm
from data import get_tokenizer
from runs import protocol
from support.flags import InputError, comparison_flags

ROOT = Path(__file__).parents[2]
PAPER = ["dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo"]


def check_flags(script, flags):
    """InputError if the script would refuse its flags."""
    if script == "train_policy.py":
        train_policy.parse_flags(flags)
    elif script == "train_rm.py":
        train_rm.parse_flags(flags)
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
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump({"nanopref": {"tokenizer": "gpt2"}}, file)
        commands.append((script, values))

    def main(*flags):
        commands.clear()
        protocol.main(["--data=pairs", "--sft_data=demos", f"--out={tmp_path}/out", *flags])
        return list(commands)

    monkeypatch.setattr(protocol, "run", run)
    monkeypatch.setattr(protocol, "check_data", lambda args: None)      # there is none
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


def test_where_samples_are_judged_they_are_cut_and_penalised_alike(stages, tmp_path):
    """The limit is left to the scripts, which look at the data, unless it is given."""
    for flags, wanted in (([], {}), (["--max_new_tokens=9", "--missing_eos_penalty=1"],
                                     {"max_new_tokens": "9", "missing_eos_penalty": "1.0"})):
        commands = stages(*flags, "--losses=dpo", f"--out={tmp_path}/{len(flags)}")
        judging = [values for _, values in commands if values.keys() & {"select", "oracle"}]
        assert len(judging) == 2
        for values in judging:
            assert {name: values[name] for name in protocol.SAMPLING if name in values} == wanted


def test_other_flags_need_another_folder(stages):
    """Once something is trained there."""
    stages()
    with pytest.raises(InputError, match="--out: .* was begun with --rho=0.2, not all"):
        stages("--rho=all")
    assert [script for script, _ in stages("--losses=dpo", "--n_prompts=5")] == ["evaluate.py"]


def write_rows(path, n=100, **columns):
    rows = [{"prompt": f"Post {i}", "chosen": f" yes {i}", "rejected": " no", **columns}
            for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world_of_files(monkeypatch, tmp_path, hub_cache):
    """protocol.main in a folder with good and bad files; the first stage is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "tokens"))
    monkeypatch.setattr(protocol, "get_tokenizer", lambda name: get_tokenizer("tinytldr"))
    write_rows(tmp_path / "pairs.jsonl")
    write_rows(tmp_path / "three.jsonl", 3)
    write_rows(tmp_path / "bad.jsonl", chosen="")
    started = []

    def run(script, *flags):
        started.append(script)
        sys.exit(2)

    def main(*flags):
        """Returns whether a stage was started."""
        started.clear()
        with contextlib.suppress(SystemExit):
            protocol.main(["--init_from=scratch", "--out=out", *flags])
        return bool(started)

    monkeypatch.setattr(protocol, "run", run)
    return main


@pytest.mark.parametrize("flags, message", [
    (["--data=paris.jsonl"], "--data: paris.jsonl"),
    (["--sft_data=paris.jsonl"], "--sft_data: paris.jsonl"),
    (["--data=bad.jsonl"], "--data: bad.jsonl: rows 1, .*: the response 'chosen' is empty"),
    (["--sft_data=bad.jsonl"], "--sft_data: bad.jsonl: rows 1, .*: the response 'chosen' is empty"),
    (["--data=three.jsonl"], "--data: three.jsonl, .*: no usable row"),
    (["--family=scores"], "--family=scores: pairs.jsonl has no score_chosen"),
    (["--max_new_tokens=512"], "--max_new_tokens: 512 leaves no room"),
    (["--n_pairs=1000"], "--n_pairs: 1000 is too many: of .* have a response that is longer"),
    (["--n_pairs=1000", "--labels=human"], "--n_pairs: no 1000 pairs in which the longer"),
    (["--device=mps"], "--device=mps: this machine has none"),
    (["--out=/proc/none"], "/proc/none.* can't be (made|written)")])
def test_bad_inputs_are_refused_before_the_work(world_of_files, flags, message):
    """What a later stage would not take; and nothing is written that stands in the way of the
    corrected command."""
    with pytest.raises(InputError, match=message):
        world_of_files("--data=pairs.jsonl", "--sft_data=pairs.jsonl", *flags)
    assert not os.path.exists("out")
    assert world_of_files("--data=pairs.jsonl", "--sft_data=pairs.jsonl")


@pytest.mark.parametrize("run, file", [("sft", "model.safetensors"), ("rms/0.2", "state.pt")])
def test_runs_of_something_else_are_not_taken_for_its_own(world_of_files, run, file):
    """Such as the speedrun's in out/: nothing says how they were trained."""
    path = Path("out", run, file)
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(InputError, match=f"--out: out/{run} is there already, and no out/protocol"):
        world_of_files("--data=pairs.jsonl", "--sft_data=pairs.jsonl")
    assert not os.path.exists("out/protocol.json")


def test_flags_may_be_corrected_until_something_is_trained(world_of_files):
    good = ["--data=pairs.jsonl", "--sft_data=pairs.jsonl"]
    assert world_of_files(*good, "--sft_lr=1") and os.path.exists("out/protocol.json")
    os.makedirs("out/sft")      # of a run that ended before it saved anything
    assert world_of_files(*good, "--sft_lr=2")
    Path("out/sft/state.pt").touch()
    with pytest.raises(InputError, match="--out: out was begun with --sft_lr=2.0, not 3.0; name"):
        world_of_files(*good, "--sft_lr=3")
    assert world_of_files(*good, "--sft_lr=2")


@pytest.mark.parametrize("flags, message", [
    (["--rho=2"], r"--rho: invalid fraction \(or all\) value: '2'"),
    (["--bias=a,b"], "--bias: invalid list of comma-separated fractions"),
    (["--bias=0.2,0.2"], "--bias: the members of a family differ in their bias; one is"),
    (["--family=seeds", "--seeds=1,1"], "--seeds: one is named twice"),
    (["--losses=dpo,dpo"], "--losses: one is named twice"),
    (["--n_prompts=100000"], "--n_prompts: invalid int from 1 to 30000"),
    (["--init_from=scratch", "--n_head=3"], "--n_head: 3 heads do not divide --n_embd=256"),
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
    ("{", "--out: .*protocol.json: not JSON: Expecting"),
    ("[]", "--out: .*protocol.json: not a JSON object"),
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
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
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


def test_the_first_look(shell):
    """A reference, DPO from it, and what it gained; in folders of its own, which a second look
    removes first. The flags of the call go to every command."""
    code, errors, commands = shell("first_look.sh", "--seed=3", OUT="my out")
    assert code == 0 and not errors
    for script, *flags in commands:
        check_flags(script, flags)
        assert flags[-1] == "--seed=3"
    assert [script for script, *_ in commands] == ["train_policy.py"] * 2 + ["evaluate.py"]
    folders = [flag_value(flags, "out_dir") for _, *flags in commands]
    sft, dpo, _ = folders
    assert folders == [f"my out/first-look/{name}" for name in ("sft", "dpo", "report")]
    assert [flag_value(flags, "loss") for _, *flags in commands[:2]] == ["sft", "dpo"]
    assert f"--init_from={sft}" in commands[1] and "--select=oracle" in commands[1]
    assert f"--ref={sft}" in commands[2] and dpo in commands[2]


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
                 "n_pairs": 30_000, "max_new_tokens": None}),
    ("helpful.sh", {"data": "Anthropic/hh-rlhf/helpful-base", "labels": "human", "rho": "all",
                    "n_pairs": None, "max_new_tokens": None})])
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


def test_an_environment_is_made_once_for_the_same_requirements(tmp_path):
    """With the tested versions; again when any of its files changes, and after a failure."""
    repository, log, python = tmp_path / "a copy", tmp_path / "log", tmp_path / "python"
    (repository / "runs").mkdir(parents=True)
    shutil.copy(ROOT / "runs/venv.sh", repository / "runs")
    files = ["requirements.txt", "requirements-dev.txt", "constraints.txt", "own.txt"]
    for name in files:
        (repository / name).write_text(f"{name}\n")
    python.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
if [ "$2" = pip ]; then echo "$@" >> '{log}'; exit $FAIL; fi
""")
    python.chmod(0o755)

    def installed(*names, fail=0):
        """What pip is called with, or None."""
        log.write_text("")
        variables = {**os.environ, "PYTHON": str(python), "FAIL": str(fail)}
        done = subprocess.run(["bash", "-euc", 'source runs/venv.sh "$@"', "test.sh", *names],
                              cwd=repository, env=variables)
        assert done.returncode == fail
        return log.read_text().split()[5:] or None

    names, wanted = (".venv", "requirements-dev.txt"), ["-r", "requirements-dev.txt", "-c"]
    assert installed(*names, fail=1) == [*wanted, "constraints.txt"]
    assert installed(*names) == [*wanted, "constraints.txt"]
    assert installed(*names) is None
    for name in files[:3]:
        (repository / name).write_text("changed\n")
        assert installed(*names) == [*wanted, "constraints.txt"]
        assert installed(*names) is None
    assert installed(".venv-xla", "requirements-dev.txt", "own.txt") == [*wanted, "own.txt"]


def test_requirements_leave_alone_what_is_there():
    """Lower bounds alone, without pytest and linters; each has a tested version, as have the tools
    of the other files."""
    bounds = {}
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-parity.txt"):
        for line in (ROOT / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement and not requirement.startswith("-r "):
                package, bound = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", requirement).groups()
                bounds[package] = bound or "0"
        if name == "requirements.txt":
            assert bounds["torch"] == "2.6" and "pytest" not in bounds
    pins = (ROOT / "constraints.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)", pins, re.M))
    assert set(tested) == set(bounds)
    for package, bound in bounds.items():
        assert numbers(tested[package]) >= numbers(bound)


def numbers(version):
    return [int(part) for part in version.split(".")]


def test_pytest_gets_the_flags_of_test_sh(shell):
    """And no script installs what another has installed: all share one environment."""
    _, _, commands = shell("test.sh", "-k", "tree and not slow")
    assert commands == [["-m", "pytest", "-q", "--numprocesses=auto", "--maxprocesses=4",
                         "--dist=loadfile", "-k", "tree and not slow"]]
