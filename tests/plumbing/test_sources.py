"""Which files of a folder and which split are read, and what is said of rows that look odd."""
import gzip
import json
import re
from types import SimpleNamespace

import pytest

import runs.show as show
import train_policy
import train_rm
from data import get_tokenizer
from support.flags import InputError, comparison_flags, talk_flags
from support.rows import load_rows, parse_rows
from support.sources import name_and_split, open_hub
from support.tokens import tokenised_file

PAIR = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."}


def fill(folder, *files):
    """Writes files of one pair each, whose prompt is the file's name."""
    for file in files:
        path, pair = folder / file, {**PAIR, "prompt": file}
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            import pandas
            pandas.DataFrame([pair]).to_parquet(path)
        elif file.endswith(".csv"):
            path.write_text(f"prompt,chosen,rejected\n{file}, Hello!, Go away.\n")
        else:
            text = (json.dumps(pair) + "\n").encode()
            path.write_bytes(gzip.compress(text) if file.endswith(".gz") else text)
    return str(folder)


def read(data):
    """The files that the rows came from."""
    return [row["prompt"] for row in load_rows(data, say=lambda message: None)]


# ------------------------------------------------------------------ a folder

@pytest.mark.parametrize("files, wanted, not_read", [
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], "; not read: test.jsonl"),
    (["prefs.jsonl"], ["prefs.jsonl"], ""),
    (["prefs.csv", "validation.csv"], ["prefs.csv"], "; not read: validation.csv"),
    (["my_train.jsonl", "my_test.jsonl"], ["my_train.jsonl"], "; not read: my_test.jsonl"),
    (["train_0.jsonl", "train_1.jsonl", "train_2.jsonl"],
     ["train_0.jsonl", "train_1.jsonl", "train_2.jsonl"], ""),
    (["data/train-00000-of-00002-a1b2c3d4.parquet", "data/train-00001-of-00002-0a0b0c0d.parquet"],
     ["data/train-00000-of-00002-a1b2c3d4.parquet", "data/train-00001-of-00002-0a0b0c0d.parquet"],
     ""),
    (["data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"],
     ["data/train_prefs-00000-of-00001.parquet"],
     "; not read: data/test_prefs-00000-of-00001.parquet"),
    (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
     ["train/0000.parquet", "train/0001.parquet"], "; not read: test/0000.parquet")])
def test_the_files_of_the_training_split(tmp_path, files, wanted, not_read):
    """They are the ones that are read, and they are named, and those that are not."""
    said = []
    data = fill(tmp_path, *files)
    assert [row["prompt"] for row in load_rows(data, say=said.append)] == wanted
    assert said[0] == f"reads {', '.join(wanted)}{not_read}"


def test_files_that_are_no_data(tmp_path):
    """Hidden files, what systems and editors leave, checksums, and JSON about the data."""
    data = fill(tmp_path, "train.jsonl", ".train.jsonl", "._train.jsonl", "train.jsonl.sha256",
                "train.jsonl~", "train.jsonl.bak", "dataset_info.json", "__MACOSX/train.jsonl",
                ".ipynb_checkpoints/train-checkpoint.jsonl", "README.txt")
    assert read(data) == ["train.jsonl"]
    with pytest.raises(InputError, match="no file in it ends in jsonl, json, csv, parquet"):
        read(fill(tmp_path / "other", "notes.txt"))


@pytest.mark.parametrize("files, there, how", [
    (["train.jsonl", "train_old_backup.jsonl"], "train, train_old_backup", "train"),
    (["train.jsonl", "train (1).jsonl"], r"train \(1\), train", r"train \(1\)"),
    (["train_gen-00000-of-00001.parquet", "train_prefs-00000-of-00001.parquet",
      "train_sft-00000-of-00001.parquet"], "train_gen, train_prefs, train_sft", "train_gen"),
    (["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet",
      "data/test_prefs-00000-of-00001.parquet"], "test_prefs, train_prefs, train_sft",
     "train_prefs"),
    (["prefs_v1.jsonl", "prefs_v2.jsonl"], "prefs_v1, prefs_v2", "prefs_v1"),
    (["harmless/train.jsonl.gz", "helpful/train.jsonl.gz"], "harmless/train, helpful/train",
     "harmless/train"),
    (["test.jsonl"], "test", "test")])
