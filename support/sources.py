"""Finds and reads the records of a file, of a folder, or of a data set on the hub.

To choose a split of a folder or of a hub data set, write it after a colon, as in
`folder:train_prefs`. Join several splits by a plus, as in `folder:train_a+train_b`. In a folder,
the names of files say which split they belong to (`train.jsonl`,
`data/test-00000-of-00002.parquet`, `train/0000.parquet`). If it is not clear which split to train
on, nothing is read.

JSON, CSV and Parquet files are read here, without keeping a copy, so you train on what is in the
file now. (`datasets` would keep a copy, named by path and time, and guess types. Only data sets on
the hub are read with it.)
"""
import contextlib
import csv
import gzip
import json
import os
import re
import zlib

from support.flags import InputError, in_a_line

ENDINGS = ("jsonl", "json", "csv", "parquet")       # of files; all but Parquet also with .gz
# JSON files that describe a data set
NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
           "state.json", "package.json", "metadata.json"}
# What stands at the end of the names of the parts of one split: "-00000-of-00003-a1b2c3", "_2"
PART_NUMBER = re.compile(r"(?:^|[-._ ])(?:(?:part|shard)[-._ ]?)?(\d+)"
                         r"(?:[-._ ]of[-._ ](\d+)(?:[-._ ][0-9a-f]{6,})?)?$")
HIDDEN = re.compile(r"(^|/)(\.|__)")
WORD = r"(?:^|[-._ /\d])(?:{})(?:[-._ /\d]|$)"
TRAINING = re.compile(WORD.format("train|training"), re.I)
HELD_OUT = re.compile(WORD.format("test|testing|eval|evaluation|validation|valid|dev|val"), re.I)


def name_and_split(data):
    """Splits --data in two: "name:split" is (name, split), a name alone (name, None)."""
    name, _, split = data.rpartition(":")
    if not name or not split or os.path.exists(data):
        return data, None
    if os.path.isfile(name):
        raise InputError(f"--data: {name} is one file; splits such as {split!r} are parts of a "
                         "folder or of a data set on the hub")
    return name, split


def choose_splits(names, wanted, data):
    """Returns which of the splits to read: those that are wanted ("a" or "a+b"), or else the one
    for training. InputError lists them all if there is no such split, or no single one to
    train on."""
    last = [name.rpartition("/")[2] for name in names]
    short = {name: own if last.count(own) == 1 else name for name, own in zip(names, last)}
    there = f"{data} has {listed(list(short.values()))}"
    if wanted is not None:
        chosen = {}
        for part in wanted.split("+"):
            matching = [name for name in names if name == part] or [
                name for name in names if f"/{part}/" in f"/{name}/"]
            if not matching:
                raise InputError(f"--data: no split {part!r}: {there}")
            chosen |= dict.fromkeys(matching)
        return list(chosen)
    candidates = [name for name in names if TRAINING.search(name)] or [
        name for name in names if not HELD_OUT.search(name)]
    if len(candidates) == 1:
        return candidates
    how = f"name one with --data={data}:{short[(candidates or names)[0]]}"
    if not candidates:
        raise InputError(f"--data: no train split: {there}; {how}")
    several = "+".join(short[name] for name in candidates[:2])
    raise InputError(f"--data: several splits to train on: {there}; {how}, or several, as in "
                     f"{several}")


def listed(names, most=8):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ------------------------------------------------------------------ folders


def folder_files(folder, split=None, say=print):
    """Finds the files of a folder that hold the rows of its training split, or of the split(s)
    named. say: is called with the names of the files, and of those that are not read. InputError if
    there is none, if there are several splits to train on, or if a split is there twice."""
    splits = {}         # {split: its files}, below the folder, hidden ones left out
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            file = os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            stem, ending = stem_and_ending(file)
            if (ending.removesuffix(".gz") in ENDINGS and name not in NO_ROWS
                    and not HIDDEN.search(file)):
                # The name of its split is its own with the folders before it, without a number.
                folders, _, own = stem.rpartition("/")
                named = "/".join(filter(None, (folders, PART_NUMBER.sub("", own)))) or "data"
                splits.setdefault(named, []).append(file)
    if not splits:
        raise InputError(f"--data: {folder}: no file in it ends in {', '.join(ENDINGS)} (or .gz)")
    chosen = []
    for name in choose_splits(list(splits), split, folder):
        check_parts(folder, name, splits[name], say)
        chosen += splits[name]
    others = [file for files in splits.values() for file in files if file not in chosen]
    not_read = f"; not read: {listed(sorted(others))}" if others else ""
    say(f"reads {listed(chosen)}{not_read}")
    return chosen


