"""LoRA: what a correction computes and how it is trained; adapters in folders, on their own and
merged; five of them on one model. Parity with PEFT is in tests/plumbing/test_parity.py."""
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import reward
import tinytldr
import train_policy
import train_rm
from data import Dataset, collate
from lora import LoRALinear, add_lora, linear_layers, merge_lora
from model import GPT, GPTConfig
from reward import RewardModel, read_reward_models
from support import columns
from support.backward import token_logps
from support.columns import hash_weights
from support.flags import InputError
from support.run import Run
from support.tokenizer import save_tokenizer

SIZES = dict(block_size=48, vocab_size=61, n_layer=2, n_head=4, n_embd=16)
FAMILIES = {
    "gpt2": SIZES,
    "llama": dict(SIZES, family="llama", n_kv_head=2, n_inner=24, mlp="swiglu", norm="rms",
                  qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=1e4)}
BATCH = collate([([5, 3, 8], [[2, 9, 60], [7, 60]]), ([4], [[6, 60], [1, 2, 3, 60]])])


def new_model(family="gpt2"):
    torch.manual_seed(0)
    return GPT(GPTConfig(**FAMILIES[family]))


def adapted(model, base="base", rank=3):
    """A model with an adapter as if it had been trained: B is not zero."""
    add_lora(model, rank, base)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and not name.endswith("lora_A"):
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("family", FAMILIES)
def test_at_step_0_it_is_the_model(family):
    """Bit for bit. Adapters alone are trained, of every linear layer."""
    model = new_model(family)
    before = model(BATCH).detach()
    add_lora(model, 3, "base")
    assert torch.equal(model(BATCH), before)
    layers = linear_layers(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name, _ in layers for part in "AB"}
    assert len(layers) == 4 * SIZES["n_layer"]
    optimizer = train_policy.adamw(model, 1e-3)
    assert len(optimizer.param_groups[0]["params"]) == len(trained)


def test_the_equation():
    """y = x W' + bias + 2 x A' B', and the gradients of A and B are those of W's by the chain
    rule: dA = 2 B' dW, dB = 2 dW A'."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4).double()
    A, B = torch.randn(3, 5).double(), torch.randn(4, 3).double()
    x, weights = torch.randn(7, 5).double(), torch.randn(7, 4).double()
    W = (linear.weight + 2 * B @ A).detach().requires_grad_()
    y = x @ W.t() + linear.bias
    (y * weights).sum().backward()
    layer = LoRALinear(linear, A, B)
    torch.testing.assert_close(layer(x), y)
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, 2 * B.t() @ W.grad)
    torch.testing.assert_close(layer.lora_B.grad, 2 * W.grad @ A.t())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_computes_the_same(family):
    """And the model's own weights, which others may share, are not changed by it."""
    model = adapted(new_model(family)).double()
    layer = model.transformer.h[0].mlp.c_proj
    own = layer.weight.detach().clone()
    wanted = model(BATCH).detach()
    merge_lora(model)
    assert all(type(linear) is torch.nn.Linear for _, linear in linear_layers(model))
    torch.testing.assert_close(model(BATCH), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.weight, own)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_frozen_head_gets_no_gradient():
    """The head's gradient, the largest product of a step, is not computed if nobody needs it; that
    of the hidden states is the same bit for bit."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4), torch.randn(11, 4)
    target = torch.arange(9)
    gradients = {}
    for trained in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        token_logps(h, w, target).sum().backward()
        gradients[trained] = h.grad
        assert (w.grad is not None) == trained
    assert torch.equal(gradients[True], gradients[False])
    with Products() as products:
        token_logps(hidden.clone().requires_grad_(), weight, target).sum().backward()
    assert products.shapes == [(9, 11), (9, 4)]     # logits, the gradient of the hidden states


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products, in `shapes`."""
    shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.shapes.append(tuple(result.shape))
        return result


