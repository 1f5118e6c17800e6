"""Checks that --device=cuda computes what --device=cpu does, and prints a line for each check.

    python dev/gpu_checks.py                    # tiny random models, on a GPU
    python dev/gpu_checks.py --device=cpu       # the CPU against itself, which tries the script
    python dev/gpu_checks.py --models=real      # the model of the folder in NANOPREF_SMOLLM2

Every line says what was compared, the difference, the tolerance, and "ok" or FAILED. A check that
breaks prints a FAILED line too, with its traceback on stderr, and the other checks still run. The
exit code is 1 if anything failed.

Differences are relative: of numbers, the largest difference over the largest number (or 1); of
gradients, the norm of the difference over the norm. Everything is in float32, without TF32, unless
the line says bfloat16. Generated tokens have to be the same; those that are drawn at random take
their random numbers from a generator on the CPU.
"""
import copy
import os
import sys
import time
import traceback
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import Dataset, collate
from dev import attention, bench
from lora import add_lora
from losses import LOSSES, batch_loss, bradley_terry, knobs, needs
from model import GPT, GPTConfig, tree_mask
from reward import RewardModel
from support.device import setup
from support.flags import InputError, Parser, comma_separated, run_script, seed
from train_policy import adamw

TINY = dict(block_size=128, vocab_size=300, n_layer=3, n_embd=64)
MODELS = {"gpt2": dict(TINY, n_head=4),
          "llama": {**bench.LLAMA, **TINY, "n_head": 4, "n_kv_head": 2, "n_inner": 160}}
REAL = "NANOPREF_SMOLLM2"       # the variable with the folder of "real"

# Tolerances. float32 and float64 differ by up to 1e-5, and in gradients 1e-4.
NUMBERS, GRADIENTS = 5e-5, 1e-3
NATS_PER_TOKEN, BFLOAT16 = 0.05, 0.02
N_ROWS, N_NEW = 4, 24


def parse_flags(argv):
    parser = Parser(__doc__)
    names = ", ".join([*MODELS, "real"])
    parser.add_argument("--models", type=comma_separated(str, "names"), default=list(MODELS),
                        help=f"which models, out of {names} (default: all but real)")
    parser.add_argument("--only", type=comma_separated(str, "names"), default=list(CHECKS),
                        help=f"which checks, out of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights and data (default: "
                        "0)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="what to compare "
                        "with the CPU (default: cuda)")
    args = parser.parse_args(argv)
    args.dtype = "float32"
    for flag, choices in (("models", [*MODELS, "real"]), ("only", CHECKS)):
        for name in getattr(args, flag):
            if name not in choices:
                raise InputError(f"--{flag}: {name!r} is none of {', '.join(choices)}")
    return args


# ---------------- models and rows


