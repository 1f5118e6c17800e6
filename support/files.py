"""Files that are whole or not there."""
import contextlib
import json
import os

from support.flags import InputError


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to; after the block the file has its own name, and the access
    rights of any new file. If the block fails, nothing is left."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)     # safetensors makes them private
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_json(path, value, indent=None):
    """Writes JSON; ValueError for NaN and infinity, which are none."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, allow_nan=False)
        file.write("\n")


def read_json(path, kind=dict):
    """The value in a JSON file. InputError if there is none, or none of this kind."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"damaged: {error}"
        raise InputError(f"{path}: {reason}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path}: damaged: a {type(value).__name__}, not a {kind.__name__}")
    return value
