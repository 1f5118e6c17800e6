"""Flags, before anything is read or made: what would be ignored is refused, what is wrong is said,
what is left out is filled in."""
import json
from pathlib import Path

import pytest

import evaluate
import sample
import train_policy
import train_rm
from losses import LOSSES, PREFERENCE_LOSSES, knobs, needs
from model import GPT, GPTConfig
from support.flags import InputError, comparison_flags, talk_flags

IGNORED = "--{}: it would be ignored"
KNOBS = {"beta": "1", "tau": "1", "gamma": "1"}
SIZES = ["n_layer", "n_head", "n_embd", "block_size"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Whoever runs the tests may have runs in out/, which are not overwritten."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refuses(tmp_path):
    """A function that runs a script in an empty folder: it has to refuse the flags with a message
    of one line, and to leave the folder empty."""

    def run(script, flags, message):
        with pytest.raises(InputError, match=message) as error:
            script.main(flags)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []

    return run


# ------------------------------------------------------------------ flags that would be ignored

def unused_flags():
    """(loss, flag, value) of every loss and every flag that another loss uses and it does not. The
    losses are those of the table, also those that somebody adds."""
    for loss in LOSSES:
        for other in LOSSES:
            for knob, default in knobs(other).items():
                if knob not in knobs(loss):
                    yield loss, knob, KNOBS.get(knob, str(default))
        if "rewards" not in needs(loss):
            yield loss, "rewards", "out/rm"
        if "kl" not in needs(loss):
            yield loss, "max_new_tokens", "64"


@pytest.mark.parametrize("loss, flag, value", sorted(set(unused_flags())))
def test_flags_of_another_loss(refuses, loss, flag, value):
    refuses(train_policy, [f"--loss={loss}", f"--{flag}={value}"], IGNORED.format(flag))


def test_the_table_above_has_these():
    """What a student tries first, by hand."""
    refused = {(loss, flag) for loss, flag, _ in unused_flags()}
    assert refused >= {("dpo", "max_new_tokens"), ("dpo", "tau"), ("dpo", "gamma"),
                       ("dpo", "rewards"), ("ipo", "beta"), ("ipo", "gamma"),
                       ("d-dpo", "max_new_tokens"), ("p-dpo", "rewards"), ("e-dpo", "tau"),
                       ("sft", "beta"), ("sft", "rewards")}
    used = [(loss, knob) for loss in LOSSES for knob in knobs(loss)]
    assert not refused & set(used)


@pytest.mark.parametrize("flag", SIZES)
@pytest.mark.parametrize("loss", ["sft", "e-dpo"])
def test_sizes_of_a_model_that_has_its_own(refuses, loss, flag):
    flags = [f"--loss={loss}", "--init_from=out/sft", f"--{flag}=8"]
    refuses(train_policy, flags, IGNORED.format(flag) + ": it is used by --init_from=scratch")


@pytest.mark.parametrize("flag", ["--pool=100", "--label_temperature=1"])
@pytest.mark.parametrize("script, flags", [(train_policy, ["--loss=dpo"]), (train_rm, [])])
def test_flags_of_the_embedded_task_with_a_file(refuses, script, flags, flag):
    name = flag.strip("-").split("=")[0]
    refuses(script, [*flags, "--data=pairs.jsonl", flag],
            IGNORED.format(name) + ": it is used by --data=tinytldr")


@pytest.mark.parametrize("data", ["tinytldr", "demonstrations.jsonl"])
@pytest.mark.parametrize("flag", ["--rho=0.2", "--n_pairs=10", "--pool=10", "--label_temperature=1",
                                  "--relabel=out/oracle"])
def test_flags_of_pairs_with_demonstrations(refuses, data, flag):
    name = flag.strip("-").split("=")[0]
    refuses(train_policy, ["--loss=sft", f"--data={data}", flag],
            IGNORED.format(name) + ": it is used by the preference losses")


@pytest.mark.parametrize("script, flags", [(train_policy, ["--loss=sft"]), (train_rm, []),
                                           (train_policy, ["--loss=dpo"]), (evaluate, [])])
def test_bad_rows_of_the_embedded_task(refuses, script, flags):
    """It has none."""
    refuses(script, [*flags, "--skip_bad_rows"],
            IGNORED.format("skip_bad_rows") + ": it is used by --data of your own")


def test_relabelling_of_pairs_that_nobody_looks_at(refuses):
    """evaluate.py looks at pairs for the accuracy of --rms alone."""
    refuses(evaluate, ["out/dpo", "--relabel=out/oracle"], IGNORED.format("relabel"))


@pytest.mark.parametrize("script, flags", [(train_policy, ["--loss=sft"]), (train_rm, [])])
def test_parts_of_a_model_for_a_single_process(refuses, script, flags):
    refuses(script, [*flags, "--fsdp"], IGNORED.format("fsdp") + ": there is one process")


def test_a_dialogue_with_a_model_that_answers_posts(world, refuses):
    refuses(sample, [f"{world}/sft", "--chat"], IGNORED.format("chat"))


@pytest.mark.parametrize("flags, message", [
    (["--split=test"], IGNORED.format("split") + ": it is used by --data"),
    (["--n_prompts=3", "--prompt=x"], IGNORED.format("n_prompts") + ": it is used by --data"),
    (["--data=tinytldr", "--chat"], IGNORED.format("chat")),
    (["--chat", "--n=2"], "--n: a dialogue goes on from one reply"),
    (["--data=tinytldr", "--prompt=x"], "--prompt: not allowed with argument --data"),
    (["--prompt_file=x.txt", "--prompt=x"], "--prompt: not allowed with argument --prompt_file")])
def test_prompts_from_two_places(refuses, flags, message):
    refuses(sample, ["out/sft", *flags], message)


@pytest.mark.parametrize("script, flags", [
    (sample, ["--prompt=x", "--top_k=3"]), (sample, ["--prompt=x", "--top_p=0.9"]),
    (sample, ["--prompt=x", "--n=2"]), (sample, ["--prompt=x", "--seed=0"]),
    (sample, ["--data=x.jsonl", "--seed=1"]), (sample, ["--prompt_file=x", "--seed=1"]),
    (evaluate, ["--data=x.jsonl", "--oracle=out/rm", "--seed=1"])])
def test_what_chance_needs_where_there_is_none(refuses, script, flags):
    """At --temperature=0; but the posts of the built-in task depend on the seed."""
    name = flags[-1].strip("-").split("=")[0]
    refuses(script, ["out/sft", "--temperature=0", *flags], IGNORED.format(name) + ".*temperature")
    for flags in ([], ["--data=tinytldr"]):
        assert talk_flags(["out/sft", "--temperature=0", "--seed=1", *flags], "").seed == 1
    assert comparison_flags(["out/sft", "--temperature=0", "--seed=1"], "").seed == 1


# ------------------------------------------------------------------ flags that are wrong

@pytest.mark.parametrize("flags, message", [
    (["--loss=ppo"], "argument --loss: invalid choice: 'ppo'"),
    (["--loss=dpo", "--bet=1"], "unrecognized arguments: --bet=1"),
    (["--loss=dpo", "--init_from=scratch"], "--init_from: .* needs a reference policy"),
    (["--gamma=1,2,3"], "--gamma: invalid FIRST,LAST"),
    (["--gamma=-1"], "--gamma: invalid FIRST,LAST"),
    (["--gamma=nan"], "--gamma: invalid FIRST,LAST"),
    (["--rho=2"], r"--rho: invalid fraction \(or all\) value: '2'"),
    (["--rho=some"], "--rho: invalid fraction"),
    (["--lr=0"], r"--lr: invalid positive float \(1e-12 to 1e12\) value: '0'"),
    (["--lr=inf"], "--lr: invalid positive float"),
    (["--loss=dpo", "--beta=1e300"], "--beta: invalid positive float"),
    (["--loss=dpo", "--pool=100001"], "--pool: invalid int from 1 to 100000 "),
    (["--missing_eos_penalty=-1"], "--missing_eos_penalty: invalid non-negative float"),
    (["--seed=-1"], "--seed: invalid seed"),
    (["--seed=4294967296"], "--seed: invalid seed"),
    (["--batch_size=1.5"], "--batch_size: invalid positive int"),
    (["--max_steps=1000000000001"], r"--max_steps: invalid positive int \(to 1e12\)"),
    (["--loss=sft", f"--n_embd={10 ** 400}"], "--n_embd: invalid positive int"),
    ([f"--seed={'1' * 5000}"], r"--seed: invalid seed value: '1{300,400}\.\.\.$"),
    (["--loss=sft", "--n_head=3"], "--n_head: 3 heads do not divide --n_embd=128")])
def test_bad_flags_of_a_policy(refuses, flags, message):
    refuses(train_policy, flags, message)


@pytest.mark.parametrize("flags, message", [
    (["--bias=0.2,x"], "--bias: invalid list of comma-separated fractions value: '0.2,x'"),
    (["--bias=0.2,1.2"], "--bias: invalid list of comma-separated fractions"),
    (["--bias=0.2,0.20"], "--bias: .* named twice"),
    (["--init_from=scratch"], "--init_from: a reward model starts from a language model"),
    (["--loss=dpo"], "unrecognized arguments: --loss=dpo"),
    (["--max_steps=0"], r"--max_steps: invalid positive int \(to 1e12\) value: '0'")])
def test_bad_flags_of_a_reward_model(refuses, flags, message):
    refuses(train_rm, flags, message)


@pytest.mark.parametrize("flags, message", [
    (["--data=pairs.jsonl"], "--oracle: only --data=tinytldr has an oracle of its own"),
    (["--temperature=0.001"], "--temperature: invalid temperature"),
    ([f"--show={10 ** 30}"], "--show: invalid non-negative int"),
    (["--n_prompts=0"], "--n_prompts: invalid int from 1 to 30000"),
    (["--split=train"], "--split: invalid choice")])
def test_bad_flags_of_a_comparison(refuses, flags, message):
    refuses(evaluate, flags, message)


def test_policies_to_compare_stand_anywhere(refuses):
    """Before, between and after the flags; what is wrong is still said."""
    args = comparison_flags(["--ref=r", "a", "--n_prompts=4", "b", "--show", "1", "c"], "")
    assert (args.policies, args.ref, args.n_prompts, args.show) == (["a", "b", "c"], "r", 4, 1)
    assert comparison_flags([], "", ["dpo", "ipo"]).policies == ["out/dpo", "out/ipo"]
    refuses(evaluate, ["a", "--n_prompts=4", "b", "--nprompts=5"], "unrecognized arguments: --npr")


@pytest.mark.parametrize("flags, message", [
    (["--top_p=0"], "--top_p: invalid positive fraction value: '0'"),
    (["--top_p=1.1"], "--top_p: invalid positive fraction"),
    (["--top_k=0"], "--top_k: invalid positive int"),
    ([f"--top_k={10 ** 30}"], "--top_k: invalid positive int"),
    (["--n=1000000000000"], "--n: invalid int from 1 to 1000")])
def test_bad_flags_of_a_talk(refuses, flags, message):
    refuses(sample, ["out/sft", *flags], message)


# ------------------------------------------------------------------ what is left out

def policy_args(*flags):
    return train_policy.parse_flags(list(flags))


def test_defaults_of_dpo():
    """Its own beta, and None for what it has no use for."""
    args = policy_args("--loss=dpo")
    assert (args.beta, args.init_from, args.out_dir) == (1.0, "out/sft", "out/dpo")
    assert args.tau is args.gamma is args.rewards is args.max_new_tokens is None
    assert args.n_embd is args.block_size is None
    assert (args.rho, args.n_pairs, args.pool, args.label_temperature) == (0.2, 1000, 5000, 0)
    assert (args.max_steps, args.batch_size, args.micro_batch_size) == (320, 16, 16)
    assert (args.n_eval, args.eval_every, args.tokenizer) == (256, 40, "tinytldr")


def test_defaults_of_sft():
    args = policy_args("--loss=sft")
    assert (args.init_from, args.n_layer, args.n_head, args.n_embd, args.block_size) == (
        "scratch", 2, 4, 128, 192)
    assert args.beta is args.rho is args.n_pairs is args.pool is args.label_temperature is None
    assert (args.max_steps, args.batch_size, args.n_eval, args.eval_every) == (1500, 32, 256, 187)


def test_a_wide_model_gets_a_smaller_learning_rate(tmp_path):
    """One of the hub is taken to be as wide as GPT-2."""
    assert policy_args("--loss=sft").lr == policy_args("--loss=sft", "--n_embd=256").lr == 4e-3
    assert policy_args("--loss=sft", "--n_embd=512", "--n_head=8").lr == 4e-5
    assert policy_args("--loss=sft", "--n_embd=512", "--n_head=8", "--lr=0.1").lr == 0.1
    assert policy_args("--loss=dpo", "--init_from=gpt2").lr == 2e-6
    assert train_rm.parse_flags(["--init_from=gpt2"]).lr == 5e-6
    for width, lr in ((128, 2e-4), (768, 2e-6)):
        folder = tmp_path / str(width)
        GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=2, n_embd=width)
            ).save_pretrained(folder)
        assert policy_args("--loss=dpo", f"--init_from={folder}").lr == lr


