"""Reads and writes checkpoints in Hugging Face's layout, config.json and the weights, of GPT-2 and
the Llama family.

Reads model.safetensors or pytorch_model.bin, whole or in several files with an index, and a ckpt.pt
of nanoGPT; names other kinds as what they are. Writes model.safetensors. Models name their
parameters as Hugging Face's GPT-2 does: of its files only Conv1D, which stores (in, out) where
nn.Linear has (out, in), is turned round. Files of the Llama family have other names, and queries,
keys and values, gate and up, one by one: tables below translate.
"""
import contextlib
import fnmatch
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file

from support.device import is_first, whole
from support.files import check_zip, read_json, replacing, write_json
from support.flags import InputError, in_a_line, naming
from support.run import MODELS, run_flags

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}    # torch's "approximate"

# Our name of a field: that in config.json
GPT2_FIELDS = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
               "n_head": "n_head", "n_embd": "n_embd", "tie_word_embeddings": "tie_word_embeddings"}
LLAMA_FIELDS = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
    "n_kv_head": "num_key_value_heads", "head_size": "head_dim", "n_inner": "intermediate_size",
    "norm_eps": "rms_norm_eps", "tie_word_embeddings": "tie_word_embeddings",
    "qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias"}

# What holds where config.json does not say; other fields have to be there
LLAMA_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
                  "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
                  "rope_theta": 10_000.0}
# The only values that are supported
GPT2_FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False}
LLAMA_FIXED = {"hidden_act": "silu"}

