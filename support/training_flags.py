"""Reads the flags of train_policy.py and train_rm.py, and says what is refused. The numbers of a
run, which are the flags' defaults, stand at the top of the two scripts."""
import argparse
import contextlib
import os

from support.checkpoint import NoModel, read_sizes
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
    penalty_flag,
    positive_float,
    positive_int,
    resolve,
    seed,
    skip_flag,
    split_flag,
    up_to_1000,
    up_to_million,
)
from support.run import check_free, check_unused, family_to_train, log_package
from support.sources import join_split, name_and_split
from support.tokenizer import known_tokenizer, own_tokenizer, tokenizer_name


def policy_flags(argv, doc, numbers, losses, needs, knobs):
    """Reads and checks the flags of train_policy.py.

    numbers: {flag: its default} for --loss=sft and for the other losses, two dictionaries. losses:
    the names of losses.LOSSES; needs, knobs: the functions of losses.py that say what a loss needs,
    and what its own flags are. Returns an argparse.Namespace; InputError says what is wrong.
    """
    of_sft, of_preferences = numbers
    parser = training_flags(doc, lr=f"{of_sft['lr']:g} for sft, else {of_preferences['lr']:g}")
    add = parser.add_argument
    add("--loss", default="e-dpo", choices=losses)
    add("--rewards", help="folder of a reward model or of a family, or several, comma-separated "
        "(default: out/rms for e-dpo, else out/rm); or scores: those that --data came with")
    add("--beta", type=positive_float, help="scale of the implicit reward, in reward per nat "
        "(default: the loss's, in losses.py; so for all that follow)")
    add("--tau", type=positive_float, help="the margin to reach is 1 / (2 tau)")
    add("--gamma", type=first_last, help="weight of the forward KL: FIRST,LAST, annealed linearly "
        "over training, or one number for all of it")
    defaults = {knob: default for loss in losses for knob, default in knobs(loss).items()}
    for knob in sorted(set(defaults) - {"beta", "tau", "gamma"}):       # of losses added
        number = isinstance(defaults[knob], (int, float))
        add(f"--{knob}", type=not_negative_float if number else str, help="see losses.py, zoo.py")
    add("--kl_samples", type=up_to_1000, help="samples from the reference for each prompt, to "
        "estimate its KL term (default: 1)")
    add("--max_new_tokens", type=positive_int, help="longest sample for the KL term and --select "
        "(default: 64 on tinytldr, else what 99%% of the training responses need)")
    penalty_flag(parser)
    add("--select", default="last", help="which evaluated checkpoint to keep: the last; that of "
        "the lowest validation loss; or that whose samples for validation prompts earn most, "
        "judged by the oracle (of tinytldr) or by reward models (a folder, as in --rewards)")
    sizes = ("n_layer", "n_head", "n_embd")
    for size in sizes:
        kind = up_to_1000 if size == "n_layer" else positive_int
        add(f"--{size}", type=kind, help=f"of a model from scratch (default: {of_sft[size]})")
    add("--block_size", type=positive_int, help="longest prompt + response of a model from "
        "scratch, in tokens (default: 192 on tinytldr, else what 99%% of the rows need, from 192 "
        "to 1024)")
    args = parser.parse_args(argv)

    sft, needed, own = args.loss == "sft", needs(args.loss), knobs(args.loss)
    args.out_dir = args.out_dir or f"out/{args.loss}"
    args.init_from = args.init_from or ("scratch" if sft else "out/sft")
    own_numbers = of_sft if sft else of_preferences
    width = args.n_embd or of_sft["n_embd"]
    training_defaults(args, own_numbers, width)
    table = preference_data_flags(args, own_numbers, used=not sft)
    for knob in defaults:
        users = [loss for loss in losses if knob in knobs(loss)]
        table[knob] = (knob in own, own.get(knob), f"--loss={', '.join(users)}")
    default_rewards = "out/rms" if args.loss == "e-dpo" else "out/rm"
    table["rewards"] = ("rewards" in needed, default_rewards, "losses that distil rewards")
    table["kl_samples"] = ("kl" in needed, own_numbers.get("kl_samples"), "losses with a KL term")
    judged = args.select not in ("last", "loss")
    tiny = args.data == "tinytldr"      # of other data, train_policy.py looks at the rows
    table["max_new_tokens"] = ("kl" in needed or judged,
                               own_numbers.get("max_new_tokens") if tiny else None,
                               "losses with a KL term, or a --select that samples")
    table["missing_eos_penalty"] = (judged, None, "a --select that samples")
    for size in (*sizes, "block_size"):
        default = None if size == "block_size" and not tiny else of_sft[size]
        table[size] = (args.init_from == "scratch", default, "--init_from=scratch")
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
    if args.init_from == "scratch":
        check_memory(args)
    join_split(args)
    check_folders_and_tokenizer(args, rewards=args.rewards,
                                select=args.select if judged and args.select != "oracle" else None)
    return args


