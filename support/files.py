"""Files that are whole or not there."""
import contextlib
import json
import os
import zipfile

from support.flags import InputError


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to; after the block the file is on the disk, and has its own name
    and the access rights of any new file. If the block fails, nothing is left."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)     # safetensors makes them private
        wait_for_disk(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # some systems can't wait for a folder
            wait_for_disk(os.path.dirname(path) or ".")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def wait_for_disk(path):
    """Until a file's content, or a folder's list of names, would survive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"damaged: {error}"
        raise InputError(f"{path}: {reason}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path}: damaged: a {type(value).__name__}, not a {kind.__name__}")
    return value


def check_zip(path):
    """ValueError if a zip file is not as it was written: torch.save's files are zip files, whose
    checksums torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"{damaged} is not what its checksum says")
