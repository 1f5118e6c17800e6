"""Reads and writes checkpoints in Hugging Face's GPT-2 layout: config.json and the weights.

Reads model.safetensors or pytorch_model.bin, whole or in several files with an index, and a ckpt.pt
of nanoGPT; names other kinds as what they are. Writes model.safetensors. Models have their
parameters named as Hugging Face does; only Conv1D, which stores (in, out) where nn.Linear has (out,
in), is turned round.
"""
import contextlib
import fnmatch
import os
import pickle
import warnings
import zipfile

import torch
from safetensors.torch import load_file, save_file

from support.device import is_first, whole
from support.files import check_zip, read_json, replacing, write_json
from support.flags import InputError, in_a_line, naming
from support.run import run_flags

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
FIELDS = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
          "n_head": "n_head", "n_embd": "n_embd"}       # our name of a size: that in config.json
FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False}      # the only value that is supported
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}    # torch's "approximate"
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "_forward_module", "base_model"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GIT_LFS = b"version https://git-lfs"
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def read_checkpoint(dir_or_hub_name, head):
    """Reads a checkpoint from a folder or else from the hub.

    head: "lm_head" or "score", of the model that is wanted. Returns (sizes by our names,
    {parameter name: tensor}). InputError if it is damaged or of another kind.
    """
    find = Finder(dir_or_hub_name)
    sizes = read_sizes(dir_or_hub_name, find)
    with naming_damage(find):
        tensors = our_tensors(read_tensors(find), of_nanogpt=find.nanogpt is not None)
    if find.nanogpt is not None and add_zero_biases(tensors):
        print(f"{dir_or_hub_name}: it was trained without biases; here they start at zero, and are "
              "trained")
    if head == "lm_head":
        settle_head(tensors, sizes, dir_or_hub_name)
    check_tensors(tensors, sizes, dir_or_hub_name)
    if ("score.weight" in tensors) != (head == "score"):
        kinds = ["a language model", "a reward model"]
        if head == "lm_head":
            kinds.reverse()
        raise InputError(f"{dir_or_hub_name}: this is {kinds[0]}, not {kinds[1]}")
    if head == "score":
        tensors.pop(HEAD, None)
    return sizes, tensors


@contextlib.contextmanager
def naming_damage(find):
    """Turns any error inside into an InputError that names the checkpoint and the file that was
    read: torch and safetensors raise many kinds for a damaged file. find: a Finder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{find.name}: unreadable checkpoint: {find.last} is damaged or not "
                         f"whole: {find.damage() or in_a_line(error)}") from error


def read_sizes(dir_or_hub_name, find=None):
    """Returns the sizes in a checkpoint's config.json, by our names."""
    find = find or Finder(dir_or_hub_name)
    config = nanogpt_config(find) if find.nanogpt else read_config(find)
    check_config(config, dir_or_hub_name)
    sizes = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    return {**sizes, "tie_word_embeddings": config.get("tie_word_embeddings", True),
            "reward_head": config.get("reward_head", "last"),
            "gelu": GELU[config.get("activation_function", "gelu_new")]}


def read_config(find):
    """Returns the content of a checkpoint's config.json, a dict."""
    path = find.required("config.json")
    with naming(f"{find.name}: unreadable checkpoint"):
        config = read_json(path)
    if "nanopref" in config and "model_type" not in config:
        raise InputError(f"{find.name}: this run has no model yet (is it finished?)")
    return config


class NoModel(InputError):
    """Says that there is nothing where a model was looked for."""


unreachable = set()     # names for which the hub gave no answer; its local cache is asked instead


def hub_file(name, filename):
    """Downloads a file of a model on the hub. Returns (its path, None), or (None, why not). A name
    for which there was no answer is asked for once: each time takes the hub's client half a minute.
    """
    try:
        import huggingface_hub  # comes with datasets
        huggingface_hub.logging.set_verbosity(50)   # it warns of every try; we say what came of it
        return huggingface_hub.hf_hub_download(name, filename,
                                               local_files_only=name in unreachable), None
    except Exception as error:     # the hub raises a dozen kinds, from offline to misspelt
        reason = type(error).__name__
        if reason not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            unreachable.add(name)       # and not merely a model without this file
        return None, reason


