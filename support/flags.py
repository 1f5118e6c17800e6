"""Command-line flags: their types, what is refused, and the one line that says why."""
import argparse
import math
import os
import sys


class InputError(ValueError):
    """Something that the user gave is wrong. The message names it and says what would be right."""


def run_script(main):
    """Runs a script. An InputError becomes one line on standard error and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and says in one line what is wrong."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise InputError(message)


# ------------------------------------------------------------------ types of flags


def number_type(kind, name, allowed):
    """A flag's type: a number for which `allowed` is true. name: what argparse calls it."""
    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise ValueError
        return value
    parse.__name__ = name       # argparse prints it: "invalid positive int value: '0'"
    return parse


positive_int = number_type(int, "positive int", lambda n: n > 0)
positive_float = number_type(float, "positive float", lambda x: 0 < x < math.inf)
not_negative_int = number_type(int, "non-negative int", lambda n: n >= 0)
not_negative_float = number_type(float, "non-negative float", lambda x: 0 <= x < math.inf)
fraction = number_type(float, "fraction", lambda x: 0 <= x <= 1)
seed = number_type(int, "seed", lambda n: 0 <= n < 2**32)        # what random generators take
temperature = number_type(float, "temperature", lambda x: x == 0 or 0.01 <= x <= 100)


def fraction_or_all(text):
    """--rho: a fraction, or "all" for all pairs as they are."""
    return text if text == "all" else fraction(text)


fraction_or_all.__name__ = "fraction (or all)"


def comma_separated(kind, name):
    """A flag's type: a list of values of another type."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list of comma-separated {name}"
    return parse


def first_last(text):
    """--gamma: FIRST,LAST, or one number for both."""
    values = [not_negative_float(part) for part in text.split(",")]
    if len(values) > 2:
        raise ValueError
    return [values[0], values[-1]]


first_last.__name__ = "FIRST,LAST (or one number), none below 0:"


# ------------------------------------------------------------------ flags that scripts share


def device_flags(parser):
    """Where to compute and in what precision: what every script asks."""
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps", "xla"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of matrix products; weights, losses and sums stay float32 "
                             "(auto: bfloat16 on cuda and xla)")


def skip_flag(parser):
    parser.add_argument("--skip_bad_rows", action="store_true", default=None, help="leave out the "
                        "rows of --data in which something is wrong, and say which")


def sampling_flags(parser):
    parser.add_argument("--max_new_tokens", type=positive_int, default=64, help="longest sample")
    parser.add_argument("--temperature", type=temperature, default=1.0,
                        help="of sampling, up to 100; 0 takes the most likely token")


def comparison_flags(argv, doc):
    """The flags of evaluate.py, checked."""
    parser = Parser(doc)
    add = parser.add_argument
    add("policies", nargs="*", help="run folders of policies (default: all six of out/)")
    add("--ref", default="out/sft", help="run folder of the reference policy")
    add("--rms", help="reward models, or folders of families, comma-separated, whose accuracy to "
        "report (if no policies are named: out/rm,out/rms)")
    add("--oracle", help="run folder of a reward model that scores the samples (default: "
        "tinytldr's oracle)")
    add("--relabel", help="run folder of a reward model that relabels the pairs for --rms")
    add("--data", default="tinytldr", help="where the held-out prompts and pairs come from")
    skip_flag(parser)
    add("--split", default="test", choices=["validation", "test"])
    add("--out_dir", default="out/report", help="where report.md, results.json and figures go")
    add("--n_prompts", type=positive_int, default=1000, help="held-out prompts, at most")
    add("--show", type=not_negative_int, default=5, help="prompts whose samples are printed")
    add("--seed", type=seed, default=0, help="of the data and of sampling")
    sampling_flags(parser)
    device_flags(parser)
    args = parser.parse_args(argv)
    if not args.policies:
        six = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")
        args.policies = [f"out/{name}" for name in six]
        args.rms = args.rms or ("out/rm,out/rms" if args.data == "tinytldr" else None)
    resolve(args, {"relabel": (args.rms is not None, None, "--rms, whose accuracy it changes"),
                   "skip_bad_rows": (args.data != "tinytldr", None, "--data of your own")})
    if args.data != "tinytldr" and not args.oracle:
        raise InputError("--oracle: only --data=tinytldr has an oracle of its own; name the run "
                         "folder of a reward model")
    check_out_dir(args.out_dir)
    return args


def talk_flags(argv, doc):
    """The flags of sample.py."""
    parser = Parser(doc)
    add = parser.add_argument
    add("policy", help="a run folder, or a folder or hub name in Hugging Face's GPT-2 layout")
    add("--prompt", help="what to answer (default: for a model of TinyTLDR one of its test posts, "
        "by --seed, else the lines of standard input, one by one)")
    add("--chat", action="store_true", help="the prompt is what a person says in a dialogue")
    add("--compare", action="store_true", help="also ask the policy that it was trained from")
    add("--n", type=positive_int, default=1, help="samples for each prompt")
    add("--seed", type=seed, default=0, help="of sampling")
    sampling_flags(parser)
    device_flags(parser)
    return parser.parse_args(argv)


def resolve(args, flags):
    """Fills in defaults, and refuses flags that would be ignored.

    flags: {flag: (is it used?, its default, by what it is used)}; a flag that is not used becomes
    None. InputError for one that was given all the same.
    """
    for flag, (used, default, by) in flags.items():
        value = getattr(args, flag)
        if value is not None and not used:
            raise InputError(f"--{flag}: it would be ignored: it is used by {by}")
        if value is None and used:
            setattr(args, flag, default)


def check_out_dir(out_dir, inputs=(), flag="--out_dir"):
    """Says before the work, not after it, that a folder can't be made, or is one of the inputs.
    inputs: {flag: comma-separated folders or None}."""
    for name, folders in dict(inputs).items():
        for folder in (folders or "").split(","):
            if os.path.isdir(folder) and os.path.realpath(folder) == os.path.realpath(out_dir):
                raise InputError(f"{flag}: {folder!r} is also --{name}, which would be "
                                 "overwritten; name another folder")
    above = os.path.abspath(out_dir)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        reason = "is a file" if os.path.isfile(above) else "is not writable"
        raise InputError(f"{flag}: {out_dir!r} can't be made: {above!r} {reason}")
