"""The scripts, end to end on runs of a few steps: determinism, resuming, and what happens to bad input."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import reward
import runtime
import sample
import train_policy
import train_rm
from losses import NEEDS_REWARDS, PREFERENCE_LOSSES
from model import GPT
from runtime import InputError

ROOT = Path(__file__).parent.parent


def policy_flags(world, out_dir, loss="p-dpo", **flags):
    flags = {"max_steps": 6, "eval_every": 3, "batch_size": 8, "n_pairs": 100, "pool": 400, "n_eval": 16, **flags}
    if loss in ("d-dpo", "dp-dpo", "e-dpo"):
        flags.setdefault("rewards", f"{world}/rms" if loss == "e-dpo" else f"{world}/rm")
    return [f"--loss={loss}", f"--init_from={world}/sft", f"--out_dir={out_dir}", *(f"--{k}={v}" for k, v in flags.items())]


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_trains(world, tmp_path, loss, capsys):
    train_policy.main(policy_flags(world, tmp_path, loss))
    assert "step 0: policy == reference" in capsys.readouterr().out
    lines = metrics(tmp_path)
    first, last = lines[0], lines[-1]
    assert first["step"] == 0 and last["step"] == 6 and abs(last["train/chosen_change"]) > 1e-3
    assert abs(first["train/chosen_change"]) < 1e-4 and ("train/forward_kl" in first) == (loss in ("p-dpo", "dp-dpo", "e-dpo"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["nanopref"]["loss"] == loss and config["model_type"] == "gpt2"
    GPT.from_pretrained(str(tmp_path))


def test_same_seed_same_bytes(world, tmp_path):
    for name in ("one", "two"):
        train_policy.main(policy_flags(world, tmp_path / name))
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    train_policy.main(policy_flags(world, tmp_path / "three", seed=1))
    assert (tmp_path / "one/metrics.jsonl").read_bytes() != (tmp_path / "three/metrics.jsonl").read_bytes()


def test_evaluating_more_often_changes_nothing(world, tmp_path):
    for name, every in (("often", 1), ("seldom", 6)):
        train_policy.main(policy_flags(world, tmp_path / name, eval_every=every))
    assert [line for line in metrics(tmp_path / "often") if line["step"] in (0, 6)][-1] == metrics(tmp_path / "seldom")[-1]


def test_gradient_does_not_depend_on_micro_batches(world, tmp_path):
    for loss in ("sft", "p-dpo"):
        whole, parts = ([f"--out_dir={tmp_path}/{loss}-{m}", f"--micro_batch_size={m}"] for m in (8, 3))
        flags = policy_flags(world, tmp_path, loss, max_steps=2) if loss != "sft" else [
            "--loss=sft", f"--init_from={world}/sft", "--max_steps=2", "--batch_size=8", "--n_eval=16"]
        train_policy.main(flags + whole)
        train_policy.main(flags + parts)
        for one, other in zip(metrics(f"{tmp_path}/{loss}-8"), metrics(f"{tmp_path}/{loss}-3")):
            for line in (one, other):      # before step 0 every margin is zero but for rounding, whose sign decides accuracy
                for name in [name for name in line if name.endswith("accuracy")]:
                    del line[name]
            assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("script", ["policy", "rm"])
def test_resumed_run_equals_the_uninterrupted_one(world, tmp_path, monkeypatch, script):
    """Killed at step 5, after state was saved at step 3; the log, the weights and the reference are as if it had not been."""
    if script == "policy":
        main, flags = train_policy.main, lambda folder: policy_flags(world, folder)
    else:
        main, flags = train_rm.main, lambda folder: [
            f"--init_from={world}/sft", f"--out_dir={folder}", "--max_steps=6", "--eval_every=3", "--batch_size=8",
            "--n_pairs=100", "--pool=400", "--n_eval=16"]
    main(flags(tmp_path / "whole"))

    schedule = runtime.learning_rate
    def killed_at_5(step, *rest):
        if step == 5:
            raise Interrupted
        return schedule(step, *rest)
    monkeypatch.setattr(runtime, "learning_rate", killed_at_5)
    with pytest.raises(Interrupted):
        main(flags(tmp_path / "parts"))
    assert not (tmp_path / "parts/model.safetensors").exists()
    monkeypatch.setattr(runtime, "learning_rate", schedule)
    main(flags(tmp_path / "parts") + ["--resume"])
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()

    with pytest.raises(InputError, match="--lr was .* has to stay the same"):
        main(flags(tmp_path / "parts") + ["--resume", "--lr=0.5"])
    with pytest.raises(InputError, match="no state.pt"):
        main(flags(tmp_path / "nothing") + ["--resume"])


def test_report(world, tmp_path):
    """Every number that the report promises is there, for a policy that is the reference (known values) and one that is not."""
    train_policy.main(policy_flags(world, tmp_path / "e-dpo", "e-dpo", lr=1e-2))
    GPT.from_pretrained(f"{world}/sft").save_pretrained(tmp_path / "same")
    evaluate.main([f"--ref={world}/sft", str(tmp_path / "same"), str(tmp_path / "e-dpo"), f"--rms={world}/rm,{world}/rms",
                   f"--out_dir={tmp_path}/report", "--n_prompts=20", "--show=2"])
    results = json.loads((tmp_path / "report/results.json").read_text())
    same, other = results["policies"]["same"], results["policies"]["e-dpo"]
    assert same["advantage"] == 0 and same["win_rate"] == 0.5 and same["kl_pi_ref"] == 0 and same["kl_ref_pi"] == 0
    assert other["kl_pi_ref"] != 0 and "chosen_change" in other and other["advantage_95"] > 0
    assert len(results["reward_models"]) == 3
    assert set(results["reward_models"][f"{world}/rm"]) >= {"accuracy", "longer_chosen", "shorter_chosen"}
    report = (tmp_path / "report/report.md").read_text()
    for heading in ("## Policies", "## Reward models", "## Samples", "**Prompt 2**", "## Glossary"):
        assert heading in report
    for figure in ("advantage.png", "logprob_change.png", "reward_margins.png"):
        assert figure in report and (tmp_path / "report" / figure).stat().st_size > 1000


def test_file_data_end_to_end(tmp_path, hub_cache):
    """SFT, an oracle reward model on a file's own labels, relabelling by it, a family, e-DPO, and evaluation by it."""
    import tinytldr
    rows = []
    for i in range(300):
        one, other = (tinytldr.demonstration(0, "train", i, person) for person in (0, 1))
        prompt = tinytldr.post(0, "train", i)
        if one != other:
            first = tinytldr.oracle_reward(prompt, one) > tinytldr.oracle_reward(prompt, other)
            rows.append({"prompt": prompt, "chosen": one if first else other, "rejected": other if first else one})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["--max_steps=4", "--batch_size=8", "--n_eval=16", f"--data={path}"]
    train_policy.main([*few, "--loss=sft", "--tokenizer=tinytldr", f"--out_dir={tmp_path}/sft", "--n_embd=32"])
    few.append(f"--init_from={tmp_path}/sft")
    train_rm.main([*few, f"--out_dir={tmp_path}/oracle"])
    few.append(f"--relabel={tmp_path}/oracle")
    train_rm.main([*few, f"--out_dir={tmp_path}/rms", "--bias=0.4,0.6", "--rho=0.5"])
    train_policy.main([*few, "--loss=e-dpo", f"--rewards={tmp_path}/rms", f"--out_dir={tmp_path}/e-dpo", "--rho=0.5",
                       "--max_new_tokens=8"])
    evaluate.main([f"--ref={tmp_path}/sft", f"{tmp_path}/e-dpo", f"--data={path}", f"--oracle={tmp_path}/oracle",
                   f"--rms={tmp_path}/rms", f"--out_dir={tmp_path}/report", "--max_new_tokens=8"])
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["policies"]["e-dpo"]["kl_ref_pi"] > 0 and len(results["reward_models"]) == 2


