"""What is refused: one line on standard error that names the flag, or the file and the row, exit
code 2, and no file made or changed."""
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from support.flags import run_script

ROOT = str(Path(__file__).parents[2])
for folder in ("runs", "experiments", "dev"):
    sys.path.insert(0, os.path.join(ROOT, folder))

GOOD = [{"prompt": f"POST {i}: my cat", "chosen": " is sad", "rejected": f" is no. {i}"}
        for i in range(60)]
FILES = {           # name: rows, or text
    "good.jsonl": GOOD,
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "null.json": "null",
    "number.json": "7",
    "deep.json": "[" * 100_000 + "]" * 100_000,
    "cut.jsonl": json.dumps(GOOD[0]) + "\n" + json.dumps(GOOD[1])[:-9],
    "list.jsonl": json.dumps(GOOD[0]) + "\n[1, 2]\n",
    "columns.jsonl": [{"question": "a", "answer": "b"}],
    "data.txt": "hello",
    "empty_response.jsonl": [*GOOD[:3], {"prompt": "a", "chosen": " ", "rejected": "c"}],
    "no_prompt.jsonl": [{"prompt": None, "chosen": "b", "rejected": "c"}],
    "roles.jsonl": [{"prompt": [{"role": "boss", "content": "a"}], "chosen": "b", "rejected": "c"}],
    "one_response.jsonl": [{"prompt": "a", "responses": ["b"]}],
    "ranks.jsonl": [{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}],
    "scores.jsonl": [{**GOOD[0], "score_chosen": 1e39, "score_rejected": 0.0}],
    "large_scores.jsonl": [{**row, "score_chosen": 1e30, "score_rejected": 0.0} for row in GOOD],
    "one_score.jsonl": [{**GOOD[0], "score_chosen": 1.0, "score_rejected": None}],
    "some_scores.jsonl": [{**row, "score_chosen": [1.0, 2.0][:1 + i % 2], "score_rejected":
                           [0.0, 1.0][:1 + i % 2]} for i, row in enumerate(GOOD)],
    "responses.jsonl": [{"prompt": "a", "responses": ["b", "c"]},
                        {"prompt": "a", "responses": ["b", "c", "d"]}],
    "fields.csv": "prompt,chosen,rejected\na,b,c\na,b,c,d\n",
    "damaged.parquet": "PAR1 no PAR1",
    "long.jsonl": [{"prompt": "a", "chosen": "cat " * 500, "rejected": "b"}]}


@pytest.fixture(scope="module")
def workshop(world, tmp_path_factory):
    """Inputs of every kind, good and bad: the files above, and models."""
    root = tmp_path_factory.mktemp("workshop")
    for name in ("sft", "rm", "rms"):
        shutil.copytree(world / name, root / name, ignore=shutil.ignore_patterns("cache"))
    for name, rows in FILES.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (root / name).write_text(text)
    (root / "latin.jsonl").write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"prompt": "\xe9"}\n')
    (root / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-8])
    (root / "folder").mkdir()
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "adapter/adapter_model.safetensors").write_bytes(b"")
    (root / "link").symlink_to("sft")

    def copy(name, config=None, **weights):
        shutil.copytree(root / "sft", root / name)
        if config is not None:
            path = root / name / "config.json"
            old = json.loads(path.read_text())
            path.write_text(config if isinstance(config, str) else json.dumps({**old, **config}))
        if weights:
            path = root / name / "model.safetensors"
            save_file({**load_file(path), **weights}, path)

    copy("absurd", {"n_positions": 10 ** 12})
    copy("deep", '{"a":' * 100_000)
    copy("list", "[]")
    copy("llama", {"model_type": "llama"})
    copy("mamba", {"model_type": "mamba"})
    copy("zero", {"n_layer": 0})
    copy("heads", {"n_head": 3})
    copy("nan", transformer__ln_f__bias=torch.zeros(1))
    weights = load_file(root / "sft/model.safetensors")
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, root / "nan/model.safetensors")
    copy("cut")
    (root / "cut/model.safetensors").write_bytes((root / "sft/model.safetensors").read_bytes()[:99])
    copy("unfinished")
    (root / "unfinished/model.safetensors").unlink()
    copy("pickled")
    (root / "pickled/model.safetensors").unlink()
    torch.save({"a": Path("code")}, root / "pickled/pytorch_model.bin")
    small = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    small.save_pretrained(root / "small")
    config = json.loads((root / "small/config.json").read_text())
    config["nanopref"] = {"tokenizer": "tinytldr"}
    (root / "small/config.json").write_text(json.dumps(config))
    small.save_pretrained(root / "unknown")             # of which nothing says what tokens it reads
    return root


