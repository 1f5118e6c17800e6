"""Checkpoints in Hugging Face's GPT-2 layout, in and out: config.json and the weights.

Read are model.safetensors, several safetensors files with an index, and pytorch_model.bin; written
is model.safetensors. Models have their parameters named as Hugging Face does; only Conv1D, which
stores (in, out) where nn.Linear has (out, in), is turned round.
"""
import json
import os

import torch
from safetensors.torch import load_file, save_file

from support.files import replacing, write_json
from support.flags import InputError
from support.processes import is_first
from support.run import run_flags
from support.sharding import whole

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
FIELDS = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
          "n_head": "n_head", "n_embd": "n_embd"}       # our name of a size: that in config.json
FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False}      # the only value that is supported


def read_checkpoint(dir_or_hub_name, head):
    """A checkpoint from a folder or else from the hub.

    head: "lm_head" or "score", of the model that is wanted. Returns (sizes by our names,
    {parameter name: tensor}). InputError if it is damaged or of another kind.
    """
    find = Finder(dir_or_hub_name)
    sizes = read_sizes(dir_or_hub_name, find)
    try:
        tensors = dict(our_tensors(read_tensors(find)))
    except InputError:
        raise
    except Exception as error:     # torch and safetensors raise many kinds for a damaged file
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{dir_or_hub_name}: unreadable checkpoint: {reason}") from error
    check_tensors(tensors, sizes, dir_or_hub_name)
    if ("score.weight" in tensors) != (head == "score"):
        kinds = ["a language model", "a reward model"]
        if head == "lm_head":
            kinds.reverse()
        raise InputError(f"{dir_or_hub_name}: this is {kinds[0]}, not {kinds[1]}")
    if head == "score":
        tensors.pop("lm_head.weight", None)
    elif sizes["tie_word_embeddings"] and "transformer.wte.weight" in tensors:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return sizes, tensors


def read_sizes(dir_or_hub_name, find=None):
    """The sizes in a checkpoint's config.json, by our names."""
    path = (find or Finder(dir_or_hub_name)).required("config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{dir_or_hub_name}: unreadable checkpoint: config.json: "
                         f"{one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{dir_or_hub_name}: config.json is not a JSON object")
    if "nanopref" in config and "model_type" not in config:
        raise InputError(f"{dir_or_hub_name}: this run has no model yet (is it finished?)")
    check_config(config, dir_or_hub_name)
    sizes = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    return {**sizes, "tie_word_embeddings": config.get("tie_word_embeddings", True),
            "reward_head": config.get("reward_head", "last")}


class Finder:
    """Finds the files of a checkpoint: in a folder, or copies of them from the hub."""

    def __init__(self, dir_or_hub_name):
        self.name, self.reason = str(dir_or_hub_name), None
        self.is_folder = os.path.isdir(dir_or_hub_name)
        like_a_path = self.name.startswith((".", "/", "~", "out/")) or self.name.count("/") > 1
        if like_a_path and not self.is_folder:      # not "name" or "owner/name": don't ask the hub
            raise InputError(f"{self.name}: no such folder")

    def optional(self, filename):
        """The file's path, or None if there is no such file."""
        if self.is_folder:
            path = os.path.join(self.name, filename)
            return path if os.path.isfile(path) else None
        try:
            from huggingface_hub import hf_hub_download  # comes with datasets
            return hf_hub_download(self.name, filename)
        except Exception as error:     # the hub raises a dozen kinds, from offline to misspelt
            self.reason = self.reason or type(error).__name__
            return None

    def required(self, filename):
        path = self.optional(filename)
        if path is None and self.is_folder:
            raise InputError(f"{self.name}: no {filename} in this folder (is the run finished?)")
        if path is None:
            raise InputError(
                f"{self.name}: no such folder, and the hub gave no {filename} ({self.reason}); "
                "without network, copy the model's config.json and model.safetensors into a folder "
                "and name that")
        return path


def read_tensors(find):
    """All tensors of a checkpoint, by their names in the files."""
    index = None
    path = find.optional("model.safetensors")
    if path is None:
        index = find.optional("model.safetensors.index.json")
    if path is None and index is None:
        old = find.optional("pytorch_model.bin")
        if old is not None:
            return torch.load(old, map_location="cpu", weights_only=True)
        path = find.required("model.safetensors")      # says that it is not there
    if index is None:
        return load_file(path)
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    tensors = {}
    for shard in shards:
        tensors |= load_file(find.required(shard))
    return tensors


def our_tensors(tensors):
    """Yields (name, tensor) as this repository's modules have them."""
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):      # old files have the mask
            continue
        if name.split(".")[0] in ("wte", "wpe", "h", "ln_f"):       # saved from a bare GPT2Model
            name = "transformer." + name
        if name.endswith(TRANSPOSED):
            tensor = tensor.t().contiguous()
        yield name, tensor


def check_config(config, where):
    """InputError if a config.json (a dict) is not that of a GPT-2 as it is written here."""
    for name, supported in FIXED.items():
        if config.get(name, supported if name != "model_type" else None) != supported:
            raise InputError(f"{where}: config.json says {name} {config.get(name)!r}, and only "
                             f"{supported!r} is supported")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(f"{where}: config.json says activation_function {activation!r}, and only "
                         "'gelu_new' is supported")
    if config.get("reward_head", "last") not in ("last", "sum"):
        raise InputError(f"{where}: config.json says reward_head {config['reward_head']!r}, and "
                         "only 'last' and 'sum' are supported")
    for name in FIELDS.values():
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise InputError(f"{where}: config.json says {name} {config.get(name)!r}, which is not "
                             "a positive whole number")
    if config["n_embd"] % config["n_head"]:
        raise InputError(f"{where}: config.json says n_head {config['n_head']}, which does not "
                         f"divide n_embd {config['n_embd']}")


def check_tensors(tensors, sizes, where):
    """InputError if weights are not finite, or of other sizes than config.json says: before a model
    of those sizes, which may be absurd, is made."""
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor):
            raise InputError(f"{where}: {name} is not a tensor")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{where}: the weights {name} hold numbers that are not finite")
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    actual = {"n_layer": len(layers)}
    for size, name in {"vocab_size": "wte", "block_size": "wpe"}.items():
        table = tensors.get(f"transformer.{name}.weight")
        if table is not None and table.dim() == 2:      # if not, load_tensors says so
            actual |= {size: table.size(0), "n_embd": table.size(1)}
    for size, value in actual.items():
        if sizes[size] != value:
            raise InputError(f"{where}: not the model of its config.json: {FIELDS[size]} is "
                             f"{sizes[size]} there, {value} in the weights")


def load_tensors(model, tensors, where):
    """model.load_state_dict, with what does not fit said in one line."""
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: not the model of its config.json: {one_line(error)}") from error


def one_line(error):
    return " ".join(str(error).split())[:300]


def write_checkpoint(directory, model, eos_token_id, **fields):
    """Writes config.json, where the flags of a run stay, and model.safetensors."""
    weights = whole(model.state_dict(), keep=is_first())
    if not is_first():
        return
    os.makedirs(directory, exist_ok=True)
    config, flags = model.config, run_flags(directory)
    end = config.vocab_size - 1 if eos_token_id is None else eos_token_id
    written = {"nanopref": flags} if flags else {}
    written |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    written |= dict(FIXED, n_ctx=config.block_size, activation_function="gelu_new", resid_pdrop=0.0,
                    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
                    tie_word_embeddings=config.tie_word_embeddings, **fields)
    write_json(os.path.join(directory, "config.json"), written, indent=2)

    tensors = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    with replacing(os.path.join(directory, "model.safetensors")) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
