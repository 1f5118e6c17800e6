"""Reads and writes checkpoints in Hugging Face's layout: config.json and the weights.

Reads model.safetensors or pytorch_model.bin, whole or in several files with an index, and a ckpt.pt
of nanoGPT. Refuses other kinds of files, and says what they are. Writes model.safetensors.
families.py knows the names that each family of models uses in these files. The second half of this
file reads and writes LoRA adapters in PEFT's layout: adapter_config.json and
adapter_model.safetensors.
"""
import contextlib
import fnmatch
import hashlib
import os
import pickle
import warnings
import zipfile

import torch
from safetensors.torch import load_file, save_file

from support.device import RANK, whole_on_cpu
from support.families import (
    HEAD,
    TRANSPOSED,
    config_fields,
    field_of,
    file_tensors,
    join_tensors,
    our_sizes,
    parts_in_files,
)
from support.flags import InputError, in_a_line, naming
from support.run import MODELS, check_zip, read_json, replacing, run_flags, write_json

WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "_forward_module", "base_model"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GIT_LFS = b"version https://git-lfs"
EMBEDDING = "transformer.wte.weight"
ADAPTER = "adapter_config.json"
PREFIX = "base_model.model."        # PEFT puts it before the name of each tensor
REWARD_HEAD = "score.weight"
KIND = {False: "a language model", True: "a reward model"}
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "alpha_pattern": ({},),
        "layer_replication": (None,), "lora_bias": (False,),        # the values that are supported
        "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}   # others change the model


def read_checkpoint(dir_or_hub_name, head):
    """Reads a checkpoint from a folder or else from the hub.

    head: "lm_head" if a language model is wanted, "score" for a reward model. Returns (sizes by our
    names, {parameter name: tensor}). InputError if it is damaged or of another kind.
    """
    where, find = dir_or_hub_name, Finder(dir_or_hub_name)
    sizes = read_sizes(where, find, say=print)
    with naming_damage(find):
        tensors = our_tensors(read_tensors(find), sizes["family"], find.nanogpt is not None)
    if find.nanogpt is not None and add_zero_biases(tensors):
        print(f"{where}: it was trained without biases; here they start at zero, and are trained")
    if head == "lm_head":
        complete_head(tensors, sizes, where)
    check_tensors(tensors, sizes, where)
    is_reward_model = REWARD_HEAD in tensors
    if is_reward_model != (head == "score"):
        raise InputError(f"{where}: this is {KIND[is_reward_model]}, not "
                         f"{KIND[not is_reward_model]}")
    if head == "score":
        tensors.pop(HEAD, None)
    return sizes, tensors


