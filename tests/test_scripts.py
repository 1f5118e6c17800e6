"""The parts of train_policy.py, train_rm.py and reward.py other than the numbers of a training step
(these are in test_training.py): what is cached and under which name, where and in what precision it
is computed, what is asked for, what is written. All with models of a layer and random tokens."""
import json
import shutil
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import reward
import tinytldr
import train_policy
import train_rm
from data import Dataset, TreeBatch
from model import GPT, GPTConfig
from reward import RewardModel, family_scores, load_reward_models, training_pairs
from support import columns
from support.columns import print_spread, sample, score
from support.device import computing, recompute_layers
from support.flags import InputError
from support.tokenizer import to_text
from support.tokens import with_room
from train_policy import reward_of_samples, row_terms, with_columns

CPU = torch.device("cpu")
TOKENIZER = tinytldr.tokenizer()
CONFIG = GPTConfig(48, TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=4)
LLAMA = replace(CONFIG, family="llama", n_head=2, n_kv_head=1, n_inner=6, mlp="swiglu", norm="rms",
                qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=100.0)
MODELS = pytest.mark.parametrize("model", ["ref", "llama"])
SCRIPTS = pytest.mark.parametrize("script", [train_policy, train_rm])


def shaken(model, seed):
    """The model, with weights that say something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def random_pairs(n, seed):
    """A data set of pairs, in some of which the longer response is chosen; with two scores each."""
    rng = np.random.default_rng(seed)

    def tokens(shortest, longest):
        return rng.integers(0, 256, rng.integers(shortest, longest + 1)).astype(np.int32)

    examples = [(tokens(2, 5), [tokens(1, 8), tokens(1, 8)]) for _ in range(n)]
    return Dataset(examples, rng.normal(size=(n, 2, 2)).astype(np.float32))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a reference policy (ref) and a family of two reward models (rms)."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("ref", CONFIG), ("llama", LLAMA)):
        shaken(GPT(config), 0).save_pretrained(root / name, TOKENIZER.eot_token)
    for number in (1, 2):
        reward_model = shaken(RewardModel(CONFIG), number)
        reward_model.save_pretrained(root / f"rms/{number}", TOKENIZER.eot_token)
    return root


@pytest.fixture
def lab(models, tmp_path, monkeypatch):
    """A copy of that folder, and the pairs that the scripts get: {split: data set}."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    pairs = {"train": random_pairs(40, 1), "validation": random_pairs(20, 2)}

    def preferences(data, split, *_):
        return pairs[split].take(np.arange(len(pairs[split])))

    monkeypatch.setattr(reward, "preferences", preferences)
    return SimpleNamespace(root=tmp_path, pairs=pairs, policy=GPT.from_pretrained(tmp_path / "ref"))


def train(lab, script, *flags):
    """Runs a script on the pairs, for a step, into the folder `run`; a policy by d-DPO, unless the
    flags say otherwise."""
    loss = ["--loss=d-dpo", "--rewards=scores"] if script is train_policy else []
    script.main([*loss, f"--init_from={lab.root}/ref", f"--out_dir={lab.root}/run", "--rho=all",
                 "--max_steps=1", "--batch_size=8", "--n_eval=8", "--device=cpu", *flags])


def demonstrate(lab, monkeypatch, *flags):
    """Supervised fine-tuning of a new model, for a step. Returns the rows that it asked for."""
    asked = []

    def rows(seed, split):
        asked.append((seed, split))
        return [{"prompt": "POST:", "responses": [" my boss", " broke"]}] * 9

    monkeypatch.setattr(tinytldr, "demonstration_rows", rows)
    train_policy.main(["--loss=sft", f"--out_dir={lab.root}/sft", "--max_steps=1", "--n_layer=1",
                       "--n_head=1", "--n_embd=4", "--batch_size=4", "--device=cpu", *flags])
    return asked


def arguments(lab, **changed):
    """What functions of the scripts read of the flags."""
    flags = {"loss": "p-dpo", "init_from": f"{lab.root}/ref", "out_dir": f"{lab.root}/run",
             "rewards": None, "relabel": None, "data": "tinytldr", "pool": 30,
             "label_temperature": 0.5, "rho": 0.5, "n_pairs": 6, "max_new_tokens": 4, "seed": 7,
             "dtype": "float32", "device": "cpu", "tokenizer": "tinytldr", "micro_batch_size": 2,
             "skip_bad_rows": None, "missing_eos_penalty": None, "freeze": None}
    return SimpleNamespace(**flags | changed)


