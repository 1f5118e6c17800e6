"""Our training step and TRL's, in turns: the same architecture, kind of rows, batch size and number
of threads (`bash dev/bench_trl.sh`).

TRL's side is its trainer's own loop, timed from the end of one step to the end of the next. After
each, a second process does one of our steps while TRL waits; two processes, so that neither uses
the other's memory (or its settings). Batches of TRL are the rows in random order, ours sorted by
length within a window, as each does by default; over the data the work is the same. Ratios: median
and (smallest .. largest) over the turns. GiB: peak memory above the imported libraries.

settings   default   gradient checkpointing, the reference model run in every step (as TRL comes, in
                     float32)
           best      neither: precompute_ref_log_probs, no gradient checkpointing (the best it has
                     on a CPU)
           head      best, and the vocabulary projection on completion tokens only, as TRL does on
                     CUDA; not stock on a CPU
           bf16      default, with TRL's default of bfloat16

           bf16 best  best, in bfloat16
           recompute  default, and ours with --gradient_checkpointing too
--device=cuda --models=gpt2,gpt2-large races on a GPU, where "head" is what TRL does anyway.

--generate races GPT.generate against transformers' generate instead, on one thread: summaries of
TinyTLDR's posts up to the end-of-text token, 1, 2 or 16 of each post, in batches of 128.
"""
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dev import bench
from support.device import keep_memory
from support.flags import Parser, positive_int, run_script

# transformers and TRL are imported in the process that runs them: ours measures its own memory.

SETTINGS = {"dpo": ("default", "best", "head", "bf16", "bf16 best", "recompute"),
            "reward": ("default", "best")}
OUR_WARM_UP = 5


def always(device):
    return True


def our_steps(args, pipe):
    """The second process: warms up, then does a step whenever it is asked to and says how long it
    took."""
    ours, (task,) = bench.Bench(args), args.only
    for turn in range(OUR_WARM_UP):
        ours.do(task, turn)
    pipe.send(bench.memory_of_steps(ours.device) / 2 ** 30)
    while (turn := pipe.recv()) is not None:
        pipe.send(ours.seconds(task, turn))


def race(model, shape, trainer, settings, steps, device):
    """Returns {"trl": [seconds], "ours": [seconds], "trl_gib": GiB, "our_gib": GiB}."""
    import datasets
    import torch
    import transformers
    import trl.trainer.utils

    from dev import peer
    args = bench.parse_flags([
        f"--model={model}", f"--shape={shape}", f"--steps={steps}", f"--device={device}",
        f"--only={'reward model' if trainer == 'reward' else 'dpo'}",
        f"--dtype={'bfloat16' if 'bf16' in settings else 'float32'}",
        *(["--gradient_checkpointing"] if settings == "recompute" else [])])
    device = torch.device(device)
    warm_up = 1 if model == "small" else 5
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, **bench.MODELS[model]}
    config = transformers.GPT2Config(
        **sizes, n_positions=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    n_rows = (steps + warm_up) * args.batch_size
    examples = [(prompt, responses[:2]) for prompt, responses
                in bench.made_up_examples(args, n_rows, sizes["vocab_size"])]
    if settings == "head":
        trl.trainer.utils._use_triton = always
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=our_steps, args=(args, theirs), daemon=True).start()
    theirs.close()      # so that recv() fails if that process does
    times = {"trl": [], "ours": [], "our_gib": pipe.recv()}
    imported = bench.peak_memory(device)

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            bench.synchronise(device)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            bench.synchronise(device)
            times["trl"].append(time.perf_counter() - self.start)
            pipe.send(OUR_WARM_UP + len(times["ours"]))
            times["ours"].append(pipe.recv())
            self.start = time.perf_counter()

    as_trl_comes = settings in ("default", "bf16", "recompute")
    options = dict(peer.SETTINGS, per_device_train_batch_size=args.batch_size, num_train_epochs=1,
                   logging_strategy="no", bf16="bf16" in settings, use_cpu=device.type == "cpu",
                   gradient_checkpointing=as_trl_comes)
    out = tempfile.mkdtemp()
    common = dict(processing_class=peer.peer_tokenizer(sizes["vocab_size"]), callbacks=[Turns()])
    if trainer == "dpo":
        policy = transformers.GPT2LMHeadModel(config)
        ref = transformers.GPT2LMHeadModel(config) if as_trl_comes else None
        trl_args = trl.DPOConfig(out, precompute_ref_log_probs=not as_trl_comes,
                                 precompute_ref_batch_size=args.batch_size, **options)
        rows = datasets.Dataset.from_list(peer.features(examples))
        racer = peer.PreparedDPOTrainer(policy, ref, trl_args, train_dataset=rows, **common)
    else:
        reward_model = transformers.GPT2ForSequenceClassification(config)
        trl_args = trl.RewardConfig(out, **options)
        rows = datasets.Dataset.from_list(peer.reward_features(examples))
        racer = peer.PreparedRewardTrainer(reward_model, trl_args, train_dataset=rows, **common)
    racer.train()
    pipe.send(None)
    trl_gib = (bench.peak_memory(device) - imported) / 2 ** 30
    return {"trl": times["trl"][warm_up:], "ours": times["ours"][warm_up:], "trl_gib": trl_gib,
            "our_gib": times["our_gib"]}