LLAMA_MODULES = {       # our modules: those in the files, which are one matrix here
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
OLMO2_MODULES = LLAMA_MODULES | {"ln_1": ["post_attention_layernorm"],
                                 "ln_2": ["post_feedforward_layernorm"]}


@dataclass
class Family:
    """A kind of model: how files spell it, and which switches of GPTConfig it sets."""
    title: str                  # how the names of its classes in transformers begin
    fields: dict = field(default_factory=lambda: LLAMA_FIELDS)
    defaults: dict = field(default_factory=dict)        # besides LLAMA_DEFAULTS
    fixed: dict = field(default_factory=lambda: LLAMA_FIXED)
    modules: dict = field(default_factory=lambda: LLAMA_MODULES)
    switches: dict = field(default_factory=dict)        # besides RMSNorm and SwiGLU


FAMILIES = {            # by model_type in config.json
    "gpt2": Family("GPT2", GPT2_FIELDS, {"tie_word_embeddings": True}, GPT2_FIXED, {}),
    "llama": Family("Llama"),
    "mistral": Family("Mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2", defaults={"num_key_value_heads": 32}, switches={"qkv_bias": True}),
    "qwen3": Family("Qwen3", defaults={"num_key_value_heads": 32, "head_dim": 128},
                    switches={"qk_norm": "head"}),
    "smollm3": Family("SmolLM3", defaults={"num_key_value_heads": 4, "rope_theta": 2e6,
                                           "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2", defaults={"rms_norm_eps": 1e-5}, modules=OLMO2_MODULES,
                    switches={"qk_norm": "all", "norm_after": True})}
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "_forward_module", "base_model"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GIT_LFS = b"version https://git-lfs"
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "alpha_pattern": ({},),
        "layer_replication": (None,), "lora_bias": (False,),        # the values that are supported
        "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}   # others change the model


def read_checkpoint(dir_or_hub_name, head):
    """Reads a checkpoint from a folder or else from the hub.

    head: "lm_head" or "score", of the model that is wanted. Returns (sizes by our names,
    {parameter name: tensor}). InputError if it is damaged or of another kind.
    """
    where, find = dir_or_hub_name, Finder(dir_or_hub_name)
    sizes = read_sizes(where, find, say=print)
    with naming_damage(find):
        tensors = our_tensors(read_tensors(find), sizes["family"], find.nanogpt is not None)
    if find.nanogpt is not None and add_zero_biases(tensors):
        print(f"{where}: it was trained without biases; here they start at zero, and are trained")
    if head == "lm_head":
        settle_head(tensors, sizes, where)
    check_tensors(tensors, sizes, where)
    if ("score.weight" in tensors) != (head == "score"):
        kinds = ["a language model", "a reward model"]
        if head == "lm_head":
            kinds.reverse()
        raise InputError(f"{where}: this is {kinds[0]}, not {kinds[1]}")
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


def read_sizes(dir_or_hub_name, find=None, say=lambda line: None):
    """Returns what a checkpoint's config.json says, by the names of GPTConfig. say: called with
    lines on what is otherwise here."""
    find = find or Finder(dir_or_hub_name)
    config = nanogpt_config(find) if find.nanogpt else read_config(find)
    return our_sizes(config, dir_or_hub_name, say)


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


def adapter_config(folder):
    """Returns the content of a folder's adapter_config.json, of a LoRA adapter in PEFT's layout;
    None if there is none. InputError if it is of another kind."""
    path = os.path.join(folder, ADAPTER)
    if not os.path.isfile(path):
        return None
    config = read_json(path)
    for name, supported in ONLY.items():
        value = config.get(name, supported[0])
        if value not in supported and value:
            raise InputError(f"{path}: {name} {value!r} is not supported, only "
                             f"{supported[0]!r}: merge the adapter into its model (PEFT: "
                             "merge_and_unload, then save_pretrained) and name that folder")
    kinds = {"base_model_name_or_path": (str,), "lora_alpha": (int, float)}
    for name, kind in kinds.items():
        value = config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not value:
            raise InputError(f"{path}: {name} is {value!r}")
    return config


class Finder:
    """Finds the files of a checkpoint: in a folder, or copies of them from the hub. In the place of
    an adapter's folder: those of the model that it belongs to.

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
        self.base = None            # of an adapter: the Finder of the model that it belongs to
        config = adapter_config(self.name)
        if config is not None:
            self.base = self._base(config["base_model_name_or_path"])
            self.nanogpt = self.base.nanogpt

    def _base(self, name):
        both = [file for file in sorted(MODELS) if self._in_folder(file)]
        if both:                    # transformers would add the adapter to it
            raise InputError(f"{self.name}: it holds both {both[0]} and {ADAPTER}, a LoRA adapter, "
                             "which belongs to another model; leave one of them there")
        with naming(f"{self.name}: {ADAPTER} names a model that is not to be had"):
            base = Finder(name)
        if base.base is not None:
            raise InputError(f"{self.name}: the adapter of a model that is an adapter itself, "
                             f"{name!r}: merge that one into its model first")
        return base

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
        if self.base is not None and not self._of_adapter(filename):
            path = self.base.optional(filename)
        elif self.is_folder:
            path = os.path.join(self.name, filename) if self._in_folder(filename) else None
        elif self.nanogpt is None:
            path, reason = hub_file(self.name, filename)
            self.reason = self.reason or reason
        self.last = filename if path is not None else self.last
        return path

    def _of_adapter(self, filename):
        """Returns whether a file is looked for next to an adapter: its tokenizer's, if it has one.
        All others belong to the model."""
        own = any(map(self._in_folder, ("tokenizer.json", "vocab.json")))
        of_model = ("config", "generation_config", "model", "pytorch_model")
        return own and not filename.startswith(of_model)

    def required(self, filename):
        path = self.optional(filename)
        if path is not None:
            return path
        if self.base is not None:
            return self.base.required(filename)
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


def our_tensors(tensors, family, of_nanogpt=False):
    """Returns the tensors of a file, {name: tensor}, as this repository's modules have them:
    without what torch.compile and wrappers put into their names, and without buffers.

    of_nanogpt: it has nn.Linear's matrices, which are not turned round.
    """
    ours = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        while parts[0] == "model" and len(parts) > 1:           # a model inside another module
            parts = parts[1:]
        if parts[0] in ("wte", "wpe", "h", "ln_f"):             # saved from a bare GPT2Model
            parts = ["transformer", *parts]
        our_name = ".".join(parts)
        if our_name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue                                            # old files have the mask, the turns
        if our_name.endswith(TRANSPOSED) and not of_nanogpt:
            tensor = tensor.t().contiguous()
        if our_name in ours and not torch.equal(ours[our_name], tensor):
            raise ValueError(f"it has {our_name} twice, with different numbers")
        ours[our_name] = tensor
    if family != "gpt2":
        n_layer = len({name.split(".")[1] for name in ours if name.startswith("layers.")})
        for name, theirs in names_in_files(family, n_layer):
            theirs = [part.removeprefix("model.") for part in theirs]
            if all(part in ours for part in theirs):
                ours[name] = torch.cat([ours.pop(part) for part in theirs])
    return ours


def names_in_files(family, n_layer):
    """Yields (our name, [names in files of the Llama family]) of every tensor that is not named the
    same."""
    for kind in ("weight", "bias"):
        yield f"transformer.wte.{kind}", [f"model.embed_tokens.{kind}"]
        yield f"transformer.ln_f.{kind}", [f"model.norm.{kind}"]
        for layer in range(n_layer):
            for module, theirs in FAMILIES[family].modules.items():
                yield (f"transformer.h.{layer}.{module}.{kind}",
                       [f"model.layers.{layer}.{part}.{kind}" for part in theirs])


def rows_of_parts(config, n_parts, rows):
    """Returns how many of the rows of a matrix belong to each of its parts in files: queries, keys
    and values, or gate and up."""
    size = config.head_size or config.n_embd // config.n_head
    kv_width = (config.n_kv_head or config.n_head) * size
    widths = {3: [config.n_head * size, kv_width, kv_width], 2: [rows // 2] * 2}
    return widths.get(n_parts, [rows])


def parts_in_files(model, layer):
    """Returns the linear layers that files have in the place of one of ours, [(name, rows)]: their
    outputs, one after another, are its own. layer: its name."""
    config, rows = model.config, model.get_submodule(layer).out_features
    names = dict(names_in_files(config.family, config.n_layer))
    theirs = names.get(f"{layer}.weight", [f"{layer}.weight"])
    theirs = [name.removesuffix(".weight") for name in theirs]
    return list(zip(theirs, rows_of_parts(config, len(theirs), rows)))


def file_tensors(weights, config):
    """Returns a model's tensors, {name: tensor}, as its family's files have them."""
    tensors = dict(weights)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    if config.family == "gpt2":
        tensors = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor
                   for name, tensor in tensors.items()}
    else:
        for name, theirs in names_in_files(config.family, config.n_layer):
            if name in tensors:
                whole_tensor = tensors.pop(name)
                parts = whole_tensor.split(rows_of_parts(config, len(theirs), len(whole_tensor)))
                tensors |= {part: tensor.clone() for part, tensor in zip(theirs, parts)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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


KINDS = {int: "which is not a positive whole number", float: "which is not a positive number",
         bool: "which is neither true nor false"}


def check_value(config, name, kind, where):
    """Raises InputError if a field of config.json is not a positive int or float, or not a bool."""
    value = config.get(name)
    numbers = (int, float) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, numbers) or (
            kind is not bool and not value > 0):
        raise InputError(f"{where}: config.json says {name} {value!r}, {KINDS[kind]}")


def our_sizes(config, where, say=print):
    """Returns the fields of GPTConfig that a config.json (a dict) means. InputError if it is not
    that of a model as it is written here."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{where}: config.json says model_type {family!r}, and only "
                         f"{', '.join(map(repr, FAMILIES))} are supported")
    about = FAMILIES[family]
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: config.json has a quantization_config: a quantised model can't "
                         "be trained here; name the model that it was made from")
    for name, supported in about.fixed.items():
        if config.get(name, supported) != supported:
            raise InputError(f"{where}: config.json says {name} {config[name]!r}, and only "
                             f"{supported!r} is supported")
    if config.get("reward_head", "last") not in ("last", "sum"):
        raise InputError(f"{where}: config.json says reward_head {config['reward_head']!r}, and "
                         "only 'last' and 'sum' are supported")
    defaults = (LLAMA_DEFAULTS if family != "gpt2" else {}) | about.defaults
    config = {**defaults, **{name: value for name, value in config.items() if value is not None}}
    sizes = {"family": family, "reward_head": config.get("reward_head", "last")}
    for ours, theirs in about.fields.items():
        kind = {"rms_norm_eps": float, "tie_word_embeddings": bool, "attention_bias": bool,
                "mlp_bias": bool}.get(theirs, int)
        if config.get(theirs) is not None or theirs not in defaults:
            check_value(config, theirs, kind, where)
        sizes[ours] = config.get(theirs)
    for part, of in (("n_head", "n_embd"), ("n_kv_head", "n_head")):
        divides = sizes.get(part) is None or sizes[of] % sizes[part] == 0
        if not divides and not (part == "n_head" and sizes.get("head_size")):
            raise InputError(f"{where}: config.json says {about.fields[part]} {sizes[part]}, which "
                             f"does not divide {about.fields[of]} {sizes[of]}")
    if family == "gpt2":
        return sizes | gpt2_sizes(config, where)
    return sizes | llama_sizes(config, sizes, where, say)