def test_the_block_size_of_a_model_from_scratch_depends_on_its_rows():
    """Those of a file, unless it is given."""
    assert policy_args("--loss=sft", "--data=a.jsonl").block_size is None
    assert policy_args("--loss=sft", "--data=a.jsonl", "--block_size=70").block_size == 70


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_gets_its_own_defaults(loss):
    args = policy_args(f"--loss={loss}")
    for name in {knob for other in LOSSES for knob in knobs(other)}:
        assert getattr(args, name) == knobs(loss).get(name)
    assert (args.rewards is not None) == ("rewards" in needs(loss))
    assert (args.max_new_tokens is not None) == ("kl" in needs(loss))


def test_a_family_for_e_dpo_and_one_reward_model_for_the_others():
    assert policy_args("--loss=e-dpo").rewards == "out/rms"
    assert policy_args("--loss=d-dpo").rewards == policy_args("--loss=dp-dpo").rewards == "out/rm"


def test_gamma_is_annealed_or_constant():
    assert policy_args("--gamma=0.1,0.2").gamma == [0.1, 0.2]
    assert policy_args("--gamma=0.1").gamma == [0.1, 0.1]
    assert list(policy_args().gamma) == [1e-4, 1e-2]


def test_defaults_of_file_data():
    """The pairs as they are, all of them."""
    args = policy_args("--loss=dpo", "--data=pairs.jsonl")
    assert (args.rho, args.n_pairs, args.pool, args.label_temperature) == ("all", None, None, None)
    assert args.tokenizer == "gpt2"
    assert policy_args("--loss=dpo", "--data=pairs.jsonl", "--rho=0.3").rho == 0.3


