"""Talks to a policy: prints its replies as they are drawn. --compare asks its reference as well.

    python sample.py out/e-dpo --compare                     # a post of TinyTLDR
    python sample.py out/e-dpo --data=tinytldr --n_prompts=3 # held-out prompts
    python sample.py out/e-dpo --prompt_file=post.txt --n=3  # a prompt of your own, three replies

If the model was trained on dialogues, add --chat: each line you type is your turn.
"""
import tinytldr
from data import get_tokenizer
from model import GPT
from support.device import compute, setup
from support.flags import InputError, naming, run_script, talk_flags
from support.prompts import prompt_room, prompt_tokens, prompts_to_answer, stream
from support.run import run_flags
from support.tokenizer import check_vocabulary, own_tokenizer


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
    for prompt in prompts_to_answer(args, tokenizer, tinytldr.post):
        for name, policy in policies.items():
            turns[name].append(prompt)
            ids = prompt_tokens(turns[name], tokenizer, room, args.chat)
            with compute():
                reply = stream(policy, name, tokenizer, ids, args)
            turns[name].append(reply)


if __name__ == "__main__":
    run_script(main)
