"""# One pair through the code

One post, two replies, and everything that happens to them: from text to tokens, to log-probs, to a
loss, to a gradient, to a policy that has learnt from them. Every number on this page was computed
by the code above it, and that code calls the functions that training calls. Each link names the
line where the function begins.

You can read it ([walk.md](walk.md)), or run and change it ([walk.ipynb](walk.ipynb), with Jupyter).
"""

import sys

sys.path.append("..")       # the notebook is in docs/, the code above it

from dataclasses import replace

import torch
import torch.nn.functional as F

from data import Dataset, collate
from dev import walk_figures as draw
from losses import (
    PREFERENCE_LOSSES,
    batch_loss,
    best_member,
    forward_kl,
    knobs,
    log_ratio_margin,
    reward_margin,
    sft,
)
from model import GPT, GPTConfig, tree_mask
from support.logprobs import token_logps
from tinytldr import demonstration, judge, oracle_reward, post, tokenizer
from train_policy import adamw, learning_rate, statistics

"""## 1. A post and two replies

The post comes from TinyTLDR, the toy world of this repository ({post}). Both replies are
demonstrations of it, by two of its people. An oracle knows the truth. It judges a reply clause by
clause ({judge}): +1 for a fact of the post, -3 for chatter.
"""

prompt = post(0, "validation", 9)
chosen = demonstration(0, "validation", 9, person=3)
rejected = demonstration(0, "validation", 9, person=24)

print(prompt)
for name, reply in (("chosen", chosen), ("rejected", rejected)):
    print(f"\n{name}:{reply}")
    for clause, verdict, points in judge(prompt, reply):
        print(f"    {points:+d}  {clause}  ({verdict})")
    print(f"    reward {oracle_reward(prompt, reply):+d}")

"""The reply with the higher reward is the *chosen* one. It is always number 1, and the *rejected*
one is number 2. Remember the words that they share: " my coworker". They will matter in part 6.

## 2. A tree of tokens

The replies answer the same post. So the post stands in the row once, and the replies follow it
({collate}). Each token has a *branch*: 0 is the prompt, 1 and 2 are the replies. Each has a
*position* in its own text: both replies begin at the position where the prompt ends.
"""

encoding = tokenizer()
prompt_ids = encoding.encode_ordinary(prompt)
replies = [encoding.encode_ordinary(reply) + [encoding.eot_token] for reply in (chosen, rejected)]
batch = collate([(prompt_ids, replies)])

R = len(batch.target)
print(f"T = {batch.tokens.size(1)} tokens in the row: {len(prompt_ids)} of the prompt, {R} of the "
      "replies")
print(f"lengths of the replies, each with its end-of-text token: {batch.lengths[0].tolist()}")

"""A picture of it, with only the last tokens of the prompt. An arrow goes from each token of a
reply to its *predictor*, the token whose output predicts it. That is the token before it, with one
exception: the first token of *each* reply is predicted from the prompt's last token.
"""

short = collate([(prompt_ids[-3:], replies)])
draw.tree(short, encoding)

"""## 3. Who may look at whom

A token may look at the prompt and at its own reply, up to itself. The mask says so
({tree_mask}). A reply never sees the other one. Next to the right mask are three wrong ones:

* **plain causal**: the second reply sees the first one, as if it went on with it.
* **siblings**: each reply sees what the other one has said so far.
* **no prompt**: a reply sees only itself. It has forgotten the question.
"""


def masks(batch):
    """The right mask and three wrong ones, each (1, 1, T, T): 0 where a token sees another."""
    right = tree_mask(batch.branch, torch.float64)
    position, branch = batch.position[0], batch.branch[0]
    sees_earlier = position[:, None] >= position
    own_branch = branch[:, None] == branch
    return {"right": right,
            "plain causal": tree_mask(torch.zeros_like(batch.branch), torch.float64),
            "siblings": torch.zeros_like(right).masked_fill(~sees_earlier, -torch.inf),
            "no prompt": right.masked_fill(~own_branch, -torch.inf)}


draw.masks(masks(short), short, encoding)

"""## 4. A small reference

Log-probs need a model. This one is small enough to learn while you wait: two layers, 32 numbers
wide ({GPT}). It imitates demonstrations of other posts for 60 steps ({sft}). It learns which words
are common in replies, but not yet to tell the facts of the post. It counts in float64, so that
your machine gets the same digits.
"""


def example(index):
    """A training post with two demonstrations, as token ids."""
    texts = [demonstration(0, "train", index, person) for person in range(2)]
    ids = [encoding.encode_ordinary(text) + [encoding.eot_token] for text in texts]
    return encoding.encode_ordinary(post(0, "train", index)), ids


torch.manual_seed(0)
config = GPTConfig(block_size=96, vocab_size=encoding.n_vocab, n_layer=2, n_head=2, n_embd=32)
reference = GPT(config).double()
optimizer = adamw(reference, lr=0.01)
for step in range(60):
    demonstrations = collate([example(8 * step + i) for i in range(8)])
    loss = sft(reference(demonstrations)).sum() / demonstrations.lengths.sum()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, max_steps=60, peak=0.01)
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 59):
        print(f"step {step:2d}: {loss.item():.2f} nats a token")

"""## 5. Log-probs, and their sums

The log-prob of a reply is the sum over its tokens. `reference(batch)` computes it for all replies
at once ({GPT.response_logps}). We open that function here, to see the tokens too. The hidden
states are read where a token is predicted, and nowhere else.
"""


def by_token(policy, batch, mask):
    """The log-prob of every token of the replies, in nats, (R,)."""
    hidden = policy.transformer(batch.tokens, batch.position, mask, read=batch.predictor)
    return token_logps(hidden, policy.lm_head.weight, batch.target)


with torch.no_grad():
    logps = by_token(reference, batch, masks(batch)["right"])       # (R,)
    ref_logps = reference(batch)                                    # (1, 2)
for slot, token, logp in zip(batch.slot, batch.target, logps):
    print(f"reply {slot + 1}  {encoding.decode([token]):15}{logp:7.2f}")
print("sums, batch.sum_tokens:    ", [f"{logp:.2f}" for logp in batch.sum_tokens(logps)[0]])
print("sums, reference(batch):    ", [f"{logp:.2f}" for logp in ref_logps[0]])

"""Is that what you get without any tree? Put each reply behind the prompt, alone, and run the model
as any language model runs ({GPT.logits}). The sums are the same. With a wrong mask they are not:
look at what changes, and for which reply.
"""

with torch.no_grad():
    separate = []
    for reply in replies:
        tokens = torch.tensor([prompt_ids + reply])                 # (1, T)
        predictions = F.log_softmax(reference.logits(tokens), dim=2)[0, len(prompt_ids) - 1:-1]
        separate.append(predictions.gather(1, torch.tensor(reply)[:, None]).sum())
    print(f"separate sequences  {separate[0]:8.4f} {separate[1]:8.4f}")
    for name, mask in masks(batch).items():
        sums = batch.sum_tokens(by_token(reference, batch, mask))[0]
        print(f"{name:18}  {sums[0]:8.4f} {sums[1]:8.4f}")