def race_generation(path, n_prompts=512, batch_size=128, max_new_tokens=64):
    """Prints a table. path: a policy that reads TinyTLDR's tokens. Seconds are CPU time."""
    import torch
    import transformers

    from data import get_tokenizer
    from model import GPT
    from tinytldr import post
    torch.set_num_threads(1)
    keep_memory()
    ours, theirs = GPT.from_pretrained(path), transformers.GPT2LMHeadModel.from_pretrained(path)
    theirs.eval()
    tokenizer = get_tokenizer("tinytldr")
    stop = tokenizer.eot_token

    def with_transformers(prompts):
        for first in range(0, len(prompts), batch_size):
            part = prompts[first:first + batch_size]
            longest = max(map(len, part))
            tokens = torch.tensor([[stop] * (longest - len(ids)) + ids for ids in part])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in part])
            theirs.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, top_k=0,
                            do_sample=True, eos_token_id=stop, pad_token_id=stop)

    print("| responses to a prompt | transformers, s | here, s | times faster |\n"
          "|---|---|---|---|")
    for n in (1, 2, 16):
        prompts = [tokenizer.encode_ordinary(post(0, "test", i))
                   for i in range(n_prompts // n) for _ in range(n)]
        turns = []
        for _ in range(6):                                      # the first warms up
            start = time.process_time()
            with_transformers(prompts)
            middle = time.process_time()
            ours.generate(prompts, max_new_tokens, stop=stop, batch_size=batch_size)
            turns.append((middle - start, time.process_time() - middle))
        ratios = [slow / fast for slow, fast in turns[1:]]
        slow, fast = (median(seconds) for seconds in zip(*turns[1:]))
        print(f"| {n} | {slow:.2f} | {fast:.2f} | "
              f"{median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f}) |", flush=True)


def table_row(line, times):
    model, shape, trainer, settings = line
    ratios = [theirs / ours for theirs, ours in zip(times["trl"], times["ours"])]
    cells = [model, shape, f"{trainer}, {settings}",
             f"{8 / median(times['trl']):.2f}", f"{8 / median(times['ours']):.2f}",
             f"{median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f})",
             f"{times['trl_gib']:.2f}", f"{times['our_gib']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=5, help="turns to measure")
    add("--models", default="tiny,small", help=f"comma-separated, of: {', '.join(bench.MODELS)}")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--only", default="", help="only lines with all of these comma-separated words, such as "
        "tiny,hh,head")
    add("--line", help="model,shape,trainer,settings: run this one here and print JSON")
    add("--generate", action="store_true", help="race generation")
    add("--policy", default="out/sft", help="for --generate: a TinyTLDR policy")
    args = parser.parse_args()
    if args.generate:
        race_generation(args.policy)
        return
    if args.line:
        print(json.dumps(race(*args.line.split(","), args.steps, args.device)))
        return
    print("| model | shape | trainer, settings | TRL, pairs/s | here, pairs/s | times faster "
          "| TRL, GiB | here, GiB |\n" + "|---" * 8 + "|")
    words = set(filter(None, args.only.split(",")))
    for line in itertools.product(args.models.split(","), bench.SHAPES, SETTINGS, SETTINGS["dpo"]):
        if not words <= set(line) or line[3] not in SETTINGS[line[2]]:
            continue
        command = [sys.executable, __file__, f"--line={','.join(line)}", f"--steps={args.steps}",
                   f"--device={args.device}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            print(f"| {' | '.join(line[:2])} | {', '.join(line[2:])} | failed: {reason} |",
                  flush=True)
            continue
        print(table_row(line, json.loads(done.stdout.strip().splitlines()[-1])), flush=True)


if __name__ == "__main__":
    run_script(main)