def stem_and_ending(file):
    """Splits the name of a file: "data/train-0.jsonl.gz" is ("data/train-0", "jsonl.gz")."""
    gz = ".gz" if file.lower().endswith(".gz") else ""
    stem, _, ending = file[:len(file) - len(gz)].rpartition(".")
    return stem, ending.lower() + gz


def check_parts(folder, name, files, say):
    """Raises InputError if the files of a split are not the parts of one data set: if it is there
    in two formats, plain and packed, whole and in parts, or exported twice."""
    kinds = {}          # {(ending, has a number, of how many): a file}
    for file in files:
        stem, ending = stem_and_ending(file)
        number = PART_NUMBER.search(os.path.basename(stem))
        kinds.setdefault((ending, number is not None, number and number[2]), file)
    total = int(list(kinds)[0][2] or len(files))
    if len(kinds) > 1 or len(files) > total:
        twice = list(kinds.values()) if len(kinds) > 1 else files
        raise InputError(f"--data: {folder}: the split {name!r} is there more than once "
                         f"({listed(twice)}); name one file, such as --data="
                         f"{os.path.join(folder, twice[0])}, or leave one of them in the folder")
    if len(files) < total:
        say(f"warning: {len(files)} of the {total} files of the split {name!r} are there")


# ------------------------------------------------------------------ the hub


def quiet_datasets():
    import datasets  # here, so that the rest runs where it is not installed
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)   # we report its errors
    return datasets


def open_hub(data):
    """Opens a data set on the hub: owner/name, or owner/name/folder for the files in one folder of
    it. Returns a datasets.Dataset of the split that is named after a colon, or else of the one to
    train on. InputError says what is wrong, and which splits there are."""
    source, split = name_and_split(data)
    suffix = source.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if (suffix in ENDINGS or source.startswith((".", "/", "~")) or source.count("/") > 2
            or not source):
        raise InputError(f"--data: {data}: no such file")
    owner_name, folder = "/".join(source.split("/")[:2]), source.split("/")[2:]
    where = {"data_dir": folder[0] if folder else None}
    datasets = quiet_datasets()
    try:
        return datasets.load_dataset(owner_name, split=split or "train", **where)
    except Exception as error:     # it raises whatever its readers do
        names = []
        with contextlib.suppress(Exception):        # the error above says what is wrong
            builder = datasets.load_dataset_builder(owner_name, **where)
            names = list(map(str, builder.info.splits or builder.config.data_files or ()))
        if names and not set((split or "train").split("+")) <= set(names):
            chosen = "+".join(choose_splits(names, split, source))
            return open_hub(f"{source}:{chosen}")
        raise InputError(f"--data: {data}: no such file or folder; and as a data set of the hub: "
                         f"{in_a_line(error.__cause__ or error)}") from error


# ------------------------------------------------------------------ records

def check_is_file(path):
    """Raises InputError if there is something with this name that is neither a file nor a folder: a
    pipe or a device may have no end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"--data: {path}: a pipe, socket or device, not a file; save what comes "
                         "out of it in a file first")


def read_records(data, hub=None, say=print):
    """Yields (row number, record) of a JSONL, JSON, CSV or Parquet file (text also gzipped), of the
    files of one split of a folder, or of a hub data set; say: is called with the files or the split
    that are read. In place of a record that can't be read stands the ValueError that says why.
    InputError if the rest can't be read either."""
    try:
        source, split = name_and_split(data)
        check_is_file(source)
        if os.path.isfile(source):
            yield from read_file(source)
        elif os.path.isdir(source):
            for file in folder_files(source, split, say):
                for number, record in read_file(os.path.join(source, file)):
                    yield f"{number} of {file}", record
        else:
            hub = hub or open_hub(data)
            if hub.split:
                others = [name for name in hub.info.splits or () if name != str(hub.split)]
                not_read = f"; not read: {', '.join(others)}" if others else ""
                say(f"reads the split {hub.split}{not_read}")
            batches = hub.iter(1000)        # {name: list of values}; faster than single rows
            yield from enumerate((dict(zip(batch, values)) for batch in batches
                                  for values in zip(*batch.values())), 1)
    except InputError:
        raise
    except Exception as error:     # gzip, pyarrow and datasets raise whatever their readers do
        packed = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
        reason = "not a whole gzip file: " * packed + in_a_line(error.__cause__ or error)
        raise InputError(f"--data: {data}: {reason}") from error