def read_json(path):
    return json.loads(path.read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cached_names(folder):
    """How many files there are of each name in a cache: {name: number}."""
    names = [path.name.rpartition("-")[0] for path in (folder / "cache").iterdir()]
    return {name: names.count(name) for name in names}


# ------------------------------------------------------------------ by hand

def batch_of(n_responses, n_samples=0):
    """Rows with these numbers of responses, and samples after them; their log-probs by the
    reference are -2."""
    examples = [([1], [[2]] * (n + n_samples)) for n in n_responses]
    ref_logps = np.full((len(examples), max(n_responses) + n_samples), -2, np.float32)
    return Dataset(examples, None, ref_logps, n_samples).batch(np.arange(len(examples)))


def test_statistics_of_single_responses():
    """The means over a data set are those over its desirable rows, its undesirable rows, and the
    mismatched responses."""
    dataset = Dataset([([1], [[2], [3]])] * 4, None, np.full((4, 2), -2, np.float32), 1,
                      desirable=np.array([True, False, True, True]))
    batch = dataset.batch(np.arange(4))
    change = torch.tensor([[0.5, 1.0], [3.0, 2.0], [-1.0, 1.0], [2.0, 4.0]])
    values = train_policy.statistics(batch.ref_logps + change, batch)
    assert {name: value.mean().item() for name, value in values.items()} == {
        "desirable_change": pytest.approx(0.5), "undesirable_change": pytest.approx(3.0),
        "mismatched_change": pytest.approx(2.0)}


def test_statistics_of_rewards():
    """A margin below 1 is right too, and one of zero is half right."""
    rewards = torch.tensor([[0.5, 0.0], [1.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    values = train_rm.statistics(rewards, batch_of([2, 3]))
    assert {name: value.tolist() for name, value in values.items()} == {
        "margin": pytest.approx([0.5, 0, -1 / 3, 1]),
        "accuracy": pytest.approx([1, 1 / 6, 0, 1 / 3])}


def test_members_that_the_minimum_picks():
    """With beta 2: in the first row the implicit margins are 2, 6 and 4, in the second 0, and of
    the rewards' margins these are the nearest."""
    batch = batch_of([3, 2], n_samples=1)
    batch.rewards = torch.tensor([[[1.0, 2.0, 6.0], [0.0, 0.0, 3.0], [-9.0, -4.5, 0.0]],
                                  [[0.0, 1.0, 5.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    change = torch.tensor([[3.0, 2.0, 0.0, 9.0], [5.0, 5.0, 7.0, 0.0]])
    shares = train_policy.picked_members(batch.ref_logps + change, batch, beta=2.0)
    assert {name: value.tolist() for name, value in shares.items()} == {
        "picked_0": [0, 0, 0, 1], "picked_1": pytest.approx([1 / 3, 0, 1 / 3, 0]),
        "picked_2": pytest.approx([0, 1 / 3, 0, 0])}


def test_a_member_that_hardly_varies(capsys):
    """Its margins' standard deviation, by hand, below a tenth of the median's, is warned of; near a
    tenth it is not. Of a ranking all pairs count."""
    pairs = np.zeros((2, 2, 4), np.float32)
    pairs[0, 0], pairs[1, 0] = [1, 2, 0.17, 0.11], [-1, -2, -0.17, -0.15]
    print_spread(pairs, ["a", "b", "c", "d"])
    out = capsys.readouterr().out
    assert "margins of each reward model: 0 (a) 1, 1 (b) 2, 2 (c) 0.17, 3 (d) 0.13\n" in out
    assert "warning" not in out
    pairs[..., 2] /= 10
    print_spread(pairs, [])
    out = capsys.readouterr().out
    assert "2 (score) 0.017" in out and out.count("warning") == 1
    assert "warning: the margins of reward model 2 (score) hardly vary" in out
    print_spread(np.array([[[2.0], [1.0], [0.0]]]), ["a"])        # margins 1, 2, 1
    assert "0 (a) 0.471\n" in capsys.readouterr().out


def test_what_a_row_weighs():
    """1, but for SFT its response tokens."""
    dataset = Dataset([([1], [[2, 3], [4]]), ([1], [[2], [4, 5, 6]])])
    assert row_terms(dataset, "sft").tolist() == [3, 4]
    assert row_terms(dataset, "dpo").tolist() == [1, 1]


# ------------------------------------------------------------------ evaluation

@SCRIPTS
def test_evaluation_is_of_all_rows_in_parts(script, monkeypatch):
    """In passes of four micro-batches, on the device of the training; the means are over rows, or
    for SFT over tokens."""
    dataset = Dataset([([1], [[2] * (1 + i % 3), [3]]) for i in range(20)])
    device = torch.device("cpu")
    passes_made, moved = [], []
    monkeypatch.setattr(TreeBatch, "to", lambda batch, where: moved.append(where) or batch)

    def model(batch):
        passes_made.append(len(batch.tokens))
        return torch.tensor([[-1.0, -2.0]]).repeat(len(batch.tokens), 1)

    args = SimpleNamespace(loss="sft", micro_batch_size=2, device="cpu", dtype="float32",
                           gamma=None, max_steps=4)
    if script is train_policy:
        means = train_policy.evaluate(model, dataset, args, {}, device)
        assert means == {"loss": pytest.approx(60 / dataset.response_lengths().sum())}
    else:
        means = train_rm.evaluate(model, dataset, args, device)
        wanted = {"loss": np.log(1 + np.exp(-1)), "margin": 1, "accuracy": 1}
        assert means == pytest.approx(wanted)
    assert passes_made == [8, 8, 4] and moved == [device] * 3


def test_an_evaluation_of_rows_of_several_sizes():
    """Means over rows, of three responses and of two, each with a sample: by hand, of a policy for
    which all responses are as likely as for the reference, and the samples 3 and 1 nats less."""
    dataset = Dataset([([1], [[2], [3], [4], [5]]), ([1], [[2], [3], [4]])],
                      np.array([[[3.0], [2.0], [0.0]], [[5.0], [1.0], [0.0]]], np.float32),
                      np.zeros((2, 4), np.float32), n_samples=1)
    logps = torch.tensor([[0.0, 0.0, 0.0, -3.0], [0.0, 0.0, -1.0, 0.0]])
    args = SimpleNamespace(loss="e-dpo", beta=1.0, micro_batch_size=2, device="cpu",
                           dtype="float32")
    means = train_policy.evaluate(lambda batch: logps, dataset, args, {"beta": 1.0, "gamma": 0.5},
                                  torch.device("cpu"))
    squares = ((1 + 9 + 4) / 3 + 16) / 2
    assert means == pytest.approx({"loss": squares + 0.5 * 2, "forward_kl": 2, "margin": 0,
                                   "chosen_change": 0, "rejected_change": 0, "accuracy": 0.5,
                                   "picked_0": 1})


def test_losses_of_all_steps_are_evaluated_with_the_last_gamma(lab):
    """Or the checkpoint of --select=loss would be an early one, for its smaller KL term. Halfway,
    with a weight as large as this, the loss is the KL."""
    train(lab, train_policy, "--loss=dp-dpo", "--gamma=0,1e6", "--max_new_tokens=4", "--lr=0.1",
          "--max_steps=2", "--eval_every=1")
    halfway, = [line for line in metrics(lab.root / "run")
                if line["step"] == 1 and "train/loss" in line]
    assert halfway["train/loss"] == pytest.approx(1e6 * halfway["train/forward_kl"], rel=1e-2)


def test_reward_of_samples_by_the_oracle(lab, monkeypatch):
    """A sample for each prompt, by random numbers of their own; the oracle reads text."""
    monkeypatch.setattr(tinytldr, "oracle_reward", lambda post, text: len(post) + 100 * len(text))
    prompts = [prompt.tolist() for prompt, _ in lab.pairs["train"].examples]
    replies = sample(lab.policy, prompts, 4, TOKENIZER.eot_token, [7, 5])
    wanted = [len(to_text(prompt, TOKENIZER)) + 100 * len(to_text(reply, TOKENIZER))
              for prompt, reply in zip(prompts, replies)]
    means = reward_of_samples(lab.policy, prompts, {}, TOKENIZER, arguments(lab))
    assert means["reward"] == pytest.approx(np.mean(wanted), rel=1e-12)


def test_reward_of_samples_by_reward_models(lab):
    """The mean of their rewards."""
    prompts = [prompt.tolist() for prompt, _ in lab.pairs["train"].examples]
    judges = load_reward_models(f"{lab.root}/rms", "--select", lab.policy, TOKENIZER, CPU)
    replies = sample(lab.policy, prompts, 4, TOKENIZER.eot_token, [7, 5])
    unended = [reply[-1] != TOKENIZER.eot_token for reply in replies]
    for reply, cut in zip(replies, unended):
        reply += [TOKENIZER.eot_token] * cut        # where a reward model is read
    dataset = Dataset([(prompt, [reply]) for prompt, reply in zip(prompts, replies)])
    wanted = [score(judge, dataset).mean() for judge in judges.values()]
    means = reward_of_samples(lab.policy, prompts, judges, TOKENIZER, arguments(lab))
    assert means["unended"] == pytest.approx(np.mean(unended)) and 0 < np.mean(unended)
    assert means["reward"] == pytest.approx(np.mean(wanted)) and wanted[0] != wanted[1]


# ------------------------------------------------------------------ columns and their cache

def compute_columns(lab, policy=None, n=9, **changed):
    """with_columns for the first n pairs, with these flags changed."""
    dataset = with_columns(lab.pairs["train"].first(n), "train", policy or lab.policy, TOKENIZER,
                           {}, arguments(lab, **changed))
    assert dataset.ref_logps.dtype == np.float32 and dataset.rewards is None


def test_columns_are_computed_once(lab):
    for _ in range(2):
        compute_columns(lab)
        assert cached_names(lab.root / "ref") == {"train-samples": 1, "train-logps": 1}


@pytest.mark.parametrize("name, value", [("max_new_tokens", 5), ("seed", 8), ("dtype", "bfloat16"),
                                         ("tokenizer", "gpt2")])
def test_samples_are_cached_by_what_they_depend_on(lab, name, value):
    compute_columns(lab)
    compute_columns(lab, **{name: value})
    assert cached_names(lab.root / "ref")["train-samples"] == 2


@pytest.mark.parametrize("loss, name", [("p-dpo", "train-samples"), ("dpo", "train-logps")])
def test_columns_are_cached_by_weights_and_rows(lab, loss, name):
    compute_columns(lab, loss=loss)
    compute_columns(lab, loss=loss, policy=shaken(GPT(CONFIG), 5))
    assert cached_names(lab.root / "ref")[name] == 2
    compute_columns(lab, loss=loss, n=10)
    assert cached_names(lab.root / "ref")[name] == 3


def test_log_probs_are_cached_by_their_precision_and_not_by_the_seed(lab):
    compute_columns(lab, loss="dpo")
    compute_columns(lab, loss="dpo", seed=8)
    assert cached_names(lab.root / "ref") == {"train-logps": 1}
    compute_columns(lab, loss="dpo", dtype="bfloat16")
    assert cached_names(lab.root / "ref") == {"train-logps": 2}


@pytest.mark.parametrize("kind", ["policy", "pairs"])
def test_the_cache_of_a_reference_from_the_hub(lab, monkeypatch, kind):
    """It is the run's."""
    args = arguments(lab, init_from="somebody/gpt2")
    if kind == "policy":
        with_columns(lab.pairs["train"], "train", lab.policy, TOKENIZER, {}, args)
        assert cached_names(lab.root / "run") == {"train-samples": 1, "train-logps": 1}
    else:
        assert calls_of_preferences(lab, monkeypatch, args)[0][4] == f"{lab.root}/run/cache"


def test_scores_that_are_missing(lab):
    dataset = Dataset(lab.pairs["train"].examples)
    args = arguments(lab, loss="d-dpo", rewards="scores", data="pairs.jsonl")
    with pytest.raises(InputError) as error:
        with_columns(dataset, "train", lab.policy, TOKENIZER, {}, args)
    assert str(error.value) == ("--rewards=scores: pairs.jsonl has no score_chosen and "
                                "score_rejected, nor scores, in all its rows")


def test_rewards_are_cached_beside_their_model(lab, monkeypatch):
    """By its weights, the rows and the precision."""
    def scores(model, dataset):
        rewards = family_scores({f"{lab.root}/rm": model}, dataset, f"{lab.root}/run", "train")
        assert rewards.dtype == np.float32
        return rewards[:, :, 0], cached_names(lab.root / "rm")

    (lab.root / "rm").mkdir()
    model, dataset = shaken(RewardModel(CONFIG), 1), lab.pairs["train"]
    for _ in range(2):
        rewards, names = scores(model, dataset)
        assert rewards == pytest.approx(score(model, dataset)) and names == {"train-rewards": 1}
    assert scores(shaken(RewardModel(CONFIG), 2), dataset)[1] == {"train-rewards": 2}
    assert scores(model, dataset.first(5))[1] == {"train-rewards": 3}
    monkeypatch.setattr(computing, "dtype", "bfloat16")
    assert scores(model, dataset)[1] == {"train-rewards": 4}


def test_what_a_policy_is_trained_on_is_cached_by_name(lab, monkeypatch, capsys):
    """And the progress bars have these names. The policy is compared with the reference once, in
    the first of three micro-batches."""
    bars = []

    def bar(desc, **options):
        bars.append(desc)
        return progress_bar(desc=desc, **options)

    progress_bar = columns.progress_bar
    monkeypatch.setattr(columns, "progress_bar", bar)
    train(lab, train_policy, "--loss=e-dpo", f"--rewards={lab.root}/rms", "--max_new_tokens=4",
          f"--relabel={lab.root}/rms/1", "--micro_batch_size=3")
    assert cached_names(lab.root / "ref") == {
        "train-samples": 1, "validation-samples": 1, "train-logps": 1, "validation-logps": 1}
    of_rewards = {"train-rewards": 1, "validation-rewards": 1}
    of_labels = {"train-relabel-rewards": 1, "validation-relabel-rewards": 1}
    assert cached_names(lab.root / "rms/1") == of_rewards | of_labels
    assert cached_names(lab.root / "rms/2") == of_rewards
    assert bars == ["train-relabel rewards", "validation-relabel rewards",
                    "train rewards", "train rewards", "train samples", "train log-probs",
                    "validation rewards", "validation rewards", "validation samples",
                    "validation log-probs", "samples to show", "samples to show"]
    assert capsys.readouterr().out.count("step 0: ") == 1


# ------------------------------------------------------------------ where, and in what precision

@pytest.fixture
def computed(monkeypatch):
    """What is noted while a script runs: the devices that models and batches are sent to; and of
    every pass of a model whether it was in autocast, and the rows and columns of its batch."""
    computed = SimpleNamespace(devices=[], autocast=[], rows=[], columns=[])

    def note(kind, method):
        plain = getattr(kind, method)

        def noting(self, *args, **options):
            if method == "to":
                computed.devices.append(args[0])
            else:
                computed.autocast.append(torch.is_autocast_enabled("cpu"))
            if method == "forward":
                computed.rows.append(args[0].tokens.size(0))
                computed.columns.append(args[0].tokens.size(1))
            return plain(self, *args, **options)

        monkeypatch.setattr(kind, method, noting)

    for kind, method in ((torch.nn.Module, "to"), (TreeBatch, "to"), (GPT, "forward"),
                         (GPT, "generate"), (RewardModel, "forward")):
        note(kind, method)
    return computed


@pytest.mark.parametrize("script, flags", [
    (train_policy, []),
    (train_policy, ["--loss=e-dpo", "--rewards={}/rms", "--relabel={}/rms/1", "--select={}/rms",
                    "--max_new_tokens=4"]),
    (train_rm, []), (train_rm, ["--bias=0.4,0.6", "--relabel={}/rms/1"])])
def test_all_is_computed_where_and_as_the_flags_say(lab, computed, monkeypatch, script, flags):
    """On --device, by --dtype, but for some of the reference's log-probs, which are compared with
    float32; and in bfloat16 the batches have few different shapes."""
    checked = []
    monkeypatch.setattr(train_policy, "check_rounding", lambda *given: checked.append(given[2]))
    train(lab, script, "--dtype=bfloat16", *(flag.format(lab.root) for flag in flags))
    assert set(computed.devices) == {CPU}
    assert set(computed.autocast) == {True}
    assert {columns % 32 for columns in computed.columns} == {0}
    assert checked == (["train", "validation"] if script is train_policy else [])


def test_log_probs_in_bfloat16_are_compared_with_float32(lab, computed, capsys):
    """Those that a loss takes as given, and only then."""
    train(lab, train_policy, "--dtype=bfloat16")
    assert set(computed.autocast) == {True, False}
    said = capsys.readouterr().out
    assert "train log-probs in bfloat16: within " in said
    assert "validation log-probs in bfloat16: within " in said
    train(lab, train_policy, f"--out_dir={lab.root}/float32")
    assert "log-probs in bfloat16" not in capsys.readouterr().out


def test_supervised_fine_tuning_is_computed_where_and_as_the_flags_say(lab, computed, monkeypatch):
    demonstrate(lab, monkeypatch, "--dtype=bfloat16")
    assert set(computed.devices) == {CPU}
    assert set(computed.autocast) == {True}
    assert {columns % 32 for columns in computed.columns} == {0}


@SCRIPTS
def test_a_batch_is_computed_in_micro_batches(lab, computed, script):
    """Which is what their size is for: memory. (Evaluation takes more rows: it keeps less.)"""
    train(lab, script, "--micro_batch_size=3")
    assert [rows for rows in computed.rows if rows < 8] == [3, 3, 2]


@SCRIPTS
@pytest.mark.parametrize("flags, calls", [([], []), (["--compile"], [{"dynamic": True}])])
def test_compilation_is_for_any_shape(lab, monkeypatch, script, flags, calls):
    """If it is asked for: batches have many shapes, and each would be compiled again."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(how))
    train(lab, script, *flags)
    assert compiled == calls


@MODELS
def test_a_compiled_run_is_the_same_run(lab, monkeypatch, model):
    """The numbers of a run with --compile, to 1e-5, and a handful of graphs for all its shapes.
    (The graphs are made and not translated to C++, which takes a minute.)"""
    from torch._dynamo.utils import counters
    graphs_before, compile_module = counters["stats"]["unique_graphs"], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="eager"))
    runs = []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        train(lab, train_policy, "--max_steps=3", f"--init_from={lab.root}/{model}",
              f"--out_dir={lab.root}/{name}", *flags)
        runs.append(metrics(lab.root / name))
    for plain, compiled in zip(*runs, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] - graphs_before <= 6


def saved_bytes(model, batch):
    """What a forward pass keeps for the backward pass."""
    kept = []

    def count(tensor):
        kept.append(tensor.nbytes)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks:
        model(batch)
    return sum(kept)


@MODELS
def test_layers_that_are_computed_again(lab, model):
    """A run with --gradient_checkpointing is the same run, and keeps less for its backward pass:
    each layer's input to attention and to its MLP and the sums after them, not what is inside."""
    runs = []
    for name, flags in (("plain", []), ("again", ["--gradient_checkpointing"])):
        train(lab, train_policy, "--max_steps=3", f"--init_from={lab.root}/{model}",
              f"--out_dir={lab.root}/{name}", *flags)
        runs.append((lab.root / name / "metrics.jsonl").read_text())
    assert runs[0] == runs[1]
    model, batch = GPT.from_pretrained(f"{lab.root}/{model}"), lab.pairs["train"].batch(range(4))
    before = saved_bytes(model, batch)
    recompute_layers(model)
    assert saved_bytes(model, batch) < 0.5 * before


# ------------------------------------------------------------------ what is asked for

@SCRIPTS
def test_help_says_what_the_script_does(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert f"    python {script.__name__}.py --" in shown and "out/" in shown


@SCRIPTS
def test_a_vocabulary_without_room(lab, monkeypatch, script):
    large = tiktoken.Encoding("large", pat_str=".", special_tokens={"<|endoftext|>": 9999},
                              mergeable_ranks={bytes([b]): b for b in range(256)})
    monkeypatch.setattr(script, "get_tokenizer", lambda name: large)
    with pytest.raises(InputError) as error:
        train(lab, script)
    assert str(error.value) == (f"--tokenizer: the model knows {CONFIG.vocab_size} tokens, and "
                                "large has 10000")


def test_demonstrations_are_those_of_the_seed(lab, monkeypatch):
    asked = demonstrate(lab, monkeypatch, "--seed=7")
    assert asked == [(7, "train"), (7, "validation")]
    assert (lab.root / "sft/model.safetensors").exists()


def calls_of_preferences(lab, monkeypatch, args):
    """The arguments with which training_pairs asks for preferences."""
    calls = []

    def preferences(*values):
        calls.append(values)
        return lab.pairs[values[1]]

    monkeypatch.setattr(reward, "preferences", preferences)
    lab.result = training_pairs(args, TOKENIZER, lab.policy, CPU)
    return calls


def test_pairs_are_those_of_the_flags(lab, monkeypatch, capsys):
    """Of --data, --pool, --label_temperature and --seed; of the training pairs --n_pairs with the
    bias --rho, the validation pairs as they come."""
    calls = calls_of_preferences(lab, monkeypatch, arguments(lab))
    cache = f"{lab.root}/ref/cache"
    assert calls == [("tinytldr", split, TOKENIZER, lab.policy, cache, 30, 0.5, 7, None, False)
                     for split in ("train", "validation")]
    assert capsys.readouterr().out == ("D_rho: 6 of 40 training pairs, the longer response "
                                       "preferred in 50% of them\n")
    subset, validation = lab.result
    again = reward.d_rho(lab.pairs["train"], 0.5, 6, seed=7)
    assert subset.examples == again.examples and validation is lab.pairs["validation"]


def test_relabelling_by_the_mean_of_a_family(lab, monkeypatch):
    """In every row the response of the higher mean reward comes first, in both splits."""
    args = arguments(lab, relabel=f"{lab.root}/rms", rho="all", n_pairs=None)
    calls_of_preferences(lab, monkeypatch, args)
    family = [RewardModel.from_pretrained(f"{lab.root}/rms/{number}") for number in (1, 2)]
    for dataset, before in zip(lab.result, lab.pairs.values()):
        rewards = np.mean([score(model, dataset) for model in family], axis=0)
        assert len(dataset) == len(before) and (rewards[:, 0] > rewards[:, 1]).all()


# ------------------------------------------------------------------ reward models

def test_a_reward_model_is_saved_as_a_classifier_with_a_single_label(lab):
    config = read_json(lab.root / "rms/1/config.json")
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"} and config["label2id"] == {"reward": 0}
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, TOKENIZER.eot_token)
    RewardModel(CONFIG).save_pretrained(lab.root / "rm", 7)
    assert read_json(lab.root / "rm/config.json")["eos_token_id"] == 7


def test_a_reward_model_starts_from_the_policy_and_at_zero(lab):
    model = RewardModel.from_policy(lab.policy)
    assert model.config == lab.policy.config and not model.score.weight.any()
    wanted = lab.policy.transformer.state_dict()
    assert all(torch.equal(tensor, wanted[name])
               for name, tensor in model.transformer.state_dict().items())
    assert list(model.score.state_dict()) == ["weight"]


def test_a_new_reward_model_is_random_below_its_head():
    model = RewardModel(GPTConfig(8, 100, n_layer=1, n_head=1, n_embd=16))
    assert 0.01 < model.transformer.wte.weight.std() < 0.03
    assert model.score.weight.tolist() == [[0] * 16]


def test_a_reward_model_that_is_not_that_of_its_config(lab):
    path = lab.root / "rms/1/config.json"
    path.write_text(json.dumps({**read_json(path), "n_layer": 2}))
    with pytest.raises(InputError, match=f"^{lab.root}/rms/1: not the model of its config.json: "):
        RewardModel.from_pretrained(f"{lab.root}/rms/1")


def test_reward_models_are_loaded_onto_the_device(lab):
    models = load_reward_models(f"{lab.root}/rms", "--rewards", lab.policy, TOKENIZER,
                                torch.device("meta"))
    assert list(models) == [f"{lab.root}/rms/{number}" for number in (1, 2)]
    assert {model.score.weight.device.type for model in models.values()} == {"meta"}
    assert load_reward_models(None, "--rewards", lab.policy, TOKENIZER, CPU) == {}


@pytest.mark.parametrize("script, flag", [(train_policy, "--rewards"), (train_policy, "--select"),
                                          (train_policy, "--relabel"), (train_rm, "--relabel")])
def test_the_flag_of_a_reward_model_that_does_not_fit_is_named(lab, script, flag):
    RewardModel(replace(CONFIG, vocab_size=600)).save_pretrained(lab.root / "small")
    (lab.root / "none").mkdir()
    for folder, message in (
            ("small", f"{flag}: {lab.root}/small has vocab_size 600, the policy "
                      f"{CONFIG.vocab_size}"),
            ("none", f"{flag}: no reward model in '{lab.root}/none': train one with python "
                     f"train_rm.py --out_dir={lab.root}/none")):
        with pytest.raises(InputError) as error:
            train(lab, script, f"{flag}={lab.root}/{folder}")
        assert str(error.value) == message


def test_a_reward_model_that_does_not_start_at_zero_is_noticed(lab, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_policy",
                        lambda policy, head: shaken(RewardModel(CONFIG), 3))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        train(lab, train_rm)


# ------------------------------------------------------------------ what is written

@SCRIPTS
def test_a_trained_model_has_its_tokenizer(lab, script):
    """The token that ends a text is the tokenizer's, also where it is not the model's last."""
    roomy = replace(CONFIG, vocab_size=CONFIG.vocab_size + 3)
    GPT(roomy).save_pretrained(lab.root / "ref", TOKENIZER.eot_token)
    train(lab, script)
    config = read_json(lab.root / "run/config.json")
    assert config["eos_token_id"] == config["bos_token_id"] == TOKENIZER.eot_token
    assert config["vocab_size"] == CONFIG.vocab_size + 3
    assert config["nanopref"]["tokenizer"] == "tinytldr"
    settings = read_json(lab.root / "run/tokenizer_config.json")
    assert settings["model_max_length"] == CONFIG.block_size
    assert settings["eos_token"] == "<|endoftext|>"
    words = read_json(lab.root / "run/tokenizer.json")["model"]["vocab"]
    assert len(words) == TOKENIZER.n_vocab - 1


def test_a_new_policy_has_the_sizes_of_the_flags(lab, monkeypatch):
    demonstrate(lab, monkeypatch, "--block_size=70", "--n_embd=6", "--n_head=3", "--n_layer=2")
    assert GPT.from_pretrained(lab.root / "sft").config == GPTConfig(
        70, TOKENIZER.n_vocab, n_layer=2, n_head=3, n_embd=6)


def test_the_members_of_a_family_have_flags_of_their_own(lab):
    """So that each can be resumed, and read, as a run."""
    train(lab, train_rm, "--bias=0.4,0.6")
    for bias in (0.4, 0.6):
        folder = lab.root / "run" / str(bias)
        flags = read_json(folder / "config.json")["nanopref"]
        assert (flags["bias"], flags["out_dir"], flags["resume"]) == (bias, str(folder), False)
        args = train_rm.parse_flags(["--bias=0.4", f"--out_dir={lab.root}/none"])
        assert flags.keys() == vars(args).keys()


def test_what_each_member_of_a_family_trains_on_is_said(lab, capsys):
    """Where the longer response is never chosen, one pair alone has round(1 / 2) such pairs."""
    lab.pairs["train"] = Dataset([([1], [[2], [3] * 5])] * 20)
    train(lab, train_rm, "--bias=0,0.5")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--bias")]
    assert said == [f"--bias={bias}: D_rho: {n} of 20 training pairs, the longer response "
                    "preferred in 0% of them" for bias, n in (("0.0", 20), ("0.5", 1))]


@pytest.mark.parametrize("script, change", [
    (train_policy, "weights"), (train_policy, "rows"), (train_policy, "rewards"),
    (train_rm, "weights"), (train_rm, "rows")])
def test_resuming_needs_what_was_trained_on_to_be_the_same(lab, script, change):
    """The reference, the rows and the rewards; it goes on if they are."""
    train(lab, script)
    train(lab, script, "--resume")
    if change == "weights":
        shaken(lab.policy, 4).save_pretrained(lab.root / "ref", TOKENIZER.eot_token)
    elif change == "rows":
        lab.pairs["train"].examples[0][1][1][0] += 1
    else:
        lab.pairs["train"].rewards[0] += 1
    with pytest.raises(InputError, match="^--resume: the reference, the data or the rewards have"):
        train(lab, script, "--resume")


@pytest.mark.parametrize("change", ["judge", "prompts"])
def test_resuming_needs_the_checkpoints_to_be_judged_alike(lab, change):
    """Rewards by another judge, or for other validation prompts, would be compared with those of
    the checkpoints before."""
    flags = [f"--select={lab.root}/rms/1", "--max_new_tokens=4"]
    train(lab, train_policy, *flags)
    train(lab, train_policy, *flags, "--resume")
    if change == "judge":
        judge = shaken(RewardModel.from_pretrained(f"{lab.root}/rms/1"), 4)
        judge.save_pretrained(f"{lab.root}/rms/1", TOKENIZER.eot_token)
    else:
        lab.pairs["validation"].examples[0][0][0] += 1
    with pytest.raises(InputError, match="^--resume: the reference, the data or the rewards have"):
        train(lab, train_policy, *flags, "--resume")


@pytest.mark.parametrize("select", ["loss", "oracle", "{}/rms"])
def test_the_model_that_select_asks_for_is_saved(lab, monkeypatch, capsys, select):
    """That of the best line of metrics.jsonl after the first; rewards are logged if they decide."""
    monkeypatch.setattr(tinytldr, "oracle_reward", lambda prompt, text: -len(text))
    flags = [f"--select={select}".format(lab.root), "--max_steps=3", "--eval_every=1", "--lr=0.3"]
    train(lab, train_policy, *flags, *([] if select == "loss" else ["--max_new_tokens=4"]))
    lines = [line for line in metrics(lab.root / "run") if "validation/loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert ("validation/reward" in line) == (select != "loss")
    values = [line.get("validation/reward", -line["validation/loss"]) for line in lines[1:]]
    best = 1 + values.index(max(values))
    assert f"the model of step {best}\n" in capsys.readouterr().out
    trained = GPT.from_pretrained(lab.root / "run").state_dict()
    chosen = torch.load(lab.root / "run/best.pt", weights_only=True)
    assert chosen["step"] == best
    assert all(torch.equal(chosen["model"][name], tensor) for name, tensor in trained.items())


def test_prompts_that_lose_their_start_are_counted(capsys):
    """Ten tokens hold three new ones and seven of a prompt; one that fits passes without a word."""
    model = GPT(GPTConfig(block_size=10, vocab_size=20, n_layer=1, n_head=1, n_embd=4))
    assert with_room([[1] * 7, [2, 3]], model, 3) == [[1] * 7, [2, 3]]
    assert capsys.readouterr().out == ""
    assert with_room([list(range(9)), [2, 3]], model, 3) == [list(range(2, 9)), [2, 3]]
    assert capsys.readouterr().out == ("1 of 2 prompts lose their start: 3 new tokens in "
                                       "block_size 10 leave room for 7\n")
