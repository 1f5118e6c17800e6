"""What a training step costs, and what the machine could do: seconds, tokens, memory, and the share of the matmul rate.

    python bench.py                                  # a 6-layer GPT of width 384, prompts of 340 tokens (TL;DR): 3 min
    python bench.py --model=tiny --shape=hh          # 4 layers of width 128, prompts of 150 tokens, long responses
    python bench.py --data=prefs.jsonl --model=gpt2 --device=cuda
    python bench.py --only=dpo --profile             # where the time goes, operator by operator and part by part
    python bench.py --scaling                        # against prompt length, response length, responses per prompt, batch
    bash runs/bench_trl.sh                           # side by side with TRL

Everything is measured in turns in one process, so that a busy machine disturbs all rows alike: trust ratios, not seconds.

step        median seconds of an optimizer step (collate, forward, loss, backward, clip, AdamW) and (min .. max)
useful      tokens that had to be looked at: every prompt once, every response once, no padding
needed      floating-point operations that the step has to do: the prompt once, the last layer only where something is read,
            the vocabulary projection on response tokens only, causal attention; the backward pass twice the forward
MFU         needed operations per second over the machine's rate for the model's own matrix products, measured in the same turns
"""
import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

import runtime
from data import batches, collate, get_tokenizer, select, tokenised_file
from losses import PESSIMISTIC, PREFERENCE_LOSSES, plackett_luce, preference_loss
from model import GPT, GPTConfig
from reward import RewardModel
from runtime import InputError

MODELS = {"tiny": dict(n_layer=4, n_head=4, n_embd=128, vocab_size=1024), "small": dict(n_layer=6, n_head=6, n_embd=384),
          "gpt2": {}}
SHAPES = {"tldr": (340, (25, 55)), "hh": (150, (60, 140))}      # tokens in a prompt, in a response (from .. to)
TASKS = ("sft",) + PREFERENCE_LOSSES + ("reward model", "score", "generate", "generate, no cache")
N_NEW, MEMBERS = 16, 5                                           # tokens to generate; reward models in e-DPO's family