# ------------------------------------------------------------------ in a folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_and_out(tmp_path, family):
    """Bit for bit. The folder holds adapters alone."""
    new_model(family).save_pretrained(tmp_path / "base")
    policy = GPT.from_pretrained(str(tmp_path / "base"))
    adapted(policy, str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(".lora_" in name for name in tensors)
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again = GPT.from_pretrained(str(tmp_path / "adapter"), merge=False)
    assert hash_weights(again) == hash_weights(policy)
    assert torch.equal(again(BATCH), policy(BATCH))
    merged = GPT.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(merged(BATCH), policy(BATCH), rtol=1e-4, atol=1e-4)
    merge_lora(policy)
    policy.save_pretrained(tmp_path / "merged")
    assert torch.equal(GPT.from_pretrained(str(tmp_path / "merged"))(BATCH), policy(BATCH))


def test_fused_layers_are_split_for_others(tmp_path):
    """In files q_proj, k_proj and v_proj share A, and B's rows are theirs."""
    new_model("llama").save_pretrained(tmp_path / "base")
    policy = adapted(GPT.from_pretrained(str(tmp_path / "base")), str(tmp_path / "base"))
    policy.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layer = policy.transformer.h[1].attn.c_attn
    prefix = "base_model.model.model.layers.1.self_attn."
    parts = [(tensors[f"{prefix}{name}_proj.lora_A.weight"],
              tensors[f"{prefix}{name}_proj.lora_B.weight"]) for name in "qkv"]
    assert all(torch.equal(A, layer.lora_A) for A, _ in parts)
    assert [len(B) for _, B in parts] == [16, 8, 8]
    assert torch.equal(torch.cat([B for _, B in parts]), layer.lora_B)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 6, False)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                        "up_proj", "v_proj"]


def test_a_family_shares_one_model(tmp_path):
    """Reward models that are adapters of one model hold the same weights, and each has its own
    head. Their hashes differ, and the shared weights are hashed once."""
    new_model().save_pretrained(tmp_path / "base")
    policy = GPT.from_pretrained(str(tmp_path / "base"))
    add_lora(policy, 3, str(tmp_path / "base"))
    rewards = []
    for number in range(3):
        member = RewardModel.from_policy(policy, "sum")
        for layer in [member.score, *[layer for _, layer in linear_layers(member)]]:
            weight = getattr(layer, "lora_B", layer.weight)
            weight.data += 0.1 * torch.randn(weight.shape)
        member.save_pretrained(tmp_path / str(number))
        rewards.append(member(BATCH).detach())
    models = read_reward_models([str(tmp_path / str(number)) for number in range(3)], "cpu")
    for model, wanted in zip(models.values(), rewards):
        assert model.config.reward_head == "sum"
        assert torch.equal(model(BATCH), wanted)
    places = {model.transformer.wte.weight.data_ptr() for model in models.values()}
    places |= {model.transformer.h[0].attn.c_attn.weight.data_ptr() for model in models.values()}
    assert len(places) == 2
    assert len({model.score.weight.data_ptr() for model in models.values()}) == 3

    with pytest.MonkeyPatch.context() as patch:
        sizes, nothing = [], torch.zeros(0)
        patch.setattr(columns, "whole_on_cpu", lambda w: sizes.append(w.numel()) or nothing)
        assert len({hash_weights(model) for model in models.values()}) == 1     # all the same
        frozen = sum(not p.requires_grad for p in models[str(tmp_path / "0")].parameters())
        assert len(sizes) == frozen + 3 * (2 * 8 + 1)
    for model in models.values():
        for weight in model.parameters():
            weight.kept_hash = (None, None)
    assert len({hash_weights(model) for model in models.values()}) == 3


def test_the_hash_of_a_frozen_weight_that_changes():
    model = adapted(new_model())
    before = hash_weights(model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] += 1
    assert hash_weights(model) != before


# ------------------------------------------------------------------ what is refused


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """The folder of an adapter, `adapter`, next to its model, `base`."""
    monkeypatch.chdir(tmp_path)
    new_model().save_pretrained("base")
    adapted(GPT.from_pretrained("base")).save_pretrained("adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only 'LORA'"),
    ({"use_dora": True}, "use_dora True is not supported"),
    ({"bias": "all"}, "bias 'all' is not supported"),
    ({"alpha_pattern": {"c_attn": 3}}, "is not supported, only {}: merge the adapter"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ({"base_model_name_or_path": "./gone"}, "that can't be read: ./gone: no such folder"),
    ({"base_model_name_or_path": "adapter"}, "the adapter of a model that is an adapter itself"),
    ({"lora_alpha": "6"}, "lora_alpha is '6'")])