def random_model(config):
    """Makes a GPT whose norms, biases and embeddings are far from their initial values. So if one
    of them were left out of a computation, the result would change."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def model_named(name):
    """Makes or reads a GPT by its name in --models. It is in float32, on the CPU."""
    if name == "real":
        if not os.environ.get(REAL):
            raise InputError(f"--models=real: the variable {REAL} names no folder")
        return GPT.from_pretrained(os.environ[REAL]).float().eval()
    return random_model(GPTConfig(**MODELS[name]))


def made_up_rows(model, rng):
    """Makes a Dataset of N_ROWS prompts with two responses and a sample each, and all columns. The
    reference's log-probs are near the model's own, as they are in training."""
    n, longest = model.config.vocab_size, 40

    def tokens(low, high):
        return rng.integers(0, n, rng.integers(low, high + 1)).astype(np.int32)

    examples = [(tokens(8, longest), [tokens(3, longest // 2) for _ in range(3)])
                for _ in range(N_ROWS)]
    rewards = rng.normal(size=(N_ROWS, 2, bench.MEMBERS)).astype(np.float32)
    dataset = Dataset(examples, rewards, n_samples=1)
    with torch.no_grad():
        logps = model(dataset.batch(range(N_ROWS))).numpy()
    dataset.ref_logps = logps + rng.normal(size=logps.shape).astype(np.float32)
    return dataset


def rows_for(task, dataset):
    """Returns the data set with the responses and columns that a loss sees in training."""
    needed = needs(task) if task in LOSSES else ()
    S, K = int("kl" in needed), 1 if task == "sft" else 2
    examples = [(prompt, responses[:K] + responses[2:2 + S])
                for prompt, responses in dataset.examples]
    keep = [*range(K), *range(2, 2 + S)]
    return Dataset(examples, dataset.rewards[:, :K], dataset.ref_logps[:, keep], S)


class Pair:
    """Holds a model on the CPU, its copy on the device, and rows for both."""

    def __init__(self, name, device, args):
        self.name, self.device = name, device
        self.cpu = model_named(name)
        self.there = copy.deepcopy(self.cpu).to(device)
        self.dataset = made_up_rows(self.cpu, np.random.default_rng(args.seed))
        self.generator = torch.Generator().manual_seed(args.seed)

    def copies(self):
        return ((self.cpu, torch.device("cpu")), (self.there, self.device))


# ---------------- what is compared


def apart(got, wanted):
    """Returns the largest difference of two tensors or arrays, relative to the largest number in
    `wanted` (or to 1, if that is larger)."""
    got, wanted = (torch.as_tensor(x).detach().double().cpu() for x in (got, wanted))
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def gradients(model):
    """Takes all gradients from a model. Returns them as one vector, on the CPU."""
    grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(grads)


def vectors_apart(got, wanted):
    """Returns the norm of the difference of two vectors, relative to the norm of `wanted`."""
    return ((got - wanted).norm() / wanted.norm()).item()


def policy_loss(model, task, dataset, device):
    """Returns the mean loss of a task over all rows."""
    batch = dataset.batch(range(len(dataset))).to(device)
    flags = knobs(task)
    if "gamma" in flags:
        flags["gamma"] = 0.01
    return batch_loss(task, model(batch), batch, **flags).sum() / len(dataset)


def response_logps(pair):
    """Compares log-probs of responses, in float32 and in bfloat16."""
    logps = []
    with torch.no_grad():
        for model, device in pair.copies():
            logps.append(model(pair.dataset.batch(range(N_ROWS)).to(device)).cpu())
        batch = pair.dataset.batch(range(N_ROWS)).to(pair.device)
        with torch.autocast(pair.device.type, dtype=torch.bfloat16):
            rounded = pair.there(batch).cpu()
        plain = pair.there.response_logps(batch, fast=False)
    yield "log-probs", apart(logps[1], logps[0]), NUMBERS
    yield "log-probs, fast against plain", apart(plain, logps[1]), NUMBERS
    per_token = (rounded - logps[0]).abs() / batch.lengths.cpu()
    yield "log-probs in bfloat16, nats a token", per_token.max().item(), NATS_PER_TOKEN


def fused_attention(pair):
    """Compares attention with and without a restriction to torch's fused kernels, which don't keep
    the scores. If none of them can be used (for a mask with fewer heads of keys, say), torch falls
    back to a slow kernel silently, and a step takes several times the memory."""
    batch = pair.dataset.batch(range(N_ROWS)).to(pair.device)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(pair.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            wanted = pair.there(batch)
            with sdpa_kernel(fused):
                got = pair.there(batch)
            yield f"fused attention, {str(dtype)[6:]}", apart(got, wanted), NUMBERS


def losses_and_gradients(pair):
    """Compares the value and the gradient of every loss."""
    for task in LOSSES:
        dataset, values, grads = rows_for(task, pair.dataset), [], []
        for model, device in pair.copies():
            loss = policy_loss(model, task, dataset, device)
            loss.backward()
            values.append(loss)
            grads.append(gradients(model))
        yield f"{task}: loss", apart(values[1], values[0]), NUMBERS
        yield f"{task}: gradient", vectors_apart(grads[1], grads[0]), GRADIENTS


def optimizer_steps(pair):
    """Compares three steps of e-DPO with AdamW: each loss, and the log-probs at the end."""
    dataset, losses, logps = rows_for("e-dpo", pair.dataset), [], []
    for model, device in pair.copies():
        trained = copy.deepcopy(model)
        optimizer = adamw(trained, 1e-4)
        for _ in range(3):
            loss = policy_loss(trained, "e-dpo", dataset, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        with torch.no_grad():
            logps.append(trained(dataset.batch(range(N_ROWS)).to(device)))
    yield "three steps of e-dpo: losses", apart(losses[3:], losses[:3]), 10 * NUMBERS
    yield "three steps of e-dpo: log-probs", apart(logps[1], logps[0]), 10 * NUMBERS


def generation(pair):
    """Compares greedy tokens, and tokens drawn with the same random numbers. The difference is the
    number of responses that are not equal."""
    prompts = [prompt.tolist() for prompt, _ in pair.dataset.examples]
    ways = {"greedy": dict(temperature=0), "sampled": {}, "top_k, top_p": dict(top_k=50, top_p=0.9)}
    for name, options in ways.items():
        responses = []
        for model, _ in pair.copies():
            if name != "greedy":
                options["generator"] = pair.generator.manual_seed(0)
            responses.append(model.generate(prompts, N_NEW, **options))
        unequal = sum(ours != theirs for ours, theirs in zip(*responses))
        yield f"{name} generation, unequal of {len(prompts)}", unequal, 0


def reward_models(pair):
    """Compares rewards and a gradient, with both heads."""
    dataset = rows_for("dpo", pair.dataset)
    for head in ("last", "sum"):
        rewards, grads = [], []
        first = RewardModel.from_policy(pair.cpu, head)
        torch.nn.init.normal_(first.score.weight, std=0.1, generator=pair.generator.manual_seed(0))
        for model, device in ((first, "cpu"), (copy.deepcopy(first).to(pair.device), pair.device)):
            batch = dataset.batch(range(N_ROWS)).to(device)
            rewards.append(model(batch))
            bradley_terry(batch.pair_up(rewards[-1])).sum().backward()
            grads.append(gradients(model))
        yield f"rewards ({head})", apart(rewards[1], rewards[0]), NUMBERS
        yield f"rewards ({head}): gradient", vectors_apart(grads[1], grads[0]), GRADIENTS


def lora_adapters(pair):
    """Compares log-probs and the gradient of a model with an adapter."""
    first = copy.deepcopy(pair.cpu)
    add_lora(first, 4, "base")
    generator = pair.generator.manual_seed(0)
    with torch.no_grad():       # which are zero at first
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    logps, grads = [], []
    for model, device in ((first, "cpu"), (copy.deepcopy(first).to(pair.device), pair.device)):
        logps.append(model(pair.dataset.batch(range(N_ROWS)).to(device)))
        logps[-1].sum().backward()
        grads.append(gradients(model))
    yield "LoRA: log-probs", apart(logps[1], logps[0]), NUMBERS
    yield "LoRA: gradient", vectors_apart(grads[1], grads[0]), GRADIENTS


def compiled(pair):
    """Compares --compile with eager mode on the device, with two shapes."""
    model = copy.deepcopy(pair.there)
    model.compile(dynamic=True)
    for rows in (N_ROWS, N_ROWS - 1):
        batch = pair.dataset.batch(range(rows)).to(pair.device)
        logps, grads = [], []
        for network in (pair.there, model):
            logps.append(network(batch))
            logps[-1].sum().backward()
            grads.append(gradients(network))
        yield f"--compile, {rows} rows: log-probs", apart(logps[1], logps[0]), NUMBERS
        yield f"--compile, {rows} rows: gradient", vectors_apart(grads[1], grads[0]), GRADIENTS


def flex(pair):
    """Compares FlexAttention with the call that model.py makes: outputs, and the gradient of
    queries, keys and values, in bfloat16 on a GPU. On a CPU it is not compiled, and has no backward
    pass."""
    on_cpu = pair.device.type == "cpu"
    batch = collate(pair.dataset.examples, 32).to(pair.device)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    shape = (3, N_ROWS, 4, batch.branch.size(1), 64)
    qkv = torch.randn(shape, generator=pair.generator.manual_seed(0)).to(pair.device, dtype)
    qkv.requires_grad_(not on_cpu)
    mask, blocks = tree_mask(batch.branch, dtype), attention.tree_blocks(batch.branch)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    attend = attention.flex_attention
    if not on_cpu:
        attend = torch.compile(attend)
    outputs = [F.scaled_dot_product_attention(*qkv, attn_mask=mask),
               attend(*qkv, block_mask=blocks)]
    tolerance = NUMBERS if on_cpu else BFLOAT16
    yield f"FlexAttention, {str(dtype)[6:]}", apart(outputs[1], outputs[0]), tolerance
    if not on_cpu:
        grads = [torch.autograd.grad(y.float().square().sum(), qkv)[0] for y in outputs]
        yield "FlexAttention: gradient", vectors_apart(*(g.double() for g in grads[::-1])), BFLOAT16


CHECKS = {"logps": response_logps, "fused": fused_attention, "losses": losses_and_gradients,
          "steps": optimizer_steps, "generation": generation, "reward": reward_models,
          "lora": lora_adapters, "flex": flex, "compile": compiled}


# ---------------- the report


def run_check(check, pair):
    """Prints a line for each comparison. Returns how many failed."""
    failed = 0
    try:
        for what, difference, tolerance in check(pair):
            good = difference <= tolerance      # a NaN is not
            failed += not good
            print(f"| {pair.name:5} | {what:38} | {difference:8.1e} | {tolerance:8.1e} | "
                  f"{'ok' if good else 'FAILED'} |", flush=True)
    except Exception as error:      # whatever it was, the other checks are worth their time
        traceback.print_exc()
        reason = str(error).strip().splitlines()[:1]
        print(f"| {pair.name:5} | {check.__name__:38} | FAILED: {type(error).__name__}: "
              f"{' '.join(reason)} |", flush=True)
        failed += 1
    return failed


def main(argv=None):
    args = parse_flags(argv)
    device = setup(args)
    torch.set_float32_matmul_precision("highest")       # no TF32
    print(f"{bench.device_name(device)}, torch {torch.__version__}\n\n"
          "| model | what | difference | tolerance | |\n|---|---|---|---|---|", flush=True)
    failed, start = 0, time.perf_counter()
    for name in args.models:
        pair = Pair(name, device, args)
        for check in args.only:
            failed += run_check(CHECKS[check], pair)
    result = f"{failed} FAILED" if failed else "all ok"
    print(f"\n{result}, {time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
