"""Writes files and folders that are whole or not there; reads and writes JSON."""
import contextlib
import json
import os
import re
import secrets
import shutil
import time
import zipfile

from support.flags import InputError, in_a_line

try:
    import fcntl
except ImportError:     # Windows has no such locks
    fcntl = None

# Names that `replacing` gives, and those of safetensors.
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$|^\.tmp\w{6}$")
A_DAY = 24 * 60 * 60


@contextlib.contextmanager
def replacing(path, folder=False):
    """Yields a temporary path, of an empty file or folder, to write to. When the block ends, what
    was written is on the disk and gets the name `path`; if the block fails, nothing is left.
    InputError names the file if the system can't write it, because the disk is full for example.

    The temporary name is random, as processes of several machines may share a cache, and it is
    locked while its process lives, so that `remove_leftovers` tells what a kill has left."""
    with naming_file(path):
        temporary, held = new_temporary(path, folder)
    try:
        yield temporary
        settle(temporary)
        try:
            os.replace(temporary, path)
        except OSError:
            if not (folder and os.path.isdir(path)):    # else another process was faster
                raise
    except InputError:
        raise
    except Exception as error:
        reason = system_reason(error, temporary)
        if reason is None:
            raise
        raise InputError(f"{path}: can't be written: {reason}") from error
    finally:
        remove(temporary)
        if held is not None:
            os.close(held)


def new_temporary(path, folder):
    """Makes an empty file or folder next to a path. Returns its name, and its lock."""
    while True:
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        if folder:
            os.mkdir(temporary)
        else:
            open(temporary, "xb").close()
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            held = lock(temporary)
            if os.path.exists(temporary):
                return temporary, held
        # Another process took it for a leftover before it was locked: once more.


def settle(path):
    """Gives a new file, or those in a new folder, the access rights of any new file, and waits
    until a loss of power would not damage them."""
    names = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []
    umask = os.umask(0)
    os.umask(umask)
    for name in names or [path]:
        os.chmod(name, 0o666 & ~umask)      # safetensors makes them private
        number = os.open(name, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def naming_file(path):
    """Turns the system's refusal to write a file into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror or error}") from error


def system_reason(error, path):
    """Returns why the system could not write to a path, such as "No space left on device"; None if
    the error is of another kind. torch, safetensors and numpy each have their own way to say it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.strerror
        in_rust = re.search(r"\(os error (\d+)\)", str(error))
        if in_rust:
            return os.strerror(int(in_rust[1]))
        error = error.__context__
    name = os.path.join(path, "more") if os.path.isdir(path) else path
    try:        # numpy only says how much it could write: is there room for more?
        with open(name, "ab") as file:
            file.write(bytes(2 ** 20))
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    return None


def lock(path):
    """Locks a file or a folder until the number that is returned is closed, or the process ends.
    Returns None where the file system has no locks. BlockingIOError if another process has it."""
    if fcntl is None:
        return None
    number = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        fcntl.flock(number, fcntl.LOCK_NB | fcntl.LOCK_EX)
    except BlockingIOError:
        os.close(number)
        raise
    except OSError:
        os.close(number)
        return None
    return number


def remove_leftovers(folder):
    """Removes what killed processes had not finished writing by `replacing`. What a live process
    writes is locked; where there are no locks, it is what was changed within a day."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if TEMPORARY.search(name):
            with contextlib.suppress(OSError):      # in use, gone already, or somebody else's
                number = lock(path)
                if number is not None or os.stat(path).st_mtime < time.time() - A_DAY:
                    remove(path)
                if number is not None:
                    os.close(number)


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
