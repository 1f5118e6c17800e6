"""Runs the paper's protocol on real preferences: reference policy, oracle reward model, relabelled
pairs, D_rho, reward models, policies, and their advantage by the oracle's reward.

    bash runs/tldr.sh       # TL;DR from the hub, from GPT-2, at the paper's scale
    bash runs/helpful.sh    # Anthropic's helpful-base, people's own labels: the unbiased setting

Every stage is one of the repository's scripts, and its command is printed. If you call the protocol
again with the same flags, finished stages are not run again, and an interrupted one goes on where
it stopped. With other flags, name another --out.
"""
import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train_policy
import train_rm
from data import biased_subset, get_tokenizer, longer
from losses import PAPER, PREFERENCE_LOSSES, knobs, needs
from support.checkpoint import read_sizes
from support.device import device_name
from support.flags import (
    InputError,
    Parser,
    check_out_dir,
    comma_separated,
    comparison_flags,
    end_with_parent,
    first_last,
    fraction,
    fraction_or_all,
    naming,
    positive_float,
    positive_int,
    resolve,
    run_script,
    seed,
)
from support.run import naming_file, read_json, write_json
from support.tokens import select, tokenised_file

SAMPLING = ("max_new_tokens", "missing_eos_penalty")
SIZES = {"n_layer": 4, "n_head": 8, "n_embd": 256, "block_size": 512}
MAY_CHANGE = ("out", "losses", "n_prompts", "device", "dtype")      # from one call to the next


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    # what
    add("--data", required=True, help="preference pairs: a file or a hub name")
    add("--sft_data", required=True, help="demonstrations: a file or a hub name (preference pairs "
        "serve too)")
    add("--out", required=True, help="the folder for all runs and the report")
    parser.add_shared("skip_bad_rows")
    add("--init_from", default="gpt2", help="the model that SFT starts from: a name on the hub, a "
        "folder in Hugging Face's layout, or scratch (default: gpt2)")
    add("--labels", default="oracle", choices=["oracle", "human"], help="who labels the pairs that "
        "reward models and policies learn from: the oracle (the default), a reward model trained "
        "on people's labels; or people themselves")
    add("--rho", type=fraction_or_all, default=0.2, help="choose these pairs such that the longer "
        "response is preferred in this fraction of them; the word all takes the pairs as they are "
        "(default: 0.2)")
    add("--n_pairs", type=positive_int, help="how many pairs to train on (default: as many as "
        "there are)")
    add("--family", default="bias", choices=["bias", "seeds", "scores"], help="how e-DPO's reward "
        "models differ: bias, in the length bias of their pairs (the default); seeds, in their "
        "seed, which also draws D_rho; with scores, all losses that distil use the scores in "
        "--data's own columns instead of reward models")
    add("--bias", type=comma_separated(fraction, "fractions"), help="the length biases of "
        "--family=bias (default: 0.2,0.4,0.5,0.6,0.8)")
    add("--seeds", type=comma_separated(seed, "seeds"), help="the seeds of --family=seeds "
        "(default: 0,1,2,3,4)")
    add("--losses", default=",".join(PAPER), help="the policies to train, out of "
        f"{', '.join(PREFERENCE_LOSSES)} (default: the paper's six)")
    add("--beta", type=positive_float, help="one beta for all losses that have it (default: each "
        "loss's own, chosen on TinyTLDR; the same goes for --tau and --gamma)")
    add("--tau", type=positive_float, help="one tau for all losses that have it")
    add("--gamma", type=first_last, help="one gamma for all losses that have it: FIRST,LAST or a "
        "single number")
    # how much: the paper's numbers where it has some
    add("--sft_steps", type=positive_int, default=3000, help="steps of SFT (default: 3000)")
    add("--sft_batch_size", type=positive_int, default=32, help="rows in a step of SFT (default: "
        "32)")
    add("--sft_lr", type=positive_float, default=5e-5, help="peak learning rate of SFT (default: "
        "5e-5)")
    add("--oracle_steps", type=positive_int, default=3000, help="steps of the oracle (default: "
        "3000)")
    add("--rm_steps", type=positive_int, default=3000, help="steps of every other reward model "
        "(default: 3000)")
    add("--rm_batch_size", type=positive_int, default=64, help="pairs in a step of the oracle and "
        "of reward models (default: 64)")
    add("--rm_lr", type=positive_float, default=4e-6, help="peak learning rate of the oracle and "
        "of reward models (default: 4e-6)")
    add("--steps", type=positive_int, default=10_000, help="steps of every policy (default: 10000)")
    add("--batch_size", type=positive_int, default=16, help="pairs in a step of every policy "
        "(default: 16)")
    add("--lr", type=positive_float, default=1e-6, help="peak learning rate of every policy "
        "(default: 1e-6)")
    add("--micro_batch_size", type=positive_int, default=16, help="rows in one forward pass, in "
        "all of these runs (default: 16)")
    add("--max_new_tokens", type=positive_int, help="how long a sample may be, in tokens (default: "
        "what 99%% of the responses need)")
    parser.add_shared("missing_eos_penalty")
    add("--n_prompts", type=positive_int, default=1000, help="use at most this many test prompts "
        "(default: 1000)")
    for size, default in SIZES.items():
        add(f"--{size}", type=positive_int, help=f"{size} of a model from scratch, with "
            f"--init_from=scratch (default: {default})")
    add("--seed", type=seed, default=0, help="seed of every run (default: 0)")
    parser.add_shared("device", "dtype")
    args = parser.parse_args(argv)
    args.losses = args.losses.split(",")
    for flag, values in (("--losses", args.losses), ("--seeds", args.seeds or [])):
        if len(set(values)) < len(values):
            raise InputError(f"{flag}: one is named twice")
    if not set(args.losses) <= set(PREFERENCE_LOSSES):
        raise InputError(f"--losses: comma-separated, of {', '.join(PREFERENCE_LOSSES)}")
    table = {size: (args.init_from == "scratch", default, "--init_from=scratch")
             for size, default in SIZES.items()}
    table["bias"] = (args.family == "bias", [0.2, 0.4, 0.5, 0.6, 0.8], "--family=bias")
    table["seeds"] = (args.family == "seeds", [0, 1, 2, 3, 4], "--family=seeds")
    resolve(args, table)
    check_out_dir(args.out, flag="--out")
    return args


