"""Computes what is constant once and keeps it on disk, in files named by what it depends on."""
import hashlib
import json
import os

import numpy as np

from support.files import remove_leftovers, replacing
from support.flags import InputError
from support.processes import first_says, is_first, wait
from support.sharding import whole


def cached(folder, name, entry, compute, *args, **options):
    """Returns compute(*args, **options), an array or a value that JSON can hold. Computes it once;
    later it comes from folder/name-entry.npz. InputError if a number in it is not finite."""
    path = os.path.join(folder, f"{name}-{entry}.npz")
    if is_first():
        remove_leftovers(folder)
    value = read(path)
    if first_says(value is not None):
        print(f"{name}: from {path}")
        return value
    value = compute(*args, **options)
    try:
        arrays = to_arrays(value)
    except ValueError as error:
        raise InputError(f"{name}: the model gives numbers that are not finite") from error
    if is_first():
        write(path, arrays)
    wait()
    return value


def to_arrays(value):
    """Returns {kind: array} of a value to keep. ValueError if a number is not finite."""
    if not isinstance(value, np.ndarray):
        return {"json": np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)}
    if not np.isfinite(value).all():
        raise ValueError
    return {"array": value}


def write(path, arrays):
    """Writes arrays to a file. If that is not possible (the disk is full, or the folder belongs to
    somebody else), they will be computed again next time, which is no reason to stop."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except (InputError, OSError) as error:
        print(f"warning: not kept for the next run: {error}")


def read(path):
    """Returns the value in a cached file; None if there is no file, or it is damaged."""
    try:
        with np.load(path) as arrays:       # compares the checksums in the file
            if "array" in arrays:
                return arrays["array"]
            return json.loads(arrays["json"].tobytes())
    except FileNotFoundError:
        return None
    except Exception as error:      # numpy and zipfile raise many kinds
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        print(f"{path}: {reason}, computed anew")
        return None


def cache_folder(init_from, out_dir):
    """Returns the folder for a reference's scores and samples: in its own folder, so that all
    policies trained from it share them. For a hub name, or where nothing can be written next to the
    reference, in the run's folder."""
    cache = os.path.join(init_from, "cache")
    folder = cache if os.path.lexists(cache) else init_from
    if os.path.isdir(folder) and os.access(folder, os.W_OK):
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
    """Returns a hash of all tensors of a model and of their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + whole(tensor.detach()).numpy().tobytes())
    return digest.hexdigest()


def hash_examples(examples):
    """Returns a hash of examples: (prompt ids, [response ids, ...])."""
    digest = hashlib.sha256()
    for prompt, responses in examples:
        for ids in (prompt, *responses):
            digest.update(np.asarray(ids, np.int32).tobytes() + b"|")
        digest.update(b"\n")
    return digest.hexdigest()
