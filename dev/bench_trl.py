"""Races our training step against TRL's, with the same architecture, kind of rows, batch size and
number of threads (`bash dev/bench_trl.sh`).

The two take turns. TRL runs its trainer's own loop, timed from the end of one step to the end of
the next. After each of its steps, a second process does one of ours while TRL waits. There are two
processes so that neither uses the other's memory or settings. By default TRL's batches are rows in
random order, and ours are sorted by length within a window; over the whole data the work is the
same. Ratios are the median and (smallest .. largest) over the turns. GiB is peak memory above the
imported libraries.

settings   default    TRL's defaults, but in float32: gradient checkpointing, and the reference
                      model in every step
           best       the best that TRL has on a CPU: precompute_ref_log_probs, and no gradient
                      checkpointing
           head       best, with the vocabulary projection on completion tokens only. TRL does this
                      on CUDA; on a CPU we patch it in
           bf16       default, in bfloat16, which is TRL's default
           bf16 best  best, in bfloat16
           recompute  default, and ours with --gradient_checkpointing too
           lora       best, both with LoRA of rank 16 on all linear layers
           bf16 lora  lora, in bfloat16

    bash dev/bench_trl.sh --models=smollm2 --batch_size=4 --only=dpo
    python dev/bench_trl.py --models=gpt2,gpt2-large --device=cuda     # "head" is TRL's own there

With --data the rows are real ones, in the tokens of --tokenizer.

--generate races GPT.generate against transformers' generate instead, on one thread: summaries of
TinyTLDR's posts up to the end-of-text token, 1, 2 or 16 of each post, in batches of 128. With
--data, the model of --policy continues 32 prompts of that file, cut to their last 160 tokens, by
48 tokens, in one batch.
"""
import contextlib
import copy
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dev import bench
from support.device import keep_memory
from support.flags import Parser, positive_int, run_script

# transformers and TRL are imported in the process that runs them: ours measures its own memory.

SETTINGS = {"dpo": ("default", "best", "head", "bf16", "bf16 best", "recompute", "lora",
                    "bf16 lora"),
            "reward": ("default", "best")}
RANK = 16       # of LoRA


def always(device):
    return True


def warm_up_steps(args):
    """Returns how many steps come before those that count: one if a step takes a minute."""
    return 1 if args.device == "cpu" and "tiny" not in args.model else 5


def our_steps(pipe):
    """Runs in the second process. For each line that comes through the pipe, it warms up and sends
    its peak memory in GiB. Then it does a step whenever it is asked to, and sends the seconds."""
    sys.stdout = sys.stderr         # the table is the other one's
    while (args := pipe.recv()) is not None:
        ours, (task,) = bench.Bench(args), args.only
        warm_up = 2 + warm_up_steps(args)
        for turn in range(warm_up):
            ours.do(task, turn)
        pipe.send(bench.memory_of_steps(ours.device) / 2 ** 30)
        while (turn := pipe.recv()) is not None:
            pipe.send(ours.seconds(task, warm_up + turn))
        del ours
        forget(args.device)