def parse_flags(argv):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--shape", default="tldr", choices=SHAPES, help="of made-up data")
    parser.add_argument("--prompt", type=runtime.positive(int), help="tokens in a made-up prompt, instead of those of --shape")
    parser.add_argument("--response", help="tokens in a made-up response, FROM,TO, instead of those of --shape")
    parser.add_argument("--n_responses", type=runtime.positive(int), default=2, help="per prompt, without the KL term's")
    parser.add_argument("--data", help="a file of preference pairs or a hub name, instead of made-up data")
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--batch_size", type=runtime.positive(int), default=8, help="pairs per step")
    parser.add_argument("--steps", type=runtime.positive(int), default=10, help="turns to measure, after three to warm up")
    parser.add_argument("--seed", type=runtime.seed, default=0)
    runtime.device_flags(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    parser.add_argument("--profile", action="store_true", help="where the time of the first task goes")
    parser.add_argument("--scaling", action="store_true", help="step time and memory against four sizes")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(TASKS)
    for task in args.only:
        if task not in TASKS:
            raise InputError(f"--only: {task!r} is none of {', '.join(TASKS)}")
    try:
        args.response = [int(n) for n in args.response.split(",")] if args.response else SHAPES[args.shape][1]
        if len(args.response) != 2 or not 0 < args.response[0] <= args.response[1]:
            raise ValueError
    except ValueError:
        raise InputError(f"--response: FROM,TO in tokens, such as 25,55; not {args.response!r}") from None
    args.prompt = args.prompt or SHAPES[args.shape][0]
    return args


# ---------------------------------------------------------------- the work

def made_up_examples(args, n, vocab_size):
    """n prompts with K + 1 responses of random tokens: the last one stands for the KL term's sample."""
    rng = np.random.default_rng(args.seed)
    ids = lambda length: rng.integers(0, vocab_size, length).astype(np.int32)
    low, high = args.response
    return [(ids(args.prompt), [ids(rng.integers(low, high + 1)) for _ in range(args.n_responses + 1)]) for _ in range(n)]


def needed_flops(config, examples):
    """Floating-point operations of one forward pass over (prompt, responses) examples, a multiply-add counting two."""
    C, flops = config.n_embd, 0
    for prompt, responses in examples:
        P, lengths = len(prompt), [len(response) for response in responses]
        tokens, read = P + sum(lengths), 1 + sum(lengths)                # read: the last prompt token and the responses
        causal = P * (P + 1) // 2                                        # pairs of tokens that see each other
        tree = sum(n * P + n * (n + 1) // 2 for n in lengths)
        every_layer = 24 * C * C * tokens + 4 * C * (causal + tree)      # 12 C^2 weights; scores and weighted sums
        last_layer = 4 * C * C * tokens + 20 * C * C * read + 4 * C * (P + tree)    # keys and values for all
        flops += (config.n_layer - 1) * every_layer + last_layer + 2 * C * config.vocab_size * sum(lengths)
    return flops


def matmul_seconds(config, tokens, response_tokens, dtype, device):
    """Seconds for the matrix products of one step, and nothing else: for each of the model's weights, forward, gradient of
    the input, gradient of the weight. -> (seconds, operations)"""
    C, seconds, flops = config.n_embd, 0.0, 0
    shapes = [(tokens, C, 3 * C, config.n_layer), (tokens, C, C, config.n_layer), (tokens, C, 4 * C, config.n_layer),
              (tokens, 4 * C, C, config.n_layer), (response_tokens, C, config.vocab_size, 1)]
    for n, fan_in, fan_out, times in shapes:
        x, w = torch.randn(n, fan_in, dtype=dtype, device=device), torch.randn(fan_out, fan_in, dtype=dtype, device=device)
        y = x @ w.t()
        for _ in range(2):      # the second time counts: the memory is there
            synchronise(device)
            start = time.perf_counter()
            torch.mm(x, w.t(), out=y)
            x_grad, w_grad = y @ w, y.t() @ x
            synchronise(device)
            once = time.perf_counter() - start
        seconds, flops = seconds + times * once, flops + times * 6 * n * fan_in * fan_out
        del x, w, y, x_grad, w_grad
    return seconds, flops


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xla":
        import torch_xla
        torch_xla.sync(wait=True)


def peak_memory(device):
    """Bytes: of the device, or the largest this process has been."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):      # Linux, where ru_maxrss starts from the size of the parent process
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # macOS: bytes


@torch.no_grad()
def generate_without_cache(model, prompts, n):
    """n greedy tokens for prompts of one length, everything computed again for every token."""
    tokens = torch.tensor(prompts, device=model.lm_head.weight.device)
    for _ in range(n):
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = model.lm_head(model.transformer(tokens, position)[:, -1])
        tokens = torch.cat([tokens, logits.argmax(dim=1, keepdim=True)], dim=1)


# ---------------------------------------------------------------- the measurement

class Bench:
    """Models, data and optimizers, and one function that does a task once."""

    def __init__(self, args):
        runtime_args = argparse.Namespace(device=args.device, dtype=args.dtype, seed=args.seed, lr=1e-5, weight_decay=0.0)
        self.device, self.autocast = runtime.setup(runtime_args)
        self.args, self.dtype = args, torch.bfloat16 if runtime_args.dtype == "bfloat16" else torch.float32
        K, B = args.n_responses, args.batch_size
        config = GPTConfig(**MODELS[args.model])
        if args.data:
            tokenizer = get_tokenizer("gpt2")
            if tokenizer.n_vocab > config.vocab_size:
                raise InputError(f"--model: {args.model} knows {config.vocab_size} tokens, and --data is in GPT-2's "
                                 f"{tokenizer.n_vocab}; use small or gpt2")
            dataset = select(tokenised_file(args.data, tokenizer), config.block_size, args.data)
            examples = [(prompt, responses + [responses[0]]) for prompt, responses in dataset.examples]
        else:
            config.block_size = max(config.block_size, args.prompt + args.response[1])
            examples = made_up_examples(args, 32 * B, config.vocab_size)
        self.config, self.policy = config, GPT(config).to(self.device)
        self.reward_model = RewardModel.from_policy(self.policy).to(self.device) if "reward model" in args.only else None
        self.models = {model: torch.compile(model, dynamic=True) if args.compile else model
                       for model in (self.policy, self.reward_model) if model}
        self.optimizers = {model: runtime.adamw(model, runtime_args, self.device) for model in self.models}
        sizes = np.array([len(prompt) + sum(map(len, responses[:K])) for prompt, responses in examples])
        plan = [rows for epoch in range(1 + args.steps * B // len(examples)) for rows in batches(sizes, B, args.seed, epoch)]
        self.plan = [[examples[i] for i in rows] for rows in plan]

    def examples(self, task, turn):
        """The rows of a turn, with the responses that the task needs."""
        K = self.args.n_responses
        K = 1 if task == "sft" else K + 1 if task in PESSIMISTIC else K
        return [(prompt, responses[:K]) for prompt, responses in self.plan[turn % len(self.plan)]]

    def do(self, task, turn):
        examples, device = self.examples(task, turn), self.device
        if task.startswith("generate"):
            shortest = min(len(prompt) for prompt, _ in examples)
            prompts = [prompt[-shortest:].tolist() for prompt, _ in examples]
            with self.autocast():
                if task == "generate":
                    self.policy.generate(prompts, N_NEW, temperature=0)
                else:
                    generate_without_cache(self.policy, prompts, N_NEW)
            return
        base = self.reward_model if task == "reward model" else self.policy
        with torch.no_grad() if task == "score" else contextlib.nullcontext(), self.autocast():
            batch = collate(examples, runtime.shape_multiple(device)).to(device)
            out = self.models[base](batch)                                     # (B, K)
        if task == "score":
            return
        if task == "sft":
            loss = -out.sum() / batch.lengths.sum()
        elif task == "reward model":
            loss = plackett_luce(out).mean()
        elif self.args.n_responses >= 2:      # rewards and reference log-probs come from the cache
            K = self.args.n_responses
            rewards = torch.zeros(len(out), K, MEMBERS, device=device)
            loss = preference_loss(task, out, out.detach(), rewards, beta=0.1, tau=0.1, gamma=0.01, K=K).mean()
        else:
            loss = -out.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        self.optimizers[base].step()
        self.optimizers[base].zero_grad(set_to_none=True)
        runtime.end_step(device)

    def seconds(self, task, turn):
        synchronise(self.device)
        start = time.perf_counter()
        self.do(task, turn)
        synchronise(self.device)
        return time.perf_counter() - start


def measure(args):
    """-> a list of one dictionary per task, and one for the machine."""
    bench = Bench(args)
    config, times, rates = bench.config, {task: [] for task in args.only}, []
    for turn in range(-3, args.steps):
        shown = bench.examples("dpo", turn)
        tokens = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in shown)
        response_tokens = sum(sum(map(len, responses)) for _, responses in shown)
        for task in args.only:
            seconds = bench.seconds(task, turn)
            if turn >= 0:
                times[task].append(seconds)
        if turn < 0:
            memory = peak_memory(bench.device)      # before the matrix products below take theirs
        else:
            matmul, flops = matmul_seconds(config, tokens, response_tokens, bench.dtype, bench.device)
            rates.append(flops / matmul)
    results = []
    for task in args.only:
        rows = [bench.examples(task, turn) for turn in range(args.steps)]
        useful = [sum(len(prompt) + sum(map(len, responses)) for prompt, responses in examples) for examples in rows]
        result = {"task": task, "seconds": statistics.median(times[task]), "from": min(times[task]), "to": max(times[task])}
        if task.startswith("generate"):
            result.update(tokens_per_s=args.batch_size * N_NEW / result["seconds"])
        else:
            passes = 1 if task == "score" else 3
            head = 2 * config.n_embd * config.vocab_size if task == "reward model" else 0       # which it does not have
            flops = [passes * (needed_flops(config, examples) - head * sum(sum(map(len, r)) for _, r in examples))
                     for examples in rows]
            result.update(pairs_per_s=args.batch_size / result["seconds"], useful=statistics.mean(useful),
                          tokens_per_s=statistics.median(n / s for n, s in zip(useful, times[task])),
                          gflop=statistics.mean(flops) / 1e9,
                          mfu=statistics.median(f / s / rate for f, s, rate in zip(flops, times[task], rates)))
        results.append(result)
    machine = {"device": torch.cuda.get_device_name() if bench.device.type == "cuda" else
               f"{torch.get_num_threads()} threads of a CPU" if bench.device.type == "cpu" else str(bench.device),
               "dtype": str(bench.dtype).removeprefix("torch."), "gflops": statistics.median(rates) / 1e9,
               "gflops_from": min(rates) / 1e9, "gflops_to": max(rates) / 1e9, "torch": torch.__version__,
               "peak_gib": (memory - IMPORTED * (bench.device.type != "cuda")) / 2 ** 30, "model": args.model, "batch_size": args.batch_size,
               "parameters": sum(p.numel() for p in bench.policy.parameters())}
    return results, machine


def report(results, machine):
    print(f"{machine['model']}: {machine['parameters']:,} parameters, batches of {machine['batch_size']}, {machine['dtype']}, "
          f"{machine['device']}, torch {machine['torch']}\nmatrix products at the model's sizes: {machine['gflops']:.0f} GFLOP/s "
          f"({machine['gflops_from']:.0f} .. {machine['gflops_to']:.0f}); peak memory above the imported libraries "
          f"{machine['peak_gib']:.2f} GiB\n")
    dpo = next((result["seconds"] for result in results if result["task"] == "dpo"), None)
    print("| task | step, s | pairs/s | useful tokens | tokens/s | needed GFLOP | MFU | time / DPO's |\n|---|---|---|---|---|---|---|---|")
    for r in results:
        seconds = f"{r['seconds']:.3f} ({r['from']:.3f} .. {r['to']:.3f})"
        if r["task"].startswith("generate"):
            print(f"| {r['task']} | {seconds} | | | {r['tokens_per_s']:,.0f} | | | |")
        else:
            print(f"| {r['task']} | {seconds} | {r['pairs_per_s']:.2f} | {r['useful']:,.0f} | {r['tokens_per_s']:,.0f} | "
                  f"{r['gflop']:.0f} | {r['mfu']:.0%} | " + (f"{r['seconds'] / dpo:.2f} |" if dpo else "|"))


# ---------------------------------------------------------------- where the time goes

def part_of(name, shapes, config):
    """Which part of a step an operator belongs to, by its name and the sizes of what it reads."""
    C, sizes = config.n_embd, {size for shape in shapes or [] if isinstance(shape, list) for size in shape}
    if "adamw" in name or "norm" in name and "layer" not in name or name == "aten::mul_" and len(shapes[0]) < 3 and not {
            config.vocab_size} & sizes:
        return "optimizer and clipping"
    if "embedding" in name:
        return "embeddings"
    if config.vocab_size in sizes:
        return "head"
    if "dot_product" in name or "attention" in name:
        return "attention (scores)"
    if "layer_norm" in name:
        return "layer norms"
    if "gelu" in name or 4 * C in sizes:
        return "MLP"
    if name in ("aten::addmm", "aten::mm"):
        return "attention (projections)"
    return "copies, sums and the rest"


def profile(args):
    """Prints the top operators, and the share of each part, of the first task."""
    bench, task, n = Bench(args), args.only[0], 3
    for turn in range(2):
        bench.do(task, turn)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        for turn in range(n):
            bench.do(task, turn)
        synchronise(bench.device)
        wall = (time.perf_counter() - start) * 1e6
    time_of = (lambda e: e.self_device_time_total) if bench.device.type == "cuda" else (lambda e: e.self_cpu_time_total)
    operators = sorted((e for e in profiler.key_averages() if e.key.startswith("aten")), key=time_of, reverse=True)
    print(f"{task}, {n} steps, {wall / n / 1e3:.0f} ms each under the profiler\n\n| operator | share | calls a step |\n|---|---|---|")
    for e in operators[:12]:
        print(f"| {e.key} | {time_of(e) / wall:.1%} | {e.count / n:.0f} |")
    parts = {}
    for e in profiler.key_averages(group_by_input_shape=True):
        if e.key.startswith("aten"):
            part = part_of(e.key, e.input_shapes, bench.config)
            parts[part] = parts.get(part, 0) + time_of(e)
    parts["outside operators: Python, collate, autograd"] = wall - sum(parts.values())
    print("\n| part of the step | share |\n|---|---|")
    for part, spent in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {part} | {spent / wall:.1%} |")


# ---------------------------------------------------------------- cost against size

SCALING = [*(f"--prompt={n}" for n in (64, 128, 256, 512, 1024)), *(f"--response={n},{n}" for n in (16, 32, 64, 128, 256)),
           *(f"--n_responses={n}" for n in (2, 3, 4, 6, 8)), *(f"--batch_size={n}" for n in (2, 4, 8, 16, 32))]


def scaling(args):
    """A process for each size, so that peak memory is its own."""
    print("| varied | DPO step, s | unique tokens | µs per token | peak memory, GiB |\n|---|---|---|---|---|")
    for flag in SCALING:
        done = subprocess.run([sys.executable, __file__, f"--model={args.model}", f"--shape={args.shape}", "--only=dpo", "--json",
                               f"--steps={args.steps}", f"--device={args.device}", f"--dtype={args.dtype}", flag],
                              capture_output=True, text=True, check=True)
        (result,), machine = json.loads(done.stdout)
        print(f"| `{flag}` | {result['seconds']:.3f} | {result['useful']:,.0f} | {1e6 / result['tokens_per_s']:.0f} | "
              f"{machine['peak_gib']:.2f} |", flush=True)


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


IMPORTED = peak_memory(torch.device("cpu"))      # what is above this is the work's own

if __name__ == "__main__":
    runtime.run(main)
