"""The flags of train_policy.py and train_rm.py: defaults, and what is refused."""
import argparse
import contextlib
import os

from support.checkpoint import read_sizes
from support.flags import (
    InputError,
    Parser,
    check_out_dir,
    comma_separated,
    device_flags,
    first_last,
    fraction,
    fraction_or_all,
    not_negative_float,
    positive_float,
    positive_int,
    resolve,
    seed,
    skip_flag,
)
from support.run import check_free, check_unused, family_to_train, log_package, run_flags

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 128}      # of a model from scratch
SFT_LR, POLICY_LR, REWARD_LR = 4e-3, 2e-4, 5e-4         # of small models


def policy_flags(argv, doc, losses):
    """The flags of train_policy.py, checked. losses: the table of losses.py."""
    parser = training_flags(doc, lr=f"{SFT_LR:g} for sft, else {POLICY_LR:g}")
    add = parser.add_argument
    add("--loss", default="e-dpo", choices=list(losses))
    add("--rewards", help="folder of a reward model or of a family, or several, comma-separated "
        "(default: out/rms for e-dpo, else out/rm); or scores: those that --data came with")
    add("--beta", type=positive_float, help="scale of the implicit reward, in reward per nat "
        "(default: the loss's, in losses.py; so for all that follow)")
    add("--tau", type=positive_float, help="the margin to reach is 1 / (2 tau)")
    add("--gamma", type=first_last, help="weight of the forward KL: FIRST,LAST, annealed linearly "
        "over training, or one number for all of it")
    add("--min_per", choices=["example", "batch"], help="pick the best reward model for each "
        "pair, or one for each batch")
    knobs = {name: default for loss in losses.values() for name, default in loss.knobs.items()}
    for knob in sorted(set(knobs) - {"beta", "tau", "gamma", "min_per"}):       # of losses added
        number = isinstance(knobs[knob], (int, float))
        add(f"--{knob}", type=not_negative_float if number else str, help="see losses.py")
    add("--kl_samples", type=positive_int, help="samples from the reference for each prompt, to "
        "estimate its KL term (default: 1)")
    add("--max_new_tokens", type=positive_int, help="longest sample for the KL term and --select "
        "(default: 64)")
    add("--select", default="last", help="which evaluated checkpoint to keep: the last; that of "
        "the lowest validation loss; or that whose samples for validation prompts earn most, "
        "judged by the oracle (of tinytldr) or by reward models (a folder, as in --rewards)")
    for size, default in SIZES.items():
        add(f"--{size}", type=positive_int, help=f"of a model from scratch (default: {default})")
    add("--block_size", type=positive_int, help="longest prompt + response of a model from "
        "scratch, in tokens (default: 192 on tinytldr, else what 99%% of the rows need, from 192 "
        "to 1024)")
    args = parser.parse_args(argv)

    sft, loss = args.loss == "sft", losses[args.loss]
    args.out_dir = args.out_dir or f"out/{args.loss}"
    args.init_from = args.init_from or ("scratch" if sft else "out/sft")
    if sft:
        training_defaults(args, max_steps=1500, batch_size=32, lr=SFT_LR)
    else:
        training_defaults(args, max_steps=320, batch_size=16, lr=POLICY_LR)
    table = preference_data_flags(args, used=not sft)       # flag: (used?, default, by what)
    for knob in knobs:
        users = [name for name in losses if knob in losses[name].knobs]
        table[knob] = (knob in loss.knobs, loss.knobs.get(knob), f"--loss={', '.join(users)}")
    default_rewards = "out/rms" if args.loss == "e-dpo" else "out/rm"
    table["rewards"] = ("rewards" in loss.needs, default_rewards, "losses that distil rewards")
    table["kl_samples"] = ("ref_samples" in loss.needs, 1, "losses with a KL term")
    judged = args.select not in ("last", "loss")
    table["max_new_tokens"] = ("ref_samples" in loss.needs or judged, 64,
                               "losses with a KL term, or a --select that samples")
    for size, default in SIZES.items():
        table[size] = (args.init_from == "scratch", default, "--init_from=scratch")
    table["block_size"] = (args.init_from == "scratch", 192 if args.data == "tinytldr" else None,
                           "--init_from=scratch")      # None: train_policy.py looks at the rows
    resolve(args, table)

    if judged and sft:
        raise InputError("--select: last or loss, with --loss=sft")
    if args.select == "oracle" and args.data != "tinytldr":
        raise InputError("--select=oracle: only tinytldr has an oracle; name a reward model's "
                         "folder")
    if not sft and args.init_from == "scratch":
        raise InputError(f"--init_from: --loss={args.loss} needs a reference policy, such as the "
                         "run of --loss=sft")
    if args.n_embd and args.n_embd % args.n_head:
        raise InputError(f"--n_head: {args.n_head} heads do not divide --n_embd={args.n_embd}")
    if args.min_per == "batch" and args.micro_batch_size < args.batch_size:
        raise InputError("--min_per=batch: one minimum per batch needs the whole batch in one "
                         "pass; leave --micro_batch_size out")
    check_folders_and_tokenizer(args, rewards=args.rewards,
                                select=args.select if judged and args.select != "oracle" else None)
    return args