class Finder:
    """Finds the files of a checkpoint: in a folder, or copies of them from the hub.

    nanogpt: the path of nanoGPT's ckpt.pt, where the checkpoint is one; last: the name of the file
    that was found last, for messages.
    """

    def __init__(self, dir_or_hub_name):
        self.name, self.reason = str(dir_or_hub_name), None
        self.nanogpt = nanogpt_file(self.name)
        self.last = self.nanogpt and os.path.basename(self.nanogpt)
        self.is_folder = os.path.isdir(self.name)
        like_a_path = self.name.startswith((".", "/", "~", "out/")) or self.name.count("/") > 1
        if like_a_path and not os.path.exists(self.name):   # not "name" or "owner/name"
            raise NoModel(f"{self.name}: no such folder")
        if os.path.exists(self.name) and not self.is_folder and self.nanogpt is None:
            kind = other_kind([os.path.basename(self.name)])
            raise InputError(f"{self.name}: {kind or 'a file: name the folder that holds it'}")
        kind = other_kind(name for name in ["adapter_config.json"] if self._in_folder(name))
        if kind is not None:        # transformers would add it to the model of the same folder
            raise InputError(f"{self.name}: {kind}")

    def _in_folder(self, filename):
        return self.is_folder and os.path.isfile(os.path.join(self.name, filename))

    def damage(self):
        """Says what a file is that git has left in the place of `last`; None if it is another."""
        path = self.nanogpt or os.path.join(self.name, self.last)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                return "it is a pointer to a file of git-lfs; git lfs pull brings the file itself"
        return None

    def optional(self, filename):
        """Returns the file's path, or None if there is no such file."""
        path = None
        if self.is_folder:
            path = os.path.join(self.name, filename) if self._in_folder(filename) else None
        elif self.nanogpt is None:
            path, reason = hub_file(self.name, filename)
            self.reason = self.reason or reason
        self.last = filename if path is not None else self.last
        return path

    def required(self, filename):
        path = self.optional(filename)
        if path is not None:
            return path
        if self.is_folder:
            kind = other_kind(sorted(os.listdir(self.name)))
            unfinished = filename in ("config.json", "model.safetensors")
            hint = "is the run finished?" if unfinished else "has the folder been copied whole?"
            raise NoModel(f"{self.name}: no {filename} in this folder " +
                          (f"but {kind}" if kind else f"({hint})"))
        raise NoModel(
            f"{self.name}: no such folder, and the hub gave no {filename} ({self.reason}); "
            "without network, copy the model's config.json and model.safetensors into a folder "
            "and name that")


def read_tensors(find):
    """Returns all tensors of a checkpoint, by their names in the files."""
    if find.nanogpt is not None:
        return load_torch_file(find.nanogpt)["model"]
    readers = {"model.safetensors": load_file, "pytorch_model.bin": load_state_dict}
    for filename, load in readers.items():
        path = find.optional(filename)
        if path is not None:
            return load(path)
        index = find.optional(f"{filename}.index.json")
        if index is not None:
            shard_of = read_json(index)["weight_map"]
            tensors = {}
            for shard in sorted(set(shard_of.values())):
                for name, tensor in load(find.required(shard)).items():
                    if shard_of.get(name, shard) == shard:      # a leftover elsewhere is not meant
                        tensors[name] = tensor
            return tensors
    return find.required("model.safetensors")      # says that it is not there


def our_tensors(tensors, of_nanogpt=False):
    """Returns the tensors of a file, {name: tensor}, as this repository's modules have them:
    without what torch.compile and wrappers put into their names, and without buffers.

    of_nanogpt: it has nn.Linear's matrices, which are not turned round.
    """
    ours = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        if parts[0] == "model" and len(parts) > 1:              # a model inside another module
            parts = parts[1:]
        if parts[0] in ("wte", "wpe", "h", "ln_f"):             # saved from a bare GPT2Model
            parts = ["transformer", *parts]
        our_name = ".".join(parts)
        if our_name.endswith((".attn.bias", ".attn.masked_bias")):  # old files have the mask
            continue
        if our_name.endswith(TRANSPOSED) and not of_nanogpt:
            tensor = tensor.t().contiguous()
        if our_name in ours and not torch.equal(ours[our_name], tensor):
            raise ValueError(f"it has {our_name} twice, with different numbers")
        ours[our_name] = tensor
    return ours


