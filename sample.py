"""Talks to a policy: prints its replies as they are drawn. --compare asks its reference as well.

    python sample.py out/e-dpo --compare                     # a post of TinyTLDR
    python sample.py out/e-dpo --data=tinytldr --n_prompts=3 # held-out prompts
    python sample.py out/e-dpo --prompt_file=post.txt --n=3  # a prompt of your own, three replies

If the model was trained on dialogues, add --chat: each line you type is your turn.
"""
import contextlib
import re
import sys

import tinytldr
from data import get_tokenizer
from model import GPT
from support.columns import was_cut_off
from support.device import compute, new_generator, setup
from support.flags import InputError, naming, run_script, talk_flags
from support.run import run_flags
from support.tokenizer import check_vocabulary, own_tokenizer, to_text
from support.tokens import held_out_prompts, last_tokens, prompt_room, prompt_tokens


def prompts_to_answer(args, tokenizer, post):
    """Yields the prompts that sample.py answers, (text, token ids): of --prompt, --prompt_file or
    --data; or else a post of TinyTLDR (post: tinytldr.post), or what comes from standard input.
    Prints those that the person has not seen. The ids are None, except for --data, whose chats have
    special tokens that a text can't bring back."""
    if args.prompt is not None:
        yield args.prompt, None
    elif args.prompt_file is not None:
        yield read_text(args.prompt_file, f"--prompt_file: {args.prompt_file}"), None
    elif args.data is not None or tokenizer.name == "tinytldr":
        if args.chat:
            raise InputError("--chat: it would be ignored: a model of TinyTLDR answers posts")
        if args.data is not None:
            texts, prompts, _ = held_out_prompts(args, tokenizer, post)
        else:
            texts, prompts = [post(0, "test", args.seed % 1000)], [None]
        for text, ids in zip(texts, prompts):
            print(text + "\n")
            yield text, ids
    elif sys.stdin.isatty():
        print("one prompt per line; Ctrl-D ends")
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n"), None
    else:
        text = read_text(None, "standard input")
        for prompt in filter(str.strip, re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))):
            yield prompt, None


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

    reply, = policy.generate([ids], args.max_new_tokens, args.temperature, tokenizer.ends,
                             generator, on_token=on_token, top_k=args.top_k, top_p=args.top_p)
    ending = " ..." if was_cut_off(reply, tokenizer.ends) else ""
    print(to_text(reply, tokenizer).lstrip()[len(printed):] + ending + "\n")
    return reply


def main(argv=None):
    args = talk_flags(argv, __doc__)
    device = setup(args)
    flags = run_flags(args.policy)
    policy = GPT.from_pretrained(args.policy).to(device)
    tokenizer = get_tokenizer(own_tokenizer(args.policy, args.data))
    check_vocabulary(policy, tokenizer, args.policy)
    policies = {args.policy: policy}
    room = prompt_room(policy, args.max_new_tokens)
    if args.compare:
        name = flags.get("init_from", "scratch")
        if name == "scratch":
            raise InputError(f"--compare: {args.policy} was trained from no reference policy")
        with naming("--compare: can't read the model that the policy was trained from"):
            policies[f"the reference, {name}"] = GPT.from_pretrained(name).to(device)

    turns = {name: [] for name in policies}     # for --chat: each policy has its own dialogue
    for prompt, given in prompts_to_answer(args, tokenizer, tinytldr.post):
        for name, policy in policies.items():
            turns[name].append(prompt)
            if given is None:
                ids = prompt_tokens(turns[name], tokenizer, room, args.chat)
            else:
                ids = last_tokens(given, room)
            with compute():
                reply = stream(policy, name, tokenizer, ids, args)
            turns[name].append(reply)


if __name__ == "__main__":
    run_script(main)