def reward_flags(argv, doc):
    """The flags of train_rm.py, checked."""
    parser = training_flags(doc, lr=f"{REWARD_LR:g}")
    parser.add_argument("--bias", type=comma_separated(fraction, "fractions"), help="train a "
                        "family: a reward model on each subset of D_rho in which the longer "
                        "response is preferred in this fraction of the pairs, such as 0.2,0.5,0.8")
    parser.add_argument("--head", choices=["last", "sum"], help="the reward is read at the last "
                        "token of a response, or summed over its tokens (default: sum on "
                        "tinytldr, else last, the standard)")
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or ("out/rms" if args.bias else "out/rm")
    args.init_from = args.init_from or "out/sft"
    args.head = args.head or ("sum" if args.data == "tinytldr" else "last")
    training_defaults(args, max_steps=200, batch_size=32, lr=REWARD_LR)
    resolve(args, preference_data_flags(args))
    if args.init_from == "scratch":
        raise InputError("--init_from: a reward model starts from a language model, such as the "
                         "run of --loss=sft")
    if args.bias and len(set(args.bias)) < len(args.bias):
        raise InputError("--bias: the members of a family differ in their bias; one is named twice")
    check_folders_and_tokenizer(args)
    return args


def training_flags(doc, lr):
    """The flags that both scripts have in common. A default of None is filled in later. lr: what
    --help says of its default."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--data", default="tinytldr", help="tinytldr, a JSONL/JSON/CSV/Parquet file, or a hub name")
    skip_flag(parser)
    add("--out_dir", help="the run folder")
    add("--init_from", help="a run folder, a Hugging Face GPT-2 folder or hub name, or scratch")
    add("--tokenizer", help="tinytldr, or a name of tiktoken's (default: as --init_from)")
    add("--max_steps", type=positive_int, help="optimizer steps")
    add("--batch_size", type=positive_int, help="rows (pairs) per optimizer step")
    add("--micro_batch_size", type=positive_int, help="rows per forward pass (default: the batch)")
    add("--lr", type=positive_float, help="peak learning rate: warm-up over 5%% of the steps, then "
        f"a cosine down to zero (default: {lr}; a hundredth of that where n_embd is 512 or more)")
    add("--weight_decay", type=not_negative_float, default=0.0, help="of matrices and embeddings")
    add("--grad_clip", type=positive_float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=seed, default=0, help="of the data, initial weights and the batch order")
    add("--eval_every", type=positive_int, help="steps between evaluations, which save the state")
    add("--n_eval", type=positive_int, help="rows in each evaluation (default: 256, or fewer in a "
                                            "short run)")
    device_flags(parser)
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    add("--fsdp", action="store_true", help="with torchrun: every process keeps a part of the "
        "weights, for models too large for one device")
    add("--gradient_checkpointing", action="store_true", help="keep less for the backward pass and "
        "compute it again: less memory, more time")
    add("--resume", action="store_true", help="go on from the state in --out_dir")
    add("--overwrite", action="store_true", help="start again in an --out_dir that holds a run or "
        "a model, whose files go into a folder in it, old-1 (-2, ...)")
    add("--log", choices=["tensorboard", "wandb"], help="show metrics.jsonl there as well (the "
        "package of that name, which has to be installed)")
    # the preference data
    add("--rho", type=fraction_or_all, help="fraction of the training pairs in which the longer "
        "response is preferred, or all for the pairs as they are (default: 0.2 on tinytldr)")
    add("--n_pairs", type=positive_int, help="training pairs (default: 1000 on tinytldr, else all)")
    add("--pool", type=positive_int, help="tinytldr: pairs to choose from (default: 5000)")
    add("--label_temperature", type=not_negative_float, help="tinytldr: noise of the oracle's "
        "labels (default: 0, none: the higher reward is always preferred)")
    add("--relabel", help="a reward-model run folder: relabel the pairs of --data by it")
    return parser


def training_defaults(args, max_steps, batch_size, lr):
    """Fills in what both training scripts leave open: the given defaults, and those that follow."""
    args.max_steps = args.max_steps or max_steps
    args.batch_size = args.batch_size or batch_size
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, args.batch_size)
    args.lr = args.lr or (lr / 100 if start_width(args) >= 512 else lr)
    # A short run is evaluated less often, on fewer rows, so that evaluating stays the smaller part.
    args.eval_every = args.eval_every or max(25, args.max_steps // 8)
    args.n_eval = args.n_eval or min(256, max(16, args.max_steps * args.batch_size // 16))


def start_width(args):
    """n_embd of the model that training starts from; of one on the hub, GPT-2's."""
    if args.init_from == "scratch":
        return vars(args).get("n_embd") or SIZES["n_embd"]      # a reward model: refused later
    if os.path.isdir(args.init_from):
        with contextlib.suppress(InputError):       # said when the model is read
            return read_sizes(args.init_from)["n_embd"]
    return 768


