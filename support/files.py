"""Writes files that are whole or not there; reads and writes JSON."""
import contextlib
import json
import os
import re
import secrets
import shutil
import time
import zipfile

from support.flags import InputError, in_a_line

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")      # the names that `replacing` gives
A_DAY = 24 * 60 * 60


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name, to write a file to. When the block ends, what was written is on the
    disk and gets the name `path`; if the block fails, nothing is left. InputError names the file if
    the system can't write it, because the disk is full for example."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"    # two processes may write the same file
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
    except InputError:
        raise
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        raise InputError(f"{path}: can't be written: {reason}") from error
    finally:
        remove(temporary)


def settle(path):
    """Gives a new file the access rights of any new file, and waits until a loss of power would not
    damage it."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)      # safetensors makes it private
    with open(path, "rb") as file:
        os.fsync(file)


def system_reason(error):
    """Returns why the system could not write, such as "No space left on device"; None if the error
    is of another kind. torch and safetensors each have their own way to say it."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)     # numpy says how much it could write
        in_rust = re.search(r"\(os error (\d+)\)", str(error))
        if in_rust:
            return os.strerror(int(in_rust[1]))
        error = error.__context__
    return None


@contextlib.contextmanager
def naming_file(path):
    """Turns the system's refusal to write a file into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror or error}") from error


def remove_leftovers(folder, age=A_DAY):
    """Removes what killed processes had not finished writing by `replacing`: what nobody has
    written to for a day. age: another time, in seconds."""
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):      # gone already, or somebody else's
                if TEMPORARY.search(name) and os.stat(path).st_mtime <= time.time() - age:
                    remove(path)


def remove(path):
    """Removes a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def write_json(path, value, indent=None):
    """Writes a JSON file. ValueError for NaN and infinity, which JSON does not have."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, allow_nan=False)
        file.write("\n")


def read_json(path):
    """Returns the object in a JSON file, a dict. InputError if there is none."""
    try:
        with open(path, "rb") as file:
            return json_object(file.read(), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def json_object(content, path):
    """Returns the object in the content of a JSON file, bytes, as a dict. InputError names the file
    if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {in_a_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def check_zip(path):
    """Raises ValueError if a zip file is not as it was written: torch.save's files are zip files,
    whose checksums torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"{damaged} is not what its checksum says")
