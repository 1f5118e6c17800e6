"""The architecture, and checkpoints in Hugging Face's layout."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from reward import RewardModel
from support.backward import rms_norm
from support.flags import InputError
from support.run import family_folders

CONFIG = GPTConfig(block_size=20, vocab_size=13, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


TOKENS = torch.arange(12)[None]


# ---------------------------------------------------------------- the architecture

def gpt2_in_numpy(weights, tokens, config):
    """GPT-2's published forward pass, from the tensors of a checkpoint in Hugging Face's layout.
    tokens: (T,) -> (T, vocab)."""
    def layer_norm(x, name):
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        normal = (x - mean) / np.sqrt(variance + 1e-5)
        return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    T, size = len(tokens), config.n_embd // config.n_head
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        qkv = linear(layer_norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = np.split(qkv, 3, axis=1)
        heads = []
        for head in range(config.n_head):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            attention = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(attention / attention.sum(axis=1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(heads, axis=1), f"{block}.attn.c_proj")
        hidden = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden ** 3)
        gelu = 0.5 * hidden * (1 + np.tanh(inner))
        x = x + linear(gelu, f"{block}.mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def test_logits_are_gpt2s(tmp_path, model):
    """In float64, without the library (tests/plumbing/test_parity.py compares with it where it is
    installed)."""
    model.save_pretrained(tmp_path)
    weights = {name: tensor.double().numpy()
               for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    got = model.double().logits(torch.tensor([tokens, tokens[::-1]])).detach()
    for row, row_tokens in zip(got, (tokens, tokens[::-1])):
        wanted = torch.from_numpy(gpt2_in_numpy(weights, row_tokens, CONFIG))
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)


def llama_in_numpy(weights, tokens, config):
    """The published forward pass of the Llama family, from the tensors of a checkpoint in Hugging
    Face's layout and its config.json. tokens: (T,) -> (T, vocab)."""
    T, n_head, n_kv = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // n_head
    olmo2 = config["model_type"] == "olmo2"

    def rms(x, name):
        mean = np.square(x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    frequencies = [config["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
    scaling = config["rope_scaling"]
    if scaling is not None:
        for i, frequency in enumerate(frequencies):
            rounds = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
            if rounds < scaling["low_freq_factor"]:
                frequencies[i] = frequency / scaling["factor"]
            elif rounds < scaling["high_freq_factor"]:
                smooth = ((rounds - scaling["low_freq_factor"])
                          / (scaling["high_freq_factor"] - scaling["low_freq_factor"]))
                frequencies[i] = frequency * ((1 - smooth) / scaling["factor"] + smooth)
    # a pair of numbers is one complex number, and to turn it is to multiply it
    turns = np.exp(1j * np.outer(np.arange(T), frequencies))

    def turned(x, layer):
        if not config.get("no_rope_layers", [1] * 9)[layer]:
            return x
        pairs = (x[:, :size // 2] + 1j * x[:, size // 2:]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def attention(x, name, layer):
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        if olmo2:
            q, k = rms(q, f"{name}.q_norm"), rms(k, f"{name}.k_norm")
        heads = []
        for head in range(n_head):
            own = slice(head * size, (head + 1) * size)
            shared = head // (n_head // n_kv)
            shared = slice(shared * size, (shared + 1) * size)
            q_head, k_head = q[:, own], k[:, shared]
            if f"{name}.q_norm.weight" in weights and not olmo2:
                q_head, k_head = rms(q_head, f"{name}.q_norm"), rms(k_head, f"{name}.k_norm")
            scores = turned(q_head, layer) @ turned(k_head, layer).T / np.sqrt(size)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(share / share.sum(axis=1, keepdims=True) @ v[:, shared])
        return linear(np.concatenate(heads, axis=1), f"{name}.o_proj")

    def mlp(x, name):
        gate, up = linear(x, f"{name}.gate_proj"), linear(x, f"{name}.up_proj")
        return linear(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        norms = [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
        if olmo2:       # the norm is after
            x = x + rms(attention(x, f"{block}.self_attn", layer), norms[1])
            x = x + rms(mlp(x, f"{block}.mlp"), f"{block}.post_feedforward_layernorm")
        else:
            x = x + attention(rms(x, norms[0]), f"{block}.self_attn", layer)
            x = x + mlp(rms(x, norms[1]), f"{block}.mlp")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms(x, "model.norm") @ head.T


LLAMA = replace(CONFIG, family="llama", n_head=4, n_kv_head=2, n_inner=24, mlp="swiglu", norm="rms",
                norm_eps=0.01, qkv_bias=False, proj_bias=False, mlp_bias=False, rope_theta=100.0)
SCALING = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}
FAMILIES = [
    LLAMA,
    replace(LLAMA, rope_scaling=SCALING, rope_theta=20.0, head_size=12, tie_word_embeddings=False),
    replace(LLAMA, qkv_bias=True, proj_bias=True, mlp_bias=True, n_kv_head=4),
    replace(LLAMA, family="mistral", n_kv_head=1, head_size=6),
    replace(LLAMA, family="qwen2", qkv_bias=True),
    replace(LLAMA, family="qwen3", qk_norm="head", head_size=8),
    replace(LLAMA, family="smollm3", rope_layers=[0, 1]),
    replace(LLAMA, family="olmo2", qk_norm="all", norm_after=True)]


def random_model(config):
    """In float64, and away from the initial zeros and ones."""
    torch.manual_seed(0)
    model = GPT(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("config", FAMILIES)
def test_logits_are_those_of_the_family(tmp_path, config):
    """In float64, of a saved model that is read again: its own file and config.json are what the
    formulas are applied to."""
    model = random_model(config).float()
    model.save_pretrained(tmp_path)
    weights = {name: tensor.double().numpy()
               for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == config.family
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    wanted = torch.from_numpy(llama_in_numpy(weights, tokens, written))
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == replace(config, token_ids={"eos_token_id": 12})
    for of_family in (model, again):
        got = of_family.double().logits(torch.tensor([tokens])).detach()[0]
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_rms_norm():
    """Its formula and its gradients by finite differences; in bfloat16, computed in float32."""
    x, weight = torch.randn(2, 3, 5).double().requires_grad_(), torch.rand(5).double()
    torch.testing.assert_close(rms_norm(x, weight, 0.1), F.rms_norm(x, (5,), weight, 0.1))
    assert torch.autograd.gradcheck(rms_norm, (x, weight.requires_grad_(), 0.1))
    half = x.detach().bfloat16().requires_grad_()
    normed = rms_norm(half, weight.detach().float(), 0.1)
    wanted = rms_norm(half.double(), weight, 0.1)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed, wanted.bfloat16(), rtol=2 ** -7, atol=0)
    normed.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_the_default_is_gpt2_small():
    """124,439,808 parameters, the head's among the embedding's; with a head of its own, more."""
    with torch.device("meta"):
        tied, untied = GPT(GPTConfig()), GPT(GPTConfig(tie_word_embeddings=False))
    assert sum(p.numel() for p in tied.parameters()) == 124_439_808
    assert sum(p.numel() for p in untied.parameters()) == 124_439_808 + 50257 * 768
    assert tied.config == GPTConfig(1024, 50257, 12, 12, 768, True)


@pytest.mark.parametrize("config", [
    GPTConfig(128, 96, 3, 2, 64),
    GPTConfig(128, 96, 3, 4, 64, family="qwen3", n_kv_head=2, mlp="swiglu", norm="rms",
              rope_theta=100.0, qk_norm="head", proj_bias=False)])
def test_initial_weights(config):
    """N(0, 0.02), projections back into the residual stream divided by sqrt(2 layers), to 5% (which
    is more than five standard errors for all of these matrices); biases 0, norms 1."""
    torch.manual_seed(0)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert parameter.square().mean().sqrt().item() == pytest.approx(std, rel=0.05), name


def test_tied_weights_stay_tied():
    """Whatever moves or converts the model: on a TPU every parameter is replaced by another."""
    class Replaced:
        def __enter__(self):
            torch.__future__.set_overwrite_module_params_on_conversion(True)

        def __exit__(self, *error):
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    with Replaced():
        model = GPT(GPTConfig(8, 11, 1, 1, 8)).double()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in model.transformer.parameters())


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    torch.manual_seed(1)
    config = GPTConfig(20, 13, 2, 2, 16, tie_word_embeddings=tied)
    model = GPT(config)
    model.save_pretrained(tmp_path / "m")
    again = GPT.from_pretrained(str(tmp_path / "m"))
    assert again.config == config
    assert torch.equal(model.logits(TOKENS), again.logits(TOKENS))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)     # Conv1D stores (in, out)
    assert ("lm_head.weight" in stored) == (not tied)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == "gpt2" and written["architectures"] == ["GPT2LMHeadModel"]


def test_reward_model_save_and_load(tmp_path, model):
    reward_model = RewardModel.from_policy(model)
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.save_pretrained(tmp_path / "family" / "0.2")
    again = RewardModel.from_pretrained(str(tmp_path / "family" / "0.2"))
    for name, tensor in reward_model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert family_folders(str(tmp_path / "family")) == [str(tmp_path / "family" / "0.2")]
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match="not a reward model"):
        RewardModel.from_pretrained(str(tmp_path / "policy"))
    with pytest.raises(InputError, match="not a language model"):
        GPT.from_pretrained(str(tmp_path / "family" / "0.2"))


def test_the_head_of_a_reward_model_is_saved_with_it(tmp_path, model):
    """In config.json, under a name that transformers does not know; a classifier of transformers
    reads at the last token."""
    for head in ("last", "sum"):
        RewardModel.from_policy(model, head).save_pretrained(tmp_path / head)
        assert RewardModel.from_pretrained(str(tmp_path / head)).config.reward_head == head
    last, summed = (json.loads((tmp_path / head / "config.json").read_text())
                    for head in ("last", "sum"))
    assert "reward_head" not in last and last["pad_token_id"] == 0
    assert summed["reward_head"] == "sum" and "architectures" not in summed
    (tmp_path / "sum/config.json").write_text(json.dumps({**summed, "reward_head": "mean"}))
    with pytest.raises(InputError, match="reward_head 'mean'"):
        RewardModel.from_pretrained(str(tmp_path / "sum"))


def test_checkpoint_without_prefix_and_with_mask_buffers(tmp_path, model):
    """The layout of the oldest GPT-2 files: names without "transformer.", and the causal mask as a
    buffer."""
    model.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).logits(TOKENS), model.logits(TOKENS))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes, message", [
    ({"n_embd": 32}, "config.json: n_embd is 32 there, 16 in the weights"),
    ({"n_layer": 3}, "config.json: n_layer is 3 there, 2 in the weights"),
    ({"n_layer": 1}, "config.json: n_layer is 1 there, 2 in the weights"),
    ({"vocab_size": 10 ** 12}, "config.json: vocab_size is 1000000000000 there, "),
    ({"n_positions": 10 ** 12}, "config.json: n_positions is 1000000000000 there, "),
    ({"model_type": "bert"}, "only 'gpt2', 'llama', 'mistral', "),
    ({"activation_function": "relu"}, "only 'gelu_new'")])
