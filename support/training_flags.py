"""Reads and checks the flags of the two training scripts. Their default numbers are at the top of
train_policy.py and train_rm.py."""
import argparse
import contextlib
import os
import sys

from support.checkpoint import NoModel, read_sizes
from support.flags import (
    InputError,
    Parser,
    check_out_dir,
    comma_separated,
    first_last,
    fraction,
    fraction_or_all,
    not_negative_float,
    positive_float,
    positive_int,
    resolve,
    seed,
    up_to_1000,
    up_to_100000,
)
from support.run import check_free, family_to_train
from support.sources import name_and_split
from support.tokenizer import known_tokenizer, own_tokenizer, tokenizer_name


def policy_flags(argv, doc, of_sft, of_preferences, losses):
    """Reads and checks the flags of train_policy.py.

    of_sft, of_preferences: {flag: its default} for --loss=sft and for the other losses. losses:
    {name: (the columns that it needs, {its own flag: default}, what it distils: "rm", "rms" or
    None)}. Returns an argparse.Namespace; InputError says what is wrong.
    """
    parser = training_parser(doc, lr=f"{of_sft['lr']:g} for sft, else {of_preferences['lr']:g}")
    add = parser.add_argument
    add("--loss", default="e-dpo", choices=list(losses), help="what to minimise (default: e-dpo); "
        "sft trains a reference policy, and docs/losses.md explains the others. With a loss named, "
        "--help shows the loss's own flags")
    add("--rewards", help="the reward models to distil: the folder of one or of a family, or "
        "several, separated by commas (default: out/rms for e-dpo, else out/rm). The word scores "
        "takes the scores in the columns of --data instead")
    users = add_loss_flags(parser, argv, losses)
    add("--max_new_tokens", type=positive_int, help="how long samples for the KL term and for "
        "--select may be, in tokens (default: 64 on tinytldr, else what 99%% of the training "
        "responses need)")
    parser.add_shared("missing_eos_penalty")
    add("--select", default="last", help="which checkpoint to keep: last (the default), or loss, "
        "the one with the lowest validation loss. Or the one whose samples for validation prompts "
        "earn most: oracle asks tinytldr's oracle, and a folder, as for --rewards, asks reward "
        "models")
    add("--n_layer", type=up_to_1000, help="layers of a model from scratch "
        f"(default: {of_sft['n_layer']})")
    add("--n_head", type=positive_int, help="attention heads of a model from scratch "
        f"(default: {of_sft['n_head']})")
    add("--n_embd", type=positive_int, help="width of a model from scratch "
        f"(default: {of_sft['n_embd']})")
    add("--block_size", type=positive_int, help="longest prompt + response of a model from "
        "scratch, in tokens (default: 192 on tinytldr, else what 99%% of the rows need, from 192 "
        "to 1024)")
    args = parser.parse_args(argv)

    sft, tiny = args.loss == "sft", args.data == "tinytldr"
    numbers = of_sft if sft else of_preferences
    needed, own, distilled = losses[args.loss]
    judged = args.select not in ("last", "loss")
    sampled = "kl" in needed or judged
    if sft:
        args.init_from = args.init_from or "scratch"
    elif args.init_from == "scratch":
        raise InputError(f"--init_from: --loss={args.loss} needs a reference policy, such as the "
                         "run of --loss=sft")
    fill_in(args, numbers, out_dir=f"out/{args.loss}", width=args.n_embd or of_sft["n_embd"])
    scratch, whose = args.init_from == "scratch", "--init_from=scratch"
    table = {knob: (knob in own, own.get(knob), f"--loss={', '.join(names)}")
             for knob, names in users.items()}
    # flag: (is it used?, its default, what uses it). max_new_tokens and block_size of other
    # data are None until train_policy.py looks at the rows.
    resolve(args, table | preference_flags(args, numbers, used=not sft) | {
        "rewards": ("rewards" in needed, f"out/{distilled or 'rm'}", "losses that distil rewards"),
        "max_new_tokens": (sampled, numbers.get("max_new_tokens") if tiny else None,
                           "losses with a KL term, or a --select that samples"),
        "missing_eos_penalty": (judged, None, "a --select that samples"),
        "n_layer": (scratch, of_sft["n_layer"], whose),
        "n_head": (scratch, of_sft["n_head"], whose),
        "n_embd": (scratch, of_sft["n_embd"], whose),
        "block_size": (scratch, of_sft["block_size"] if tiny else None, whose)})
    if judged and sft:
        raise InputError("--select: last or loss, with --loss=sft")
    if args.select == "oracle" and not tiny:
        raise InputError("--select=oracle: only tinytldr has an oracle; name a reward model's "
                         "folder")
    if scratch:
        check_sizes(args)
    judges = args.select if judged and args.select != "oracle" else None
    folders = None if args.rewards == "scores" else args.rewards
    check_folders(args, rewards=folders, select=judges)
    args.tokenizer = resolved_tokenizer(args)
    return args