def gpt2_sizes(config, where):
    """Returns the fields of GPTConfig that a GPT-2 alone sets. See our_sizes."""
    activation = config.get("activation_function", "gelu_new")
    if activation not in list(GELU):
        raise InputError(f"{where}: config.json says activation_function {activation!r}, and only "
                         "'gelu_new' and 'gelu' are supported")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise InputError(f"{where}: config.json says n_inner {config['n_inner']!r}, and only 4 "
                         f"n_embd, {4 * config['n_embd']}, is supported")
    return {"gelu": GELU[activation]}


def llama_sizes(config, sizes, where, say):
    """Returns the fields of GPTConfig that the Llama family alone sets. See our_sizes."""
    family, n_layer = config["model_type"], sizes["n_layer"]
    if (sizes["head_size"] or sizes["n_embd"] // sizes["n_head"]) % 2:
        raise InputError(f"{where}: config.json says sizes whose heads are odd, which RoPE can't "
                         "turn in pairs")
    # transformers 5 writes rope_parameters; before it was rope_theta and rope_scaling
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: config.json says rope_scaling {rope!r}, which is not an object")
    rope = {"rope_theta": config["rope_theta"], **rope}
    check_value(rope, "rope_theta", float, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{where}: config.json says rope_scaling {rope!r}, and only rope_type "
                         "'default' and 'llama3' are supported")
    scaling = None
    if kind == "llama3":
        scaling = {"rope_type": kind}
        for name in ("factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings"):
            check_value(rope, name, float, f"{where}: in rope_scaling")
            scaling[name] = rope[name]
    own = {"norm": "rms", "mlp": "swiglu", "rope_theta": float(rope["rope_theta"]),
           "rope_scaling": scaling}
    if family == "smollm3":
        every = config.get("no_rope_layer_interval", 4)
        layers = config.get("no_rope_layers")
        if layers is None:
            check_value({"no_rope_layer_interval": every}, "no_rope_layer_interval", int, where)
            layers = [int((i + 1) % every != 0) for i in range(min(n_layer, 10_000))]
        if not isinstance(layers, list) or any(layer not in (0, 1) for layer in layers):
            raise InputError(f"{where}: config.json says no_rope_layers {layers!r}, which is not a "
                             "list of 0 and 1")
        own["rope_layers"] = layers
    sliding = family == "mistral" or config.get("use_sliding_window") is True or (
        "sliding_attention" in (config.get("layer_types") or []))
    if sliding and config.get("sliding_window") is not None:
        check_value(config, "sliding_window", int, where)
        if config["sliding_window"] < sizes["block_size"]:      # within it all is in sight
            say(f"{where}: texts may have {config['sliding_window']} tokens, its sliding_window, "
                f"not {sizes['block_size']}: attention that looks no farther back is not supported")
            own["block_size"] = config["sliding_window"]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own["token_ids"] = {name: config[name] for name in names if name in config}
    return own | FAMILIES[family].switches


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
    actual, family = {"n_layer": len(layers)}, sizes["family"]
    for size, name in [("vocab_size", "wte"), ("block_size", "wpe")][:1 + (family == "gpt2")]:
        table = tensors.get(f"transformer.{name}.weight")
        if table is None or table.dim() != 2:
            wanted = f"transformer.{name}" if family == "gpt2" else "model.embed_tokens"
            there = ", ".join(list(tensors)[:2]) or "nothing"
            raise InputError(f"{where}: not the model of its config.json: its weights have no "
                             f"table {wanted}.weight (but {there} ...)")
        actual |= {size: table.size(0), "n_embd": table.size(1)}
    for size, value in actual.items():
        if sizes[size] != value:
            raise InputError(f"{where}: not the model of its config.json: "
                             f"{FAMILIES[family].fields[size]} is {sizes[size]} there, {value} in "
                             "the weights")


def load_model(new_model, tensors, where):
    """Returns new_model(), a model, with tensors loaded. InputError says in one line what does not
    fit, before memory is taken for it."""
    try:
        with torch.device("meta"):
            new_model().load_state_dict(tensors, assign=True)
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{where}: not the model of its config.json: {in_a_line(error)}"
                         ) from error
    model = undrawn(new_model)
    model.load_state_dict(tensors)
    return model