def forget(device):
    """Frees a GPU's memory and resets its peak. Returns the bytes that are still in use; on a
    CPU, where every line has a process of its own, the peak so far."""
    import torch
    gc.collect()
    if device == "cpu":
        return bench.peak_memory(torch.device(device))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def start_our_process():
    """Starts the process that runs our_steps. Returns it, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=our_steps, args=(theirs,), daemon=True)
    process.start()
    theirs.close()      # so that recv() fails if that process does
    return process, pipe


def peer_config(sizes):
    """Returns the transformers configuration of one of bench.MODELS."""
    import transformers
    tokens = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=1)
    if sizes.get("family") == "llama":
        return transformers.LlamaConfig(
            hidden_size=sizes["n_embd"], intermediate_size=sizes["n_inner"],
            num_hidden_layers=sizes["n_layer"], num_attention_heads=sizes["n_head"],
            num_key_value_heads=sizes["n_kv_head"], vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["block_size"], tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]}, **tokens)
    return transformers.GPT2Config(
        n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens, **sizes)


def race(line, flags, pipe):
    """Races one line. line: (model, shape, trainer, settings). flags: this script's. pipe: to our
    process. Returns {"trl": [seconds], "ours": [seconds], "trl_gib": GiB, "our_gib": GiB}."""
    import datasets
    import torch
    import transformers
    import trl.trainer.utils

    from dev import peer
    model, shape, trainer, settings = line
    steps = flags.steps
    rows = [f"--data={flags.data}", f"--tokenizer={flags.tokenizer}"] if flags.data else [
        f"--shape={shape}"]
    args = bench.parse_flags([
        f"--model={model}", *rows, f"--steps={steps}", f"--device={flags.device}",
        f"--batch_size={flags.batch_size}",
        f"--only={'reward model' if trainer == 'reward' else 'dpo'}",
        f"--dtype={'bfloat16' if 'bf16' in settings else 'float32'}",
        *(["--gradient_checkpointing"] if settings == "recompute" else []),
        *([f"--lora={RANK}"] if "lora" in settings else [])])
    device = torch.device(flags.device)
    warm_up = warm_up_steps(args)
    config = bench.GPTConfig(**bench.MODELS[model])
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, **bench.MODELS[model]}
    examples = [(prompt, responses[:2]) for prompt, responses
                in bench.examples_for(args, config)]
    n_rows = (steps + warm_up) * args.batch_size
    examples = list(itertools.islice(itertools.cycle(examples), n_rows))
    config = peer_config(sizes)
    if settings == "head":
        trl.trainer.utils._use_triton = always
    imported = forget(flags.device)
    pipe.send(args)
    times = {"trl": [], "ours": [], "our_gib": pipe.recv()}

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            bench.synchronise(device)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            bench.synchronise(device)
            times["trl"].append(time.perf_counter() - self.start)
            pipe.send(len(times["ours"]))
            times["ours"].append(pipe.recv())
            self.start = time.perf_counter()

    as_trl_comes = settings in ("default", "bf16", "recompute")
    options = dict(peer.SETTINGS, per_device_train_batch_size=args.batch_size, num_train_epochs=1,
                   logging_strategy="no", bf16="bf16" in settings, use_cpu=device.type == "cpu",
                   gradient_checkpointing=as_trl_comes)
    out = tempfile.mkdtemp()
    common = dict(processing_class=peer.peer_tokenizer(sizes["vocab_size"]), callbacks=[Turns()])
    if trainer == "dpo":
        with device:                # drawn on a CPU, 774M weights take a while
            policy = transformers.AutoModelForCausalLM.from_config(config)
        ref = copy.deepcopy(policy) if as_trl_comes else None
        trl_args = trl.DPOConfig(out, precompute_ref_log_probs=not as_trl_comes,
                                 precompute_ref_batch_size=args.batch_size, **options)
        rows = datasets.Dataset.from_list(peer.features(examples))
        if "lora" in settings:
            import peft
            common["peft_config"] = peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        racer = peer.PreparedDPOTrainer(policy, ref, trl_args, train_dataset=rows, **common)
    else:
        with device:
            reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
        trl_args = trl.RewardConfig(out, **options)
        rows = datasets.Dataset.from_list(peer.reward_features(examples))
        racer = peer.PreparedRewardTrainer(reward_model, trl_args, train_dataset=rows, **common)
    try:
        racer.train()
    finally:
        pipe.send(None)         # this line is over
        shutil.rmtree(out)
    trl_gib = (bench.peak_memory(device) - imported) / 2 ** 30
    return {"trl": times["trl"][warm_up:], "ours": times["ours"][warm_up:], "trl_gib": trl_gib,
            "our_gib": times["our_gib"]}


def generation_rows(args, config):
    """Yields what race_generation's rows are about: (responses to a prompt, prompts, the token that
    ends a response or None, batch size, new tokens at most, turns to measure)."""
    from data import get_tokenizer
    from tinytldr import post
    if args.data:
        flags = bench.parse_flags([f"--data={args.data}", f"--tokenizer={args.tokenizer}"])
        examples = bench.examples_for(flags, config)[:32]
        yield 1, [prompt[-160:].tolist() for prompt, _ in examples], None, 32, 48, 2
        return
    tokenizer = get_tokenizer("tinytldr")
    for n in (1, 2, 16):
        prompts = [tokenizer.encode_ordinary(post(0, "test", i))
                   for i in range(512 // n) for _ in range(n)]
        yield n, prompts, tokenizer.eot_token, 128, 64, 5


def race_generation(args):
    """Prints a table. Seconds are CPU time."""
    import torch
    import transformers

    from model import GPT
    torch.set_num_threads(1)
    keep_memory()
    ours = GPT.from_pretrained(args.policy).float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    theirs.eval()
    rows = list(generation_rows(args, ours.config))

    def with_transformers(prompts, stop, batch_size, max_new_tokens):
        theirs.generation_config.eos_token_id = stop            # and not what the file says
        pad = 0 if stop is None else stop
        for first in range(0, len(prompts), batch_size):
            part = prompts[first:first + batch_size]
            longest = max(map(len, part))
            tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in part])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in part])
            theirs.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, top_k=0,
                            do_sample=True, eos_token_id=stop, pad_token_id=pad)

    print("| responses to a prompt | transformers, s | here, s | times faster |\n"
          "|---|---|---|---|")
    for n, prompts, stop, batch_size, new, n_turns in rows:
        turns = []
        for turn in range(1 + n_turns):                         # the first warms up
            few = prompts[:1] if turn == 0 else prompts
            start = time.process_time()
            with_transformers(few, stop, batch_size, new)
            middle = time.process_time()
            ours.generate(few, new, stop=stop, batch_size=batch_size)
            turns.append((middle - start, time.process_time() - middle))
        ratios = [slow / fast for slow, fast in turns[1:]]
        slow, fast = (median(seconds) for seconds in zip(*turns[1:]))
        print(f"| {n} | {slow:.2f} | {fast:.2f} | "
              f"{median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f}) |", flush=True)


def table_row(line, times, batch_size):
    model, shape, trainer, settings = line
    ratios = [theirs / ours for theirs, ours in zip(times["trl"], times["ours"])]
    cells = [model, shape, f"{trainer}, {settings}",
             f"{batch_size / median(times['trl']):.3g}",
             f"{batch_size / median(times['ours']):.3g}",
             f"{median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f})",
             f"{times['trl_gib']:.2f}", f"{times['our_gib']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def lines_to_race(args):
    """Yields the lines of the table that --only selects: those with all words of one of them."""
    choices = [set(text.split(",")) for text in args.only] or [set()]
    shapes = ["data"] if args.data else bench.SHAPES
    for line in itertools.product(args.models.split(","), shapes, SETTINGS, SETTINGS["dpo"]):
        chosen = any(words <= set(line) for words in choices)
        if chosen and line[3] in SETTINGS[line[2]]:
            yield line


def race_in_processes(args, argv):
    """Prints the row of each line. Each line is raced by two new processes, so that their peak
    memory is this line's."""
    for line in lines_to_race(args):
        command = [sys.executable, __file__, *argv, f"--line={','.join(line)}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            reason = done.stderr.strip().splitlines()[-1]
            print(f"| {' | '.join(line[:2])} | {', '.join(line[2:])} | failed: {reason} |",
                  flush=True)
            continue
        times = json.loads(done.stdout.strip().splitlines()[-1])
        print(table_row(line, times, args.batch_size), flush=True)


def race_on_gpu(args):
    """Prints the row of each line. All are raced by the same two processes, since a GPU can tell
    the peak memory of each: importing transformers and TRL takes longer than a race."""
    process, pipe = start_our_process()
    for line in lines_to_race(args):
        try:
            with contextlib.redirect_stdout(sys.stderr):        # what TRL prints
                times = race(line, args, pipe)
            print(table_row(line, times, args.batch_size), flush=True)
        except Exception as error:      # out of memory, say: the others still race
            traceback.print_exc()
            reason = " ".join(str(error).split())[:200]
            print(f"| {' | '.join(line[:2])} | {', '.join(line[2:])} | failed: {reason} |",
                  flush=True)
            process.kill()      # it may wait for a turn that won't come
            process, pipe = start_our_process()
    pipe.send(None)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=5, help="turns to measure (default: 5)")
    add("--models", default="tiny,small", help="which models to race with, out of "
        f"{', '.join(bench.MODELS)}, separated by commas (default: tiny,small)")
    add("--batch_size", type=positive_int, default=8, help="pairs in a step (default: 8)")
    add("--data", help="preferences, or prompts for --generate: a file or a name on the hub "
        "(default: made-up ones)")
    add("--tokenizer", default="gpt2", help="the tokenizer for --data, as in dev/bench.py "
        "(default: gpt2)")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where to race (default: cpu)")
    add("--only", action="append", default=[], help="race only in the lines that have all of these "
        "words, separated by commas, such as tiny,hh,head; may be given several times, for more "
        "lines")
    add("--line", help="run one line in this process and print JSON: model,shape,trainer,settings")
    add("--generate", action="store_true", help="race generation instead of training")
    add("--policy", default="out/sft", help="the folder of the policy for --generate (default: "
        "out/sft)")
    args = parser.parse_args(argv)
    if args.generate:
        race_generation(args)
        return
    if args.line:
        _, pipe = start_our_process()
        print(json.dumps(race(args.line.split(","), args, pipe)))
        pipe.send(None)
        return
    print("| model | shape | trainer, settings | TRL, pairs/s | here, pairs/s | times faster "
          "| TRL, GiB | here, GiB |\n" + "|---" * 8 + "|")
    if args.device == "cpu":
        race_in_processes(args, argv)
    else:
        race_on_gpu(args)


if __name__ == "__main__":
    run_script(main)