LOSS_FLAGS = {          # flags of losses that are no plain number: (type, help)
    "beta": (positive_float, "scale of the implicit reward, in reward per nat (each loss has its "
             "own default, in losses.py or zoo.py)"),
    "tau": (positive_float, "IPO pushes the margin h to 1 / (2 tau)"),
    "gamma": (first_last, "weight of the KL term: FIRST,LAST, which grows linearly over training, "
              "or one number for all of training")}


def add_loss_flags(parser, argv, losses):
    """Adds the flags of all losses to a parser. --help shows those of the loss that is named in
    argv, because there are thirty losses. losses: see policy_flags. Returns {flag: the losses that
    have it}."""
    words, users = ["e-dpo", *(sys.argv[1:] if argv is None else argv)], {}
    for loss, (_, knobs, _) in losses.items():
        for knob in knobs:
            users.setdefault(knob, []).append(loss)
    for knob, names in users.items():
        default = losses[names[0]][1][knob]
        number = not_negative_float if isinstance(default, (int, float)) else str
        text = f"the {knob} in the formula of {', '.join(names)} (losses.py, zoo.py)"
        kind, text = LOSS_FLAGS.get(knob, (number, text))
        named = any(word.removeprefix("--loss=") in names for word in words)
        parser.add_argument(f"--{knob}", type=kind, help=text if named else argparse.SUPPRESS)
    return users


def reward_flags(argv, doc, numbers):
    """Reads and checks the flags of train_rm.py. numbers: {flag: its default}. Returns an
    argparse.Namespace; InputError says what is wrong."""
    parser = training_parser(doc, lr=f"{numbers['lr']:g}")
    parser.add_argument("--bias", type=comma_separated(fraction, "fractions"), help="train a "
                        "family: a reward model on each subset of D_rho in which the longer "
                        "response is preferred in this fraction of the pairs, such as 0.2,0.5,0.8")
    parser.add_argument("--head", choices=["last", "sum"], help="where the reward is read: last, "
                        "at the last token of a response, or sum, summed over its tokens (default: "
                        "sum on tinytldr, else last, the standard)")
    args = parser.parse_args(argv)
    if args.init_from == "scratch":
        raise InputError("--init_from: a reward model starts from a language model, such as the "
                         "run of --loss=sft")
    if args.bias and len(set(args.bias)) < len(args.bias):
        raise InputError("--bias: the members of a family differ in their bias; one is named twice")
    args.head = args.head or ("sum" if args.data == "tinytldr" else "last")
    fill_in(args, numbers, out_dir="out/rms" if args.bias else "out/rm")
    resolve(args, preference_flags(args, numbers))
    check_folders(args)
    args.tokenizer = resolved_tokenizer(args)
    return args


