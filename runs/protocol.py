"""The paper's protocol on real preferences, start to end: reference policy, oracle reward model, relabelled pairs, D_rho,
reward models, policies, and their advantage by the oracle's reward.

    bash runs/tldr.sh                                  # TL;DR from the hub, from GPT-2, at the paper's scale
    bash runs/helpful.sh --rho=all --labels=human      # Anthropic's helpful-base, people's own labels: the unbiased setting

Every stage is one of the repository's scripts, printed as it is run. What is finished is not run again, and what was interrupted
goes on where it was: call it again with the same flags. With other flags, name another --out.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import runtime  # noqa: E402
from losses import NEEDS_REWARDS, PESSIMISTIC, PREFERENCE_LOSSES  # noqa: E402
from runtime import InputError  # noqa: E402


def parse_flags(argv):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    parser.add_argument("--data", required=True, help="preference pairs: a file or a hub name")
    parser.add_argument("--sft_data", required=True, help="demonstrations: a file or a hub name (preference pairs serve too)")
    parser.add_argument("--out", required=True, help="folder for all runs and the report")
    parser.add_argument("--init_from", default="gpt2", help="what SFT starts from: a hub name, a folder in GPT-2's layout, or scratch")
    parser.add_argument("--labels", default="oracle", choices=["oracle", "human"], help="of the pairs that all but the oracle learn from")
    parser.add_argument("--rho", default="0.2", help="fraction of these pairs in which the longer response is preferred, or all")
    parser.add_argument("--n_pairs", type=runtime.positive(int), help="pairs to train on (default: as many as there are)")
    parser.add_argument("--family", default="bias", choices=["bias", "seeds", "scores"], help="e-DPO's reward models: differing in length "
                        "bias; or in their seed, which also draws D_rho; or (for all losses that distil) the scores in --data's own columns")
    parser.add_argument("--bias", default="0.2,0.4,0.5,0.6,0.8", help="with --family=bias")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="with --family=seeds")
    parser.add_argument("--losses", default=",".join(PREFERENCE_LOSSES), help="the policies to train")
    for flag, kind in (("beta", runtime.positive(float)), ("tau", runtime.positive(float)), ("gamma", str)):
        parser.add_argument(f"--{flag}", type=kind, help="of the losses that have it (default: train_policy.py's, chosen on TinyTLDR)")
    # how much: the paper's numbers where it has some
    for flag, default, of in (("sft_steps", 3000, "SFT"), ("sft_batch_size", 32, "SFT"), ("sft_lr", 5e-5, "SFT"),
                              ("oracle_steps", 3000, "the oracle"), ("rm_steps", 3000, "every reward model"),
                              ("rm_batch_size", 64, "the oracle and every reward model"),
                              ("rm_lr", 4e-6, "the oracle and every reward model"), ("steps", 10000, "every policy"),
                              ("batch_size", 16, "every policy"), ("lr", 1e-6, "every policy"),
                              ("micro_batch_size", 16, "one pass, in all of them")):
        parser.add_argument(f"--{flag}", type=runtime.positive(type(default)), default=default, help=f"of {of} (default: {default})")
    parser.add_argument("--max_new_tokens", type=runtime.positive(int), default=64, help="longest sample, in tokens")
    parser.add_argument("--n_prompts", type=runtime.positive(int), default=1000, help="test prompts")
    for flag, default in (("n_layer", 4), ("n_head", 8), ("n_embd", 256), ("block_size", 512)):
        parser.add_argument(f"--{flag}", type=runtime.positive(int), default=default, help="with --init_from=scratch")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="of everything")
    runtime.device_flags(parser)
    args = parser.parse_args(argv)
    args.losses = args.losses.split(",")
    if not set(args.losses) <= set(PREFERENCE_LOSSES):
        raise InputError(f"--losses: comma-separated, of {', '.join(PREFERENCE_LOSSES)}")
    runtime.resolve_rho(args)
    for flag, kind in (("bias", runtime.fraction), ("seeds", runtime.seed)):      # say what is wrong before the work, not after it
        try:
            [kind(text) for text in getattr(args, flag).split(",")]
        except ValueError:
            raise InputError(f"--{flag}: comma-separated {'fractions between 0 and 1' if flag == 'bias' else 'whole numbers'}") from None
    return args


def same_as_before(args):
    """Stages that are finished are kept, so the flags they were run with have to be these. They are in protocol.json."""
    path = os.path.join(args.out, "protocol.json")
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "losses", "n_prompts", "device", "dtype")}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        for name in flags:
            if flags[name] != before.get(name):
                raise InputError(f"--out: {args.out} was begun with --{name}={before.get(name)}, not {flags[name]}; name another folder")
    os.makedirs(args.out, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(flags, file, indent=2)


def run(script, *flags):
    print(f"\n$ python {script} {shlex.join(flags)}", flush=True)
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags])
    if done.returncode:
        sys.exit(done.returncode)      # the script has said why


def train(script, folder, *flags):
    """One training run, if it is not finished."""
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        print(f"\n{folder}: finished before")
        return
    resume = ["--resume"] if os.path.exists(os.path.join(folder, "state.pt")) else []
    run(script, *flags, f"--out_dir={folder}", *resume)


def main(argv=None):
    args = parse_flags(argv)
    same_as_before(args)
    path = lambda name: os.path.join(args.out, name)
    sft, oracle, rm, rms = map(path, ("sft", "oracle", "rm", "rms"))
    same = [f"--device={args.device}", f"--dtype={args.dtype}", f"--micro_batch_size={args.micro_batch_size}"]
    data, seed = [f"--data={args.data}", f"--init_from={sft}", *same], f"--seed={args.seed}"
    shape = [f"--{name}={getattr(args, name)}" for name in ("n_layer", "n_head", "n_embd", "block_size")]

    # The reference policy.
    train("train_policy.py", sft, "--loss=sft", f"--data={args.sft_data}", f"--init_from={args.init_from}", "--tokenizer=gpt2",
          f"--max_steps={args.sft_steps}", f"--batch_size={args.sft_batch_size}", f"--lr={args.sft_lr}", seed, *same,
          *(shape if args.init_from == "scratch" else []))

    # The oracle: a reward model on people's labels of all training pairs. What it thinks is the truth from here on.
    reward = [*data, f"--batch_size={args.rm_batch_size}", f"--lr={args.rm_lr}"]
    train("train_rm.py", oracle, *reward, "--rho=all", f"--max_steps={args.oracle_steps}", seed)

    # The pairs that the others learn from: relabelled by the oracle, and of these D_rho.
    labels = [f"--relabel={oracle}"] if args.labels == "oracle" else []
    pairs = [*labels, f"--rho={args.rho}", *([f"--n_pairs={args.n_pairs}"] if args.n_pairs else [])]

    # Reward models on D_rho: one, and the family.
    reward += [*pairs, f"--max_steps={args.rm_steps}"]
    if args.family == "scores":
        rm = rms = "scores"
    elif {"d-dpo", "dp-dpo"} & set(args.losses):
        train("train_rm.py", rm, *reward, seed)
    if "e-dpo" in args.losses and args.family == "bias":
        members = [os.path.join(rms, str(float(bias))) for bias in args.bias.split(",")]
        if not all(os.path.exists(os.path.join(member, "model.safetensors")) for member in members):
            begun = any(os.path.exists(os.path.join(member, "state.pt")) for member in members)
            run("train_rm.py", *reward, f"--bias={args.bias}", f"--out_dir={rms}", seed, *["--resume"] * begun)
    elif "e-dpo" in args.losses and args.family == "seeds":
        for member in args.seeds.split(","):
            train("train_rm.py", os.path.join(rms, member), *reward, f"--seed={member}")

    # The policies.
    for loss in args.losses:
        flags = [f"--rewards={rms if loss == 'e-dpo' else rm}"] if loss in NEEDS_REWARDS else []
        if loss in PESSIMISTIC:
            flags += [f"--max_new_tokens={args.max_new_tokens}"] + [f"--gamma={args.gamma}"] * (args.gamma is not None)
        scale = "tau" if loss == "ipo" else "beta"
        flags += [f"--{scale}={getattr(args, scale)}"] * (getattr(args, scale) is not None)
        train("train_policy.py", path(loss), f"--loss={loss}", *data, *pairs, *flags, f"--max_steps={args.steps}",
              f"--batch_size={args.batch_size}", f"--lr={args.lr}", seed)

    # What they reached, by the oracle.
    trained = ",".join(folder for folder in (rm, rms) if os.path.isdir(folder))
    run("evaluate.py", f"--data={args.data}", f"--ref={sft}", f"--oracle={oracle}", *labels, *[f"--rms={trained}"] * bool(trained),
        f"--n_prompts={args.n_prompts}", f"--max_new_tokens={args.max_new_tokens}", seed, f"--device={args.device}",
        f"--dtype={args.dtype}", f"--out_dir={args.out}", *map(path, args.losses))


if __name__ == "__main__":
    runtime.run(main)