def check_begun(args, stages):
    """Raises InputError if --out has runs with other flags (its protocol.json has them), or runs of
    something else. As long as no run there has saved anything, a flag may be corrected. Returns the
    flags to write to protocol.json."""
    path = protocol_file(args)
    flags = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    below = [os.path.join(parent, name) for parent, names, _ in os.walk(args.out) for name in names]
    if not os.path.exists(path):
        for run in [run for _, *stage in stages for run in members(*stage)]:
            if begun(run) or finished(run):
                raise InputError(f"--out: {run} is there already, and no {path} says with which "
                                 "flags; name another folder")
    else:
        with naming("--out"):
            before = read_json(path)
        for name, value in flags.items():
            if before.get(name) != value and any(begun(run) or finished(run) for run in below):
                raise InputError(f"--out: {args.out} was begun with --{name}={before.get(name)}, "
                                 f"not {value}; name another folder")
    return flags


def protocol_file(args):
    return os.path.join(args.out, "protocol.json")


def check_flags(args, stages):
    """Raises InputError for flags that a later stage would refuse, perhaps hours from now."""
    for script, folder, flags in stages:
        flags = missing_flags(folder, flags)
        if flags is not None and script == "train_policy.py":
            train_policy.parse_flags(flags)
        elif flags is not None:
            train_rm.parse_flags(flags)
    comparison_flags(report_flags(args), "")
    device_name(args.device)


