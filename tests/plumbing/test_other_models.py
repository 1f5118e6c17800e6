"""Models that were made elsewhere: their weights under other names and in other files, their own
output heads and their own tokenizers."""
import json
import os
import shutil
from dataclasses import asdict

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sample
import tinytldr
import train_policy
import train_rm
from data import get_tokenizer
from model import GPT, MLP, GPTConfig
from reward import RewardModel
from support.checkpoint import hub_file, read_sizes
from support.flags import InputError
from support.tokenizer import (
    check_same_tokenizer,
    fingerprint,
    known_tokenizer,
    own_tokenizer,
    save_tokenizer,
    tokenizer_name,
)
from support.tokens import encode, tokenised_file

CONFIG = GPTConfig(block_size=20, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
TOKENS = torch.arange(12)[None]
SHORT = ["--max_steps=2", "--batch_size=2", "--eval_every=2", "--n_eval=4"]
pytestmark = pytest.mark.usefixtures("hub_cache")


def random_model(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**asdict(CONFIG), **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    random_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def same_logits(folder, model):
    again = GPT.from_pretrained(str(folder))
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    return again


def refusal(folder, read=GPT.from_pretrained):
    with pytest.raises(InputError) as error:
        read(str(folder))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ names and heads

@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.",
                                    "_fsdp_wrapped_module.", "_forward_module.",
                                    "base_model.model."])
def test_names_of_wrapped_models(folder, prefix):
    """As torch.compile, DistributedDataParallel, FSDP and Lightning leave them."""
    tensors = {prefix + name: tensor for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    same_logits(folder, random_model())


def test_names_of_layers_that_are_wrapped_one_by_one(folder):
    tensors = {name.replace(".attn.", "._checkpoint_wrapped_module.attn._orig_mod."): tensor
               for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    same_logits(folder, random_model())
    name = "transformer.h.0.ln_1.bias"
    tensors[f"module.{name}"] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors")
    assert f"it has {name} twice, with different numbers" in refusal(folder)


@pytest.mark.parametrize("says", ["gone", True])
def test_a_head_of_its_own_is_kept(folder, says, tmp_path, capsys):
    """Where config.json does not say tie_word_embeddings: false; said once, then config.json does,
    and training starts from it."""
    model = random_model(tie_word_embeddings=False)
    model.save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=says)
    again = same_logits(folder, model)
    assert not again.config.tie_word_embeddings
    said = capsys.readouterr().out
    assert f"{folder}: lm_head.weight differs from transformer.wte.weight" in said
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    same_logits(tmp_path / "again", model)
    assert capsys.readouterr().out == ""


def test_a_head_that_is_the_embedding_stays_tied(folder, capsys):
    tensors = tensors_of(folder)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()},
              folder / "model.safetensors")
    assert same_logits(folder, random_model()).config.tie_word_embeddings
    assert capsys.readouterr().out == ""


def test_a_head_alone_is_the_embedding_of_a_tied_model(folder):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, folder / "model.safetensors")
    assert same_logits(folder, random_model()).config.tie_word_embeddings
    edit_config(folder, tie_word_embeddings=False)
    assert "no table transformer.wte.weight" in refusal(folder)


# ------------------------------------------------------------------ files