def training_parser(doc, lr):
    """Returns a parser with the flags that both scripts have. A default of None is filled in later.
    lr: what --help says of its default."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--data", default="tinytldr", help="what to train on: tinytldr, a JSONL, JSON, CSV or "
        "Parquet file, a folder of such files, or a name on the Hugging Face hub. If there are "
        "several splits, choose with NAME:SPLIT, such as NAME:train_prefs or NAME:a+b")
    parser.add_shared("skip_bad_rows")
    add("--out_dir", help="the folder of the run (default: named after what it trains, in out/)")
    add("--init_from", help="the model to start from: the folder of a run or of a Hugging Face "
        "model, or a model's name on the hub (default: out/sft). With --loss=sft also scratch, "
        "which is the default there")
    add("--tokenizer", help="tinytldr, a name that tiktoken knows, such as gpt2, or the folder of "
        "a model that has its own (default: the tokenizer of --init_from)")
    add("--max_steps", type=positive_int, help="how many optimizer steps to train")
    add("--batch_size", type=positive_int, help="rows (prompts with their responses) in each "
        "optimizer step")
    add("--micro_batch_size", type=positive_int, help="rows in one forward pass; fewer take less "
        "memory (default: the whole batch)")
    add("--lr", type=positive_float, help="peak learning rate, reached over the first 5%% of the "
        f"steps and followed by a cosine down to zero (default: {lr}; a hundredth of that if "
        "n_embd is 512 or more; ten times as much with --lora)")
    add("--lora", type=up_to_1000, metavar="RANK", help="train a LoRA adapter of this rank, such "
        "as 16, and leave the model of --init_from as it is. This takes less memory, and the run "
        "folder gets the adapter alone, in PEFT's layout")
    add("--freeze", type=positive_int, metavar="N", help="train only what is above the lowest N "
        "layers, and leave these and the embeddings as they are. What they compute is kept from "
        "epoch to epoch, so that a step is several times as fast")
    add("--seed", type=seed, default=0, help="seed of the data, of the initial weights and of the "
        "order of batches (default: 0)")
    add("--eval_every", type=positive_int, help="steps between evaluations; each also saves the "
        "state of the run")
    add("--n_eval", type=positive_int, help="rows in each evaluation (default: 256, or fewer in a "
        "short run)")
    parser.add_shared("device", "dtype")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    add("--fsdp", action="store_true", help="with torchrun: each process keeps only a part of the "
        "weights, for models too large for one device")
    add("--gradient_checkpointing", action="store_true", help="keep less for the backward pass, "
        "and compute it again when it is needed: less memory, more time")
    add("--resume", action="store_true", help="continue the run in --out_dir from its saved state")
    # the preference data
    add("--rho", type=fraction_or_all, help="choose training pairs such that the longer response "
        "is the preferred one in this fraction of them; the word all takes the pairs as they are "
        "(default: 0.2 on tinytldr, else all)")
    add("--n_pairs", type=positive_int, help="how many training pairs to take (default: 1000 on "
        "tinytldr, else all)")
    add("--pool", type=up_to_100000, help="with tinytldr: how many pairs to sample, from which "
        "the training pairs are chosen (default: 5000)")
    add("--label_temperature", type=not_negative_float, help="with tinytldr: noise in the oracle's "
        "labels (default: 0, which always prefers the response with the higher reward)")
    add("--relabel", help="let a reward model label the pairs of --data: the folder of its run")
    return parser


def fill_in(args, numbers, out_dir, width=None):
    """Fills in what both training scripts leave open: the given numbers, and those that follow from
    them. out_dir: the default of --out_dir. width: n_embd of a model from scratch."""
    args.out_dir = args.out_dir or out_dir
    args.init_from = args.init_from or "out/sft"
    args.max_steps = args.max_steps or numbers["max_steps"]
    args.batch_size = args.batch_size or numbers["batch_size"]
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, args.batch_size)
    if args.init_from != "scratch":
        width = 768                             # of one on the hub: GPT-2's
        if os.path.exists(args.init_from):
            with contextlib.suppress(InputError):       # said when the model is read
                width = read_sizes(args.init_from)["n_embd"]
    lr = numbers["lr"] / 100 if width >= 512 else numbers["lr"]
    args.lr = args.lr or lr * (numbers["lora_lr"] if args.lora else 1)
    # A short run is evaluated less often, on fewer rows, so that evaluating stays the smaller part.
    args.eval_every = args.eval_every or max(25, args.max_steps // 8)
    few = max(16, args.max_steps * args.batch_size // 16)
    args.n_eval = args.n_eval or min(numbers["n_eval"], few)


def preference_flags(args, numbers, used=True):
    """Returns the rows of `resolve`'s table for the flags of the data. numbers: {flag: default} on
    TinyTLDR. used: is there any preference data?"""
    tiny = args.data == "tinytldr"
    whose = "--data=tinytldr" if used else "the preference losses"
    return {
        "rho": (used, numbers.get("rho") if tiny else "all", whose),
        "n_pairs": (used, numbers.get("n_pairs") if tiny else None, whose),
        "pool": (used and tiny, numbers.get("pool"), whose),
        "label_temperature": (used and tiny, 0.0, whose),
        "relabel": (used, None, whose),
        "skip_bad_rows": (not tiny, None, "--data of your own"),
    }


def check_sizes(args):
    """Raises InputError if a model from scratch is impossible, or can't fit this machine's memory:
    4 bytes for a weight, and on the CPU 12 more for its gradient and Adam's moments. That is less
    than it takes, because the vocabulary is not known yet."""
    n_layer, n_embd, block_size = args.n_layer, args.n_embd, args.block_size or 192
    if n_embd % args.n_head:
        raise InputError(f"--n_head: {args.n_head} heads do not divide --n_embd={n_embd}")
    weights = 12 * n_layer * n_embd ** 2 + block_size * n_embd
    needed = weights * (16 if args.device == "cpu" else 4)
    with contextlib.suppress(AttributeError, OSError):      # Windows does not tell
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise InputError(
                f"--n_layer={n_layer} --n_embd={n_embd} --block_size={block_size}: a model of "
                f"{weights:.1e} weights needs {needed / 2 ** 30:.3g} GiB of memory, and this "
                f"machine has {memory / 2 ** 30:.3g}; name smaller sizes")


def check_folders(args, **inputs):
    """Raises InputError if a run would overwrite what it reads, or another run. inputs: {flag:
    folders, comma-separated, or None} that it reads, besides those of all runs."""
    start = None if args.init_from == "scratch" else args.init_from
    data = None if args.data == "tinytldr" else name_and_split(args.data)[0]
    check_out_dir(args.out_dir, {"init_from": start, "relabel": args.relabel, "data": data,
                                 **inputs})
    if args.lora and start is None:
        raise InputError("--lora: it adapts a model: name one by --init_from (now it is scratch)")
    if args.lora and args.fsdp:
        raise InputError("--lora: it doesn't work with --fsdp, which splits memory that --lora "
                         "mostly does not need; leave one of them out")
    if args.freeze and start is None:
        raise InputError("--freeze: it keeps layers of a trained model: name one by --init_from "
                         "(now it is scratch)")
    for name, used in (("--lora", args.lora), ("--fsdp", args.fsdp)):
        if args.freeze and used:
            raise InputError(f"--freeze: it doesn't work with {name}; leave one of them out")
    if vars(args).get("bias"):
        for _, folder, resume in family_to_train(args):
            check_free(folder, resume)
    else:
        check_free(args.out_dir, args.resume)


def resolved_tokenizer(args):
    """Returns the tokenizer of a run: that of --tokenizer, by default that of --init_from."""
    start = None if args.init_from == "scratch" else args.init_from
    chosen = args.tokenizer and tokenizer_name(args.tokenizer)
    with contextlib.suppress(NoModel):      # said when the model is read
        if start is not None and chosen is None:
            chosen = own_tokenizer(start, args.data)
        elif start is not None and known_tokenizer(start) not in (None, chosen):
            print(f"--tokenizer={chosen} takes the place of the tokenizer of {start}: where their "
                  "tokens differ, the model reads other words than it has learnt")
    return chosen or ("tinytldr" if args.data == "tinytldr" else "gpt2")