def test_checkpoint_of_another_shape(tmp_path, model, changes, message):
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        GPT.from_pretrained(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)
    if message.startswith("config.json: "):
        assert str(error.value).startswith(f"{tmp_path}: not the model of its config.json: ")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, model, number):
    model.transformer.h[1].mlp.c_fc.weight.data[2, 3] = number
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert str(error.value) == (f"{tmp_path}: the weights transformer.h.1.mlp.c_fc.weight hold "
                                "numbers that are not finite")


def test_checkpoint_missing_or_broken(tmp_path, model):
    with pytest.raises(InputError, match="no such folder"):
        GPT.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no config.json"):
        GPT.from_pretrained(str(tmp_path))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="unreadable checkpoint"):
        GPT.from_pretrained(str(tmp_path))


def test_checkpoint_in_several_files(tmp_path, model):
    """Sharded safetensors with an index; and what is said when one is not there."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, shard in enumerate((names[::2], names[1::2])):
        where |= {name: f"model-{number}.safetensors" for name in shard}
        save_file({name: tensors[name] for name in shard}, tmp_path / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).logits(TOKENS), model.logits(TOKENS))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match="no model-1.safetensors in this folder"):
        GPT.from_pretrained(str(tmp_path))


def test_checkpoint_as_torch_file(tmp_path, model):
    """pytorch_model.bin, in half precision too; read without running code from it."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).logits(TOKENS), model.logits(TOKENS))
    half = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save(half, tmp_path / "pytorch_model.bin")
    again = GPT.from_pretrained(str(tmp_path))
    torch.testing.assert_close(again.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-2)
    for bad in ({"wte.weight": print}, [tensors], {1: torch.zeros(1)}):
        torch.save(bad, tmp_path / "pytorch_model.bin")
        reason = "unreadable checkpoint|not a model's weights"
        with pytest.raises(InputError, match=reason) as error:
            GPT.from_pretrained(str(tmp_path))
        assert "\n" not in str(error.value)


def test_hub_names(tmp_path, model, monkeypatch):
    """A name that is no folder is asked of the hub, file by file; without network and cache, one
    line says what to do."""
    model.save_pretrained(tmp_path)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda name, filename, **options: str(tmp_path / filename))
    assert torch.equal(GPT.from_pretrained("gpt2-medium").logits(TOKENS), model.logits(TOKENS))

    def offline(name, filename, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = ("gpt2: no such folder, and the hub gave no config.json "
               r"\(LocalEntryNotFoundError\); without network, copy the model's config.json and "
               "model.safetensors into a folder and name that")
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained("gpt2")


def test_end_of_text_in_a_saved_config(tmp_path, model):
    model.save_pretrained(tmp_path / "policy", eos_token_id=5)
    RewardModel.from_policy(model).save_pretrained(tmp_path / "rm", eos_token_id=5)
    for folder in ("policy", "rm"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["eos_token_id"] == 5
