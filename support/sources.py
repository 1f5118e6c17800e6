"""Finds rows: in a file, a folder with files of several splits, or a data set on the hub.

A split of a folder or of a hub data set is named after a colon, `folder:train_prefs`; several of
them with a plus, `folder:train_a+train_b`. In a folder the splits go by the names of the files
(`train.jsonl`, `data/test-00000-of-00002.parquet`, `train/0000.parquet`), unless its README
declares others, as on the hub. Where it is not clear what to train on, nothing is read.
"""
import os
import re

from support.flags import InputError, in_a_line

ENDINGS = ("jsonl", "json", "csv", "parquet")       # of files; all but Parquet also with .gz
# JSON files that describe a data set
NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
           "state.json", "package.json", "metadata.json"}
# What stands at the end of the names of the parts of one split: "-00000-of-00003-a1b2c3", "_2"
PART_NUMBER = re.compile(r"(?:^|[-._ ])(?:(?:part|shard)[-._ ]?)?(\d+)"
                         r"(?:[-._ ]of[-._ ](\d+)(?:[-._ ][0-9a-f]{6,})?)?$")
WORD = r"(?:^|[-._ /\d])(?:{})(?:[-._ /\d]|$)"
TRAINING = re.compile(WORD.format("train|training"), re.I)
HELD_OUT = re.compile(WORD.format("test|testing|eval|evaluation|validation|valid|dev|val"), re.I)
# Files with rows in them that are not read
OTHER_ENDINGS = (".arrow", ".tsv", ".xlsx", ".ndjson", ".jsonlines", ".zst", ".bz2", ".xz", ".zip")


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
    for training. InputError names them all if there is no such split, or not one alone."""
    last = [name.rpartition("/")[2] for name in names]
    short = {name: own if last.count(own) == 1 else name for name, own in zip(names, last)}
    there = f"{data} has {listed(list(short.values()))}"
    if wanted is not None:
        chosen = {}
        for part in wanted.split("+"):
            matching = [name for name in names if name == part]
            matching = matching or [name for name in names if f"/{part}/" in f"/{name}/"]
            if not matching:
                raise InputError(f"--data: no split {part!r}: {there}")
            chosen |= dict.fromkeys(matching)
        return list(chosen)
    training = [name for name in names if TRAINING.search(name)]
    candidates = training or [name for name in names if not HELD_OUT.search(name)]
    if len(candidates) == 1:
        return candidates
    first = short[(candidates or names)[0]]
    how = f"name one with --data={data}:{first}"
    if not candidates:
        raise InputError(f"--data: no train split: {there}; {how}")
    raise InputError(f"--data: several splits to train on: {there}; {how}, or several, as in "
                     f"{first}+{short[candidates[1]]}")


def listed(names, most=8):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ------------------------------------------------------------------ folders


def folder_files(folder, split=None, say=print):
    """Finds the files of a folder that hold the rows of its training split, or of the split(s)
    named. say: is called with the names of the files, and of those that are not read. InputError if
    there is none, if there are several splits to train on, or if a split is there twice."""
    files, unreadable = data_files(folder)
    if not files:
        there = f"; there is {listed(unreadable)}" if unreadable else ""
        raise InputError(f"--data: {folder}: no file in it ends in {', '.join(ENDINGS)} (or .gz)"
                         f"{there}")
    splits = declared_splits(folder)
    if splits:
        names = choose_splits(list(splits), split, folder)
    else:
        splits = {}
        for file in files:
            splits.setdefault(split_name(file), []).append(file)
        names = choose_splits(list(splits), split, folder)
        for name in names:
            check_parts(folder, name, splits[name], say)
    chosen = [file for name in names for file in splits[name]]
    missed = [file for file in unreadable if TRAINING.search(file)]
    if missed and split is None and not any(map(TRAINING.search, chosen)):
        raise InputError(f"--data: {folder}: {listed(missed)} can't be read; files end in "
                         f"{', '.join(ENDINGS)} (or .gz); or name {listed(chosen)} itself")
    others = [file for file in files if file not in chosen] + unreadable
    not_read = f"; not read: {listed(others)}" if others else ""
    say(f"reads {listed(chosen)}{not_read}")
    return chosen


def data_files(folder):
    """Lists the files with rows in a folder and below it, but for hidden ones: their paths from
    there. Returns (those that can be read, those of other kinds)."""
    files, others = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            _, ending = stem_and_ending(name)
            path = os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            if name.startswith((".", "__")) or name in NO_ROWS:
                continue
            if ending.removesuffix(".gz") in ENDINGS:
                files.append(path)
            elif name.lower().endswith(OTHER_ENDINGS):
                others.append(path)
    return sorted(files), sorted(others)


def stem_and_ending(file):
    """Splits the name of a file: "data/train-0.jsonl.gz" is ("data/train-0", "jsonl.gz")."""
    gz = ".gz" if file.lower().endswith(".gz") else ""
    stem, _, ending = file[:len(file) - len(gz)].rpartition(".")
    return stem, ending.lower() + gz


def split_name(file):
    """Returns the name of the split that a file is, or is a part of: its own with the folders
    before it, without the number of the part; if there is nothing else in it, the folders alone,
    or "data"."""
    stem, _ = stem_and_ending(file)
    folders, _, own = stem.rpartition("/")
    own = PART_NUMBER.sub("", own)
    return "/".join(filter(None, (folders, own))) or "data"


def check_parts(folder, name, files, say):
    """Raises InputError if the files of a split are not the parts of one data set: if it is there
    in two formats, plain and packed, whole and in parts, or exported twice."""
    kinds, totals = {}, set()
    for file in files:
        stem, ending = stem_and_ending(file)
        number = PART_NUMBER.search(os.path.basename(stem))
        total = number[2] if number else None
        totals.add(total)
        kinds.setdefault((ending, number is not None, total), file)
    counted = totals.pop() if len(totals) == 1 else None
    if len(kinds) > 1 or (counted and len(files) > int(counted)):
        twice = list(kinds.values()) if len(kinds) > 1 else files
        raise InputError(f"--data: {folder}: the split {name!r} is there more than once "
                         f"({listed(twice)}); name one file, such as --data="
                         f"{os.path.join(folder, twice[0])}, or leave one of them in the folder")
    if counted and len(files) < int(counted):
        say(f"warning: {len(files)} of the {int(counted)} files of the split {name!r} are there")
    numbers = []
    for file in files:
        stem, _ = stem_and_ending(file)
        match = PART_NUMBER.search(os.path.basename(stem))
        if match and not match[2]:
            numbers.append(int(match[1]))
    gaps = sorted(set(range(min(numbers, default=0), max(numbers, default=0))) - set(numbers))
    if 0 < len(gaps) < len(files):      # more are steps, or dates
        say(f"warning: is a file of the split {name!r} missing? There is none with the number "
            f"{listed([str(number) for number in gaps])}")


def declared_splits(folder):
    """Returns {split: its files} if the README of a copy of a hub data set declares them, else
    {}."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
            head = re.match(r"---\n.*?\n---", file.read(2 ** 20), re.S)
    except (OSError, ValueError):
        return {}
    if not head or "\nconfigs:" not in head[0] or "data_files:" not in head[0]:
        return {}
    try:
        declared = quiet_datasets().load_dataset_builder(folder).config.data_files or {}
    except Exception:       # several configurations, or files that are not there: go by the names
        return {}
    root = os.path.realpath(folder)
    return {str(split): [os.path.relpath(os.path.realpath(file), root).replace(os.sep, "/")
                         for file in files] for split, files in declared.items()}


# ------------------------------------------------------------------ the hub


def quiet_datasets():
    import datasets  # here, so that the rest runs where it is not installed
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)   # we report its troubles
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
    try:
        return quiet_datasets().load_dataset(owner_name, split=split or "train", **where)
    except Exception as error:     # it raises whatever its readers do
        names = hub_splits(owner_name, where)
        if names and not set((split or "train").split("+")) <= set(names):
            chosen = "+".join(choose_splits(names, split, source))
            return open_hub(f"{source}:{chosen}")
        raise InputError(f"--data: {data}: no such file or folder; and as a data set of the hub: "
                         f"{in_a_line(error.__cause__ or error)}") from error


def hub_splits(owner_name, where):
    """Returns the names of the splits of a data set on the hub; none if it can't be told."""
    datasets = quiet_datasets()
    try:
        builder = datasets.load_dataset_builder(owner_name, **where)
        return list(map(str, builder.info.splits or builder.config.data_files or ()))
    except Exception:       # the error of reading says what is wrong
        return []