def snapshot(folder):
    """{path: bytes} of all in a folder but the caches of references, which only ever grow."""
    return {str(path): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*")) if "cache" not in path.parts}


POLICY, REWARD, REPORT, TALK = "train_policy", "train_rm", "evaluate", "sample"
DPO = "--init_from=sft --loss=dpo --out_dir=new"
DATA = f"{DPO} --max_steps=2 --data="
RM = "--init_from=sft --out_dir=new"
EVAL = "--ref=sft sft --out_dir=new --n_prompts=4"
CASES = [       # script, flags, what the line has to say
    # numbers
    (POLICY, f"{DPO} --beta=1e300", "--beta: invalid positive float"),
    (POLICY, f"{DPO} --beta=nan", "--beta: invalid positive float"),
    (POLICY, f"{DPO} --beta=-1", "--beta: invalid positive float"),
    (POLICY, f"{DPO} --beta=", "--beta: invalid positive float"),
    (POLICY, f"{DPO} --lr=0", "--lr: invalid positive float"),
    (POLICY, f"{DPO} --lr=fast", "--lr: invalid positive float"),
    (POLICY, f"{DPO} --weight_decay=0.1", "unrecognized arguments: --weight_decay=0.1"),
    (POLICY, f"{DPO} --max_steps=0", "--max_steps: invalid positive int"),
    (POLICY, f"{DPO} --max_steps=1e3", "--max_steps: invalid positive int"),
    (POLICY, f"{DPO} --batch_size=-4", "--batch_size: invalid positive int"),
    (POLICY, f"{DPO} --batch_size=2.5", "--batch_size: invalid positive int"),
    (POLICY, f"{DPO} --seed=-1", "--seed: invalid seed"),
    (POLICY, f"{DPO} --seed=4294967296", "--seed: invalid seed"),
    (POLICY, f"{DPO} --rho=1.5", "--rho: invalid fraction"),
    (POLICY, f"{DPO} --rho=some", "--rho: invalid fraction"),
    (POLICY, "--loss=e-dpo --init_from=sft --gamma=1,2,3 --out_dir=new", "--gamma: invalid"),
    (POLICY, "--loss=e-dpo --init_from=sft --gamma=-1 --out_dir=new", "--gamma: invalid"),
    (REWARD, f"{RM} --bias=", "--bias: invalid list"),
    (REWARD, f"{RM} --bias=0.2,,0.4", "--bias: invalid list"),
    (REWARD, f"{RM} --bias=0.2,0.2", "--bias: the members of a family differ"),
    (REPORT, f"{EVAL} --n_prompts=1e8", "--n_prompts: invalid int from 1 to 30000"),
    (REPORT, f"{EVAL} --n_prompts=100000000", "--n_prompts: invalid int from 1 to 30000"),
    (REPORT, f"{EVAL} --n_prompts=1", "at least 2 are needed"),
    (REPORT, f"{EVAL} --temperature=-1", "--temperature: invalid temperature"),
    (REPORT, f"{EVAL} --max_new_tokens=10000", "--max_new_tokens: 10000 leaves no room"),
    (TALK, "sft --max_new_tokens=10000", "--max_new_tokens: 10000 leaves no room"),
    (TALK, "sft --n=0", "--n: invalid int from 1 to 1000"),
    # words
    (POLICY, f"{DPO} --los=dpo", "unrecognized arguments: --los=dpo"),
    (POLICY, "--loss=ppo --out_dir=new", "--loss: invalid choice"),
    (POLICY, f"{DPO} --device=tpu", "--device: invalid choice"),
    (POLICY, f"{DPO} --dtype=float16", "--dtype: invalid choice"),
    (POLICY, f"{DPO} --device=cuda", "--device=cuda: this machine has none"),
    (POLICY, f"{DPO} --tokenizer=klingon", "--tokenizer: there is no encoding 'klingon'"),
    (REWARD, f"{RM} --head=first", "--head: invalid choice"),
    # flags that would be ignored
    (POLICY, f"{DPO} --tau=1", "--tau: it would be ignored"),
    (POLICY, f"{DPO} --gamma=1", "--gamma: it would be ignored"),
    (POLICY, f"{DPO} --rewards=rm", "--rewards: it would be ignored"),
    (POLICY, f"{DPO} --max_new_tokens=9", "--max_new_tokens: it would be ignored"),
    (POLICY, f"{DPO} --n_layer=3", "--n_layer: it would be ignored"),
    (POLICY, "--loss=sft --beta=1 --out_dir=new", "--beta: it would be ignored"),
    (POLICY, "--loss=sft --rho=0.2 --out_dir=new", "--rho: it would be ignored"),
    (POLICY, f"{DATA}good.jsonl --pool=10", "--pool: it would be ignored"),
    (POLICY, f"{DATA}good.jsonl --label_temperature=1", "--label_temperature: it would be ignored"),
    (REPORT, f"{EVAL} --relabel=rm", "--relabel: it would be ignored"),
    (TALK, "sft --chat", "--chat: it would be ignored"),
    # what does not go together
    (POLICY, "--loss=dpo --init_from=scratch --out_dir=new", "--init_from: --loss=dpo needs a"),
    (POLICY, "--loss=sft --n_embd=10 --n_head=3 --out_dir=new", "--n_head: 3 heads do not divide"),
    (POLICY, "--loss=sft --select=oracle --out_dir=new", "--select: last or loss"),
    (POLICY, f"{DATA}good.jsonl --select=oracle", "--select=oracle: only tinytldr"),
    (POLICY, "--loss=d-dpo --init_from=sft --rewards=scores --out_dir=new --data=good.jsonl",
     "--rewards=scores: good.jsonl has no score_chosen"),
    (REPORT, f"{EVAL} --data=good.jsonl", "--oracle: only --data=tinytldr has an oracle"),
    (TALK, "sft --compare", "--compare: sft was trained from no reference"),
    # folders
    (POLICY, "--loss=dpo --init_from=sft --out_dir=good.jsonl", "'good.jsonl' can't be made"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=good.jsonl/run", "is not a folder"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=sft", "--out_dir: 'sft' is also --init_from"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=link", "--out_dir: 'link' is also --init_from"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=link/run", "lies in --init_from"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=.", "--out_dir: '.' holds --init_from"),
    (POLICY, "--loss=e-dpo --init_from=sft --rewards=rms --out_dir=rms/0.4", "lies in --rewards"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=rm", "--out_dir: 'rm' holds a model"),
    (POLICY, "--loss=dpo --init_from=sft --out_dir=small", "--out_dir: 'small' holds a model"),
    (REWARD, "--init_from=rms/0.2 --out_dir=rms --bias=0.4", "'rms' holds --init_from"),
    (REWARD, "--init_from=sft --out_dir=rms --bias=0.2,0.6", "'rms/0.2' holds a model"),
    (REWARD, "--init_from=sft --out_dir=rms --bias=0.4", "would join this family"),
    (POLICY, f"{DPO} --resume", "--resume: there is no state.pt in 'new'"),
    (REPORT, "--ref=sft sft --out_dir=good.jsonl", "--out_dir: 'good.jsonl' can't be made"),
    # models
    (POLICY, "--loss=dpo --init_from=./nowhere --out_dir=new", "./nowhere: no such folder"),
    (POLICY, "--loss=dpo --init_from=folder --out_dir=new", "folder: no config.json"),
    (POLICY, "--loss=dpo --init_from=absurd --out_dir=new", "n_positions is 1000000000000 there"),
    (POLICY, "--loss=dpo --init_from=deep --out_dir=new", "deep/config.json: not JSON: "),
    (POLICY, "--loss=dpo --init_from=list --out_dir=new", "list/config.json: not a JSON object"),
    (POLICY, "--loss=dpo --init_from=llama --out_dir=new", "max_position_embeddings None"),
    (POLICY, "--loss=dpo --init_from=mamba --out_dir=new", "model_type 'mamba'"),
    (POLICY, "--loss=dpo --init_from=zero --out_dir=new", "n_layer 0, which is not a positive"),
    (POLICY, "--loss=dpo --init_from=heads --out_dir=new", "n_head 3, which does not divide"),
    (POLICY, "--loss=dpo --init_from=nan --out_dir=new", "transformer.ln_f.bias hold numbers that"),
    (POLICY, "--loss=dpo --init_from=cut --out_dir=new", "cut: unreadable checkpoint"),
    (POLICY, "--loss=dpo --init_from=unfinished --out_dir=new", "no model.safetensors"),
    (POLICY, "--loss=dpo --init_from=pickled --out_dir=new", "pickled: unreadable checkpoint"),
    (POLICY, "--loss=dpo --init_from=rm --out_dir=new", "rm: this is a reward model"),
    (POLICY, "--loss=dpo --init_from=small --out_dir=new", "--tokenizer: the model knows 256"),
    (POLICY, "--loss=d-dpo --init_from=sft --rewards=sft --out_dir=new", "a language model, not"),
    (POLICY, "--loss=d-dpo --init_from=sft --rewards=nowhere --out_dir=new",
     "--rewards: no reward model in 'nowhere'"),
    (POLICY, "--loss=d-dpo --init_from=sft --rewards=nan --out_dir=new", "transformer.ln_f.bias"),
    (REWARD, f"{RM} --relabel=nowhere", "--relabel: no reward model in 'nowhere'"),
    (REWARD, "--init_from=scratch --out_dir=new", "--init_from: a reward model starts from"),
    (REPORT, "--ref=nan sft --out_dir=new", "nan: the weights transformer.ln_f.bias"),
    (REPORT, "--ref=small small --out_dir=new", "--ref: the model knows 256 tokens"),
    (TALK, "unknown --prompt=a", "unknown: it has no tokenizer"),
    (POLICY, "--loss=sft --data=good.jsonl --init_from=unknown --out_dir=new",
     "unknown: it has no tokenizer (no tokenizer.json, no vocab.json), and its vocab_size, 256, is "
     "not GPT-2's"),
    (POLICY, "--loss=sft --init_from=adapter --out_dir=new",
     "adapter_config.json: base_model_name_or_path is None"),
    (POLICY, "--loss=sft --n_layer=1000000000 --out_dir=new", "--n_layer: invalid int from 1 to"),
    (POLICY, "--loss=sft --block_size=1e12 --out_dir=new", "--block_size: invalid positive int"),
    (POLICY, "--loss=sft --block_size=1000000000000 --out_dir=new", "--block_size=1000000000000: "),
    (POLICY, "--loss=sft --n_embd=4000000000 --out_dir=new", "--n_embd=4000000000 "),
    (POLICY, "--loss=sft --tokenizer=folder --out_dir=new", "folder/: no tokenizer in this folder"),
    (REPORT, "--ref=sft nowhere --out_dir=new", "nowhere: no such folder"),
    (REPORT, f"{EVAL} --oracle=nowhere", "--oracle: no reward model in 'nowhere'"),
    (TALK, "nan", "nan: the weights transformer.ln_f.bias"),
    (TALK, "rm", "rm: this is a reward model"),
    # files
    (POLICY, f"{DATA}none.jsonl", "--data: none.jsonl: no such file"),
    (POLICY, f"{DATA}data.txt", "data.txt"),
    (POLICY, f"{DATA}folder", "--data: folder: "),
    (POLICY, f"{DATA}empty.jsonl", "--data: empty.jsonl: the file is empty"),
    (POLICY, f"{DATA}blank.jsonl", "--data: blank.jsonl: the file has no rows"),
    (POLICY, f"{DATA}null.json", "--data: null.json: "),
    (POLICY, f"{DATA}number.json", "--data: number.json: "),
    (POLICY, f"{DATA}deep.json", "--data: deep.json: "),
    (POLICY, f"{DATA}cut.jsonl", "--data: cut.jsonl: row 2: not JSON"),
    (POLICY, f"{DATA}list.jsonl", "--data: list.jsonl: row 2: not a JSON object"),
    (POLICY, f"{DATA}latin.jsonl", "--data: latin.jsonl: "),
    (POLICY, f"{DATA}cut.jsonl.gz", "--data: cut.jsonl.gz: "),
    (POLICY, f"{DATA}fields.csv", "--data: fields.csv: "),
    (POLICY, f"{DATA}damaged.parquet", "--data: damaged.parquet: "),
    (POLICY, f"{DATA}columns.jsonl", "row 1: needs columns chosen and rejected"),
    (POLICY, f"{DATA}empty_response.jsonl", "row 4: the response 'chosen' is empty"),
    (POLICY, f"{DATA}no_prompt.jsonl", "row 1: column 'prompt' is missing"),
    (POLICY, f"{DATA}roles.jsonl", "row 1: column 'prompt' is not a list of chat messages"),
    (POLICY, f"{DATA}one_response.jsonl", "row 1: column 'responses' is not a list of two"),
    (POLICY, f"{DATA}ranks.jsonl", "row 1: column 'ranks' is not a list of 2 numbers"),
    (POLICY, f"{DATA}scores.jsonl", "row 1: column 'score_chosen' is neither a number below"),
    (POLICY, f"{DATA}one_score.jsonl", "row 1: column 'score_rejected' is missing"),
    (POLICY, f"{DATA}some_scores.jsonl", "and 25 more: 2 scores for each response"),
    (POLICY, f"{DATA}responses.jsonl", "row 2: 3 responses, most rows have 2"),
    (POLICY, f"{DATA}long.jsonl", "--data: long.jsonl"),
    (POLICY, "--loss=d-dpo --init_from=sft --rewards=scores --out_dir=new --max_steps=2 "
     "--data=large_scores.jsonl", "score_chosen' is neither a number below 1e12"),
    # drivers
    ("score", "--data=good.jsonl --rewards=rm --out=good.jsonl", "--out: it is also --data"),
    ("score", "--data=good.jsonl --rewards=rm --out=folder", "--out: 'folder' is not the name of"),
    ("score", "--data=good.jsonl --rewards=rm --out=data.txt/x.jsonl", "--out: "),
    ("score", "--data=good.jsonl --rewards=nowhere --out=new.jsonl", "--rewards: no reward model"),
    ("protocol", "--data=good.jsonl --sft_data=good.jsonl --out=data.txt", "--out: "),
    ("protocol", "--data=good.jsonl --sft_data=good.jsonl --losses=ppo --out=new", "--losses: "),
    ("protocol", "--data=good.jsonl --sft_data=good.jsonl --family=seeds --bias=0.2 --out=new",
     "--bias: it would be ignored"),
    ("figure2", "--sft=nowhere --results=new", "nowhere"),
    ("figure2", "--rhos=2 --results=new", "--rhos: invalid list"),
    ("ablations", "--sft=nowhere --results=new", "nowhere"),
    ("degeneracy", "--sft=nowhere --results=new", "nowhere")]


@pytest.mark.parametrize("script, flags, message", CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_refused(workshop, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    before = snapshot(workshop)
    with pytest.raises(SystemExit) as exit:
        run_script(importlib.import_module(script).main)
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    assert message in error and error.count("\n") == 1 and error.startswith(f"{script}.py: error: ")
    assert snapshot(workshop) == before


# ------ whatever else stops a script

@pytest.mark.parametrize("bug, last_line", [
    ("undefined_name", "NameError: name 'undefined_name' is not defined"),
    ("exec('raise RuntimeError(\"size mismatch\")')", "RuntimeError: size mismatch")])
def test_a_bug_is_pythons_own_traceback(bug, last_line):
    """Whoever changes the code and gets it wrong sees the line and the reason, as in any script."""
    program = (f"import sys; sys.path.insert(0, {ROOT!r})\n"
               f"from support.flags import run_script\nrun_script(lambda: {bug})")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback (most recent call last)")
    assert process.stderr.strip().splitlines()[-1].startswith(last_line)


def test_ctrl_c_where_nothing_can_be_saved(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert capsys.readouterr().err == "script.py: interrupted\n" and exit.value.code == 130


@pytest.mark.parametrize("code, exit_code, line", [
    ("print('x' * 100_000)", 1, "-c: error: standard output was closed"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ("print('\\u2016')", 0, "")])
def test_a_script_in_a_shell(code, exit_code, line):
    """Into a pipe that nobody reads; when it is told to stop; on a terminal that knows ASCII."""
    program = (f"import os, signal, sys; sys.path.insert(0, {ROOT!r})\n"
               f"from support.flags import run_script\nrun_script(lambda: {code})")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONIOENCODING": "ascii"})
    if exit_code == 1:
        process.stdout.close()
    assert process.stderr.read().strip() == line and process.wait() == exit_code