def test_a_torch_file_in_parts(folder):
    """pytorch_model.bin.index.json, as transformers wrote it until 2023."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    same_logits(folder, random_model())
    (folder / file).unlink()
    assert f"no {file} in this folder" in refusal(folder)
    index.write_text("[]")
    assert "pytorch_model.bin.index.json: not a JSON object" in refusal(folder)


def test_a_file_in_parts_that_is_not_whole(folder):
    """A part that is missing, and one that holds what the index says is in another."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    other = {names[-1]: torch.zeros_like(tensors[names[-1]])}
    save_file({name: tensors[name] for name in names[:5]} | other, folder / "part-1")
    save_file({name: tensors[name] for name in names[5:]}, folder / "part-0")
    where = {name: f"part-{int(name in names[:5])}" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    same_logits(folder, random_model())
    (folder / "part-1").unlink()
    assert "no part-1 in this folder (has the folder been copied whole?)" in refusal(folder)


def test_weights_that_are_under_another_name(folder):
    save_file({f"policy.{name}": tensor for name, tensor in tensors_of(folder).items()},
              folder / "model.safetensors")
    assert "have no table transformer.wte.weight (but policy." in refusal(folder)


def test_an_adapter_that_is_not_merged(folder):
    tensors = tensors_of(folder) | {"transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(2, 16)}
    save_file(tensors, folder / "model.safetensors")
    assert "its weights hold a LoRA adapter's as well: merge them" in refusal(folder)


def test_a_pointer_of_git_lfs(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n")
    assert refusal(folder).endswith("a pointer to a file of git-lfs; git lfs pull fetches the file "
                                    "itself")


class Command:
    """What a pickle of this would run when it is read."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content, message", [
    (lambda weights: {"model": weights}, "its weights are in a part of it, 'model'; write them"),
    (lambda weights: [weights], "not a model's weights, {name: tensor}"),
    (lambda weights: {0: torch.zeros(1)}, "not a model's weights, {name: tensor}"),
    (lambda weights: {**weights, "more": Command()}, "which could run any code and are not read"),
    (lambda weights: torch.nn.Linear(1, 1), "which could run any code and are not read")])
@pytest.mark.parametrize("as_zip", [True, False])
def test_other_things_that_torch_saves(folder, monkeypatch, content, message, as_zip):
    monkeypatch.chdir(folder)
    torch.save(content(tensors_of(folder)), folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=as_zip)
    (folder / "model.safetensors").unlink()
    said = refusal(folder)
    assert message in said and "weights_only" not in said
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("damage", ["short", "shorter", "empty", "header", "length"])
def test_a_damaged_safetensors_file(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"short": content[:-1], "shorter": content[:100], "empty": b"",
                      "header": content[:8] + b"x" + content[9:],
                      "length": b"\xff" * 8 + content[8:]}[damage])
    assert "unreadable checkpoint: model.safetensors is damaged or not whole: " in refusal(folder)


def test_a_damaged_torch_file(folder):
    """torch.load does not look at checksums."""
    path = folder / "pytorch_model.bin"
    weights = tensors_of(folder)
    torch.save(weights, path)
    (folder / "model.safetensors").unlink()
    content = path.read_bytes()
    place = content.index(weights["transformer.wpe.weight"].numpy().tobytes())
    path.write_bytes(content[:place] + b"1234" + content[place + 4:])
    assert "unreadable checkpoint: pytorch_model.bin is damaged or not whole: " in refusal(folder)
    torch.save({"state": {}, "param_groups": []}, path)
    assert "the state of an optimizer, not a model's weights" in refusal(folder)


@pytest.mark.parametrize("changes, message", [
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no', which is neither true nor false"),
    ({"n_layer": True}, "n_layer True, which is not a positive whole number"),
    ({"n_layer": 2.0}, "n_layer 2.0, which is not a positive whole number"),
    ({"n_embd": "16"}, "n_embd '16', which is not a positive whole number"),
    ({"n_head": [2]}, "n_head [2], which is not a positive whole number"),
    ({"vocab_size": None}, "vocab_size None, which is not a positive whole number"),
    ({"n_positions": {}}, "n_positions {}, which is not a positive whole number"),
    ({"model_type": ["gpt2"]}, "only 'gpt2', 'llama', 'mistral', "),
    ({"activation_function": {"gelu": 1}}, "only 'gelu_new' and 'gelu' are supported"),
    ({"reward_head": []}, "only 'last' and 'sum' are supported"),
    ({"layer_norm_epsilon": "small"}, "only 1e-05 is supported"),
    ({"n_inner": 48}, "n_inner 48, and only 4 n_embd, 64, is supported"),
    ({"quantization_config": {"bits": 4}}, "a quantised model can't be trained here"),
    ({"n_layer": 10 ** 9}, "n_layer is 1000000000 there, 2 in the weights"),
    ({"n_embd": 2 * 10 ** 12}, "n_embd is 2000000000000 there, 16 in the weights")])
def test_a_config_with_wrong_values(folder, changes, message):
    edit_config(folder, **changes)
    assert message in refusal(folder)


LLAMA = GPTConfig(20, 13, 2, 2, 16, family="llama", n_kv_head=1, n_inner=24, mlp="swiglu",
                  norm="rms", norm_eps=0.01, qkv_bias=False, proj_bias=False, mlp_bias=False,
                  rope_theta=100.0)


@pytest.fixture
def llama(tmp_path):
    """A saved model of the Llama family."""
    random_model(**asdict(LLAMA)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


ROPE = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 10}


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma3"}, "model_type 'gemma3', and only 'gpt2', 'llama', 'mistral', 'qwen2', "
                               "'qwen3', 'smollm3', 'olmo2' are supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu', and only 'silu' is supported"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers '2', which is not a positive whole number"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0, which is not a positive whole number"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3, which does not "
                                                           "divide num_attention_heads 4"),
    ({"num_attention_heads": 3}, "num_attention_heads 3, which does not divide hidden_size 16"),
    ({"num_attention_heads": 16}, "which makes heads of an odd size"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny', which is not a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan, which is not a positive number"),
    ({"mlp_bias": 1}, "mlp_bias 1, which is neither true nor false"),
    ({"rope_theta": [1]}, "rope_theta [1], which is not a positive number"),
    ({"layer_types": 5}, "layer_types 5, which is not a list"),
    ({"head_dim": 3}, "head_dim 3, which makes heads of an odd size"),
    ({"rope_scaling": "llama3"}, "rope_scaling 'llama3', which is not an object"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "and only the types 'default' and 'llama3'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters {'rope_type': 'linear'}, and"),
    ({"rope_scaling": {**ROPE, "factor": None}}, "factor None, which is not a positive number"),
    ({"eos_token_id": "</s>"}, "eos_token_id '</s>', which is not the number of a token"),
    ({"quantization_config": {"bits": 4}}, "a quantised model can't be trained here"),
    ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers is 1000000000 there, 2 in the weights"),
    ({"hidden_size": 2 * 10 ** 12}, "hidden_size is 2000000000000 there, 16 in the weights"),
    ({"intermediate_size": 10 ** 12}, "size mismatch for transformer.h.0.mlp.c_fc.weight"),
    ({"head_dim": 10 ** 12}, "size mismatch for transformer.h.0.attn.c_attn.weight"),
    ({"num_key_value_heads": 2}, "size mismatch for transformer.h.0.attn.c_attn.weight"),
    ({"attention_bias": True}, "Missing key(s) in state_dict: \"transformer.h.0.attn.c_attn.bias"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "which is not a 0 or 1 for each layer")])
def test_a_config_of_the_llama_family_with_wrong_values(llama, changes, message):
    edit_config(llama, **changes)
    assert message in refusal(llama)


def test_weights_of_the_llama_family_that_are_not_whole(llama):
    tensors = tensors_of(llama)
    without = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    save_file(without, llama / "model.safetensors")
    assert 'Missing key(s) in state_dict: "transformer.h.1.mlp.c_fc.weight"' in refusal(llama)
    del without["model.embed_tokens.weight"]
    save_file(without, llama / "model.safetensors")
    assert "its weights have no table model.embed_tokens.weight (but " in refusal(llama)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "base_model.model."])
def test_names_of_wrapped_models_of_the_llama_family(llama, prefix):
    """And the turns of each layer, which old files hold."""
    tensors = {prefix + name: tensor for name, tensor in tensors_of(llama).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, llama / "model.safetensors")
    same_logits(llama, random_model(**asdict(LLAMA)))


def test_both_ways_to_write_rope(llama):
    """rope_theta and rope_scaling, and rope_parameters, as transformers 5 writes it."""
    edit_config(llama, rope_scaling=ROPE, rope_theta=50)
    older = GPT.from_pretrained(str(llama)).config
    assert older.rope_theta == 50 and older.rope_scaling == ROPE
    edit_config(llama, rope_scaling="gone", rope_theta="gone",
                rope_parameters={**ROPE, "rope_theta": 50.0})
    assert GPT.from_pretrained(str(llama)).config == older
    edit_config(llama, rope_scaling={**ROPE, "factor": 3.0}, rope_theta=40)     # of both the older
    both = GPT.from_pretrained(str(llama)).config
    assert both.rope_theta == 40 and both.rope_scaling == {**ROPE, "factor": 3.0}


def test_a_sliding_window_is_the_longest_text(llama, capsys):
    """Up to there a model that sees a window sees everything. It is said once, where it is so."""
    edit_config(llama, model_type="mistral", sliding_window=30)
    assert GPT.from_pretrained(str(llama)).config.block_size == 20
    edit_config(llama, sliding_window="gone", max_position_embeddings=5000)
    assert GPT.from_pretrained(str(llama)).config.block_size == 4096
    assert read_sizes(str(llama))["block_size"] == 4096
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "texts may have 4096 tokens, its sliding_window, not 5000: " in said
    edit_config(llama, sliding_window=None)     # as in Mistral 7B since version 0.2: no window
    assert GPT.from_pretrained(str(llama)).config.block_size == 5000
    assert capsys.readouterr().out == ""
    edit_config(llama, model_type="qwen2", sliding_window=8, use_sliding_window=False,
                attention_bias="gone")
    assert read_sizes(str(llama))["block_size"] == 5000


def test_tokens_that_a_config_names_stay(llama, tmp_path):
    """The end of a text may be several; the one that a run uses is among them, or takes their
    place. A reward is read by transformers at the last token that is not the padding."""
    edit_config(llama, bos_token_id=1, eos_token_id=[2, 0], pad_token_id=7)

    def saved(model, eos_token_id):
        model.save_pretrained(tmp_path / "saved", eos_token_id)
        written = json.loads((tmp_path / "saved/config.json").read_text())
        return [written.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]

    policy = GPT.from_pretrained(str(llama))
    assert saved(policy, None) == saved(policy, 2) == [1, [2, 0], 7]
    assert saved(policy, 5) == [1, 5, 7]
    reward_model = RewardModel.from_policy(policy)
    assert saved(reward_model, None) == [1, [2, 0], 1]
    assert saved(reward_model, 5) == [1, 5, 0]
    assert saved(random_model(**asdict(LLAMA)), None) == [None, 12, None]


def test_weights_are_saved_in_the_type_that_they_have(llama, tmp_path):
    """Read into float32 and saved so; half the size if the model is made bfloat16 first."""
    model, folder = GPT.from_pretrained(str(llama)), tmp_path / "saved"
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(folder)
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {dtype}
        written = json.loads((folder / "config.json").read_text())
        assert f"torch.{written['torch_dtype']}" == str(dtype)
    again = GPT.from_pretrained(str(folder))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_a_reward_that_transformers_reads_elsewhere(llama, capsys):
    """A classifier that is padded with the token that ends a text."""
    RewardModel(LLAMA).save_pretrained(llama, eos_token_id=5)
    RewardModel.from_pretrained(str(llama))
    assert capsys.readouterr().out == ""
    edit_config(llama, pad_token_id=5)
    RewardModel.from_pretrained(str(llama))
    assert "so transformers reads a reward at the token before" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["wte", "wpe"])
def test_absurd_sizes_of_tables_that_are_not_there(folder, missing):
    """No model of these sizes is made."""
    tensors = tensors_of(folder)
    del tensors[f"transformer.{missing}.weight"]
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, vocab_size=10 ** 12, n_positions=10 ** 12)
    assert f"its weights have no table transformer.{missing}.weight" in refusal(folder)


def test_weights_that_are_whole_numbers(folder):
    tensors = tensors_of(folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = (tensors[name] * 100).to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert f"the weights {name} are int8 numbers: a quantised model can't be" in refusal(folder)


@pytest.mark.parametrize("file, message", [
    ("adapter_model.safetensors", "a LoRA adapter without its adapter_config.json: copy that"),
    ("gpt2.Q4_K_M.gguf", "a model of llama.cpp: name the folder of the model that it was made"),
    ("tf_model.h5", "weights of TensorFlow"),
    ("flax_model.msgpack", "weights of Flax"),
    ("model.ckpt.index", "a checkpoint of TensorFlow"),
    ("__0_0.distcp", "a distributed checkpoint of torch"),
    ("optimizer.pt", "the state of an optimizer")])
@pytest.mark.parametrize("config", [True, False])
def test_other_kinds_are_named(folder, file, message, config):
    """With a config.json next to them, or without."""
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    (folder / file).write_bytes(b"{}")
    said = refusal(folder)
    assert f"{file}, {message}" in said
    if file != "optimizer.pt":      # its name ends as nanoGPT's
        assert message in refusal(folder / file)


def test_an_adapter_next_to_its_model(folder):
    """transformers would add it; to leave it out would be another model."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "lora_alpha": 1}')
    assert "both model.safetensors and adapter_config.json, a LoRA adapter" in refusal(folder)


def test_a_file_in_place_of_its_folder(folder):
    path = folder / "model.safetensors"
    assert refusal(path) == f"{path}: a file: name the folder that holds it"


# ------------------------------------------------------------------ nanoGPT

def write_nanogpt(path, model, prefix="_orig_mod.", bias=True):
    """A checkpoint as nanoGPT's train.py writes it: nn.Linear's matrices, the tied head twice."""
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()
               if bias or not name.endswith(".bias")}
    config = model.config
    model_args = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                      block_size=config.block_size, bias=bias, vocab_size=config.vocab_size,
                      dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": weights, "optimizer": optimizer, "model_args": model_args, "iter_num": 5,
                "best_val_loss": torch.tensor(3.0), "config": {"dataset": "openwebtext"}}, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(tmp_path, prefix):
    """Its folder or its file. It computes the GELU exactly, and so does what is trained from it."""
    model = random_model(gelu="none")
    write_nanogpt(tmp_path / "run/ckpt.pt", model, prefix)
    again = same_logits(tmp_path / "run/ckpt.pt", model)
    assert not torch.equal(again.logits(TOKENS), random_model().logits(TOKENS))
    same_logits(tmp_path / "run", again).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["activation_function"] == "gelu"
    same_logits(tmp_path / "saved", model)


def test_the_exact_gelu():
    layer, x = MLP(GPTConfig(n_embd=8, gelu="none")), torch.randn(5, 8)
    assert torch.equal(layer(x), layer.c_proj(F.gelu(layer.c_fc(x))))


def test_nanogpt_without_biases(tmp_path, capsys):
    model = random_model(gelu="none")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    write_nanogpt(tmp_path / "run/ckpt.pt", model, bias=False)
    same_logits(tmp_path / "run", model)
    assert "it was trained without biases; here they start at zero" in capsys.readouterr().out


def test_nanogpt_that_is_damaged_or_none(tmp_path):
    path = tmp_path / "run/ckpt.pt"
    write_nanogpt(path, random_model())
    path.write_bytes(path.read_bytes()[:-500])
    assert "unreadable checkpoint" in refusal(path) and "unreadable" in refusal(path.parent)
    for content in ({"a": torch.zeros(1)}, [1], {"model": {}, "model_args": {}}):
        torch.save(content, path)
        refusal(path)


def test_tokens_of_nanogpt(tmp_path, monkeypatch, capsys):
    """GPT-2's vocabulary, rounded up to a multiple of 64; another one is not guessed."""
    monkeypatch.chdir(tmp_path)         # where no speedrun has been
    write_nanogpt(tmp_path / "run/ckpt.pt", random_model(vocab_size=50304, n_embd=2, n_layer=1))
    args = train_policy.parse_flags([f"--init_from={tmp_path}/run", "--data=pairs.jsonl"])
    assert args.tokenizer == "gpt2" and args.lr == 2e-4
    assert "taken to read the tokens of gpt2" in capsys.readouterr().out
    write_nanogpt(tmp_path / "run/ckpt.pt", random_model(vocab_size=65))
    with pytest.raises(InputError, match="vocab_size, 65, is not GPT-2's"):
        own_tokenizer(str(tmp_path / "run"))


# ------------------------------------------------------------------ a model's own tokenizer

END = "<|endoftext|>"
WORDS = ["Ġthe", "Ġcat", "he", "Ġt", "Ġc", "at"]
MERGES = ["h e", "Ġ t", "Ġt he", "Ġ c", "a t", "Ġc at"]


def other_vocabulary():
    """Bytes and six words, numbered otherwise than by GPT-2; the end of text is token 0."""
    letters = [chr(byte) for byte in range(33, 127)]
    letters += [chr(256 + i) for i in range(68)] + [chr(b) for b in (*range(161, 173),
                                                                     *range(174, 256))]
    return {token: number for number, token in enumerate([END, *reversed(letters), *WORDS])}


def write_tokenizer(folder, kind, **settings):
    """The tokenizer of a folder, as tokenizer.json or as vocab.json and merges.txt."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(exist_ok=True)
    vocabulary = other_vocabulary()
    if kind == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n",
                                           encoding="utf-8")
    else:
        merges = [tuple(merge.split()) for merge in MERGES]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([END])
        tokenizer.enable_truncation(4)          # for training elsewhere: it is not used here
        tokenizer.enable_padding(length=8)
        tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_the_tokens_of_a_folder(tmp_path, kind):
    """By hand, there and back, in a batch and alone; a special token in a text is text."""
    vocabulary = write_tokenizer(tmp_path, kind)
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenizer.name == f"{tmp_path}/" and tokenizer.n_vocab == len(vocabulary)
    assert tokenizer.eot_token == 0 and tokenizer.special_tokens_set == {END}
    words = ["t", "he", "Ġcat", "Ġthe", "!"]
    assert tokenizer.encode_ordinary("the cat the!") == [vocabulary[word] for word in words]
    texts = ["", "the cat" * 9, f"a{END} b", "na\u00efve \u65e5\u672c \U0001F600\r\n  x\u00b2"]
    batch = tokenizer.encode_ordinary_batch(texts, num_threads=2)
    for text, ids in zip(texts, batch):
        assert tokenizer.encode_ordinary(text) == ids and tokenizer.decode(ids) == text
        assert tokenizer.eot_token not in ids
    assert tokenizer.decode([vocabulary["Ġcat"], 0]) == f" cat{END}"
    rows = [{"prompt": "the", "responses": [" cat"]}]
    assert encode(rows, tokenizer)["tokens"].tolist() == [
        vocabulary["t"], vocabulary["he"], vocabulary["Ġcat"], 0]


def test_a_text_on_which_a_tokenizer_stops(tmp_path, hub_cache):
    """For want of an unknown token."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a b", "chosen": " c", "rejected": " a"}) + "\n")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({END: 0, "a": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="/: the tokenizer can't read all text"):
        tokenised_file(str(path), get_tokenizer(f"{tmp_path}/"))


def test_names_of_tokenizers(tmp_path, monkeypatch):
    """A word is an encoding, also where a folder has this name; a folder and a file in it are the
    same tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "own", "vocab.json")
    (tmp_path / "gpt2").mkdir()
    assert tokenizer_name("own") == tokenizer_name("own/") == "own/"
    assert tokenizer_name("own/vocab.json") == "own/"
    assert tokenizer_name("gpt2") == "gpt2" and tokenizer_name("gpt2/") == "gpt2/"
    with pytest.raises(InputError, match="gpt2/: no tokenizer in this folder"):
        get_tokenizer("gpt2/")


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", "{}", "unreadable tokenizer"),
    ("vocab.json", "[]", "unreadable tokenizer"),
    ("vocab.json", '{"a": "b"}', "unreadable tokenizer"),
    ("merges.txt", "a b c", "unreadable tokenizer"),
    ("merges.txt", None, "transformers can make a tokenizer.json of vocab.json and what is next"),
    ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
    ("tokenizer_config.json", '{"eos_token": "</s>"}', "its eos_token, '</s>', is no token"),
    ("added_tokens.json", '{"<sep>": 900}', "transformers can make a tokenizer.json of vocab.j")])
def test_damaged_tokenizers(tmp_path, file, content, message):
    write_tokenizer(tmp_path, "vocab.json")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    assert message in refusal(tmp_path, get_tokenizer)


def test_the_token_that_ends_a_text(tmp_path, capsys):
    """The tokenizer's eos_token, or <|endoftext|>, or the model's, if that is not GPT-2's default
    in another vocabulary; what differs is said, and what is unclear is refused."""
    vocabulary = write_tokenizer(tmp_path, "vocab.json")
    config, settings = tmp_path / "config.json", tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token_id": 7}')
    assert get_tokenizer(str(tmp_path)).eot_token == 0
    assert "responses are trained to end in token 0, as its tokenizer says, and not in 7" in (
        capsys.readouterr().out)
    settings.write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert get_tokenizer(str(tmp_path)).eot_token == vocabulary["!"]
    settings.unlink()
    del vocabulary[END]
    vocabulary["#!"] = 0
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert get_tokenizer(str(tmp_path)).eot_token == 7
    config.write_text('{"eos_token_id": [8, 7]}')
    assert get_tokenizer(str(tmp_path)).eot_token == 8
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 8]}')       # it counts more than config.json
    assert get_tokenizer(str(tmp_path)).eot_token == 7
    generation.unlink()
    for unclear in (50256, None, [], True, -1, 10 ** 9):
        config.write_text(json.dumps({"eos_token_id": unclear}))
        assert "which token ends a text?" in refusal(tmp_path, get_tokenizer)


def test_added_tokens(tmp_path):
    """Ordinary ones are tokens wherever they are written, special ones are not."""
    tokenizers = pytest.importorskip("tokenizers")
    n = len(write_tokenizer(tmp_path, "tokenizer.json", eos_token="<end>"))
    path = str(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_tokens(["<sep>"])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(path)
    tokenizer = get_tokenizer(str(tmp_path))
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (n + 2, n + 1)
    assert n in tokenizer.encode_ordinary("a<sep>b")
    assert n + 1 not in tokenizer.encode_ordinary("a<end>b")
    assert tokenizer.decode([n, n + 1]) == "<sep><end>"


def test_tokens_are_cached_by_the_content_of_a_tokenizer(tmp_path):
    """Not by its name."""
    for name in ("a", "b"):
        write_tokenizer(tmp_path / name, "vocab.json")
    first, second = (fingerprint(get_tokenizer(str(tmp_path / name))) for name in ("a", "b"))
    assert first == second
    write_tokenizer(tmp_path / "b", "vocab.json", eos_token="!")
    assert fingerprint(get_tokenizer(str(tmp_path / "b"))) != first


def tiktoken_twin():
    """The same tokens, numbered alike, as a tiktoken.Encoding."""
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b" t": 257, b" the": 258}
    return tiktoken.Encoding("twin", pat_str=r" ?\w+| ?\W", mergeable_ranks=ranks,
                             special_tokens={END: 259})


def test_models_are_compared_by_the_content_of_their_tokenizers(tmp_path):
    pytest.importorskip("tokenizers")
    twin = tiktoken_twin()
    save_tokenizer(tmp_path, twin, 20)
    model = str(tmp_path)
    assert known_tokenizer(model) == f"{model}/"
    check_same_tokenizer("it", model, twin)                 # no run, its files
    check_same_tokenizer("it", model, get_tokenizer(model))
    (tmp_path / "config.json").write_text('{"nanopref": {"tokenizer": "elsewhere/"}}')
    check_same_tokenizer("it", model, twin)                 # a run, which has a copy
    write_tokenizer(tmp_path / "other", "vocab.json")
    for other in (tinytldr.tokenizer(), get_tokenizer(str(tmp_path / "other"))):
        with pytest.raises(InputError, match=f"it reads {model}/ tokens, the policy {other.name}"):
            check_same_tokenizer("it", model, other)


def rows(kind):
    row = {"prompt": "the cat", "chosen": " the cat", "rejected": " cat"}
    if kind == "demonstrations":
        row = {"prompt": "the cat", "completion": " the cat"}
    return [{**row, "prompt": f"{i} the cat"} for i in range(60)]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_training_reads_and_saves_the_tokenizer_of_the_folder(tmp_path, kind, capsys):
    """SFT from a folder that was made elsewhere, a reward model and DPO from the run, which was
    moved: all read the folder's tokens; its files are copied as they are."""
    vocabulary = write_tokenizer(tmp_path / "hf", kind, eos_token=END)
    random_model(vocab_size=len(vocabulary), block_size=24).save_pretrained(tmp_path / "hf", 0)
    for name in ("demonstrations", "pairs"):
        lines = "".join(json.dumps(row) + "\n" for row in rows(name))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    train_policy.main(["--loss=sft", f"--init_from={tmp_path}/hf", f"--out_dir={tmp_path}/sft",
                       f"--data={tmp_path}/demonstrations.jsonl", *SHORT])
    config = json.loads((tmp_path / "sft/config.json").read_text())
    assert config["nanopref"]["tokenizer"] == f"{tmp_path}/hf/" and config["eos_token_id"] == 0
    files = {"tokenizer.json"} if kind == "tokenizer.json" else {"vocab.json", "merges.txt"}
    for name in files | {"tokenizer_config.json"}:
        assert (tmp_path / "sft" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()

    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "sft").rename(tmp_path / "moved")
    of_pairs = [f"--init_from={tmp_path}/moved", f"--data={tmp_path}/pairs.jsonl", *SHORT]
    train_rm.main([f"--out_dir={tmp_path}/rm", *of_pairs])
    train_policy.main(["--loss=d-dpo", f"--rewards={tmp_path}/rm", f"--out_dir={tmp_path}/d-dpo",
                       *of_pairs])
    flags = json.loads((tmp_path / "d-dpo/config.json").read_text())["nanopref"]
    assert flags["tokenizer"] == f"{tmp_path}/moved/"
    assert RewardModel.from_pretrained(str(tmp_path / "rm")).config.vocab_size == len(vocabulary)

    policy, tokenizer = GPT.from_pretrained(f"{tmp_path}/d-dpo"), get_tokenizer(f"{tmp_path}/d-dpo")
    ids = [vocabulary[word] for word in ("t", "he", "Ġcat")]
    reply, = policy.generate([ids], 6, temperature=0, stop=0)
    capsys.readouterr()
    sample.main([f"{tmp_path}/d-dpo", "--prompt=the cat", "--temperature=0", "--max_new_tokens=6"])
    assert tokenizer.decode([token for token in reply if token != 0]) in capsys.readouterr().out


def test_a_tokenizer_in_place_of_the_model_s_own(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """--tokenizer is done as asked, and said."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))     # where no speedrun has been
    write_tokenizer(tmp_path, "vocab.json")
    args = train_policy.parse_flags([f"--init_from={tmp_path}", "--tokenizer=gpt2"])
    assert args.tokenizer == "gpt2"
    assert f"takes the place of the tokenizer of {tmp_path}" in capsys.readouterr().out
    args = train_policy.parse_flags([f"--init_from={tmp_path}"])
    assert args.tokenizer == f"{tmp_path}/" and capsys.readouterr().out == ""


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    """GPT-2's, if its vocabulary has that size; said."""
    random_model(vocab_size=50257, n_embd=2, n_layer=1).save_pretrained(tmp_path)
    assert own_tokenizer(str(tmp_path)) == "gpt2"
    assert "no tokenizer there; it is taken to read the tokens of gpt2" in capsys.readouterr().out
    assert read_sizes(str(tmp_path))["vocab_size"] == 50257


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Each time would take half a minute; after it only the local cache is looked at. A file that
    the model merely does not have is no reason for that."""
    asked = []

    def download(name, filename, local_files_only=False):
        asked.append((name, filename, local_files_only))
        if name == "owner/without":
            raise type("RemoteEntryNotFoundError", (OSError,), {})()
        raise type("LocalEntryNotFoundError", (OSError,), {})()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for name in ("owner/offline", "owner/without"):
        for filename in ("tokenizer.json", "vocab.json", "config.json"):
            assert hub_file(name, filename)[0] is None
    assert [local for name, _, local in asked if name == "owner/offline"] == [False, True, True]
    assert [local for name, _, local in asked if name == "owner/without"] == [False] * 3