def test_defaults_of_reward_models():
    args = train_rm.parse_flags([])
    assert (args.out_dir, args.init_from, args.bias) == ("out/rm", "out/sft", None)
    assert (args.max_steps, args.batch_size, args.rho) == (200, 32, 0.2)
    args = train_rm.parse_flags(["--bias=0.2,0.5"])
    assert (args.out_dir, args.bias) == ("out/rms", [0.2, 0.5])


@pytest.mark.parametrize("max_steps, batch_size", [(1, 1), (6, 8), (40, 16), (100, 32)])
def test_a_short_run_is_evaluated_seldom_and_on_few_rows(max_steps, batch_size):
    """So that evaluating stays the smaller part; what was asked for is done all the same."""
    short = [f"--max_steps={max_steps}", f"--batch_size={batch_size}"]
    for args in (policy_args(*short), train_rm.parse_flags(short)):
        assert 16 <= args.n_eval < 256 and args.eval_every >= 25
        assert args.n_eval <= max(16, max_steps * batch_size)
    args = policy_args(*short, "--n_eval=300", "--eval_every=2")
    assert (args.n_eval, args.eval_every) == (300, 2)


def test_a_micro_batch_is_not_larger_than_the_batch():
    assert policy_args("--batch_size=8", "--micro_batch_size=32").micro_batch_size == 8
    assert policy_args("--batch_size=8", "--micro_batch_size=3").micro_batch_size == 3


def test_scratch_is_a_folder_name_like_any_other(hub_cache):
    """For --out_dir; for --init_from it means a new model, also where there is such a folder: the
    run can be repeated and resumed."""
    rows = [json.dumps({"prompt": f"{i}:", "completion": " broke"}) + "\n" for i in range(40)]
    Path("demonstrations.jsonl").write_text("".join(rows))
    flags = ["--loss=sft", "--out_dir=scratch", "--max_steps=1", "--batch_size=2", "--n_layer=1",
             "--n_embd=8", "--data=demonstrations.jsonl", "--tokenizer=tinytldr"]
    for again in ([], ["--resume"]):
        train_policy.main(flags + again)
        config = json.loads(Path("scratch/config.json").read_text())
        assert config["nanopref"]["init_from"] == "scratch" and config["n_layer"] == 1


def test_a_new_model_has_nothing_of_a_folder_called_scratch():
    """Not its tokenizer either."""
    Path("scratch").mkdir()
    Path("scratch/config.json").write_text(json.dumps({"nanopref": {"tokenizer": "gpt2"}}))
    assert policy_args("--loss=sft").tokenizer == "tinytldr"
