"""Checkpoints of other kinds: nanoGPT's is read, the others are named as what they are."""
import fnmatch
import os
import zipfile

import torch

from support.files import check_zip
from support.flags import InputError

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
    """What torch.save wrote, {name: tensor}, without running code from it. Any error if it is
    damaged; InputError if it is an optimizer's."""
    is_zip = zipfile.is_zipfile(path)       # files from before torch 1.6 are not
    if is_zip:
        check_zip(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if isinstance(content, dict) and "param_groups" in content:
        raise InputError(f"{path}: the state of an optimizer, not a model's weights")
    return content


# ------------------------------------------------------------------ nanoGPT

def nanogpt_file(name):
    """The path of nanoGPT's checkpoint: a file that ends in .pt, or ckpt.pt in a folder without a
    config.json. None if there is none."""
    if os.path.isfile(name) and name.endswith(".pt"):
        return name
    path = os.path.join(name, "ckpt.pt")
    if os.path.isfile(path) and not os.path.exists(os.path.join(name, "config.json")):
        return path
    return None


def nanogpt_config(path):
    """The config.json that nanoGPT's checkpoint would have. InputError if it is another thing."""
    try:
        content = load_torch_file(path)
    except InputError:
        raise
    except Exception as error:      # torch raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: unreadable checkpoint: damaged or not whole: {reason}"
                         ) from error
    sizes = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(sizes, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{path}: not a checkpoint of nanoGPT, which has 'model' and "
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