def undrawn(new_model):
    """Returns new_model(), a model, with room for its weights on the CPU. None are drawn at random,
    which would take longer than to read them."""
    with torch.device("meta"):
        model = new_model()
    return model.to_empty(device="cpu")


def write_checkpoint(directory, model, eos_token_id):
    """Writes config.json, where the flags of a run stay, and model.safetensors."""
    weights = whole(model.state_dict(), keep=is_first())
    if not is_first():
        return
    os.makedirs(directory, exist_ok=True)
    config, flags = model.config, run_flags(directory)
    written = {"nanopref": flags} if flags else {}
    written |= config_fields(config, eos_token_id)
    title = FAMILIES[config.family].title
    if HEAD in weights:
        written["architectures"] = [title + ("LMHeadModel" if title == "GPT2" else "ForCausalLM")]
    elif config.reward_head == "last":
        ends = written["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        written |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0},
                    "pad_token_id": next(i for i in range(len(ends) + 1) if i not in ends),
                    "architectures": [title + "ForSequenceClassification"]}
    else:
        written["reward_head"] = "sum"          # which transformers does not know
    write_json(os.path.join(directory, "config.json"), written, indent=2)
    with replacing(os.path.join(directory, "model.safetensors")) as temporary:
        save_file(file_tensors(weights, config), temporary, metadata={"format": "pt"})


