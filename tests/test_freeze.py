"""--freeze: the lowest layers stay as they are, and what they compute is a column of the data set,
so that a step needs no more than the layers above."""
import json
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tinytldr
import train_policy
import train_rm
from data import Dataset
from model import GPT, GPTConfig
from reward import RewardModel
from support.columns import add_frozen, score
from support.device import freeze
from support.flags import InputError

SIZES = dict(block_size=48, vocab_size=61, n_layer=4, n_head=4, n_embd=16)
FAMILIES = {
    "gpt2": SIZES,
    "llama": dict(SIZES, family="llama", n_kv_head=2, n_inner=24, mlp="swiglu", norm="rms",
                  qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=1e4,
                  tie_word_embeddings=False)}
ROWS = [([5, 3, 8], [[2, 9, 60], [7, 60]]), ([4], [[6, 60], [1, 2, 3, 60]]),
        ([7, 7, 1, 2, 9], [[60], [11, 60]])]


def frozen_model(kind, family, n=3):
    torch.manual_seed(0)
    model = kind(GPTConfig(**FAMILIES[family]))
    if kind is RewardModel:
        torch.nn.init.normal_(model.score.weight)
    freeze(model.transformer, n)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [GPT, RewardModel])
def test_what_frozen_layers_compute_is_a_column(kind, family, tmp_path):
    """Values and gradients with the column are those without it, also of some of the rows in
    another order, and with samples; the column is read again from the cache."""
    model = frozen_model(kind, family)
    dataset = Dataset(ROWS).with_samples([[8, 60], [60], [1, 1, 60]])
    plain = score(model, dataset)
    for _ in range(2):
        add_frozen(dataset, model, tmp_path, "train")
        np.testing.assert_allclose(score(model, dataset), plain, atol=1e-6)
    assert [states.shape for states in dataset.below] == [(n, 16) for n in dataset.row_lengths()]

    rows = np.array([2, 0])
    gradients = []
    for some in (dataset.take(rows), Dataset(dataset.examples).take(rows)):
        model.zero_grad()
        model(some.batch(np.arange(2))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()
                          if p.grad is not None})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert any(name.startswith("transformer.h.3.") for name in gradients[0])
    assert not any(name.startswith(("transformer.h.2.", "transformer.w")) for name in gradients[0])


def test_a_model_that_is_not_frozen_computes_all_itself():
    """A column of another model's frozen layers is not taken for its own."""
    other = GPT(GPTConfig(**SIZES))
    dataset = Dataset(ROWS)
    plain = score(other, dataset)
    dataset.below = [np.ones((n, 16), np.float32) for n in dataset.row_lengths()]
    np.testing.assert_array_equal(score(other, dataset), plain)


def test_a_column_that_does_not_fit_is_refused(monkeypatch):
    """Before anything is computed: otherwise the system would end the run."""
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 10}.get(name, 200))
    dataset, model = Dataset(ROWS), frozen_model(GPT, "gpt2")           # 23 tokens of 16 numbers
    with pytest.raises(InputError, match="^--freeze: .* 23 tokens .* take fewer rows"):
        add_frozen(dataset, model, None, "train")
    assert dataset.below is None


@pytest.mark.parametrize("script, loss", [("train_policy", "sft"), ("train_policy", "dp-dpo"),
                                          ("train_rm", None)])
def test_a_run_takes_the_same_steps_without_the_column(world, tmp_path, monkeypatch, script, loss):
    """The frozen layers end as they began, bit for bit, the others do not."""
    module = {"train_policy": train_policy, "train_rm": train_rm}[script]
    flags = [f"--init_from={world}/sft", "--max_steps=4", "--batch_size=8", "--n_eval=16",
             "--freeze=1"]
    if loss == "sft":
        rows = tinytldr.demonstration_rows
        monkeypatch.setattr(tinytldr, "demonstration_rows", lambda *a: islice(rows(*a), 300))
        flags += ["--loss=sft"]
    else:
        flags += ["--n_pairs=24", "--pool=500"]
    if loss == "dp-dpo":
        flags += [f"--loss={loss}", f"--rewards={world}/rm"]
    module.main([*flags, f"--out_dir={tmp_path}/with"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "add_frozen", lambda *args: None)
        module.main([*flags, f"--out_dir={tmp_path}/without"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()
             for name in ("with", "without")]
    for line, other in zip(*lines, strict=True):
        numbers = [{name: value for name, value in json.loads(text).items()
                    if "second" not in name and "time" not in name} for text in (line, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4, rel=1e-4)
    before, after = load_file(world / "sft/model.safetensors"), load_file(
        tmp_path / "with/model.safetensors")
    for name in before:
        if "h.1." in name:
            assert not torch.equal(before[name], after[name]) or name.endswith(".bias")
        elif "ln_f" not in name and name in after:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("flags, words", [
    (["--freeze=2"], "has 2 layers"),
    (["--freeze=1", "--lora=2"], "--lora"),
    (["--freeze=1", "--loss=sft"], "--init_from"),
    (["--freeze=0"], "--freeze"),
])
def test_what_can_not_be_frozen_is_refused(world, tmp_path, flags, words):
    with pytest.raises((InputError, SystemExit)) as error:
        train_policy.main(["--loss=dpo", *([] if "--loss=sft" in flags else
                                           [f"--init_from={world}/sft"]), *flags,
                           "--max_steps=1", f"--out_dir={tmp_path}/run"])
    assert error.type is SystemExit or words in str(error.value)