KINDS = {       # the first bytes of a file: what it is
    b"\xff\xfe": "UTF-16 text; save it as UTF-8", b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "packed with gzip", b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"PAR1": "Parquet", b"PK\x03\x04": "a zip file or a spreadsheet; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch it with git lfs pull"}


def read_file(path):
    """Yields (row number, record) of one file, as `read_records` does."""
    packed = path.lower().endswith(".gz")
    suffix = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix not in ENDINGS:
        raise InputError(f"--data: {path}: files end in {', '.join(ENDINGS)}, or one of these and "
                         ".gz")
    check_is_file(path)
    with open(path, "rb") as file:
        beginning = file.read(40)
    if not beginning:
        raise InputError(f"--data: {path}: the file is empty")
    expected = {"packed with gzip"} if packed else {"Parquet"} if suffix == "parquet" else set()
    for signature, kind in KINDS.items():
        if beginning.startswith(signature) and kind not in expected:
            raise InputError(f"--data: {path}: by its first bytes it is {kind}")
    if suffix == "parquet":
        yield from enumerate(parquet_records(path), 1)
        return
    open_text = gzip.open if packed else open
    # A byte that is not UTF-8 becomes half a letter, which `checked_text` refuses where it matters.
    with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from {"jsonl": json_lines, "json": json_values, "csv": csv_records}[suffix](file)


def unique_names(pairs):
    """Makes a dict of [(name, value)]. ValueError if a name is there twice, because it is not clear
    which one is meant."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} is there twice")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=unique_names)


def json_lines(lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, DECODER.decode(line.removeprefix("\ufeff"))
            except RecursionError:
                yield number, ValueError("JSON nested too deeply")
            except ValueError as error:
                if number == 1 and line.strip().startswith("["):
                    raise ValueError("row 1: not JSON; an array over several lines belongs into a "
                                     "file that ends in .json") from None
                yield number, ValueError(f"not JSON: {error}")


def json_values(file):
    """Yields the elements of a JSON array; or, if the file is none, of JSON lines."""
    text = file.read()
    if not text.lstrip().startswith("["):
        yield from json_lines(text.split("\n"))
        return
    try:
        yield from enumerate(DECODER.decode(text), 1)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def csv_records(file):
    """Yields the records of a CSV file. All fields but scores are text. An empty field counts as
    missing, and a row with too many fields as a mistake."""
    csv.field_size_limit(2 ** 31 - 1)       # posts may be long
    reader, number = csv.DictReader(file, strict=True), 0
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if len(names) == 1 and re.search(r"[;\t|]", names[0]):
            raise ValueError("the columns of the first line are not separated by commas")
        unique_names([(name, None) for name in names if name])
        reader.fieldnames = names
        for number, fields in enumerate(reader, 1):
            if None in fields:
                yield number, ValueError(f"{len(names) + len(fields[None])} fields, the header "
                                         f"has {len(names)}")
            else:
                yield number, {name: csv_value(name, text) for name, text in fields.items()}
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: not CSV: {error}") from None


def csv_value(name, text):
    if name in ("score_chosen", "score_rejected"):
        with contextlib.suppress(ValueError, TypeError):    # of what is no number, or missing
            return float(text)
    return text or None


def parquet_records(path):
    import pyarrow.parquet  # comes with datasets
    file = pyarrow.parquet.ParquetFile(path)
    unique_names([(name, None) for name in file.schema_arrow.names])
    for batch in file.iter_batches(1000):
        yield from batch.to_pylist()