def reward_flags(argv, doc, numbers):
    """Reads and checks the flags of train_rm.py. numbers: {flag: its default}. Returns an
    argparse.Namespace; InputError says what is wrong."""
    parser = training_flags(doc, lr=f"{numbers['lr']:g}")
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
    training_defaults(args, numbers)
    resolve(args, preference_data_flags(args, numbers))
    if args.init_from == "scratch":
        raise InputError("--init_from: a reward model starts from a language model, such as the "
                         "run of --loss=sft")
    if args.bias and len(set(args.bias)) < len(args.bias):
        raise InputError("--bias: the members of a family differ in their bias; one is named twice")
    join_split(args)
    check_folders_and_tokenizer(args)
    return args


def training_flags(doc, lr):
    """Returns a parser with the flags that both scripts have. A default of None is filled in later.
    lr: what --help says of its default."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--data", default="tinytldr", help="tinytldr, a JSONL/JSON/CSV/Parquet file, a folder of "
        "them, or a hub name")
    split_flag(parser)
    skip_flag(parser)
    add("--out_dir", help="the run folder")
    add("--init_from", help="a run folder, a Hugging Face folder or hub name, or scratch")
    add("--tokenizer", help="tinytldr, a name of tiktoken's, or the folder of a model "
        "with its own (default: that of --init_from)")
    add("--max_steps", type=positive_int, help="optimizer steps")
    add("--batch_size", type=positive_int, help="rows (pairs) per optimizer step")
    add("--micro_batch_size", type=positive_int, help="rows per forward pass (default: the batch)")
    add("--lr", type=positive_float, help="peak learning rate: warm-up over 5%% of the steps, then "
        f"a cosine down to zero (default: {lr}; a hundredth of that where n_embd is 512 or more; "
        "ten times as much with --lora)")
    add("--lora", type=up_to_1000, metavar="RANK", help="train a LoRA adapter of this rank, such "
        "as 16, and leave the model of --init_from as it is: less memory, and a run folder "
        "with the adapter alone, in PEFT's layout")
    add("--merge_lora", action="store_true", default=None, help="write the whole model, with the "
        "adapter added to its weights, instead of the adapter")
    add("--grad_clip", type=positive_float, help="largest norm of the gradient")
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
    add("--pool", type=up_to_million, help="tinytldr: pairs to choose from (default: 5000)")
    add("--label_temperature", type=not_negative_float, help="tinytldr: noise of the oracle's "
        "labels (default: 0, none: the higher reward is always preferred)")
    add("--relabel", help="a reward-model run folder: relabel the pairs of --data by it")
    return parser


def training_defaults(args, numbers, scratch_width=0):
    """Fills in what both training scripts leave open: the given numbers, and those that follow from
    them. scratch_width: n_embd of a model from scratch."""
    for name in ("max_steps", "batch_size", "grad_clip"):
        setattr(args, name, getattr(args, name) or numbers[name])
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, args.batch_size)
    wide = start_width(args, scratch_width) >= 512
    default = numbers["lr"] / 100 if wide else numbers["lr"]
    args.lr = args.lr or default * (numbers["lora_lr"] if args.lora else 1)
    # A short run is evaluated less often, on fewer rows, so that evaluating stays the smaller part.
    args.eval_every = args.eval_every or max(25, args.max_steps // 8)
    few = max(16, args.max_steps * args.batch_size // 16)
    args.n_eval = args.n_eval or min(numbers["n_eval"], few)


def start_width(args, scratch_width):
    """Returns n_embd of the model that training starts from; of one on the hub, GPT-2's."""
    if args.init_from == "scratch":
        return scratch_width
    if os.path.exists(args.init_from):
        with contextlib.suppress(InputError):       # said when the model is read
            return read_sizes(args.init_from)["n_embd"]
    return 768


