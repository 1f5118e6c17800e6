"""The benchmark runs, and counts what it says. No test looks at a time."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import collate
from dev import attention, bench, gpu_checks
from losses import LOSSES, needs
from model import GPT, GPTConfig, tree_mask
from support.flags import InputError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CONFIG = GPTConfig(block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=16)
LLAMA = GPTConfig(vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=16, head_size=6,
                  n_inner=22, **bench.LLAMA)
SMALL = ["--model=tiny", "--batch_size=2", "--steps=1", "--device=cpu"]
SHORT = [*SMALL, "--prompt=12", "--response=3,5"]


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "tiny", dict(n_layer=2, n_head=2, n_embd=16, vocab_size=50))


@pytest.mark.parametrize("n_responses", [1, 2, 3])
@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_needed_operations(config, n_responses):
    """For one row, which has no padding: the matrix products that a forward pass really does, less
    the last layer's queries and outputs of attention that no head reads, plus two products per
    pair of tokens in sight."""
    prompt = list(range(9))
    examples = [(prompt, [[1, 2, 3], [4], [5, 6, 7, 8]][:n_responses])]
    batch, C = collate(examples), config.n_embd
    width = config.n_head * (config.head_size or C // config.n_head)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        GPT(config).response_logps(batch)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = counts["aten.mm"] + counts.get("aten.addmm", 0)
    in_sight = (tree_mask(batch.branch, torch.float32) == 0)[0, 0].sum(dim=1)            # (T,)
    pairs = (config.n_layer - 1) * in_sight.sum() + in_sight[len(prompt) - 1:].sum()
    wanted = products - 4 * C * width * len(prompt) + 4 * width * pairs
    assert bench.needed_flops(config, examples) == wanted


def test_smollm2():
    """bench's SmolLM2 is the published one: 134,515,008 weights."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**bench.MODELS["smollm2"]))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_peak_rate(monkeypatch):
    """What the maker promises is known for two cards, in bfloat16."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(bench, "device_name", lambda device: "NVIDIA H200")
    assert bench.peak_rate(cuda, torch.bfloat16) == 989e12
    assert bench.peak_rate(cuda, torch.float32) is None
    monkeypatch.setattr(bench, "device_name", lambda device: "NVIDIA GeForce RTX 5090")
    assert bench.peak_rate(cuda, torch.bfloat16) is None


def test_gpu_checks_agree_on_one_device(capsys):
    """Everything but the GPU and the compiler: the CPU against itself, both families, every
    loss."""
    gpu_checks.main(["--device=cpu", "--only=logps,fused,losses,steps,generation,reward,lora,flex"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("all ok")
    n_comparisons = 3 + 2 + 2 * len(LOSSES) + 2 + 3 + 4 + 2 + 1
    assert sum(line.endswith("| ok |") for line in lines) == 2 * n_comparisons


def test_gpu_checks_go_on_after_a_failure(monkeypatch, capsys):
    """A difference, a NaN and an exception are FAILED lines, and the exit code is 1."""
    def bad(pair):
        yield "apart", 1.0, 0.5
        yield "not a number", math.nan, 0.5
        raise RuntimeError("no such kernel\nin the second line")

    monkeypatch.setitem(gpu_checks.CHECKS, "logps", bad)
    with pytest.raises(SystemExit) as raised:
        gpu_checks.main(["--device=cpu", "--models=gpt2", "--only=logps,flex"])
    out = capsys.readouterr().out
    assert raised.value.code == 1 and out.count("FAILED") == 4 and "3 FAILED" in out
    assert "FAILED: RuntimeError: no such kernel |" in out and "| ok |" in out


def test_flex_attention_is_the_mask():
    """FlexAttention's block mask for the tree, without its compiler, float32: padding, prompts of
    several lengths, one or three responses."""
    for n_responses in (1, 3):
        examples = [(list(range(n)), [[1, 2, 3], [4] * n, [5]][:n_responses]) for n in (9, 30, 150)]
        batch = collate(examples)
        q, k, v = torch.randn(3, 3, 2, batch.branch.size(1), 8, generator=torch.manual_seed(0))
        mask = tree_mask(batch.branch, torch.float32)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        got = attention.flex_attention(q, k, v, block_mask=attention.tree_blocks(batch.branch))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_attention_is_timed(capsys):
    attention.main(["--device=cpu", "--batch_size=2", "--n_head=2", "--head_size=8", "--turns=1"])
    assert "forward alone" in capsys.readouterr().out


def test_all_tasks(capsys):
    bench.main(SHORT)
    table = capsys.readouterr().out
    assert all(f"| {task} |" in table for task in bench.TASKS)
    assert set(LOSSES) <= set(bench.TASKS)


def test_json_and_sizes(capsys):
    bench.main([*SHORT, "--only=dpo", "--json", "--n_responses=4", "--gradient_checkpointing"])
    (result,), machine = json.loads(capsys.readouterr().out)
    assert 2 * (12 + 4 * 3) <= result["useful"] <= 2 * (12 + 4 * 5)
    assert machine["dtype"] == "float32"


@pytest.mark.parametrize("task, K, S", [
    ("sft", 1, 0), ("dpo", 3, 0), ("ipo-per-token", 3, 0), ("d-dpo", 3, 0), ("p-dpo", 3, 1),
    ("e-dpo", 3, 1), ("reward model", 3, 0), ("score", 3, 0)])
def test_a_task_has_the_columns_that_its_loss_needs(task, K, S):
    """Responses, samples from the reference, rewards and reference log-probs, as train_policy.py
    has them."""
    dataset = bench.task_dataset(task, [([1, 2], [[3], [4], [5], [6]])] * 2)
    batch, needed = dataset.batch([0, 1]), needs(task) if task in LOSSES else ()
    assert dataset.examples[0] == ([1, 2], [[3], [4], [5], [6]][:K + S])
    assert batch.samples.size(1) == S
    assert (batch.ref_logps is None) == ("ref_logps" not in needed)
    assert (batch.rewards is None) == ("rewards" not in needed)
    if "rewards" in needed:
        assert batch.rewards.shape == (2, K, bench.MEMBERS)


@pytest.mark.parametrize("task, moves", [("dpo", True), ("sft", True), ("score", False)])
def test_a_step_trains(task, moves):
    """What is measured is an optimizer step; a score is a pass without a gradient."""
    args = bench.parse_flags([*SHORT, f"--only={task}"])
    measured = bench.Bench(args)
    before = [p.detach().clone() for p in measured.policy.parameters()]
    measured.do(task, 0)
    after = list(measured.policy.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after)) == moves
    assert all(p.grad is None for p in after)


def test_a_file_of_preferences(tmp_path, hub_cache, monkeypatch, capsys):
    """--data instead of made-up rows; flags of the latter are refused."""
    import tinytldr
    tokenizer = tinytldr.tokenizer()
    monkeypatch.setattr(bench, "get_tokenizer", lambda name: tokenizer)
    monkeypatch.setitem(bench.MODELS["tiny"], "vocab_size", tokenizer.n_vocab)
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "POST:", "chosen": " my boss", "rejected": " broke"}
    path.write_text(f"{json.dumps(row)}\n" * 5)
    bench.main([*SMALL, f"--data={path}", "--only=dpo,e-dpo", "--json"])
    results, _ = json.loads(capsys.readouterr().out.splitlines()[-1])
    lengths = [len(tokenizer.encode(text)) for text in row.values()]
    assert results[0]["useful"] == 2 * (sum(lengths) + 2)
    with pytest.raises(InputError, match="--prompt: it would be ignored"):
        bench.main([*SMALL, f"--data={path}", "--prompt=3"])


def test_profile(capsys):
    bench.main([*SHORT, "--only=e-dpo", "--profile"])
    out = capsys.readouterr().out
    table = out.split("part of the step")[1].splitlines()
    shares = [float(line.split("|")[2].strip(" %")) for line in table if "%" in line]
    assert "aten::mm" in out and sum(shares) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("flag", ["--only=ppo", "--response=5", "--response=0,4", "--response=a,b",
                                  "--response=9,4", "--n_responses=1"])
def test_refuses(flag):
    with pytest.raises(InputError, match=flag.split("=")[0]):
        bench.main([flag])