def preference_data_flags(args, used=True):
    """The rows of `resolve`'s table for the flags of the preference data. used: is there any?"""
    tiny = args.data == "tinytldr"
    what = "--data=tinytldr" if used else "the preference losses"
    return {
        "rho": (used, 0.2 if tiny else "all", what),
        "n_pairs": (used, 1000 if tiny else None, what),
        "pool": (used and tiny, 5000, what),
        "label_temperature": (used and tiny, 0.0, what),
        "relabel": (used, None, what),
        "skip_bad_rows": (not tiny, None, "--data of your own"),
    }


def check_folders_and_tokenizer(args, **inputs):
    """Nothing is overwritten that is read, nor anybody's work; --tokenizer is that of --init_from
    by default. What is missing for --log is said now."""
    if args.log is not None:
        log_package(args.log)
    start = None if args.init_from == "scratch" else args.init_from
    check_out_dir(args.out_dir, {"init_from": start, "relabel": args.relabel, "data": args.data,
                                 **inputs})
    if args.resume and args.overwrite:
        raise InputError("--overwrite: it would be ignored: --resume goes on with what is there")
    runs = [(None, args.out_dir, args.resume)]
    if vars(args).get("bias"):
        check_unused(args.out_dir)
        runs = family_to_train(args)
    for _, folder, resume in runs:
        check_free(folder, resume, args.overwrite)
    default = "tinytldr" if args.data == "tinytldr" else "gpt2"
    if start is not None:
        default = run_flags(start).get("tokenizer", default)
    args.tokenizer = args.tokenizer or default