def test_it_is_not_guessed_what_to_train_on(tmp_path, files, there, how):
    data = fill(tmp_path, *files)
    with pytest.raises(InputError, match=f"{data} has {there}; name one with "
                                         f"--data={data}:{how}"):
        read(data)


@pytest.mark.parametrize("files", [
    ["train.csv", "train.jsonl"],
    ["train.jsonl", "train.jsonl.gz"],
    ["train.jsonl", "train_2.jsonl"],
    ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"],
    ["train-00000-of-00001-aaaaaaa1.parquet", "train-00000-of-00001-bbbbbbb2.parquet"]])
def test_a_split_that_is_there_twice(tmp_path, files):
    """In two formats, packed and not, whole and in parts, or exported twice."""
    data = fill(tmp_path, *files)
    for name in (data, f"{data}:train"):
        with pytest.raises(InputError, match=fr"the split 'train' is there more than once "
                                             fr"\({files[0]}, {files[1]}\); name one file, such"):
            read(name)


def test_parts_that_are_missing(tmp_path, capsys):
    list(load_rows(fill(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")))
    assert "warning: 2 of the 3 files of the split 'train' are there" in capsys.readouterr().out


@pytest.mark.parametrize("split, wanted", [
    ("train", ["helpful/train.jsonl", "harmless/train.jsonl"]),
    ("helpful/train", ["helpful/train.jsonl"]),
    ("helpful", ["helpful/train.jsonl", "helpful/test.jsonl"]),
    ("old", ["old.jsonl"]),
    ("old+helpful/train+old", ["old.jsonl", "helpful/train.jsonl"])])
def test_a_split_is_chosen_by_name(tmp_path, split, wanted):
    data = fill(tmp_path, "helpful/train.jsonl", "harmless/train.jsonl", "helpful/test.jsonl",
                "old.jsonl")
    assert sorted(read(f"{data}:{split}")) == sorted(wanted)


def test_a_split_that_is_not_there(tmp_path):
    data = fill(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(InputError, match=f"no split 'tset': {data} has test, train"):
        read(f"{data}:tset")
    with pytest.raises(InputError, match="train.jsonl is one file; splits such as 'x' are parts"):
        read(f"{data}/train.jsonl:x")
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        read(f"{data}/none.jsonl")


def test_cached_tokens_know_the_split(tmp_path, hub_cache, capsys):
    data = fill(tmp_path, "train_a.jsonl", "train_b.jsonl")
    tokenizer = get_tokenizer("tinytldr")
    tokens = [tokenised_file(f"{data}:train_{split}", tokenizer)["tokens"].tolist()
              for split in "abab"]
    assert tokens[:2] == tokens[2:] and tokens[0] != tokens[1]
    out = capsys.readouterr().out
    assert out.count("tokens: from") == 2
    assert out.count(f"{data}:train_b: reads train_b.jsonl; not read: train_a.jsonl\n") == 1


# ------------------------------------------------------------------ the hub

@pytest.fixture
def hub(monkeypatch, hub_cache):
    """A hub on which every data set has these splits: a dictionary."""
    import datasets
    splits = {}

    def load_dataset(name, data_dir=None, split=None):
        rows = []
        for part in split.split("+"):
            if part not in splits:
                raise ValueError(f'Unknown split "{part}".')
            rows += splits[part]
        return datasets.Dataset.from_list(rows, split=datasets.NamedSplit(split))

    class Builder:
        def __init__(self, name, data_dir=None):
            self.info = SimpleNamespace(splits=dict(splits))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    return splits


def test_splits_of_the_hub(hub, capsys):
    """As of a folder: the one to train on, those that are named, or else all names are said."""
    for split in ("train_prefs", "train_sft", "test_prefs"):
        hub[split] = [{**PAIR, "prompt": split}]
    there = "lab/set has train_prefs, train_sft, test_prefs"
    with pytest.raises(InputError, match=f"several splits to train on: {there}; name one with "
                                         "--data=lab/set:train_prefs, or several"):
        read("lab/set")
    with pytest.raises(InputError, match=f"no split 'train': {there}"):
        read("lab/set:train")
    assert read("lab/set:train_sft") == ["train_sft"]
    assert read("lab/set:train_sft+test_prefs") == ["train_sft", "test_prefs"]
    del hub["train_sft"]
    rows = [row["prompt"] for row in load_rows("lab/set")]
    assert rows == ["train_prefs"] and "reads the split train_prefs" in capsys.readouterr().out
    hub["train"] = [{**PAIR, "prompt": "train"}]
    assert read("lab/set") == ["train"]


def test_what_is_no_split_of_the_hub(hub_cache):
    for data in ("nobody/nothing:train", "./none:train"):
        with pytest.raises(InputError, match=f"--data: {data}: no such file"):
            open_hub(data)


# ------------------------------------------------------------------ the flag

@pytest.mark.parametrize("script, flags", [(train_policy, ["--loss=sft"]), (train_rm, [])])
def test_a_split_of_the_data_to_train_on(tmp_path, script, flags):
    """It is part of --data's name; the run may still not be written into the data."""
    data = fill(tmp_path / "prefs", "train_a.jsonl", "train_b.jsonl")
    args = script.parse_flags([*flags, f"--data={data}:train_a", f"--out_dir={tmp_path}/out"])
    assert args.data == f"{data}:train_a"
    with pytest.raises(InputError, match="train_a.jsonl is one file"):
        script.parse_flags([*flags, f"--data={data}/train_a.jsonl:train"])
    with pytest.raises(InputError, match="--out_dir: .* lies in --data"):
        script.parse_flags([*flags, f"--data={data}:train_a", f"--out_dir={data}/out"])


def test_words_are_no_folders(tmp_path, monkeypatch):
    """A run may be written into a folder that is called as the built-in data, or as the word for
    the scores of a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("tinytldr", "scores"):
        (tmp_path / name).mkdir()
    args = train_policy.parse_flags(["--loss=sft", "--out_dir=tinytldr/sft"])
    assert args.data == "tinytldr"
    flags = [f"--data={fill(tmp_path / 'prefs', 'train.jsonl')}", "--tokenizer=tinytldr"]
    args = train_policy.parse_flags([*flags, "--rewards=scores", "--out_dir=scores/e-dpo"])
    assert args.rewards == "scores"


def test_held_out_prompts_of_a_split(tmp_path):
    """evaluate.py and sample.py: --split is the held-out part; the error says how to name both."""
    for parse in (lambda flags: comparison_flags(["--oracle=o", *flags], ""),
                  lambda flags: talk_flags(["policy", *flags], "")):
        args = parse(["--data=folder:train_prefs", "--split=validation"])
        assert (args.data, args.split) == ("folder:train_prefs", "validation")
        with pytest.raises(InputError, match="--split: invalid choice: 'train_prefs' .*; a split "
                                             "of the data set itself is --data=NAME:train_prefs"):
            parse(["--data=folder", "--split=train_prefs"])


def test_show_a_split(tmp_path, hub_cache, capsys):
    data = fill(tmp_path, "train_a.jsonl", "train_b.jsonl")
    show.main([f"--data={data}:train_b", "--tokenizer=tinytldr"])
    assert "reads train_b.jsonl; not read: train_a.jsonl" in capsys.readouterr().out


def test_colons_in_names(tmp_path):
    path = tmp_path / "a:b"
    fill(path, "train.jsonl")
    assert name_and_split(str(path)) == (str(path), None)
    assert name_and_split(f"{path}:train") == (str(path), "train")
    assert name_and_split("tinytldr") == ("tinytldr", None)


# ------------------------------------------------------------------ rows that look odd

def said_of(tmp_path, records, demonstrations=False):
    """What is said of a file."""
    path, said = tmp_path / "a.jsonl", []
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    list(load_rows(str(path), demonstrations, say=said.append))
    return said


SWAPPED = {**PAIR, "score_chosen": 1, "score_rejected": 2}
RIGHT = {**PAIR, "score_chosen": 2, "score_rejected": 1}
IN_LISTS = {**PAIR, "score_chosen": [1, 1], "score_rejected": [3, 0]}


@pytest.mark.parametrize("records, message", [
    ([{**PAIR, "prompt": "Name a town. "}] * 3 + [PAIR], "3 of 4 prompts end in a space"),
    ([{**PAIR, "chosen": "Bergen.", "rejected": "Goat."}] * 3 + [PAIR],
     "in 3 of 4 rows there is neither a space nor a new line between prompt and response"),
    ([{"prompt": "Name a town.", "completion": "Bergen."}],
     "in 1 of 1 rows there is neither a space nor a new line"),
    ([SWAPPED] * 3 + [RIGHT], "in 3 of 4 rows the chosen response has the lower score"),
    ([IN_LISTS], "in 1 of 1 rows the chosen response has the lower score")])
def test_what_is_warned_of(tmp_path, records, message):
    """Once for the file, with the count, where most rows are like this."""
    said = said_of(tmp_path, records, "completion" in records[0])
    assert len(said) == 1 and said[0].startswith("warning: ")
    assert re.search(message, said[0])


@pytest.mark.parametrize("records", [
    [PAIR],
    [{**PAIR, "prompt": "Name a town:\n", "chosen": "Bergen.", "rejected": "Goat."}],
    [{**PAIR, "prompt": "Name a town. "}, PAIR],
    [{**PAIR, "chosen": "Bergen.", "rejected": "Goat."}, PAIR],
    [{**PAIR, "prompt": "说你好。", "chosen": "你好", "rejected": "走开"}],
    [{**PAIR, "prompt": [{"role": "user", "content": "Hi"}],
      "chosen": [{"role": "assistant", "content": "Yes?"}],
      "rejected": [{"role": "assistant", "content": "No."}]}],
    [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}],
    [SWAPPED, RIGHT],
    [{**PAIR, "score_chosen": 1, "score_rejected": 1}],
    [{**PAIR, "system": None, "instruction": "", "input": [], "extra": {}}]])
def test_nothing_is_said_of_good_rows(tmp_path, records):
    assert said_of(tmp_path, records) == []


def test_other_columns_are_named(tmp_path):
    """And what only SFT reads."""
    record = {**PAIR, "confidence": 7, "system": "Be kind.", "meta": {"a": 1}, "messages": [
        {"role": "user", "content": "Hi"}]}
    assert said_of(tmp_path, [record, PAIR]) == [
        "columns that are not read: 'confidence', 'messages', 'meta', 'system'"]
    assert said_of(tmp_path, [SWAPPED], demonstrations=True) == []


def test_warnings_are_printed_once(tmp_path, hub_cache, capsys):
    """Although a run reads training and validation rows one after the other, from the cache too."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**PAIR, "system": "Be kind."}))
    for _ in range(3):
        tokenised_file(str(path), get_tokenizer("tinytldr"))
    assert capsys.readouterr().out.count(f"{path}: columns that are not read") == 1


@pytest.mark.parametrize("label, used", [
    (True, 1), (1, 1), ("yes", 1), ("Desirable", 1), (" TRUE ", 1), (None, 1), ("", 1),
    (float("nan"), 1), (False, 0), (0, 0), (-1, 0), ("no", 0), ("Undesirable", 0), ("0.0", 0)])
def test_labels(label, used):
    record = {"prompt": "a", "completion": " b", "label": label}
    assert len(parse_rows(record, demonstrations=True)) == used


@pytest.mark.parametrize("label", ["maybe", 2, 0.5, "sports", [True]])
def test_a_label_that_says_neither(label):
    with pytest.raises(ValueError, match="^column 'label' is .*neither true nor false"):
        parse_rows({"prompt": "a", "completion": " b", "label": label}, demonstrations=True)
