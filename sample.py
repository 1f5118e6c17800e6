"""Talks to a policy: prints what it says as it says it, and with --compare what its reference would have said.

    python sample.py out/e-dpo --compare                     # on a post of TinyTLDR
    python sample.py out/my/e-dpo --prompt="SUBREDDIT: r/tifu ... TL;DR:" --n=3
    python sample.py out/my/e-dpo --chat                     # asks for a prompt, and puts it as a person's turn in a dialogue
"""
import argparse
import codecs
import sys

import torch

import runtime
import tinytldr
from data import get_tokenizer
from formats import chat_text
from model import GPT
from runtime import InputError


def parse_flags(argv):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a run folder, or a folder or hub name in Hugging Face's GPT-2 layout")
    parser.add_argument("--prompt", help="what to answer (default: for a model of TinyTLDR one of its test posts, by --seed, else the lines of "
                                         "standard input, one by one)")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a person says in a dialogue")
    parser.add_argument("--compare", action="store_true", help="also print what the policy that it was trained from says")
    parser.add_argument("--n", type=runtime.positive(int), default=1, help="samples for each prompt")
    parser.add_argument("--max_new_tokens", type=runtime.positive(int), default=64, help="longest sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 takes the most likely token")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="of sampling")
    runtime.device_flags(parser)
    args = parser.parse_args(argv)
    if args.temperature and not 0.01 <= args.temperature <= 100:
        raise InputError(f"--temperature: 0, or between 0.01 and 100; not {args.temperature}")
    return args


def stream(policy, tokenizer, ids, args, generator, autocast):
    """Prints one sample, each token as it is drawn. A letter may be spread over several tokens, and waits for the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def on_token(tokens):
        if tokens[0] != tokenizer.eot_token:
            print(decoder.decode(tokenizer.decode_single_token_bytes(tokens[0])), end="", flush=True)

    with autocast():
        response, = policy.generate([ids], args.max_new_tokens, args.temperature, tokenizer.eot_token, generator, on_token=on_token)
    print(decoder.decode(b"", final=True) + ("" if response[-1] == tokenizer.eot_token else " ...") + "\n")


def main(argv=None):
    args = parse_flags(argv)
    device, autocast = runtime.setup(args)
    flags = runtime.run_flags(args.policy)
    tokenizer = get_tokenizer(flags.get("tokenizer", "gpt2"))
    policies = {args.policy: GPT.from_pretrained(args.policy).to(device)}
    if policies[args.policy].config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{args.policy}: knows {policies[args.policy].config.vocab_size} tokens, and {tokenizer.name} has {tokenizer.n_vocab}")
    room = policies[args.policy].config.block_size - args.max_new_tokens
    if room < 1:
        raise InputError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in block_size "
                         f"{policies[args.policy].config.block_size}")
    if args.compare:
        reference = flags.get("init_from")
        if not isinstance(reference, str) or reference == "scratch":
            raise InputError(f"--compare: {args.policy} was trained from no reference policy")
        try:
            policies[f"the reference, {reference}"] = GPT.from_pretrained(reference).to(device)
        except InputError as error:
            raise InputError(f"--compare: the policy was trained from {error}") from error

    if args.prompt is not None:
        prompts = [args.prompt]
    elif tokenizer.name == "tinytldr":
        prompts = [tinytldr.post(0, "test", args.seed % 1000)]
        print(prompts[0] + "\n")
    else:
        if sys.stdin.isatty():
            print("one prompt a line; the end of the input ends it")
        prompts = (line.rstrip("\n") for line in sys.stdin)
    for prompt in prompts:
        text = chat_text([{"role": "user", "content": prompt}]) + "\n\nAssistant:" if args.chat else prompt
        ids = (tokenizer.encode_ordinary(text) or [tokenizer.eot_token])[-room:]
        for name, policy in policies.items():
            generator = torch.Generator(device="cpu" if device.type == "xla" else device).manual_seed(args.seed)
            for _ in range(args.n):
                print(f"[{name}]", end="", flush=True)
                stream(policy, tokenizer, ids, args, generator, autocast)


if __name__ == "__main__":
    runtime.run(main)
