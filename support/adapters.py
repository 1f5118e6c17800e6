"""Reads and writes LoRA adapters in PEFT's layout: adapter_config.json, adapter_model.safetensors.

The layers that have a correction are those of lora.py, with lora_A, (rank, in), and lora_B, (out,
rank).
"""
import hashlib
import os

import torch
from safetensors.torch import load_file, save_file

from support.checkpoint import (
    Finder,
    adapter_config,
    load_state_dict,
    naming_damage,
)
from support.device import is_first, whole
from support.families import parts_in_files
from support.files import read_json, replacing, write_json
from support.flags import InputError
from support.run import run_flags

PREFIX = "base_model.model."        # which PEFT puts before the name of each tensor
HEAD = "score.weight"


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

    model: with the weights that the adapter belongs to. layers: its linear layers, [(name, layer)].
    Returns ({layer: (A, B)}, the weight of the reward head or None). A layer computes
    x W' + (x A') B': the factor alpha / r is already in B. InputError says what is wrong with the
    adapter.
    """
    config = adapter_config(folder)
    if about_run(folder).get("base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise InputError(f"{folder}: an adapter of other weights than {base_of(folder)!r} has now; "
                         "train it again, or put the old weights back")
    tensors = read_tensors(folder)
    head = tensors.pop(HEAD, None)
    kinds = ["a language model", "a reward model"]
    if (head is not None) != hasattr(model, "score"):
        kinds.sort(reverse=head is not None)
        raise InputError(f"{folder}: this is {kinds[0]}, not {kinds[1]}")
    if head is not None and head.shape != model.score.weight.shape:
        raise InputError(f"{folder}: its {HEAD} is not that of one reward")
    corrections = {}
    for layer, linear in layers:
        parts = []
        for name, rows in parts_in_files(model, layer):
            A = tensors.pop(f"{name}.lora_A.weight", torch.zeros(0, linear.in_features))
            B = tensors.pop(f"{name}.lora_B.weight", torch.zeros(rows, 0))
            if A.shape != (B.size(1), linear.in_features) or B.size(0) != rows:
                raise InputError(f"{folder}: not an adapter of {base_of(folder)!r}, where {name} "
                                 "has other sizes")
            rank = max(1, len(A)) ** (0.5 if config.get("use_rslora") else 1)
            parts.append((A, B * (config["lora_alpha"] / rank)))
        if any(len(A) for A, B in parts):
            corrections[layer] = fused(parts)
    if tensors:
        raise InputError(f"{folder}: its {next(iter(tensors))} can't be read, because LoRA here is "
                         "of the transformer's linear layers alone; merge the adapter into its "
                         "model (PEFT: merge_and_unload, then save_pretrained) and name that "
                         "folder")
    return corrections, head


def fused(parts):
    """Joins the corrections of several layers that read the same x, such as queries, keys and
    values, into one: the outputs stand one after another. parts: [(A, B)]. Returns (A, B). If the
    parts do not share their A, the rank of the result is the sum of their ranks."""
    As, Bs = zip(*parts)
    if all(torch.equal(A, As[0]) for A in As):
        return As[0], torch.cat(Bs)                                     # (rank, in), (out, rank)
    return torch.cat(As), torch.block_diag(*Bs)


def base_of(folder):
    """Returns the folder or hub name of the model that an adapter belongs to, or None if the folder
    holds no adapter."""
    config = adapter_config(folder)
    return None if config is None else config["base_model_name_or_path"]


def read_tensors(folder):
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
                is_lora = name.endswith((".lora_A.weight", ".lora_B.weight", HEAD))
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
        tensors[PREFIX + HEAD] = score.weight.detach()
    tensors = whole(tensors, keep=is_first())
    if not is_first():
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
