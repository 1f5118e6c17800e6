"""What is constant is computed once: JSON values on disk, named by what they depend on."""
import hashlib
import json
import os

import numpy as np

from support.files import write_json
from support.flags import InputError
from support.processes import first_says, is_first, wait
from support.sharding import whole


def cached(folder, name, entry, compute, *args, **options):
    """compute(*args, **options), an array or what JSON can hold; from folder/name-entry.json if it
    is there and whole. Arrays come back as lists. InputError if a number is not finite."""
    path = os.path.join(folder, f"{name}-{entry}.json")
    value = read(path)
    if first_says(value is not None):
        print(f"{name}: from {path}")
        return value
    value = compute(*args, **options)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if is_first():
        try:
            checksum = key(json.dumps(value, allow_nan=False))
        except ValueError as error:
            raise InputError(f"{name}: the model gives numbers that are not finite") from error
        os.makedirs(folder, exist_ok=True)
        write_json(path, {"checksum": checksum, "value": value})
    wait()
    return value


def read(path):
    """The value in a cached file, or None if there is none or it is not what was written."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["checksum"] == key(json.dumps(content["value"])):
            return content["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass            # not even JSON of the right shape: as damaged as a wrong checksum
    print(f"{path}: damaged, computed anew")
    return None


def cache_folder(init_from, out_dir):
    """The reference's own folder, so that all policies trained from it share one cache; the run's
    for a hub name, or where nothing can be written to the reference's."""
    cache = os.path.join(init_from, "cache")
    there = cache if os.path.isdir(cache) else init_from
    if os.path.isdir(init_from) and os.access(there, os.W_OK):
        return cache
    return os.path.join(out_dir, "cache")


def key(*parts):
    """A short hash of bytes, arrays and printable values, for the names of cached files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = part.tobytes()
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def hash_weights(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + whole(tensor.detach()).numpy().tobytes())
    return digest.hexdigest()


def hash_examples(examples):
    """examples: (prompt ids, [response ids, ...])."""
    digest = hashlib.sha256()
    for prompt, responses in examples:
        for ids in (prompt, *responses):
            digest.update(np.asarray(ids, np.int32).tobytes() + b"|")
        digest.update(b"\n")
    return digest.hexdigest()