def settle_head(tensors, sizes, where):
    """Fills in what is saved once of an output head that shares the embedding's weights. A head of
    its own is kept, whatever config.json says of it."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if not sizes["tie_word_embeddings"]:
        return
    if embedding is None and head is not None:
        tensors[EMBEDDING] = head
    elif embedding is not None and head is None:
        tensors[HEAD] = embedding
    elif embedding is not None and not torch.equal(embedding, head):
        print(f"{where}: {HEAD} differs from {EMBEDDING}, though config.json does not say "
              "tie_word_embeddings: false; it is kept as a head of its own")
        sizes["tie_word_embeddings"] = False


def check_config(config, where):
    """Raises InputError if a config.json (a dict) is not that of a GPT-2 as it is written here."""
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: config.json has a quantization_config: a quantised model can't "
                         "be trained here; name the model that it was made from")
    for name, supported in FIXED.items():
        if config.get(name, supported if name != "model_type" else None) != supported:
            raise InputError(f"{where}: config.json says {name} {config.get(name)!r}, and only "
                             f"{supported!r} is supported")
    activation = config.get("activation_function", "gelu_new")
    if activation not in list(GELU):
        raise InputError(f"{where}: config.json says activation_function {activation!r}, and only "
                         "'gelu_new' and 'gelu' are supported")
    if config.get("reward_head", "last") not in ("last", "sum"):
        raise InputError(f"{where}: config.json says reward_head {config['reward_head']!r}, and "
                         "only 'last' and 'sum' are supported")
    if not isinstance(config.get("tie_word_embeddings", True), bool):
        raise InputError(f"{where}: config.json says tie_word_embeddings "
                         f"{config['tie_word_embeddings']!r}, which is neither true nor false")
    for name in FIELDS.values():
        size = config.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{where}: config.json says {name} {size!r}, which is not a positive "
                             "whole number")
    if config["n_embd"] % config["n_head"]:
        raise InputError(f"{where}: config.json says n_head {config['n_head']}, which does not "
                         f"divide n_embd {config['n_embd']}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise InputError(f"{where}: config.json says n_inner {config['n_inner']!r}, and only 4 "
                         f"n_embd, {4 * config['n_embd']}, is supported")


def check_tensors(tensors, sizes, where):
    """Raises InputError if weights are not finite, or of other sizes than config.json says: before
    a model of those sizes, which may be absurd, is made."""
    if any(".lora_" in name for name in tensors):
        raise InputError(f"{where}: its weights hold a LoRA adapter's as well: merge them (PEFT: "
                         "merge_and_unload, then save_pretrained) and name that folder")
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor):
            raise InputError(f"{where}: {name} is not a tensor")
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{where}: the weights {name} are {dtype} numbers: a quantised model "
                             "can't be trained here; name the model that it was made from")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: the weights {name} hold numbers that are not finite")
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    actual = {"n_layer": len(layers)}
    for size, name in {"vocab_size": "wte", "block_size": "wpe"}.items():
        table = tensors.get(f"transformer.{name}.weight")
        if table is None or table.dim() != 2:
            there = ", ".join(list(tensors)[:2]) or "nothing"
            raise InputError(f"{where}: not the model of its config.json: its weights have no "
                             f"table transformer.{name}.weight (but {there} ...)")
        actual |= {size: table.size(0), "n_embd": table.size(1)}
    for size, value in actual.items():
        if sizes[size] != value:
            raise InputError(f"{where}: not the model of its config.json: {FIELDS[size]} is "
                             f"{sizes[size]} there, {value} in the weights")


def load_tensors(model, tensors, where):
    """Loads tensors into a model. InputError says in one line what does not fit."""
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: not the model of its config.json: {in_a_line(error)}"
                         ) from error


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
    activation = "gelu_new" if config.gelu == "tanh" else "gelu"
    written |= dict(FIXED, n_ctx=config.block_size, activation_function=activation, resid_pdrop=0.0,
                    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
                    tie_word_embeddings=config.tie_word_embeddings, **fields)
    write_json(os.path.join(directory, "config.json"), written, indent=2)

    tensors = {}
    for name, tensor in weights.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    with replacing(os.path.join(directory, "model.safetensors")) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


# ------------------------------------------------------------------ other kinds of checkpoints

OTHER_KINDS = {         # a file's name: what it is, and what to do
    "adapter_config.json": "a LoRA adapter, not a whole model: merge it into its model first "
                           "(PEFT: merge_and_unload, then save_pretrained) and name that folder",
    "adapter_model.*": "a LoRA adapter, not a whole model: merge it into its model first "
                       "(PEFT: merge_and_unload, then save_pretrained) and name that folder",
    "*.gguf": "a model of llama.cpp: name the folder of the model that it was made from",
    "tf_model.h5": "weights of TensorFlow: save the model with PyTorch's (transformers before 5: "
                   "from_pretrained(..., from_tf=True), then save_pretrained) and name that folder",
    "flax_model.msgpack": "weights of Flax: save the model with PyTorch's (transformers before 5: "
                          "from_pretrained(..., from_flax=True), then save_pretrained) and name "
                          "that folder",
    "*.ckpt.index": "a checkpoint of TensorFlow: convert it to Hugging Face's layout first",
    "*.onnx": "a model for ONNX: name the folder of the model that it was made from",
    "*.distcp": "a distributed checkpoint of torch: save the whole model in one file first",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed: run its zero_to_fp32.py first",
    "optimizer.pt": "the state of an optimizer: name the folder that holds the model"}


def other_kind(names):
    """Says of some files what they are and what to do, or returns None. names: without folders."""
    names = list(names)
    for pattern, kind in OTHER_KINDS.items():
        for name in fnmatch.filter(names, pattern):
            return f"{name}, {kind}"
    return None


def load_torch_file(path):
    """Reads what torch.save wrote, {name: tensor}, without running code from it. Raises any error
    if it is damaged, InputError if it is an optimizer's."""
    is_zip = zipfile.is_zipfile(path)       # files from before torch 1.6 are not
    if is_zip:
        check_zip(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:     # torch advises to run whatever is in there
            raise ValueError("or it holds other Python objects than tensors, which could run any "
                             "code and are not read: write the weights alone, "
                             "torch.save(model.state_dict(), ...)") from error
    if isinstance(content, dict) and "param_groups" in content:
        raise InputError(f"{path}: the state of an optimizer, not a model's weights")
    return content


def load_state_dict(path):
    """Reads a model's weights from what torch.save wrote, {name: tensor}. InputError if something
    else is in there."""
    content = load_torch_file(path)
    if isinstance(content, dict):
        inner = [name for name, value in content.items() if isinstance(value, dict)]
        if inner:
            raise InputError(f"{path}: its weights are in a part of it, {inner[0]!r}; write them "
                             f"alone: torch.save(torch.load(...)[{inner[0]!r}], ...)")
        if all(isinstance(name, str) for name in content):
            return content
    raise InputError(f"{path}: not a model's weights, {{name: tensor}}, as in "
                     "torch.save(model.state_dict(), ...)")


# ------------------------------------------------------------------ nanoGPT

def nanogpt_file(name):
    """Returns the path of nanoGPT's checkpoint: a file that ends in .pt, or ckpt.pt in a folder
    without a config.json. None if there is none."""
    if os.path.isfile(name) and name.endswith(".pt"):
        return name
    path = os.path.join(name, "ckpt.pt")
    if os.path.isfile(path) and not os.path.exists(os.path.join(name, "config.json")):
        return path
    return None


def nanogpt_config(find):
    """Returns the config.json that nanoGPT's checkpoint would have. InputError if it is something
    else."""
    with naming_damage(find):
        content = load_torch_file(find.nanogpt)
    sizes = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(sizes, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{find.nanogpt}: not a checkpoint of nanoGPT, which has 'model' and "
                         "'model_args'; name a folder in Hugging Face's layout")
    config = {"model_type": "gpt2", "activation_function": "gelu",
              "n_positions": sizes.get("block_size")}
    return config | {name: sizes.get(name) for name in ("vocab_size", "n_layer", "n_head",
                                                        "n_embd")}


def add_zero_biases(tensors):
    """Gives layers that were trained without biases a bias of zeros, in place. tensors: by our
    names, matrices (out, in). Returns whether there were such layers."""
    before = len(tensors)
    for name in list(tensors):
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            bias = name.removesuffix("weight") + "bias"
            tensors.setdefault(bias, torch.zeros(len(tensors[name])))
    return len(tensors) > before