def config_fields(config, eos_token_id):
    """Returns what config.json says of a GPTConfig."""
    about = FAMILIES[config.family]
    written = {theirs: getattr(config, ours) for ours, theirs in about.fields.items()}
    written |= {"model_type": config.family, **about.fixed}
    if config.family == "gpt2":
        end = config.vocab_size - 1 if eos_token_id is None else eos_token_id
        activation = "gelu_new" if config.gelu == "tanh" else "gelu"
        return written | dict(n_ctx=config.block_size, activation_function=activation,
                              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end,
                              eos_token_id=end)
    tokens = dict(config.token_ids or {})
    ends = tokens.get("eos_token_id", config.vocab_size - 1)
    if eos_token_id is not None and not (isinstance(ends, list) and eos_token_id in ends):
        ends = eos_token_id
    written |= {**tokens, "eos_token_id": ends, "rope_theta": config.rope_theta,
                "rope_scaling": config.rope_scaling, "torch_dtype": "float32",
                "attention_bias": config.proj_bias}
    if config.family == "mistral":
        written["sliding_window"] = None        # where it is not said, it is 4096
    if config.rope_layers is not None:
        written["no_rope_layers"] = config.rope_layers
    return {name: value for name, value in written.items()
            if value is not None or name in ("rope_scaling", "sliding_window")}


# ------------------------------------------------------------------ other kinds of checkpoints

OTHER_KINDS = {         # a file's name: what it is, and what to do
    "adapter_model.*": "a LoRA adapter without its adapter_config.json: copy that there too",
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