@contextlib.contextmanager
def naming_damage(find):
    """Turns any error inside into an InputError that names the checkpoint and the file: torch and
    safetensors raise many kinds for a damaged one. find: a Finder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{find.name}: unreadable checkpoint: {find.last} is damaged or not "
                         f"whole: {find.damage() or in_a_line(error)}") from error


def read_sizes(dir_or_hub_name, find=None, say=lambda line: None):
    """Returns the sizes in a checkpoint's config.json, under the names of GPTConfig. say: see
    our_sizes."""
    find = find or Finder(dir_or_hub_name)
    if find.nanogpt is not None:
        return our_sizes(nanogpt_config(find), dir_or_hub_name, say)
    path = find.required("config.json")
    with naming(f"{find.name}: unreadable checkpoint"):
        config = read_json(path)
    if "nanopref" in config and "model_type" not in config:
        raise InputError(f"{find.name}: this run has no model yet (is it finished?)")
    return our_sizes(config, dir_or_hub_name, say)


class NoModel(InputError):
    """Says that there is no model where one was looked for."""


unreachable = set()     # names for which the hub gave no answer; its local cache is asked instead


def hub_file(name, filename):
    """Downloads a file of a model on the hub. Returns (its path, None) or (None, why not). A name
    that got no answer is not asked for again: each try takes half a minute."""
    try:
        import huggingface_hub  # comes with datasets
        huggingface_hub.logging.set_verbosity(50)   # it warns of every try; we say what came of it
        return huggingface_hub.hf_hub_download(name, filename,
                                               local_files_only=name in unreachable), None
    except Exception as error:     # the hub raises a dozen kinds, from offline to misspelt
        reason = type(error).__name__
        if reason not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            unreachable.add(name)       # no answer; a missing file is an answer
        return None, reason


def adapter_config(folder):
    """Returns the content of the adapter_config.json in a folder, which PEFT writes for a LoRA
    adapter, or None if there is none. InputError if it is an adapter of another kind."""
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
    """Finds the files of a checkpoint, in a folder or on the hub. For an adapter's folder it finds
    those of the model that the adapter belongs to.

    nanogpt: the path of nanoGPT's ckpt.pt, if the checkpoint is one. last: the name of the file
    that was found last, for messages.
    """

    def __init__(self, dir_or_hub_name):
        self.name, self.reason = str(dir_or_hub_name), None
        self.is_folder = os.path.isdir(self.name)
        self.nanogpt = None         # a file that ends in .pt, or else ckpt.pt in a folder
        if os.path.isfile(self.name) and self.name.endswith(".pt"):
            self.nanogpt = self.name
        elif self._in_folder("ckpt.pt") and not self._in_folder("config.json"):
            self.nanogpt = os.path.join(self.name, "ckpt.pt")
        self.last = self.nanogpt and os.path.basename(self.nanogpt)
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
        with naming(f"{self.name}: {ADAPTER} names a model that can't be read"):
            base = Finder(name)
        if base.base is not None:
            raise InputError(f"{self.name}: the adapter of a model that is an adapter itself, "
                             f"{name!r}: merge that one into its model first")
        return base

    def _in_folder(self, filename):
        return self.is_folder and os.path.isfile(os.path.join(self.name, filename))

    def damage(self):
        """Says that the file `last` is only a pointer of git-lfs, if it is one; otherwise returns
        None."""
        path = self.nanogpt or os.path.join(self.name, self.last)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                return "it is a pointer to a file of git-lfs; git lfs pull fetches the file itself"
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
        """Returns whether to look for a file next to the adapter. If the adapter has a tokenizer,
        the tokenizer's files are there. All other files are next to the model."""
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
                    if shard_of.get(name, shard) == shard:      # elsewhere it is a leftover
                        tensors[name] = tensor
            return tensors
    return find.required("model.safetensors")      # says that it is not there


def our_tensors(tensors, family, of_nanogpt=False):
    """Returns the tensors of a file, {name: tensor}, as this repository's modules have them:
    without what torch.compile and wrappers put into their names, and without buffers.

    of_nanogpt: whether nanoGPT wrote the file; its matrices are nn.Linear's, not transposed ones.
    """
    ours = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        while parts[0] == "model" and len(parts) > 1:           # a model inside another module
            parts = parts[1:]
        if parts[0] in ("wte", "wpe", "h", "ln_f"):             # saved from a bare GPT2Model
            parts = ["transformer", *parts]
        elif parts[0] in ("embed_tokens", "layers", "norm"):
            parts = ["model", *parts]
        our_name = ".".join(parts)
        if our_name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue                                            # masks and angles, in old files
        if our_name.endswith(TRANSPOSED) and not of_nanogpt:
            tensor = tensor.t().contiguous()
        if our_name in ours and not torch.equal(ours[our_name], tensor):
            raise ValueError(f"it has {our_name} twice, with different numbers")
        ours[our_name] = tensor
    if family != "gpt2":
        join_tensors(ours, family)
    return ours


def complete_head(tensors, sizes, where):
    """Fills in the output head, or the embedding, where the two share their weights and these are
    saved once. A head with weights of its own is kept, whatever config.json says."""
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


