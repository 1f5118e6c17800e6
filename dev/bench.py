"""Measures what a training step costs: seconds, tokens, memory, and which share it reaches of the
machine's speed in matrix products.

    python dev/bench.py                            # 6 layers, width 384, TL;DR's lengths: 3 min
    python dev/bench.py --model=tiny --shape=hh    # 4 layers, width 128; long responses
    python dev/bench.py --data=prefs.jsonl --model=gpt2 --device=cuda
    python dev/bench.py --model=smollm2 --batch_size=4      # SmolLM2-135M, of the Llama family
    python dev/bench.py --only=dpo --profile       # where the time goes, operators and parts
    python dev/bench.py --scaling                  # how the cost grows with four sizes
    bash dev/bench_trl.sh                          # side by side with TRL

Everything is measured in turns in one process, so that a busy machine disturbs all rows alike.
Trust the ratios, not the seconds.

step        median seconds of an optimizer step as in train_policy.py (collate, forward, loss,
            backward, clip, AdamW, but no logging), and (min .. max)
useful      tokens that had to be looked at: every prompt and every response once, no padding
needed      floating-point operations that the step has to do: the prompt once, the last layer only
            where something is read, the vocabulary projection on response tokens only, causal
            attention. The backward pass counts twice the forward one (with --lora once). Norms,
            rotations, activations and the optimizer are not counted
MFU         needed operations per second over the machine's rate for the model's own matrix
            products, measured in the same turns
of peak     the same over what the card's maker promises: for H100 and H200 (SXM) in bfloat16
            989 TFLOP/s, the dense figure
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from statistics import mean, median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import BatchOrder, Dataset, get_tokenizer
from lora import add_lora
from losses import LOSSES, PREFERENCE_LOSSES, batch_loss, bradley_terry, knobs, needs
from model import GPT, GPTConfig
from reward import RewardModel
from support.device import compute, recompute_layers, setup, sync
from support.flags import (
    InputError,
    Parser,
    comma_separated,
    number_type,
    positive_int,
    resolve,
    run_script,
    seed,
)
from support.tokens import select, tokenised_file
from train_policy import adamw, row_terms

LLAMA = dict(family="llama", block_size=8192, mlp="swiglu", norm="rms", qkv_bias=False,
             proj_bias=False, mlp_bias=False, rope_theta=100_000.0)
MODELS = {"tiny": dict(n_layer=4, n_head=4, n_embd=128, vocab_size=1024),
          "small": dict(n_layer=6, n_head=6, n_embd=384),
          "gpt2": {}, "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
          "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
          "tiny-llama": dict(LLAMA, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_inner=384,
                             vocab_size=1024),
          "smollm2": dict(LLAMA, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536,
                          vocab_size=49152)}
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12}      # dense bfloat16; parts of a card's name
SHAPES = {"tldr": (340, [25, 55]), "hh": (150, [60, 140])}      # tokens of a prompt, of a response
GENERATE = ("generate", "generate, no cache")
TASKS = ("sft", *PREFERENCE_LOSSES, "reward model", "score", *GENERATE)
WARM_UP = 3                         # turns
N_NEW, MEMBERS = 16, 5              # tokens to generate; reward models in e-DPO's family
LR = 1e-5


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="small", choices=MODELS, help="which model to measure (default: small)")
    add("--data", help="preferences to train on: a file or a name on the hub (default: made-up "
        "ones)")
    parser.add_shared("skip_bad_rows")
    add("--tokenizer", help="the tokenizer for --data: a name, or the folder of a model that has "
        'its own, with a "/" at its end (default: gpt2)')
    add("--shape", choices=SHAPES, help="lengths of made-up prompts and responses (default: tldr)")
    add("--prompt", type=positive_int, help="tokens in a made-up prompt (default: as --shape says)")
    add("--response", type=comma_separated(positive_int, "token counts FROM,TO"),
        help="tokens in a made-up response, from FROM to TO (default: as --shape says)")
    add("--n_responses", type=number_type(int, "number from 2 up", lambda n: n >= 2),
        help="responses to each made-up prompt, the KL term's sample not counted (default: 2)")
    add("--only", help=f"which tasks to measure, out of {', '.join(TASKS)}, separated by commas "
        "(default: all)")
    add("--batch_size", type=positive_int, default=8, help="rows (pairs) in a step (default: 8)")
    add("--steps", type=positive_int, default=10, help="turns to measure, after three to warm up "
        "(default: 10)")
    add("--seed", type=seed, default=0, help="seed of weights and data (default: 0)")
    parser.add_shared("device", "dtype")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    add("--gradient_checkpointing", action="store_true", help="the same as in train_policy.py")
    add("--lora", type=positive_int, help="train adapters of this rank, as in train_policy.py")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--profile", action="store_true", help="show where the time of the first "
                        "task goes")
    output.add_argument("--scaling", action="store_true", help="show how time and memory grow with "
                        "four sizes")
    output.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(TASKS)
    for task in args.only:
        if task not in TASKS:
            raise InputError(f"--only: {task!r} is none of {', '.join(TASKS)}")
    prompt, response = SHAPES[args.shape or "tldr"]
    defaults = {"shape": "tldr", "prompt": prompt, "response": response, "n_responses": 2}
    resolve(args, {flag: (args.data is None, default, "made-up data, which is without --data")
                   for flag, default in defaults.items()})
    resolve(args, {"skip_bad_rows": (args.data is not None, None, "--data"),
                   "tokenizer": (args.data is not None, "gpt2", "--data")})
    if args.response and (len(args.response) != 2 or args.response[0] > args.response[1]):
        raise InputError("--response: FROM,TO in tokens, such as 25,55")
    return args


# ---------------- the work


def made_up_examples(args, n, vocab_size):
    """Makes n prompts with K + 1 responses of random tokens. The last response takes the place of
    the sample that the KL needs. Returns [(prompt, [response] * (K + 1))]."""
    rng = np.random.default_rng(args.seed)

    def tokens(length):
        return rng.integers(0, vocab_size, length).astype(np.int32)

    low, high = args.response
    return [(tokens(args.prompt),
             [tokens(rng.integers(low, high + 1)) for _ in range(args.n_responses + 1)])
            for _ in range(n)]


def examples_for(args, config):
    """Returns the examples of --data, or made-up ones. Each has one more response, in the place of
    the sample that the KL needs. config: the model's; made-up examples raise its block_size."""
    if args.data is None:
        config.block_size = max(config.block_size, args.prompt + args.response[1])
        return made_up_examples(args, 32 * args.batch_size, config.vocab_size)
    tokenizer = get_tokenizer(args.tokenizer)
    if tokenizer.n_vocab > config.vocab_size:
        raise InputError(f"--model: {args.model} knows {config.vocab_size} tokens, and --tokenizer "
                         f"{args.tokenizer} has {tokenizer.n_vocab}; for gpt2 use small or gpt2")
    arrays = tokenised_file(args.data, tokenizer, skip_bad_rows=args.skip_bad_rows)
    examples = select(arrays, config.block_size, args.data)["examples"]
    return [(prompt, [*responses, responses[0]]) for prompt, responses in examples]