def test_adapters_of_other_kinds(adapter, changes, message):
    if changes.get("base_model_name_or_path") == "adapter":
        (adapter.parent / "second").mkdir()
        (adapter.parent / "second/adapter_config.json").write_bytes(
            (adapter / "adapter_config.json").read_bytes())
        adapter = adapter.parent / "second"
    edited(adapter, **changes)
    with pytest.raises(InputError) as error:
        GPT.from_pretrained(adapter.name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_other_weights(adapter):
    """The model that it was trained on has since been trained again."""
    model = GPT.from_pretrained("base")
    model.transformer.h[0].ln_1.weight.data += 1e-3
    model.save_pretrained("base")
    with pytest.raises(InputError, match="adapter: the weights of 'base' have changed"):
        GPT.from_pretrained("adapter")


def test_an_adapter_of_the_other_kind(adapter):
    with pytest.raises(InputError, match="adapter: this is a language model, not a reward model"):
        RewardModel.from_pretrained("adapter")
    add_lora(policy := GPT.from_pretrained("base"), 2, "base")
    RewardModel.from_policy(policy).save_pretrained("rm")
    with pytest.raises(InputError, match="rm: this is a reward model, not a language model"):
        GPT.from_pretrained("rm")


def test_an_adapter_that_is_not_whole(adapter):
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match="adapter_model.safetensors is damaged or not whole"):
        GPT.from_pretrained("adapter")
    path.unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors in this folder"):
        GPT.from_pretrained("adapter")


def test_another_rank(adapter):
    """Training on an adapter keeps its rank."""
    policy = GPT.from_pretrained("adapter", merge=False)
    add_lora(policy, 3, "adapter")
    assert policy.lora_base == "base"
    with pytest.raises(InputError, match=r"--lora=4: the adapter of --init_from does not have"):
        add_lora(policy, 4, "adapter")
    for script, loss in ((train_policy, ["--loss=dpo"]), (train_rm, [])):    # before data is read
        flags = [*loss, "--init_from=adapter", "--tokenizer=tinytldr", "--data=tinytldr"]
        with pytest.raises(InputError, match="--lora=4: the adapter of --init_from does not"):
            script.main([*flags, "--lora=4", "--out_dir=new"])


@pytest.mark.parametrize("script, flags, message", [
    (train_policy, "--loss=sft --lora=4", "--lora: it adapts a model: name one by --init_from")])
def test_flags_that_are_refused(tmp_path, script, flags, message):
    with pytest.raises(InputError, match=message):
        script.parse_flags([*flags.split(), f"--out_dir={tmp_path}/new"])


# ------------------------------------------------------------------ runs


TOKENIZER = tinytldr.tokenizer()
POLICY = ["--loss=d-dpo", "--rewards=scores"]


def random_pairs(n, seed):
    """A data set of pairs of random tokens, with two scores each."""
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(0, 256, 4), [rng.integers(0, 256, 5), rng.integers(0, 256, size)])
                for size in rng.integers(1, 9, n)]
    return Dataset(examples, rng.normal(size=(n, 2, 2)).astype(np.float32))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The working folder, with an untrained policy `ref`; the scripts get random pairs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig(48, TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=4)
    GPT(config).save_pretrained("ref", TOKENIZER.eot_token)
    save_tokenizer("ref", TOKENIZER, 48)
    monkeypatch.setattr(reward, "preferences", lambda data, split, *_: random_pairs(40, len(split)))
    return tmp_path


def train(script, out_dir, *flags, init_from="ref"):
    """A run of four steps with --lora=2, if the flags don't say otherwise."""
    own = POLICY if script is train_policy and not any("--loss" in flag for flag in flags) else []
    script.main([*own, f"--init_from={init_from}", f"--out_dir={out_dir}", "--rho=all",
                 "--max_steps=4", "--batch_size=8", "--n_eval=8", "--eval_every=2", "--device=cpu",
                 "--lora=2", *flags])


def read(path):
    with open(path, "rb") as file:
        return file.read()