def check_tensors(tensors, sizes, where):
    """Raises InputError if weights are not finite, or of other sizes than config.json says. Called
    before a model of those sizes is made, because they may be absurd."""
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
            raise InputError(f"{where}: not the model of its config.json: {field_of(size, family)} "
                             f"is {sizes[size]} there, {value} in the weights")


def load_model(new_model, tensors, where):
    """Returns new_model(), a model, with tensors loaded. InputError says in one line what does not
    fit, before memory is taken for it."""
    try:
        with torch.device("meta"):
            new_model().load_state_dict(tensors, assign=True)
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{where}: not the model of its config.json: {in_a_line(error)}"
                         ) from error
    model = empty_model(new_model)
    model.load_state_dict(tensors)
    return model


def empty_model(new_model):
    """Returns new_model(), a model, with room for its weights on the CPU. They are not drawn at
    random, which would take longer than reading them."""
    with torch.device("meta"):
        model = new_model()
    return model.to_empty(device="cpu")


def write_checkpoint(directory, model, eos_token_id):
    """Writes config.json, which keeps the flags of the run, and model.safetensors."""
    weights = whole_on_cpu(model.state_dict(), keep=RANK == 0)
    if RANK > 0:
        return
    os.makedirs(directory, exist_ok=True)
    config, flags = model.config, run_flags(directory)
    written = {"nanopref": flags} if flags else {}
    written |= config_fields(config, weights, eos_token_id)
    write_json(os.path.join(directory, "config.json"), written, indent=2)
    with replacing(os.path.join(directory, "model.safetensors")) as temporary:
        save_file(file_tensors(weights, config), temporary, metadata={"format": "pt"})


# ------------------------------------------------------------------ LoRA adapters, in PEFT's layout

# The layers that have a correction are those of lora.py, with lora_A, (rank, in), and lora_B, (out,
# rank).


def reward_head(folder):
    """Returns where a reward model that is an adapter reads its reward, "last" or "sum"."""
    return about_run(folder).get("reward_head", "last")


def about_run(folder):
    """Returns the content of the run.json that a run with --lora leaves next to its adapter; {} if
    there is none."""
    path = os.path.join(folder, "run.json")
    return read_json(path) if os.path.exists(path) else {}


def read_adapter(folder, model, layers):
    """Reads the adapter in a folder.

    model: the one that the adapter belongs to. layers: its linear layers, [(name, layer)].
    Returns (the name of the model that it belongs to, {layer: (A, B)}, the weight of the reward
    head or None). A layer computes x W' + (x A') B': the factor alpha / r is already in B.
    InputError says what is wrong with the adapter.
    """
    config = adapter_config(folder)
    base = config["base_model_name_or_path"]
    if about_run(folder).get("base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise InputError(f"{folder}: the weights of {base!r} have changed since this adapter "
                         "was trained; train it again, or put the old weights back")
    tensors = adapter_tensors(folder)
    head = tensors.pop(REWARD_HEAD, None)
    is_reward_model = head is not None
    if is_reward_model != hasattr(model, "score"):
        raise InputError(f"{folder}: this is {KIND[is_reward_model]}, not "
                         f"{KIND[not is_reward_model]}")
    if head is not None and head.shape != model.score.weight.shape:
        raise InputError(f"{folder}: its {REWARD_HEAD} is not that of one reward")
    corrections = {}
    for layer, linear in layers:
        parts = []
        for name, rows in parts_in_files(model, layer):
            A = tensors.pop(f"{name}.lora_A.weight", torch.zeros(0, linear.in_features))
            B = tensors.pop(f"{name}.lora_B.weight", torch.zeros(rows, 0))
            if A.shape != (B.size(1), linear.in_features) or B.size(0) != rows:
                raise InputError(f"{folder}: not an adapter of {base!r}, where {name} has other "
                                 "sizes")
            rank = max(1, len(A)) ** (0.5 if config.get("use_rslora") else 1)
            parts.append((A, B * (config["lora_alpha"] / rank)))
        if any(len(A) for A, B in parts):
            corrections[layer] = fused(parts)
    if tensors:
        raise InputError(f"{folder}: its {next(iter(tensors))} can't be read, because LoRA here is "
                         "only for the transformer's linear layers; merge the adapter into its "
                         "model (PEFT: merge_and_unload, then save_pretrained) and name that "
                         "folder")
    return base, corrections, head


