"""The prompts that a policy answers: a person's, or held-out ones; and dialogues."""
import re
import sys

from support.flags import InputError
from support.formats import chat_text
from support.passes import to_text
from support.tokens import prompts_of, tokenised_file


def held_out_prompts(args, tokenizer, post, seed=0, demonstrations=True):
    """The first --n_prompts prompts of --split of --data, each once; says so if there are fewer.
    post: tinytldr.post, and seed its first argument; demonstrations: will they do, too? Returns
    (texts, lists of token ids)."""
    if args.data == "tinytldr":
        texts = [post(seed, args.split, i) for i in range(args.n_prompts)]
        return texts, [tokenizer.encode_ordinary(text) for text in texts]
    prompts = prompts_of(tokenised_file(args.data, tokenizer, demonstrations), args.split)
    if not prompts:
        raise InputError(f"--data: {args.data}: no prompt in the {args.split} split")
    if len(prompts) < args.n_prompts:
        print(f"--n_prompts={args.n_prompts}: the {args.split} split of {args.data} has "
              f"{len(prompts)}, which are taken")
    prompts = prompts[:args.n_prompts]
    return [to_text(prompt, tokenizer) for prompt in prompts], prompts


def prompts_to_answer(args, tokenizer, post):
    """Yields the texts that sample.py answers: of --prompt, --prompt_file or --data; or else a post
    of TinyTLDR (post: tinytldr.post), or what comes from standard input. Prints those that the
    person has not seen."""
    if args.prompt is not None:
        yield args.prompt
    elif args.prompt_file is not None:
        yield read_text(args.prompt_file)
    elif args.data is not None or tokenizer.name == "tinytldr":
        if args.chat:
            raise InputError("--chat: it would be ignored: a model of TinyTLDR answers posts")
        if args.data is not None:
            texts, _ = held_out_prompts(args, tokenizer, post)
        else:
            texts = [post(0, "test", args.seed % 1000)]
        for text in texts:
            print(text + "\n")
            yield text
    elif sys.stdin.isatty():
        print("one prompt per line; Ctrl-D ends")
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
    else:
        yield from blocks_of(sys.stdin)


def read_text(path):
    """A file's text, without the ends of lines at its end. InputError if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read().rstrip("\n")
    except (OSError, ValueError) as error:      # ValueError: not UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"--prompt_file: {path}: {reason}") from error
    if not text:
        raise InputError(f"--prompt_file: {path}: the file is empty")
    return text


def blocks_of(file):
    """The parts of a text between its blank lines. InputError if there is none."""
    try:
        blocks = re.split(r"\n(?:[ \t]*\n)+", file.read().strip("\n"))
    except ValueError as error:
        raise InputError("standard input: not UTF-8 text") from error
    blocks = [block for block in blocks if block.strip()]
    if not blocks:
        raise InputError("standard input: no prompt; write some, with a blank line between them, "
                         "or use --prompt, --prompt_file or --data")
    return blocks


def dialogue_tokens(messages, tokenizer, room):
    """A dialogue that waits for the assistant's next reply, as token ids, `room` at most. messages:
    from the user and the assistant by turns, the user first and last; where they do not fit, the
    oldest are taken out of the list, and a message that does not fit alone loses its start."""
    while True:
        ids = tokenizer.encode_ordinary(chat_text(messages) + "\n\nAssistant:")
        if len(ids) <= room or len(messages) == 1:
            return ids[-room:]
        del messages[:2]        # what the user said, and the reply to it
