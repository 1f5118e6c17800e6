"""Reads and checks command-line flags. Says in one line what is wrong with them."""
import argparse
import contextlib
import ctypes
import os
import signal
import sys


class InputError(ValueError):
    """Says that something the user gave is wrong. The message names it and says what would be
    right."""


def in_a_line(error):
    """Returns an error's message in one line of at most 300 characters, or the name of its type if
    it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def run_script(main):
    """Runs a script's main function. What the user got wrong (an InputError) ends in one line on
    standard error and exit code 2. A bug ends in Python's own traceback."""
    name = os.path.basename(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")        # a terminal may know only ASCII
    signal.signal(signal.SIGTERM, _exit_on_signal)  # so that Python cleans up
    try:
        with lost_processes():
            main()
        sys.stdout.flush()
    except InputError as error:
        _say_and_exit(f"{name}: error: {error}", 2)
    except KeyboardInterrupt:
        _say_and_exit(f"{name}: interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for the last flush
        _say_and_exit(f"{name}: error: standard output was closed", 1)


def end_with_parent():
    """Asks Linux for a SIGTERM when the process that started this one ends, even if it was killed.
    Other systems ignore this."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)          # PR_SET_PDEATHSIG


def _exit_on_signal(number, frame):
    sys.exit(128 + number)


def _say_and_exit(line, code):
    print(line, file=sys.stderr)
    sys.exit(code)


OTHERS_ENDED = ("another of torchrun's processes was killed, was stopped or met an error (printed "
                "above), and this one ends with it; the same command with --resume continues a "
                "training run from its last saved state")
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",  # gloo
                   "remote process exited")                                                 # NCCL


@contextlib.contextmanager
def lost_processes():
    """Turns what torch raises when another of torchrun's processes is gone into an InputError.
    (torch has no type of its own for it, and it may come out of a forward or a backward pass.)"""
    try:
        yield
    except RuntimeError as error:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if by_torchrun and any(text in str(error) for text in CONNECTION_LOST):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun's, which adds nothing
            raise InputError(OTHERS_ENDED) from error
        raise


@contextlib.contextmanager
def naming(flag):
    """Puts the name of a flag, or of what was read, before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


LONGEST_MESSAGE = 400       # characters


class Parser(argparse.ArgumentParser):
    """Parses flags as argparse does, but takes no abbreviations and says in one line what is
    wrong."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def add_shared(self, *names):
        """Adds flags that several scripts have, rows of the table SHARED."""
        for name in names:
            self.add_argument(f"--{name}", **SHARED[name])

    def error(self, message):
        if len(message) > LONGEST_MESSAGE:      # it quotes what was typed
            message = f"{message[:LONGEST_MESSAGE]}..."
        raise InputError(message)


# ------------------------------------------------------------------ types of flags


def number_type(kind, name, allowed):
    """Returns a flag's type: a number for which `allowed` is true. name: what argparse calls it."""
    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise ValueError
        return value
    parse.__name__ = name       # argparse prints it: "invalid positive int value: '0'"
    return parse


positive_int = number_type(int, "positive int (to 1e12)", lambda n: 1 <= n <= 10**12)
positive_float = number_type(float, "positive float (1e-12 to 1e12)", lambda x: 1e-12 <= x <= 1e12)
up_to_1000 = number_type(int, "int from 1 to 1000", lambda n: 1 <= n <= 1000)
up_to_100000 = number_type(int, "int from 1 to 100000", lambda n: 1 <= n <= 100_000)
up_to_30000 = number_type(int, "int from 1 to 30000", lambda n: 1 <= n <= 30_000)
not_negative_int = number_type(int, "non-negative int (to 1e12)", lambda n: 0 <= n <= 10**12)
not_negative_float = number_type(float, "non-negative float (to 1e12)", lambda x: 0 <= x <= 1e12)
fraction = number_type(float, "fraction", lambda x: 0 <= x <= 1)
positive_fraction = number_type(float, "positive fraction", lambda x: 0 < x <= 1)
seed = number_type(int, "seed", lambda n: 0 <= n < 2**32)        # what random generators take
temperature = number_type(float, "temperature", lambda x: x == 0 or 0.01 <= x <= 100)


def fraction_or_all(text):
    """Parses --rho: a fraction, or "all" for all pairs as they are."""
    return text if text == "all" else fraction(text)


fraction_or_all.__name__ = "fraction (or all)"


def comma_separated(kind, name):
    """Returns a flag's type: a list of values of another type."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list of comma-separated {name}"
    return parse


def first_last(text):
    """Parses --gamma: FIRST,LAST, or one number for both."""
    values = [not_negative_float(part) for part in text.split(",")]
    if len(values) > 2:
        raise ValueError
    return [values[0], values[-1]]


first_last.__name__ = "FIRST,LAST (or one number), none below 0:"


# ------------------------------------------------------------------ flags that scripts share


def held_out_split(text):
    """Parses --split of the scripts that answer held-out prompts: validation or test."""
    if text not in ("validation", "test"):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from validation, test: what the training scripts "
            f"hold out of --data); a split of the data set itself is --data=NAME:{text}")
    return text


SHARED = {          # {flag: its options for argparse}, for Parser.add_shared
    "device": dict(default="auto", choices=["auto", "cpu", "cuda", "mps", "xla"],
                   help="where to compute (default: auto, which takes cuda if there is one, else "
                        "cpu)"),
    "dtype": dict(default="auto", choices=["auto", "float32", "bfloat16"],
                  help="the type of matrix products; weights, losses and sums are always "
                       "float32 (default: auto, which is bfloat16 on xla and on an A100 or newer, "
                       "else float32)"),
    "skip_bad_rows": dict(action="store_true", default=None,
                          help="leave out the rows of --data in which something is wrong, and say "
                               "which ones"),
    "missing_eos_penalty": dict(type=not_negative_float,
                                help="how much reward a sample loses if it was cut off before its "
                                     "end-of-text token (default: nothing)"),
    "temperature": dict(type=temperature, default=1.0,
                        help="temperature of sampling, up to 100; 0 always takes the most likely "
                             "token (default: 1)"),
}


def comparison_flags(argv, doc, methods=()):
    """Reads and checks the flags of evaluate.py. methods: those that it compares by default, by the
    names of their folders in out/. Returns an argparse.Namespace."""
    parser = Parser(doc)
    add = parser.add_argument
    add("policies", nargs="*", help="the policies to compare: the folders of their runs (default: "
        "the six methods in out/)")
    add("--ref", default="out/sft", help="the folder of the reference policy's run (default: "
        "out/sft)")
    add("--rms", help="also report the accuracy of these reward models: folders of single ones or "
        "of families, separated by commas (default, if no policies are named: out/rm,out/rms)")
    add("--oracle", help="the folder of a reward model that scores the samples (default: "
        "tinytldr's oracle)")
    add("--relabel", help="the folder of a reward model that labels the pairs for --rms")
    add("--data", default="tinytldr", help="where the held-out prompts and pairs come from "
        "(default: tinytldr)")
    parser.add_shared("skip_bad_rows")
    add("--split", default="test", type=held_out_split, metavar="{validation,test}",
        help="which of the held-out prompts to use (default: test); to name a split of the data "
        "set itself, write --data=NAME:SPLIT")
    add("--out_dir", default="out/report", help="the folder for report.html, report.md, "
        "results.json and the figures (default: out/report)")
    add("--n_prompts", type=up_to_30000, default=1000, help="use at most this many held-out "
        "prompts (default: 1000)")
    add("--show", type=not_negative_int, default=5, help="show the samples for this many prompts "
        "in report.md (default: 5)")
    add("--seed", type=seed, help="seed of the data and of sampling (default: 0)")
    add("--max_new_tokens", type=positive_int, help="how long a sample may be, in tokens (default: "
        "64 on tinytldr, else what 99%% of the held-out responses need)")
    parser.add_shared("missing_eos_penalty", "temperature", "device", "dtype")
    args = parser.parse_intermixed_args(argv)       # policies may stand between flags
    if not args.policies:
        args.policies = [f"out/{name}" for name in methods]
        args.rms = args.rms or ("out/rm,out/rms" if args.data == "tinytldr" else None)
    random = args.data == "tinytldr" or args.temperature > 0
    if args.data == "tinytldr":
        args.max_new_tokens = args.max_new_tokens or 64     # else evaluate.py looks at the rows
    resolve(args, {"relabel": (args.rms is not None, None, "--rms, whose accuracy it changes"),
                   "skip_bad_rows": (args.data != "tinytldr", None, "--data of your own"),
                   "seed": (random, 0, "--data=tinytldr, and by a --temperature above 0")})
    args.seed = args.seed or 0      # also where it changes nothing
    if args.data != "tinytldr" and not args.oracle:
        raise InputError("--oracle: only --data=tinytldr has an oracle of its own; name the run "
                         "folder of a reward model")
    check_out_dir(args.out_dir)
    return args


def talk_flags(argv, doc):
    """Reads and checks the flags of sample.py. Returns an argparse.Namespace."""
    parser = Parser(doc)
    add = parser.add_argument
    add("policy", help="the folder of a run or of a Hugging Face model, or a model's name on the "
        "hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to answer (default: a model of TinyTLDR gets "
                        "one of its test posts, chosen by --seed; any other model gets what you "
                        "type, line by line, or what is piped in, split at blank lines)")
    source.add_argument("--prompt_file", help="a text file, all of which is one prompt")
    source.add_argument("--data", help="answer held-out prompts of tinytldr, of a file of "
                        "preferences or demonstrations, or of a data set on the hub")
    parser.add_shared("skip_bad_rows")
    add("--split", type=held_out_split, metavar="{validation,test}", help="which of the held-out "
        "prompts to answer (default: test); to name a split of the data set itself, write "
        "--data=NAME:SPLIT")
    add("--n_prompts", type=positive_int, help="answer at most this many held-out prompts "
        "(default: 5)")
    add("--chat", action="store_true", help="hold a dialogue: each prompt is your next turn, and "
        "each policy remembers what was said before, as far as it has room")
    add("--compare", action="store_true", help="also ask the policy that this one was trained from")
    add("--n", type=up_to_1000, help="samples for each prompt (default: 1)")
    add("--seed", type=seed, help="seed of sampling, and of the choice of a post (default: 0)")
    add("--max_new_tokens", type=positive_int, default=64, help="how long a sample may be, in "
        "tokens (default: 64)")
    parser.add_shared("temperature", "device", "dtype")
    add("--top_k", type=positive_int, help="sample only from this many tokens, the most likely "
        "ones")
    add("--top_p", type=positive_fraction, help="sample only from the most likely tokens that "
        "together hold this fraction of the probability (applied after --temperature and --top_k)")
    args = parser.parse_args(argv)
    prompts = args.prompt is not None or args.prompt_file is not None
    posts = not prompts and args.data in (None, "tinytldr")     # which depend on --seed
    random, warm = args.temperature > 0, "a --temperature above 0"
    resolve(args, {"split": (args.data is not None, "test", "--data"),
                   "skip_bad_rows": (args.data not in (None, "tinytldr"), None,
                                     "--data of your own"),
                   "n_prompts": (args.data is not None, 5, "--data"),
                   "n": (random, 1, f"{warm}: at 0 all samples are the same"),
                   "seed": (random or posts, 0, f"{warm}, and by the posts of tinytldr"),
                   "top_k": (random, None, warm), "top_p": (random, None, warm)})
    args.n, args.seed = args.n or 1, args.seed or 0
    if args.chat and args.data is not None:
        raise InputError("--chat: it would be ignored: the prompts of --data are whole")
    if args.chat and args.n > 1 and not prompts:
        raise InputError("--n: a dialogue goes on from one reply; leave --n out, or ask a single "
                         "question with --prompt or --prompt_file")
    return args


def resolve(args, flags):
    """Fills in defaults, and refuses flags that would be ignored.

    flags: {flag: (is it used?, its default, what uses it)}. A flag that is not used becomes None.
    InputError if it was given.
    """
    for flag, (used, default, by) in flags.items():
        value = getattr(args, flag)
        if value is not None and not used:
            raise InputError(f"--{flag}: it would be ignored: it is used by {by}")
        if value is None and used:
            setattr(args, flag, default)


def check_out_dir(out_dir, inputs={}, flag="--out_dir"):
    """Raises InputError before the work, not after it, if a folder can't be made, or if it is one
    of the inputs, holds one or lies in one. inputs: {flag: comma-separated paths, or None}."""
    own = os.path.realpath(out_dir)
    for name, paths in inputs.items():
        for path in (paths or "").split(","):
            there = os.path.realpath(path)
            if path and os.path.exists(path) and os.path.commonpath([own, there]) in (own, there):
                what = "is also" if own == there else "lies in" if own > there else "holds"
                raise InputError(f"{flag}: {out_dir!r} {what} --{name} ({path!r}), which could be "
                                 "overwritten; name another folder")
    above = os.path.abspath(out_dir)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        reason = "is not writable" if os.path.isdir(above) else "is not a folder"
        raise InputError(f"{flag}: {out_dir!r} can't be made: {above!r} {reason}")