def fused(parts):
    """Joins the corrections of several layers that read the same x, such as queries, keys and
    values, into one: the outputs stand one after another. parts: [(A, B)]. Returns (A, B). If the
    parts do not share their A, the rank of the result is the sum of their ranks."""
    As, Bs = zip(*parts)
    if all(torch.equal(A, As[0]) for A in As):
        return As[0], torch.cat(Bs)                                     # (rank, in), (out, rank)
    return torch.cat(As), torch.block_diag(*Bs)


def adapter_tensors(folder):
    """Returns the tensors of an adapter's file, {name in the model: tensor}, float32 or wider."""
    readers = {"adapter_model.safetensors": load_file, "adapter_model.bin": load_state_dict}
    find = Finder(folder)
    for filename, load in readers.items():
        path = os.path.join(folder, filename)
        if os.path.exists(path):
            find.last = filename
            with naming_damage(find):
                tensors = load(path)
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                is_lora = name.endswith((".lora_A.weight", ".lora_B.weight", REWARD_HEAD))
                if is_lora and tensor.dim() != 2 or not torch.isfinite(tensor).all():
                    raise InputError(f"{folder}: the weights {name} are not a matrix of finite "
                                     "numbers")
                tensors[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            return tensors
    raise InputError(f"{folder}: no adapter_model.safetensors in this folder (has it been copied "
                     "whole?)")


def write_adapter(directory, model):
    """Writes the adapter of a model (lora.py) for PEFT to load, and run.json with the flags of the
    run. (A config.json would make transformers look for a whole model in the folder.)"""
    score = getattr(model, "score", None)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    (rank, scale), = {(len(layer.lora_A), layer.scale) for layer in layers.values()}
    tensors, targets = {}, set()
    for layer, linear in layers.items():
        parts = parts_in_files(model, layer)
        rows = linear.lora_B.detach().split([rows for _, rows in parts])
        for (name, _), B in zip(parts, rows):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = linear.lora_A.detach().clone()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B.clone()
            targets.add(name.split(".")[-1])
    if score is not None:
        tensors[PREFIX + REWARD_HEAD] = score.weight.detach()
    tensors = whole_on_cpu(tensors, keep=RANK == 0)
    if RANK > 0:
        return
    os.makedirs(directory, exist_ok=True)
    about = {"nanopref": run_flags(directory), "base_fingerprint": fingerprint(model)}
    if score is not None:
        about["reward_head"] = model.config.reward_head
    write_json(os.path.join(directory, "run.json"), about, indent=2)
    with replacing(os.path.join(directory, "adapter_model.safetensors")) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(os.path.join(directory, "adapter_config.json"), {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "base_model_name_or_path": model.lora_base, "r": rank, "lora_alpha": scale * rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(targets),
        "modules_to_save": None if score is None else ["score"],
        "fan_in_fan_out": "c_attn" in targets,          # GPT-2's Conv1D has its weight transposed
        "inference_mode": True}, indent=2)


def fingerprint(model):
    """Returns a hash of the first thousand numbers of each frozen weight of a transformer. That is
    fast, and enough to notice that the weights have changed."""
    digest = hashlib.sha256()
    for name, weight in model.transformer.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            some = weight.detach().flatten()[:1000].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


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
    """Says what some files are and what to do, or returns None. names: without their folders."""
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
        except pickle.UnpicklingError as error:     # torch advises to run what is in there
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