# ---------------------------------------------------------------- scores from a file, rankings

def read(path):
    return Path(path).read_text()


def test_scores_from_a_file_are_as_good_as_reward_models(world, tmp_path, hub_cache):
    """`reward.py --score` writes the family's scores beside the pairs; distilling these columns gives the same metrics, but for
    rounding (they were scored in other batches), as distilling from the family itself."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i}:", "chosen": " my boss" * (i % 3 + 1), "rejected": f" broke {i}"}) + "\n"
                             for i in range(120)))
    reward.main(["--score", f"--data={pairs}", f"--rewards={world}/rms", f"--out={tmp_path}/scored.jsonl"])
    scored = [json.loads(line) for line in read(tmp_path / "scored.jsonl").splitlines()]
    assert len(scored) == 120 and {key: scored[7][key] for key in ("prompt", "chosen", "rejected")} == json.loads(read(pairs).splitlines()[7])
    assert len(scored[7]["score_chosen"]) == len(scored[7]["score_rejected"]) == 2
    flags = ["--loss=e-dpo", f"--init_from={world}/sft", "--max_steps=4", "--batch_size=8", "--max_new_tokens=8"]
    train_policy.main([*flags, f"--data={pairs}", f"--rewards={world}/rms", f"--out_dir={tmp_path}/a"])
    train_policy.main([*flags, f"--data={tmp_path}/scored.jsonl", "--rewards=scores", f"--out_dir={tmp_path}/b"])
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    reward.main(["--score", f"--data={pairs}", f"--rewards={world}/rm", f"--out={tmp_path}/one.jsonl"])
    assert isinstance(json.loads(read(tmp_path / "one.jsonl").splitlines()[0])["score_chosen"], float)
    with pytest.raises(InputError, match="--rewards=scores: .*pairs.jsonl has no score_chosen"):
        train_policy.main([*flags, f"--data={pairs}", "--rewards=scores", f"--out_dir={tmp_path}/c"])


@pytest.fixture(scope="module")
def rankings(world, tmp_path_factory):
    """Three responses for each prompt, with scores that like "broke"."""
    path = tmp_path_factory.mktemp("rankings") / "rankings.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}:", "responses": [" my boss", " broke" * (i % 4 + 1), " exhausted"],
                                        "scores": [0, i % 4 + 1, -1]}) + "\n" for i in range(120)))
    return path


def test_a_reward_model_learns_a_ranking(world, rankings, tmp_path):
    """Plackett-Luce from ln 3! = ln 6 down; and its scores rank the responses."""
    train_rm.main([f"--data={rankings}", f"--init_from={world}/sft", "--max_steps=30", "--batch_size=16", "--lr=1e-2", f"--out_dir={tmp_path}/rm"])
    lines = metrics(tmp_path / "rm")
    assert lines[0]["validation/loss"] == pytest.approx(np.log(6), abs=1e-4)
    assert lines[-1]["validation/loss"] < 0.5 and lines[-1]["validation/accuracy"] > 0.9
    reward.main(["--score", f"--data={rankings}", f"--rewards={tmp_path}/rm", f"--out={tmp_path}/scored.jsonl"])
    scored = [json.loads(line) for line in read(tmp_path / "scored.jsonl").splitlines()]
    assert len(scored) == 120 and all(row["responses"][0].startswith(" broke") for row in scored)
    assert np.mean([row["scores"] == sorted(row["scores"], reverse=True) for row in scored]) > 0.9
    again = list(data.load_rows(f"{tmp_path}/scored.jsonl"))     # the order is still the ranking's, also where the scores differ
    assert [row["responses"] for row in again] == [row["responses"] for row in data.load_rows(str(rankings))]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_trains_on_rankings(world, rankings, tmp_path, loss):
    rewards = ["--rewards=scores"] if loss in NEEDS_REWARDS else []
    train_policy.main([f"--loss={loss}", f"--data={rankings}", f"--init_from={world}/sft", "--max_steps=20", "--batch_size=16", "--lr=1e-3",
                       "--max_new_tokens=8", f"--out_dir={tmp_path}", *rewards])
    lines = [line for line in metrics(tmp_path) if "validation/accuracy" in line]
    assert lines[-1]["validation/accuracy"] > 0.9
    assert lines[-1]["validation/chosen_change"] > lines[-1]["validation/rejected_change"]


@pytest.mark.parametrize("script, flags, message", [
    (train_policy, ["--loss=dpo", "--rho=0.2"], "--rho: D_rho is made of pairs"), (train_rm, ["--bias=0.2,0.5"], "--bias: subsets by length")])
def test_length_bias_needs_pairs(world, rankings, tmp_path, script, flags, message):
    with pytest.raises(InputError, match=message):
        script.main([f"--data={rankings}", f"--init_from={world}/sft", f"--out_dir={tmp_path}/out", *flags])


# ---------------------------------------------------------------- talking to the result

def test_sample_streams_what_generate_gives(world, capsys):
    sample.main([f"{world}/sft", "--prompt=POST: My boss.\n\nTL;DR:", "--temperature=0", "--max_new_tokens=8"])
    policy, tokenizer = GPT.from_pretrained(f"{world}/sft"), data.get_tokenizer("tinytldr")
    ids, = policy.generate([tokenizer.encode_ordinary("POST: My boss.\n\nTL;DR:")], 8, temperature=0, stop=tokenizer.eot_token)
    wanted = tokenizer.decode([token for token in ids if token != tokenizer.eot_token])
    assert f"[{world}/sft]{wanted}" + ("" if ids[-1] == tokenizer.eot_token else " ...") + "\n\n" == capsys.readouterr().out


def test_sample_beside_the_reference(world, tmp_path, capsys):
    """With --compare the reference answers too; a policy that has not moved says the same."""
    train_policy.main(policy_flags(world, tmp_path / "run", "dpo", max_steps=1, lr=1e-12))
    capsys.readouterr()
    sample.main([f"{tmp_path}/run", "--compare", "--n=2", "--max_new_tokens=8"])
    out = capsys.readouterr().out
    assert out.startswith("POST: ") and out.count(f"[{tmp_path}/run]") == 2
    mine, its = out.split(f"[the reference, {world}/sft]")[0], out.split(f"[the reference, {world}/sft]")[1:]
    assert [part.strip() for part in mine.split(f"[{tmp_path}/run]")[1:]] == [part.strip() for part in its]
    with pytest.raises(InputError, match="--compare: .* was trained from no reference"):
        sample.main([f"{world}/sft", "--compare"])


def test_interrupted_family_goes_on(world, tmp_path, monkeypatch):
    """Killed in the second of three members: the first is kept, the second resumed, the third begun."""
    flags = [f"--init_from={world}/sft", "--max_steps=4", "--eval_every=2", "--batch_size=8", "--n_pairs=100", "--pool=400",
             "--n_eval=16", "--bias=0.2,0.4,0.6"]
    train_rm.main([*flags, f"--out_dir={tmp_path}/whole"])
    schedule, calls = runtime.learning_rate, []
    def killed_at_the_seventh(*args):
        calls.append(args)
        if len(calls) == 4 + 3:
            raise Interrupted
        return schedule(*args)
    monkeypatch.setattr(runtime, "learning_rate", killed_at_the_seventh)
    with pytest.raises(Interrupted):
        train_rm.main([*flags, f"--out_dir={tmp_path}/parts"])
    monkeypatch.setattr(runtime, "learning_rate", schedule)
    train_rm.main([*flags, f"--out_dir={tmp_path}/parts", "--resume"])
    for bias in ("0.2", "0.4", "0.6"):
        assert (tmp_path / "whole" / bias / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / bias / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="would join this family"):
        train_rm.main([*flags[:-1], "--bias=0.2,0.5", f"--out_dir={tmp_path}/parts"])


def test_resuming_needs_the_same_reference(world, tmp_path):
    import shutil
    shutil.copytree(f"{world}/sft", tmp_path / "sft")
    flags = [flag for flag in policy_flags(world, tmp_path / "run") if "init_from" not in flag] + [f"--init_from={tmp_path}/sft"]
    train_policy.main(flags)
    other = GPT.from_pretrained(str(tmp_path / "sft"))
    other.transformer.ln_f.bias.data += 0.1
    other.save_pretrained(tmp_path / "sft")
    with pytest.raises(InputError, match="the reference, the data or the rewards have changed"):
        train_policy.main(flags + ["--resume"])


def test_reward_model_of_another_kind(world, tmp_path):
    with pytest.raises(InputError, match="not a reward model"):
        train_policy.main(policy_flags(world, tmp_path / "run", "d-dpo", rewards=f"{world}/sft"))
    config = json.loads(Path(f"{world}/rm/config.json").read_text())
    import shutil
    shutil.copytree(f"{world}/rm", tmp_path / "rm")
    (tmp_path / "rm/config.json").write_text(json.dumps({**config, "nanopref": {"tokenizer": "gpt2"}}))
    with pytest.raises(InputError, match="--rewards: .* reads gpt2 tokens, the policy tinytldr tokens"):
        train_policy.main(policy_flags(world, tmp_path / "run", "d-dpo", rewards=f"{tmp_path}/rm"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- bad input: exit code 2, one line, nothing written

@pytest.mark.parametrize("script, flags, message", [
    ("train_policy.py", ["--los=dpo"], "unrecognized arguments: --los=dpo"),
    ("train_policy.py", ["--loss=kto"], "argument --loss: invalid choice: 'kto'"),
    ("train_policy.py", ["--lr=fast"], "argument --lr: invalid positive float value: 'fast'"),
    ("train_rm.py", ["--max_steps=0"], "argument --max_steps"),
    ("train_rm.py", ["--bias=0.2,x"], "--bias: comma-separated fractions"),
    ("train_policy.py", ["--init_from={tmp}/nowhere"], "nowhere: no such folder"),
    ("train_policy.py", ["--loss=sft", "--data={tmp}/none.jsonl", "--tokenizer=tinytldr"], "none.jsonl: no such file"),
    ("evaluate.py", ["--ref={tmp}/none"], "none: no such folder"),
    ("evaluate.py", ["--data=x.jsonl"], "--oracle")])
def test_bad_input_from_the_shell(tmp_path, script, flags, message):
    flags = [flag.format(tmp=tmp_path) for flag in flags] + [f"--out_dir={tmp_path}/out"]
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--loss=dpo", "--init_from=scratch"], "needs a reference policy"), (["--loss=dpo", "--rewards=x"], "--rewards: --loss=dpo does not use it, only d-dpo"),
    (["--loss=ipo", "--beta=1"], "--beta: --loss=ipo does not use it"), (["--loss=dpo", "--tau=1"], "--tau: --loss=dpo"),
    (["--gamma=1,2,3"], "--gamma: FIRST,LAST"), (["--gamma=-1"], "--gamma"), (["--rho=2"], "--rho: a fraction"),
    (["--loss=sft", "--n_head=3"], "--n_head: 3 heads do not divide"), (["--min_per=batch", "--micro_batch_size=2"], "--min_per")])
def test_bad_flags(world, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train_policy.main([f"--init_from={world}/sft", f"--rewards={world}/rms", f"--out_dir={tmp_path}/out", *flags]
                          if flags[0] == "--rho=2" else [f"--out_dir={tmp_path}/out", *flags])
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_overwrite_its_reference(world):
    with pytest.raises(InputError, match="--out_dir: .* is also --init_from"):
        train_policy.main(policy_flags(world, f"{world}/sft"))
    GPT.from_pretrained(f"{world}/sft")


def test_a_folder_that_cannot_be_made(world, tmp_path):
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="--out_dir: .* is a file"):
            train_policy.main(policy_flags(world, out_dir))


def test_a_diverged_run_is_not_saved(world, tmp_path):
    with pytest.raises(InputError, match="--lr: training diverged before step"):
        train_policy.main(policy_flags(world, tmp_path / "run", lr=1e12))
    assert not (tmp_path / "run/model.safetensors").exists()


def test_too_few_pairs_for_the_bias(world, tmp_path):
    with pytest.raises(InputError, match="--rho, --n_pairs: no 399 pairs"):
        train_policy.main(policy_flags(world, tmp_path, n_pairs=399))


def test_tokenizer_that_the_model_has_no_room_for(world, tmp_path, monkeypatch):
    import tiktoken
    large = tiktoken.Encoding("large", pat_str=".", mergeable_ranks={bytes([b]): b for b in range(256)},
                              special_tokens={"<|endoftext|>": 99_999})
    monkeypatch.setattr(data, "get_tokenizer", lambda name: large)
    with pytest.raises(InputError, match="--tokenizer: large has 100000 tokens"):
        train_policy.main(policy_flags(world, tmp_path, tokenizer="large"))


def test_learning_rate():
    """Warm-up to the peak at 5% of the steps, then a cosine down to a tenth."""
    rates = [runtime.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == 1.0 and rates[5] == 1.0
    assert rates[100] == pytest.approx(0.1) and all(a >= b for a, b in zip(rates[5:], rates[6:]))
