"""Reads the prompts that a policy answers, a person's or held-out ones, and prints its replies."""
import contextlib
import re
import sys

from support.columns import was_cut_off
from support.device import new_generator
from support.flags import InputError
from support.tokenizer import ends_of, prompt_ids, to_text
from support.tokens import SPLITS, prompts_of, tokenised_file


def held_out_prompts(args, tokenizer, post, needed=1):
    """Takes --n_prompts prompts of --split of --data, each once, a random part of those that there
    are; says so if there are fewer. post: tinytldr.post. Returns (texts, lists of token ids, and
    how long the rows of the split are: (N, 1 + K), or None for tinytldr). InputError if fewer
    prompts than needed."""
    if args.data == "tinytldr":
        texts = [post(args.seed, args.split, i) for i in range(args.n_prompts)]
        prompts, lengths = [tokenizer.encode_ordinary(text) for text in texts], None
    else:
        demonstrations = vars(args).get("rms") is None      # will do; reward models need pairs
        arrays = tokenised_file(args.data, tokenizer, demonstrations,
                                vars(args).get("skip_bad_rows"))
        there = prompts_of(arrays, args.split)
        lengths = arrays["lengths"][SPLITS[arrays["hash"]] == args.split]
        prompts = there[:args.n_prompts]
        texts = [to_text(prompt, tokenizer) for prompt in prompts]
        if len(there) < args.n_prompts:
            print(f"--n_prompts={args.n_prompts}: the {args.split} split of {args.data} has "
                  f"{len(there)}, which are taken")
    if len(prompts) < needed:
        raise InputError(f"--data, --n_prompts: {len(prompts)} in the {args.split} split of "
                         f"{args.data}; at least {needed} are needed")
    return texts, prompts, lengths


def prompts_to_answer(args, tokenizer, post):
    """Yields the texts that sample.py answers: of --prompt, --prompt_file or --data; or else a post
    of TinyTLDR (post: tinytldr.post), or what comes from standard input. Prints those that the
    person has not seen."""
    if args.prompt is not None:
        yield args.prompt
    elif args.prompt_file is not None:
        yield read_text(args.prompt_file, f"--prompt_file: {args.prompt_file}")
    elif args.data is not None or tokenizer.name == "tinytldr":
        if args.chat:
            raise InputError("--chat: it would be ignored: a model of TinyTLDR answers posts")
        texts = (held_out_prompts(args, tokenizer, post)[0] if args.data is not None
                 else [post(0, "test", args.seed % 1000)])
        for text in texts:
            print(text + "\n")
            yield text
    elif sys.stdin.isatty():
        print("one prompt per line; Ctrl-D ends")
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
    else:
        text = read_text(None, "standard input")
        yield from filter(str.strip, re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")))


def read_text(path, name):
    """Returns a file's text (None: of standard input), without the ends of lines at its end. name:
    what messages call it. InputError if there is none."""
    try:
        with open(path, encoding="utf-8") if path else contextlib.nullcontext(sys.stdin) as file:
            text = file.read().rstrip("\n")
    except (OSError, ValueError) as error:      # ValueError: not UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{name}: {reason}") from error
    if not text.strip():
        raise InputError(f"{name}: there is no prompt in it")
    return text


def prompt_tokens(turns, tokenizer, room, chat):
    """Returns what the policy reads, as at most `room` token ids. What does not fit loses its
    start, which is printed. InputError if the tokenizer can't read it.

    turns: the prompts of the person, and the replies to all but the last. Of these the policy reads
    the last; or with `chat` all of them, as a dialogue that waits for the assistant's next reply:
    where they do not fit, the oldest are taken out of the list.
    """
    try:
        "".join(turns).encode()
        while True:
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()}
                        for i, turn in enumerate(turns)]
            ids = prompt_ids(messages if chat else turns[-1], tokenizer)
            if len(ids) <= room or len(turns) == 1 or not chat:
                break
            del turns[:2]           # what the person said, and the reply to it
    except UnicodeEncodeError as error:     # a terminal's bytes, which may be anything
        raise InputError("the prompt: not UTF-8 text") from error
    except ValueError as error:
        raise InputError(f"the prompt: {error}") from error
    if len(ids) > room:
        print(f"(room for {room} of the prompt's {len(ids)} tokens: it loses its start)")
    return ids[-room:]


def prompt_room(model, max_new_tokens):
    """Returns how many tokens a prompt may have. InputError if that is none."""
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise InputError(f"--max_new_tokens: {max_new_tokens} leaves no room for a prompt in "
                         f"block_size {model.config.block_size}")
    return room


def with_room(prompts, model, max_new_tokens):
    """Returns the end of each prompt (token ids) that leaves room for max_new_tokens; says how many
    lose their start."""
    room = prompt_room(model, max_new_tokens)
    n_cut = sum(len(prompt) > room for prompt in prompts)
    if n_cut:
        print(f"{n_cut} of {len(prompts)} prompts lose their start: {max_new_tokens} new tokens in "
              f"block_size {model.config.block_size} leave room for {room}")
    return [prompt[-room:] for prompt in prompts]


# ------------------------------------------------------------------ replies, token by token


def stream(policy, name, tokenizer, ids, args):
    """Prints --n replies to a prompt (token ids), each token as it is drawn. Returns the text of
    the last."""
    generator = new_generator(next(policy.parameters()).device, args.seed)
    for _ in range(args.n):
        print(f"[{name}] ", end="", flush=True)
        reply = stream_reply(policy, tokenizer, ids, args, generator)
    return to_text(reply, tokenizer)


def stream_reply(policy, tokenizer, ids, args, generator):
    """Prints one reply, each token as it is drawn. Returns its tokens."""
    drawn, printed = [], ""

    def on_token(tokens):
        nonlocal printed
        drawn.append(tokens[0])
        text = to_text(drawn, tokenizer).lstrip()       # a space stands before it already
        if not text.endswith("\ufffd"):     # a letter may be several tokens: wait for all of it
            print(text[len(printed):], end="", flush=True)
            printed = text

    reply, = policy.generate([ids], args.max_new_tokens, args.temperature, ends_of(tokenizer),
                             generator, on_token=on_token, top_k=args.top_k, top_p=args.top_p)
    ending = " ..." if was_cut_off(reply, ends_of(tokenizer)) else ""
    print(to_text(reply, tokenizer).lstrip()[len(printed):] + ending + "\n")
    return reply