def check_data(args):
    """Raises InputError for what a later stage would refuse in the files, such as bad rows or
    missing scores, and for samples that are longer than a text may be. The tokens that are read
    here are kept for the stages."""
    block_size = args.block_size or read_sizes(args.init_from)["block_size"]
    if (args.max_new_tokens or 0) >= block_size:
        raise InputError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in "
                         f"block_size {block_size}")
    needed = {"--sft_data": ("train", "validation"), "--data": ("train", "validation", "test")}
    for flag, splits in needed.items():
        data = getattr(args, flag.strip("-"))
        if data == "tinytldr":
            continue
        try:
            arrays = tokenised_file(data, get_tokenizer("gpt2"), flag == "--sft_data",
                                    args.skip_bad_rows)
            examples = {split: select(arrays, block_size, f"{data}, {split}", split)["examples"]
                        for split in splits}
            if flag == "--data":
                check_pairs(args, examples["train"].lengths[:, 1:])
        except InputError as error:
            raise InputError(str(error).replace("--data", flag, 1)) from error
    if args.family == "scores" and args.data != "tinytldr" and "scores" not in arrays:
        raise InputError(f"--family=scores: {args.data} has no score_chosen and score_rejected, "
                         "nor scores, in all its rows")


def check_pairs(args, lengths):
    """Raises InputError if D_rho, or a subset of it for e-DPO's family, can't be drawn from the
    training rows. What the oracle will prefer is not known yet, but it is known how many pairs have
    a longer response. lengths: (N, K) tokens in each response."""
    by_bias = "e-dpo" in args.losses and args.family == "bias"
    if args.rho == "all" and not by_bias:
        return
    if args.labels == "human" or lengths.shape[1] != 2:
        if args.rho != "all":
            lengths = lengths[biased_subset(lengths, args.rho, args.n_pairs, args.seed)]
        for bias in args.bias if by_bias else []:
            biased_subset(lengths[:args.n_pairs], bias, seed=args.seed)
        return
    possible = (longer(lengths) != 0).sum()
    if args.rho != "all" and possible < (args.n_pairs or 1):
        raise InputError(f"--n_pairs: {args.n_pairs or 1} is too many: of {len(lengths)} training "
                         f"pairs of --data, {possible} have a response that is longer")


def run(script, *flags):
    print(f"\n$ python {script} {shlex.join(flags)}", flush=True)
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags],
                          preexec_fn=end_with_parent)
    if done.returncode:
        sys.exit(done.returncode)      # the script has said why


def members(folder, flags):
    """Returns the run folders of a stage: its own, or those of a family by bias."""
    biases = [flag.split("=")[1] for flag in flags if flag.startswith("--bias=")]
    return [os.path.join(folder, bias) for bias in biases[0].split(",")] if biases else [folder]


def finished(folder):
    return os.path.exists(os.path.join(folder, "model.safetensors"))


def begun(folder):
    return os.path.exists(os.path.join(folder, "state.pt"))


def missing_flags(folder, flags):
    """Returns the flags that a stage needs to start or to go on; None if it is finished."""
    runs = members(folder, flags)
    if all(map(finished, runs)):
        return None
    resume = ["--resume"] if any(map(begun, runs)) else []
    return [*flags, f"--out_dir={folder}", *resume]


def train(script, folder, flags):
    """Runs a stage, a training run or a family of them, if it is not finished."""
    flags = missing_flags(folder, flags)
    if flags is None:
        print(f"\n{folder}: finished before")
    else:
        run(script, *flags)


def listed(values):
    return ",".join(map(str, values))


def loss_flags(args, loss, rm, rms):
    """Returns the flags of train_policy.py for one loss: those that the loss uses."""
    flags = [f"--loss={loss}"]
    if "rewards" in needs(loss):
        flags.append(f"--rewards={rms if loss == 'e-dpo' else rm}")
    given = {"beta": args.beta, "tau": args.tau, "gamma": args.gamma and listed(args.gamma)}
    for knob, value in given.items():
        if value is not None and knob in knobs(loss):
            flags.append(f"--{knob}={value}")
    return flags