def check_memory(args):
    """Raises InputError if a model from scratch can't fit this machine's memory: 4 bytes for a
    weight, and where it is trained on the CPU 12 for its gradient and Adam's moments. Less than it
    takes: the vocabulary is not known yet."""
    n_layer, n_embd, block_size = args.n_layer, args.n_embd, args.block_size or 192
    weights = 12 * n_layer * n_embd ** 2 + block_size * n_embd
    needed = weights * (16 if args.device == "cpu" else 4)
    memory = memory_of_machine()
    if memory is not None and needed > memory:
        raise InputError(f"--n_layer={n_layer} --n_embd={n_embd} --block_size={block_size}: a "
                         f"model of {weights:.1e} weights needs {needed / 2 ** 30:.3g} GiB of "
                         f"memory, and this machine has {memory / 2 ** 30:.3g}; name smaller sizes")


def memory_of_machine():
    """Returns the bytes of memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):       # Windows
        return None


def preference_data_flags(args, numbers, used=True):
    """Returns the rows of `resolve`'s table for the flags of the preference data. numbers: {flag:
    default} on TinyTLDR. used: is there any?"""
    tiny = args.data == "tinytldr"
    what = "--data=tinytldr" if used else "the preference losses"
    return {
        "merge_lora": (args.lora is not None, False, "--lora"),
        "rho": (used, numbers.get("rho") if tiny else "all", what),
        "n_pairs": (used, numbers.get("n_pairs") if tiny else None, what),
        "pool": (used and tiny, numbers.get("pool"), what),
        "label_temperature": (used and tiny, 0.0, what),
        "relabel": (used, None, what),
        "skip_bad_rows": (not tiny, None, "--data of your own"),
        "split": (not tiny, None, "--data of your own"),
    }


def check_folders_and_tokenizer(args, **inputs):
    """Raises InputError if a run would overwrite what it reads, or another run, or if a package for
    --log is missing. Fills in --tokenizer, by default that of --init_from."""
    if args.log is not None:
        log_package(args.log)
    start = None if args.init_from == "scratch" else args.init_from
    folder, _ = name_and_split(args.data)
    check_out_dir(args.out_dir, {"init_from": start, "relabel": args.relabel, "data": folder,
                                 **inputs})
    if args.lora and start is None:
        raise InputError("--lora: it adapts a model: name one by --init_from, which is scratch")
    if args.lora and args.fsdp:
        raise InputError("--lora: not with --fsdp: most of the memory that it splits over the "
                         "processes is not needed with --lora")
    if args.resume and args.overwrite:
        raise InputError("--overwrite: it would be ignored: --resume goes on with what is there")
    runs = [(None, args.out_dir, args.resume)]
    if vars(args).get("bias"):
        check_unused(args.out_dir)
        runs = family_to_train(args)
    for _, folder, resume in runs:
        check_free(folder, resume, args.overwrite)
    if args.tokenizer is not None:
        args.tokenizer = tokenizer_name(args.tokenizer)
    default = "tinytldr" if args.data == "tinytldr" else "gpt2"
    with contextlib.suppress(NoModel):      # said when the model is read
        if start is not None and args.tokenizer is None:
            default = own_tokenizer(start, args.data)
        elif start is not None and known_tokenizer(start) not in (None, args.tokenizer):
            print(f"--tokenizer={args.tokenizer} takes the place of the tokenizer of {start}: "
                  "where their tokens differ, the model reads other words than it has learnt")
    args.tokenizer = args.tokenizer or default