def needed_flops(config, examples):
    """Counts the floating-point operations of one forward pass over some examples, [(prompt,
    responses)]. A multiply-add counts as two. For a reward model, set config.vocab_size to 0."""
    C, flops = config.n_embd, 0
    size = config.head_size or C // config.n_head
    width = config.n_head * size                                    # of all queries of a token
    kv_weights = 2 * C * (config.n_kv_head or config.n_head) * size
    mlp_weights = (3 if config.mlp == "swiglu" else 2) * C * (config.n_inner or 4 * C)
    read_weights = 2 * C * width + mlp_weights      # queries, attention's output, the MLP
    for prompt, responses in examples:
        P, lengths = len(prompt), [len(response) for response in responses]
        R = sum(lengths)
        tokens = P + R
        causal = P * (P + 1) // 2               # pairs of tokens of which one sees the other
        tree = sum(n * P + n * (n + 1) // 2 for n in lengths)
        # all weights for each token; attention: scores and weighted sums
        layer = 2 * (kv_weights + read_weights) * tokens + 4 * width * (causal + tree)
        # keys and values for all tokens, the rest for those that a head reads
        last_layer = 2 * kv_weights * tokens + 2 * read_weights * R + 4 * width * (P + tree)
        flops += (config.n_layer - 1) * layer + last_layer + 2 * C * config.vocab_size * R
    return flops


def matmul_rate(model, tokens, response_tokens, dtype, device):
    """Operations per second of the matrix products of one step, and nothing else: for each of the
    model's weights, forward, gradient of the input, gradient of the weight."""
    config, seconds, flops = model.config, 0.0, 0
    shapes = [(tokens, part.in_features, part.out_features, config.n_layer)
              for part in model.transformer.h[0].modules() if isinstance(part, nn.Linear)]
    shapes.append((response_tokens, config.n_embd, config.vocab_size, 1))
    for n, fan_in, fan_out, times in shapes:
        x = torch.randn(n, fan_in, dtype=dtype, device=device)
        w = torch.randn(fan_out, fan_in, dtype=dtype, device=device)
        y = x @ w.t()
        # The second time counts: the memory is there. On a GPU many in a row: one is short.
        for repetitions in (1, 20 if device.type == "cuda" else 1):
            synchronise(device)
            start = time.perf_counter()
            for _ in range(repetitions):
                torch.mm(x, w.t(), out=y)
                x_grad, w_grad = y @ w, y.t() @ x
            synchronise(device)
            last = (time.perf_counter() - start) / repetitions
        seconds += times * last
        flops += times * 6 * n * fan_in * fan_out
        del x, w, y, x_grad, w_grad
    return flops / seconds


def peak_rate(device, dtype):
    """Operations per second that the maker of a card promises, or None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return next((rate for name, rate in PEAKS.items() if name in device_name(device)), None)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xla":
        import torch_xla
        torch_xla.sync(wait=True)


def seconds_of(work, device):
    """Times a function, including all the work that it starts on the device. Returns seconds."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a CPU" if device.type == "cpu" else str(device)


def peak_memory(device):
    """Returns the peak memory in bytes: of a GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = "/proc/self/status"
    if os.path.exists(status):      # Linux, where ru_maxrss starts from the size of the parent
        with open(status, encoding="utf-8") as file:
            kilobytes, = [line.split()[1] for line in file if line.startswith("VmHWM")]
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # macOS: bytes


def memory_of_steps(device):
    """Returns the peak memory of the work itself in bytes, without the imported libraries."""
    return peak_memory(device) - (IMPORTED if device.type != "cuda" else 0)


@torch.no_grad()
def generate_without_cache(model, prompts, n):
    """Draws n greedy tokens for prompts of one length, and computes everything again for each."""
    tokens = torch.tensor(prompts, device=model.lm_head.weight.device)
    for _ in range(n):
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = model.lm_head(model.transformer(tokens, position)[:, -1])
        tokens = torch.cat([tokens, logits.argmax(dim=1, keepdim=True)], dim=1)


# ---------------- the measurement


class Bench:
    """Models, data and optimizers, and one function that does a task once."""

    def __init__(self, args):
        self.args = argparse.Namespace(**vars(args), lr=LR)
        self.device = setup(self.args)
        self.dtype = getattr(torch, self.args.dtype)
        self.config = GPTConfig(**MODELS[args.model])
        examples = examples_for(self.args, self.config)
        self.datasets = {task: task_dataset(task, examples) for task in {*args.only, "dpo"}}
        # every task the rows of DPO, so that all can be compared
        self.order = BatchOrder(self.datasets["dpo"].row_lengths(), args.batch_size, args.seed)
        self.terms = {task: row_terms(self.datasets[task], task)
                      for task in args.only if task in LOSSES}
        with self.device if self.device.type == "cuda" else nullcontext():      # drawn on a CPU,
            self.policy = GPT(self.config).to(self.device)      # 774M weights take 15 s
        self.models = {task: self.policy for task in args.only}
        if "reward model" in args.only:
            self.models["reward model"] = RewardModel.from_policy(self.policy).to(self.device)
        networks = set(self.models.values())
        if args.lora:
            for network in networks:
                add_lora(network, args.lora, args.model)
        if args.gradient_checkpointing:
            for network in networks:
                recompute_layers(network)
        if args.compile:
            for network in networks:
                network.compile(dynamic=True)
        self.optimizers = {network: adamw(network, LR) for network in networks}

    def do(self, task, turn):
        """Does a task once, on the rows of a turn."""
        rows, dataset, model = self.order.rows(turn), self.datasets[task], self.models[task]
        if task in GENERATE:
            shortest = min(len(dataset.examples[i][0]) for i in rows)
            prompts = [dataset.examples[i][0][-shortest:].tolist() for i in rows]
            with compute():
                if task == "generate":
                    model.generate(prompts, N_NEW, temperature=0)
                else:
                    generate_without_cache(model, prompts, N_NEW)
            return

        batch = dataset.batch(rows).to(self.device)
        with torch.set_grad_enabled(task != "score"), compute():
            outputs = model(batch)                  # (B, K + S) log-probs, or (B, K) rewards
        if task == "score":
            return
        if task == "reward model":
            losses = batch.pair_weight * bradley_terry(batch.pair_up(outputs))
            total = len(rows)
        else:
            flags = knobs(task)
            if "gamma" in flags:
                flags["gamma"] = 0.01
            losses = batch_loss(task, outputs, batch, **flags)
            total = int(self.terms[task][rows].sum())
        (losses.sum() / total).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer = self.optimizers[model]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.device.type == "xla":
            sync()

    def seconds(self, task, turn):
        return seconds_of(lambda: self.do(task, turn), self.device)

    def flops(self, task, turn):
        """Counts the operations that a task needs in a turn."""
        examples = [self.datasets[task].examples[i] for i in self.order.rows(turn)]
        config = self.config if task != "reward model" else replace(self.config, vocab_size=0)
        passes = 3                  # forward, the inputs' gradients, the weights' gradients
        if task == "score":
            passes = 1
        elif self.args.lora:
            passes = 2              # and the adapters', which are thin
        return passes * needed_flops(config, examples)


def task_dataset(task, examples):
    """Makes a Dataset with the responses and columns that a task needs in train_policy.py. The
    values in the columns are zeros. examples: with K + 1 responses each."""
    needed = needs(task) if task in LOSSES else ()
    K, S = len(examples[0][1]) - 1, int("kl" in needed)
    if task == "sft":
        K = 1
    N, examples = len(examples), [(prompt, responses[:K + S]) for prompt, responses in examples]
    rewards = np.zeros((N, K, MEMBERS), np.float32) if "rewards" in needed else None
    ref_logps = np.zeros((N, K + S), np.float32) if "ref_logps" in needed else None
    return Dataset(examples, rewards, ref_logps, n_samples=S)


def measure(args):
    """Returns a list with a dictionary for each task, and a dictionary for the machine."""
    bench = Bench(args)
    tasks, device, turns = args.only, bench.device, range(WARM_UP, WARM_UP + args.steps)
    pairs = bench.datasets["dpo"]
    tokens, response_tokens = pairs.row_lengths(), pairs.response_lengths().sum(axis=1)     # (N,)
    for turn in range(WARM_UP):
        for task in tasks:
            bench.do(task, turn)
    memory = memory_of_steps(device)        # before the matrix products below take theirs
    seconds, rates = {task: [] for task in tasks}, []
    for turn in turns:
        for task in tasks:
            seconds[task].append(bench.seconds(task, turn))
        rows = bench.order.rows(turn)
        rates.append(matmul_rate(bench.policy, tokens[rows].sum(), response_tokens[rows].sum(),
                                 bench.dtype, device))
    results, peak = [], peak_rate(device, bench.dtype)
    for task in tasks:
        s = median(seconds[task])
        result = {"task": task, "seconds": s, "from": min(seconds[task]), "to": max(seconds[task])}
        if task in GENERATE:
            result["tokens_per_s"] = args.batch_size * N_NEW / s
        else:
            lengths = bench.datasets[task].row_lengths()
            useful = [int(lengths[bench.order.rows(turn)].sum()) for turn in turns]
            flops = [bench.flops(task, turn) for turn in turns]
            shares = [f / t / rate for f, t, rate in zip(flops, seconds[task], rates)]
            result |= {"pairs_per_s": args.batch_size / s, "useful": mean(useful),
                       "tokens_per_s": median(n / t for n, t in zip(useful, seconds[task])),
                       "gflop": mean(flops) / 1e9, "mfu": median(shares)}
            if peak is not None:
                result["of_peak"] = median(f / t for f, t in zip(flops, seconds[task])) / peak
        results.append(result)
    machine = {"device": device_name(device), "dtype": bench.args.dtype,
               "gflops": median(rates) / 1e9, "gflops_from": min(rates) / 1e9,
               "gflops_to": max(rates) / 1e9,
               "torch": torch.__version__, "peak_gib": memory / 2 ** 30,
               "model": args.model, "batch_size": args.batch_size,
               "parameters": sum(p.numel() for p in bench.policy.parameters())}
    return results, machine


def report(results, machine):
    m = machine
    print(f"{m['model']}: {m['parameters']:,} parameters, batches of {m['batch_size']}, "
          f"{m['dtype']}, {m['device']}, torch {m['torch']}\n"
          f"matrix products at the model's sizes: {m['gflops']:.0f} GFLOP/s "
          f"({m['gflops_from']:.0f} .. {m['gflops_to']:.0f}); "
          f"peak memory above the imported libraries {m['peak_gib']:.2f} GiB\n")
    print("| task | step, s | pairs/s | useful tokens | tokens/s | needed GFLOP | MFU "
          "| of peak | time / DPO's |\n" + "|---" * 9 + "|")
    seconds = {r["task"]: r["seconds"] for r in results}
    for r in results:
        cells = [r["task"], f"{r['seconds']:.3f} ({r['from']:.3f} .. {r['to']:.3f})",
                 "", "", f"{r['tokens_per_s']:,.0f}", "", "", "", ""]
        if r["task"] not in GENERATE:
            cells[2:4] = [f"{r['pairs_per_s']:.2f}", f"{r['useful']:,.0f}"]
            cells[5:7] = [f"{r['gflop']:.0f}", f"{r['mfu']:.0%}"]
            if "of_peak" in r:
                cells[7] = f"{r['of_peak']:.0%}"
            if "dpo" in seconds:
                cells[8] = f"{r['seconds'] / seconds['dpo']:.2f}"
        print("| " + " | ".join(cells) + " |")


# ---------------- where the time goes


def part_of(name, shapes, config):
    """Tells which part of a step an operator belongs to, by its name and its inputs' sizes."""
    shapes = [shape for shape in shapes or [] if isinstance(shape, list)]
    sizes = {size for shape in shapes for size in shape}
    if "layer_norm" in name or "rms_norm" in name:
        return "norms"
    if "adamw" in name or "foreach" in name or "norm" in name:
        return "optimizer and clipping"
    if name == "aten::mul_" and len(shapes[0]) < 3 and config.vocab_size not in sizes:
        return "optimizer and clipping"
    if "embedding" in name:
        return "embeddings"
    if config.vocab_size in sizes:
        return "head"
    if "dot_product" in name or "attention" in name:
        return "attention (scores)"
    inner = config.n_inner or 4 * config.n_embd
    if "gelu" in name or "silu" in name or sizes & {inner, 2 * inner}:
        return "MLP"
    if name in ("aten::addmm", "aten::mm"):
        return "attention (projections)"
    return "copies, sums and the rest"


def profile(args):
    """Prints the top operators, and the share of each part, of the first task."""
    bench, task = Bench(args), args.only[0]
    for turn in range(WARM_UP):
        bench.do(task, turn)
    on_cuda, turns = bench.device.type == "cuda", range(WARM_UP, WARM_UP + 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        for turn in turns:
            bench.do(task, turn)
        synchronise(bench.device)
        wall = (time.perf_counter() - start) * 1e6                      # microseconds

    def time_of(event):
        return event.self_device_time_total if on_cuda else event.self_cpu_time_total

    operators = [e for e in profiler.key_averages() if e.key.startswith("aten")]
    print(f"{task}, {len(turns)} steps, {wall / len(turns) / 1e3:.0f} ms each under the profiler\n"
          "\n| operator | share | calls a step |\n|---|---|---|")
    for event in sorted(operators, key=time_of, reverse=True)[:12]:
        print(f"| {event.key} | {time_of(event) / wall:.1%} | {event.count / len(turns):.0f} |")
    parts = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten"):
            part = part_of(event.key, event.input_shapes, bench.config)
            parts[part] = parts.get(part, 0) + time_of(event)
    parts["outside operators: Python, collate, autograd"] = wall - sum(parts.values())
    print("\n| part of the step | share |\n|---|---|")
    for part in sorted(parts, key=parts.get, reverse=True):
        print(f"| {part} | {parts[part] / wall:.1%} |")


# ---------------- cost against size

SCALING = {"--prompt": (64, 128, 256, 512, 1024),
           "--response": ("16,16", "32,32", "64,64", "128,128", "256,256"),
           "--n_responses": (2, 3, 4, 6, 8),
           "--batch_size": (2, 4, 8, 16, 32)}


def scaling(args):
    """Prints what a DPO step costs at different sizes. Each size has its own process, so that its
    peak memory can be measured."""
    print("| varied | DPO step, s | unique tokens | µs per token | peak memory, GiB |\n"
          "|---|---|---|---|---|")
    kept = [f"--{name}={getattr(args, name)}"
            for name in ("model", "shape", "steps", "seed", "device", "dtype")]
    for flag in [f"{name}={value}" for name, values in SCALING.items() for value in values]:
        done = subprocess.run([sys.executable, __file__, *kept, "--only=dpo", "--json", flag],
                              stdout=subprocess.PIPE, text=True, check=True)
        (result,), machine = json.loads(done.stdout)
        print(f"| `{flag}` | {result['seconds']:.3f} | {result['useful']:,.0f} | "
              f"{1e6 / result['tokens_per_s']:.0f} | {machine['peak_gib']:.2f} |", flush=True)


def main(argv=None):
    args = parse_flags(argv)
    if args.profile:
        profile(args)
    elif args.scaling:
        scaling(args)
    elif args.json:
        print(json.dumps(measure(args)))
    else:
        report(*measure(args))


IMPORTED = peak_memory(torch.device("cpu"))

if __name__ == "__main__":
    run_script(main)