def plan(args):
    """Returns the training runs in their order: [(script, run folder, flags)]. A family by bias is
    one of them, whose folder holds the runs."""
    sft, oracle, rm, rms = [os.path.join(args.out, name) for name in ("sft", "oracle", "rm", "rms")]
    seed_flag = f"--seed={args.seed}"
    everywhere = [*device_and_rows(args), f"--micro_batch_size={args.micro_batch_size}"]
    sizes = [f"--{size}={getattr(args, size)}" for size in SIZES]

    # The reference policy.
    stages = [("train_policy.py", sft, [
        "--loss=sft", f"--data={args.sft_data}", f"--init_from={args.init_from}",
        "--tokenizer=gpt2", f"--max_steps={args.sft_steps}", f"--batch_size={args.sft_batch_size}",
        f"--lr={args.sft_lr}", seed_flag, *everywhere,
        *(sizes if args.init_from == "scratch" else [])])]

    # The oracle: a reward model on people's labels of all training pairs. What it thinks is the
    # truth from here on.
    data = [f"--data={args.data}", f"--init_from={sft}", *everywhere]
    rm_flags = [*data, f"--batch_size={args.rm_batch_size}", f"--lr={args.rm_lr}"]
    stages.append(("train_rm.py", oracle, [
        *rm_flags, "--rho=all", f"--max_steps={args.oracle_steps}", seed_flag]))

    # The pairs that the others learn from: relabelled by the oracle, and of these D_rho.
    pairs = [*relabelled(args), f"--rho={args.rho}"]
    if args.n_pairs:
        pairs.append(f"--n_pairs={args.n_pairs}")

    # Reward models on D_rho: one, and the family.
    distilled = [loss for loss in args.losses if "rewards" in needs(loss)]
    rm_flags += [*pairs, f"--max_steps={args.rm_steps}"]
    if args.family == "scores":
        rm = rms = "scores"
    elif set(distilled) - {"e-dpo"}:
        stages.append(("train_rm.py", rm, [*rm_flags, seed_flag]))
    if "e-dpo" in args.losses and args.family == "bias":
        stages.append(("train_rm.py", rms, [*rm_flags, seed_flag, f"--bias={listed(args.bias)}"]))
    elif "e-dpo" in args.losses and args.family == "seeds":
        for member in args.seeds:
            folder = os.path.join(rms, str(member))
            stages.append(("train_rm.py", folder, [*rm_flags, f"--seed={member}"]))

    # The policies: of each the checkpoint whose samples for validation prompts the oracle likes
    # best, as in the paper.
    for loss in args.losses:
        stages.append(("train_policy.py", os.path.join(args.out, loss), [
            *loss_flags(args, loss, rm, rms), *data, *pairs, f"--max_steps={args.steps}",
            f"--batch_size={args.batch_size}", f"--lr={args.lr}", f"--select={oracle}",
            *sampling_flags(args), seed_flag]))
    return stages


def device_and_rows(args):
    """Returns the flags that every script takes, evaluate.py too."""
    skip = ["--skip_bad_rows"] if args.skip_bad_rows else []
    return [f"--device={args.device}", f"--dtype={args.dtype}", *skip]


def relabelled(args):
    oracle = os.path.join(args.out, "oracle")
    return [f"--relabel={oracle}"] if args.labels == "oracle" else []


def report_flags(args):
    """Returns the flags of evaluate.py: what the policies reached, by the oracle."""
    sft, oracle, rm, rms = [os.path.join(args.out, name) for name in ("sft", "oracle", "rm", "rms")]
    reward_models = [folder for folder in (rm, rms) if os.path.isdir(folder)]
    judged = [f"--rms={','.join(reward_models)}", *relabelled(args)] if reward_models else []
    return [f"--data={args.data}", f"--ref={sft}", f"--oracle={oracle}", *judged,
            f"--n_prompts={args.n_prompts}", *sampling_flags(args), f"--seed={args.seed}",
            *device_and_rows(args), f"--out_dir={args.out}",
            *[os.path.join(args.out, loss) for loss in args.losses]]


def sampling_flags(args):
    """Returns the flags of whatever samples from a policy."""
    return [f"--{name}={getattr(args, name)}" for name in SAMPLING
            if getattr(args, name) is not None]


def main(argv=None):
    args = parse_flags(argv)
    stages = plan(args)
    begun_with = check_begun(args, stages)
    check_flags(args, stages)
    check_data(args)
    with naming_file(args.out):
        os.makedirs(args.out, exist_ok=True)
    write_json(protocol_file(args), begun_with, indent=2)
    for script, folder, flags in stages:
        train(script, folder, flags)
    run("evaluate.py", *report_flags(args))


if __name__ == "__main__":
    run_script(main)
