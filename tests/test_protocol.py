"""The driver of the paper's protocol: which stages it runs, with the scripts themselves replaced."""
import os

import pytest

from runs import protocol
from runtime import InputError


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """protocol.main on tmp_path/out with some flags -> the commands that it ran; each finishes its run folder."""
    def main(*flags):
        commands = []

        def run(script, *flags):
            commands.append((script, dict(flag.removeprefix("--").split("=", 1) for flag in flags if "=" in flag)))
            folder = commands[-1][1]["out_dir"]
            for member in commands[-1][1].get("bias", "").split(","):
                os.makedirs(f"{folder}/{member}", exist_ok=True)
                open(f"{folder}/{member}/model.safetensors", "w").close()

        monkeypatch.setattr(protocol, "run", run)
        protocol.main(["--data=pairs", "--sft_data=demos", f"--out={tmp_path}/out", *flags])
        return commands
    return main


def test_all_stages_once(stages, tmp_path):
    """In the paper's order, on relabelled pairs; a second call with the same flags only evaluates."""
    commands = stages("--gamma=0.1", "--tau=2")
    out = f"{tmp_path}/out"
    assert [(script, os.path.relpath(flags["out_dir"], out)) for script, flags in commands] == [
        ("train_policy.py", "sft"), ("train_rm.py", "oracle"), ("train_rm.py", "rm"), ("train_rm.py", "rms"),
        *(("train_policy.py", loss) for loss in protocol.PREFERENCE_LOSSES), ("evaluate.py", ".")]
    assert "relabel" not in commands[1][1] and commands[1][1]["rho"] == "all"
    assert all(flags["relabel"] == f"{out}/oracle" for _, flags in commands[2:]) and commands[-1][1]["oracle"] == f"{out}/oracle"
    by_loss = {flags["loss"]: flags for script, flags in commands if "loss" in flags}
    assert by_loss["e-dpo"]["rewards"] == f"{out}/rms" and by_loss["d-dpo"]["rewards"] == f"{out}/rm" and "rewards" not in by_loss["dpo"]
    assert [loss for loss in by_loss if "gamma" in by_loss[loss]] == ["p-dpo", "dp-dpo", "e-dpo"]
    assert [loss for loss in by_loss if "tau" in by_loss[loss]] == ["ipo"]
    assert [script for script, _ in stages("--gamma=0.1", "--tau=2")] == ["evaluate.py"]


def test_other_flags_need_another_folder(stages):
    stages()
    with pytest.raises(InputError, match="--out: .* was begun with --rho=0.2, not all"):
        stages("--rho=all")


@pytest.mark.parametrize("flags, message", [(["--rho=2"], "--rho: a fraction"), (["--bias=a,b"], "--bias: comma-separated fractions"),
                                            (["--losses=dpo,xx"], "--losses"), (["--steps=abc"], "--steps"), (["--foo=1"], "--foo")])
def test_bad_flags_are_refused_before_the_work(stages, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        stages(*flags)
    assert not (tmp_path / "out").exists()


def test_human_labels_and_a_family_by_seeds(stages, tmp_path):
    commands = stages("--labels=human", "--rho=all", "--family=seeds", "--seeds=3,4", "--losses=e-dpo")
    assert not any("relabel" in flags for _, flags in commands)
    assert [flags["seed"] for script, flags in commands if script == "train_rm.py"] == ["0", "3", "4"]        # the oracle, and two
    assert [flags["out_dir"] for _, flags in commands[2:4]] == [f"{tmp_path}/out/rms/3", f"{tmp_path}/out/rms/4"]


def test_scores_need_no_reward_models(stages, tmp_path):
    commands = stages("--family=scores", "--losses=d-dpo,e-dpo")
    assert [script for script, _ in commands] == ["train_policy.py", "train_rm.py", "train_policy.py", "train_policy.py", "evaluate.py"]
    assert commands[2][1]["rewards"] == commands[3][1]["rewards"] == "scores" and "rms" not in commands[4][1]