def logged(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_run_saves_the_adapter_alone(lab):
    """In the folder and in state.pt. The reference's log-probs come from the cache of full
    training, and the loss at step 0 is checked against them (train_policy.check_step_0)."""
    before = read("ref/model.safetensors")
    train(train_policy, "run")
    assert read("ref/model.safetensors") == before and not os.path.exists("run/model.safetensors")
    assert len(os.listdir("ref/cache")) == 2                # training and validation log-probs
    train_policy.main([*POLICY, "--init_from=ref", "--out_dir=full", "--rho=all", "--max_steps=1",
                       "--batch_size=8", "--n_eval=8", "--device=cpu"])
    assert len(os.listdir("ref/cache")) == 2
    state = torch.load("run/state.pt")
    assert len(state["model"]) == 8 and all(".lora_" in name for name in state["model"])
    assert len(state["optimizer"]["state"]) == 8
    first, last = logged("run")[0], logged("run")[-1]
    assert last["train/loss"] < first["train/loss"]
    GPT.from_pretrained("run").save_pretrained("merged")
    assert not os.path.exists("merged/adapter_config.json")
    assert (hash_weights(GPT.from_pretrained("merged"))
            == hash_weights(GPT.from_pretrained("run")))


def test_resuming(lab, monkeypatch):
    """A run that was stopped and resumed arrives at the same adapter, bit for bit, and chooses the
    same checkpoint."""
    train(train_policy, "whole", "--select=loss")
    end_step = Run.end_step

    def stop(run, step, *args, **values):
        if step == 3:
            raise KeyboardInterrupt
        end_step(run, step, *args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(train_policy, "stopped", "--select=loss")
    train(train_policy, "stopped", "--select=loss", "--resume")
    for file in ("adapter_model.safetensors", "metrics.jsonl"):
        assert read(f"whole/{file}") == read(f"stopped/{file}")


def test_a_family_that_judges_and_an_adapter_that_is_trained_on(lab):
    """From supervised fine-tuning on, all with adapters of one model: a family of reward models,
    a policy that distils them, one more from there."""
    train(train_rm, "rms", "--bias=0.2,0.6")
    assert sorted(os.listdir("rms")) == ["0.2", "0.6"]
    train(train_policy, "e-dpo", "--loss=e-dpo", "--rewards=rms", "--select=rms", "--gamma=0",
          "--max_new_tokens=4")
    assert len({name[:10] for name in os.listdir("rms/0.2/cache")}) >= 1
    train(train_policy, "more", init_from="e-dpo")
    config = json.loads(read("more/adapter_config.json"))
    assert config["base_model_name_or_path"] == "ref"
    own, more = (GPT.from_pretrained(folder, merge=False) for folder in ("e-dpo", "more"))
    assert torch.equal(own.transformer.wte.weight, more.transformer.wte.weight)
    assert not torch.equal(own.transformer.h[0].attn.c_attn.lora_A,
                           more.transformer.h[0].attn.c_attn.lora_A)
    train(train_rm, "more-rm", init_from="e-dpo")
    assert RewardModel.from_pretrained("more-rm").lora_base == "ref"


def test_full_training_from_an_adapter(lab):
    """It is merged; the run's folder holds a whole model."""
    train(train_policy, "adapter")
    train_policy.main([*POLICY, "--init_from=adapter", "--out_dir=full", "--rho=all",
                       "--max_steps=1", "--batch_size=8", "--n_eval=8", "--device=cpu"])
    assert len(torch.load("full/state.pt")["model"]) > 12
    assert os.path.exists("full/model.safetensors")


def test_a_reward_model_merged(lab):
    """A merged reward model computes what its adapter does."""
    train(train_rm, "adapter")
    adapter = RewardModel.from_pretrained("adapter")
    merge_lora(adapter)
    adapter.save_pretrained("merged")
    adapter, merged = (RewardModel.from_pretrained(folder) for folder in ("adapter", "merged"))
    assert merged.lora_base is None and adapter.lora_base == "ref"
    batch = random_pairs(6, 0).batch(range(6))
    torch.testing.assert_close(merged(batch), adapter(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", [train_policy, train_rm])
def test_with_less_memory(lab, script):
    """--gradient_checkpointing changes no bit, in bfloat16 either."""
    train(script, "plain", "--dtype=bfloat16")
    train(script, "less", "--dtype=bfloat16", "--gradient_checkpointing")
    assert read("plain/adapter_model.safetensors") == read("less/adapter_model.safetensors")


def test_the_learning_rate(lab):
    """By default ten times that of full training."""
    full = train_policy.parse_flags(["--loss=dpo", "--init_from=ref", "--out_dir=new"])
    lora = train_policy.parse_flags(["--loss=dpo", "--init_from=ref", "--out_dir=new", "--lora=8"])
    assert (full.lr, lora.lr) == (2e-4, 2e-3)
