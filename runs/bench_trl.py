"""Our training step and TRL's, in turns: same architecture, same kind of rows, batch size and threads (`bash runs/bench_trl.sh`).

TRL's side is its trainer's own loop, timed from the end of one step to the end of the next. After each, a second process
does one of our steps while TRL waits; two processes, so that neither uses the other's memory (or its settings). Batches of
TRL are the rows in random order, ours sorted by length within a window, as each does by default; over the data the work
is the same. Ratios: median and (smallest .. largest) over the turns. GiB: peak memory above the imported libraries.

settings   default   gradient checkpointing, the reference model run in every step (as TRL comes, in float32)
           best      neither: precompute_ref_log_probs, no gradient checkpointing (the best it has on a CPU)
           head      best, and the vocabulary projection on completion tokens only, as TRL does on CUDA; not stock on a CPU
           bf16      default, with TRL's default of bfloat16
"""
import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import bench

LINES = [(model, shape, trainer, settings) for model in ("tiny", "small") for shape in ("tldr", "hh")
         for trainer, settings in (("dpo", "default"), ("dpo", "best"), ("dpo", "head"), ("dpo", "bf16"),
                                   ("reward", "default"), ("reward", "best"))]


def our_steps(args, pipe):
    """The second process: warms up, then does a step whenever it is asked to and says how long it took."""
    ours = bench.Bench(args)
    for turn in range(-5, 0):
        ours.do(args.only[0], turn)
    pipe.send((bench.peak_memory(ours.device) - bench.IMPORTED) / 2 ** 30)
    while (turn := pipe.recv()) is not None:
        pipe.send(ours.seconds(args.only[0], turn))


def race(model, shape, trainer, settings, steps):
    """-> {"trl": [seconds], "ours": [seconds], "trl_gib": GiB, "our_gib": GiB}."""
    import datasets
    import torch
    import transformers

    from runs import peer
    flags = [f"--model={model}", f"--shape={shape}", f"--steps={steps}", "--device=cpu",
             f"--only={'reward model' if trainer == 'reward' else 'dpo'}",
             f"--dtype={'bfloat16' if settings == 'bf16' else 'float32'}"]
    args, warmup = bench.parse_flags(flags), 1 if model == "small" else 5
    shapes = {**dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257), **bench.MODELS[model]}
    config = transformers.GPT2Config(**shapes, n_positions=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    examples = [(prompt, responses[:2]) for prompt, responses in
                bench.made_up_examples(args, (steps + warmup) * args.batch_size, shapes["vocab_size"])]
    if settings == "head":
        import trl.trainer.utils
        trl.trainer.utils._use_triton = lambda device: True
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=our_steps, args=(args, theirs), daemon=True).start()
    times = {"trl": [], "ours": [], "our_gib": pipe.recv()}
    imported = bench.peak_memory(torch.device("cpu"))

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times["trl"].append(time.perf_counter() - self.start)
            pipe.send(len(times["ours"]))
            times["ours"].append(pipe.recv())
            self.start = time.perf_counter()

    options = dict(peer.SETTINGS, per_device_train_batch_size=args.batch_size, num_train_epochs=1, logging_strategy="no",
                   bf16=settings == "bf16", gradient_checkpointing=settings in ("default", "bf16"))
    tokenizer, out = peer.peer_tokenizer(shapes["vocab_size"]), tempfile.mkdtemp()
    if trainer == "dpo":
        start = transformers.GPT2LMHeadModel(config)
        ref = transformers.GPT2LMHeadModel(config) if settings in ("default", "bf16") else None
        racer = peer.PreparedDPOTrainer(
            start, ref, peer.trl.DPOConfig(out, precompute_ref_log_probs=settings in ("best", "head"),
                                           precompute_ref_batch_size=args.batch_size, **options),
            train_dataset=datasets.Dataset.from_list(peer.features(examples)), processing_class=tokenizer, callbacks=[Turns()])
    else:
        config.num_labels = 1
        racer = peer.PreparedRewardTrainer(
            transformers.GPT2ForSequenceClassification(config), peer.trl.RewardConfig(out, **options),
            train_dataset=datasets.Dataset.from_list(peer.reward_features(examples)), processing_class=tokenizer,
            callbacks=[Turns()])
    racer.train()
    pipe.send(None)
    return {**times, "trl": times["trl"][warmup:], "ours": times["ours"][warmup:],
            "trl_gib": (bench.peak_memory(torch.device("cpu")) - imported) / 2 ** 30}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="turns to measure")
    parser.add_argument("--only", default="", help="only lines with all of these comma-separated words, such as tiny,hh,head")
    parser.add_argument("--line", help="model,shape,trainer,settings: run this one here and print JSON")
    args = parser.parse_args()
    if args.line:
        print(json.dumps(race(*args.line.split(","), args.steps)))
        return
    print("| model | shape | trainer, settings | TRL, pairs/s | here, pairs/s | times faster | TRL, GiB | here, GiB |\n"
          "|---|---|---|---|---|---|---|---|")
    words = set(filter(None, args.only.split(",")))
    for line in LINES:
        if not words <= set(line):
            continue
        model, shape, trainer, settings = line
        done = subprocess.run([sys.executable, __file__, f"--line={','.join(line)}", f"--steps={args.steps}"],
                              capture_output=True, text=True)
        if done.returncode:
            print(f"| {model} | {shape} | {trainer}, {settings} | failed: {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        times = json.loads(done.stdout.strip().splitlines()[-1])
        ratios = [theirs / ours for theirs, ours in zip(times["trl"], times["ours"])]
        rate = lambda seconds: 8 / statistics.median(seconds)
        print(f"| {model} | {shape} | {trainer}, {settings} | {rate(times['trl']):.2f} | {rate(times['ours']):.2f} | "
              f"{statistics.median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f}) | {times['trl_gib']:.2f} | "
              f"{times['our_gib']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
