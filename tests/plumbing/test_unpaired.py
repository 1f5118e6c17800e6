"""Training by KTO on single responses with a label, from the file to the last step, and what is
refused of it."""
import json
import re

import numpy as np
import pytest

import train_policy
import train_rm
from data import Dataset
from runs import score, show
from support.flags import InputError

ROWS = [{"prompt": f"POST {i}: my cat", "completion": " is sad" if i % 3 else " is no. 7",
         "label": i % 3 > 0} for i in range(60)]


@pytest.fixture
def files(world, tmp_path):
    """Writes rows to a file. Returns the flags that train on it from the short runs' reference."""
    def write(rows, *flags):
        path = tmp_path / "unpaired.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [f"--data={path}", f"--init_from={world}/sft", "--max_steps=30", "--lr=3e-3",
                "--batch_size=8", f"--out_dir={tmp_path}/kto", *flags]
    return write


def test_kto_learns_from_single_responses(files, tmp_path, capsys):
    """It starts at half a weight; then desirable responses gain on undesirable ones, and on the
    mismatched. The table on the screen says so."""
    train_policy.main(["--loss=kto", *files(ROWS)])
    lines = list(map(json.loads, (tmp_path / "kto/metrics.jsonl").read_text().splitlines()))
    first, last = [next(line for line in order if "validation/loss" in line)
                   for order in (lines, lines[::-1])]
    assert first["validation/loss"] == first["train/loss"] == pytest.approx(0.5, abs=1e-6)
    assert last["validation/loss"] < 0.45 and "train/margin" not in last
    for split in ("train", "validation"):
        good, bad = [last[f"{split}/{name}_change"] for name in ("desirable", "undesirable")]
        assert good > 1 + bad
        assert first[f"{split}/mismatched_change"] == 0 != last[f"{split}/mismatched_change"]
    out = capsys.readouterr().out
    assert re.search(r"labels: \d+ desirable, \d+ undesirable, .* --undesirable_weight=[12]", out)
    assert " step      loss  val/loss  train/good  train/bad  val/good   val/bad" in out


def test_mismatched_responses_are_those_of_the_next_row(capsys):
    """One that is cut, and one that answers the same prompt after all, are counted."""
    examples = [([1, 2], [[3, 9]]), ([1, 2], [[4, 5, 9]]), ([6], [[7, 9]])]
    got = Dataset(examples, desirable=np.array([True, False, True])).with_mismatched(4)
    assert [responses[1].tolist() for _, responses in got.examples] == [[4, 5], [7, 9], [3, 9]]
    assert got.n_samples == 1 and got.desirable.tolist() == [True, False, True]
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 mismatched responses answer the same prompt, which the next row has too",
        "1 of 3 mismatched responses lose their end, as they don't fit block_size 4"]


def test_a_resumed_run_asks_for_the_same_labels(files, tmp_path):
    train_policy.main(["--loss=kto", *files(ROWS, "--max_steps=2")])
    flipped = [row | {"label": not row["label"]} for row in ROWS]
    with pytest.raises(InputError, match="--resume: "):
        train_policy.main(["--loss=kto", *files(flipped, "--max_steps=2", "--resume")])


@pytest.mark.parametrize("flags, message", [
    (["--loss=dpo"], "single responses with a label .*, which --loss=kto trains on; all else "),
    (["--loss=kto", "--rho=0.5"], "--rho, --bias: subsets by length are of pairs"),
    (["--loss=kto", "--rewards=scores"], "--rewards: it would be ignored"),
    (["--loss=dpo", "--desirable_weight=2"], "--desirable_weight: it would be ignored: .* by "
     "--loss=kto")])
def test_what_does_not_go_together(files, flags, message):
    with pytest.raises(InputError, match=message):
        train_policy.main(files(ROWS, *flags))


@pytest.mark.parametrize("rows, message", [
    ([row | {"label": True} for row in ROWS], "all .* training rows have the label True, and "
     "--loss=kto needs both kinds; --loss=sft imitates what people wanted"),
    ([row | {"label": False} for row in ROWS], "the label False, and --loss=kto needs both kinds$"),
    ([row | {"label": "maybe"} for row in ROWS[:1]], "row 1: column 'label' is 'maybe', which is "
     "neither true nor false"),
    ([row | {"label": None} for row in ROWS[:2]], "rows 1, 2: column 'label' is missing"),
    ([{"prompt": "a", "completion": "b"}], "row 1: needs columns chosen and rejected, or prompt "
     "and responses, or prompt and completion and label; has prompt, completion"),
    ([*ROWS, {"prompt": "a", "chosen": "b", "rejected": "c"}], "row 61: 2 responses, most rows "
     "have 1")])
def test_files_that_kto_refuses(files, rows, message):
    with pytest.raises(InputError, match=message):
        train_policy.main(["--loss=kto", *files(rows)])


def test_reward_models_need_pairs(files, world, tmp_path):
    data, *flags = files(ROWS)
    with pytest.raises(InputError, match="single responses with a label .* chosen and rejected"):
        train_rm.main([data, *flags])
    with pytest.raises(InputError, match="single responses with a label; scores compare"):
        score.main([data, f"--rewards={world}/rm", f"--out={tmp_path}/scored.jsonl"])


def test_show_reads_them(files, capsys):
    show.main([files(ROWS)[0], "--tokenizer=tinytldr"])
    assert "60 rows read, 60 used" in capsys.readouterr().out


def test_kto_on_pairs_is_what_it_was(files):
    """A file of pairs has no labels: the loss is that of the two halves."""
    pairs = [{"prompt": f"POST {i}: my cat", "chosen": " is sad", "rejected": " is no. 7"}
             for i in range(60)]
    args = train_policy.parse_flags(["--loss=kto", *files(pairs)])
    assert (args.desirable_weight, args.undesirable_weight) == (1, 1)
    train_policy.main(["--loss=kto", *files(pairs, "--max_steps=2")])
