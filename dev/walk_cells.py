"""# One pair through the code

One post, two replies, and everything that happens to them: from text to tokens, to log-probs, to a
loss, to a gradient, to a policy that has learnt from them. Every number on this page was computed
by the code above it, and that code calls the functions that training calls. Each link names the
line where the function begins.

You can read it ([walk.md](walk.md)), or run and change it ([walk.ipynb](walk.ipynb), with Jupyter).
"""

import sys

sys.path.append("..")       # a notebook runs in docs/, and the code is one folder up

from copy import deepcopy

import torch
import torch.nn.functional as F

from data import Dataset, collate
from dev import walk_figures as draw
from losses import (
    PREFERENCE_LOSSES,
    batch_loss,
    best_member,
    d_dpo,
    dpo,
    ensemble_distill,
    forward_kl,
    ipo,
    knobs,
    log_ratio_margin,
    reward_margin,
    sft,
)
from model import GPT, GPTConfig, tree_mask
from support.backward import token_logps
from tinytldr import demonstration, judge, oracle_reward, post, tokenizer
from train_policy import adamw, learning_rate, statistics

"""## 1. A post and two replies

The post comes from TinyTLDR, the toy world of this repository ({tinytldr.post}). Both replies are
demonstrations of it, by two of its people. An oracle knows the truth. It judges a reply clause by
clause ({tinytldr.judge}): +1 for a fact of the post, -3 for chatter.
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
one is number 2. Remember the words that they share: " my coworker". They will matter in part 8.

## 2. A tree of tokens

The replies answer the same post. So the post stands in the row once, and the replies follow it
({data.collate}). Each token has a *branch*: 0 is the prompt, 1 and 2 are the replies. Each has a
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
reply to its *predictor*, the token whose output predicts it. Mostly that is the token before it.
But the first token of *each* reply is predicted from the prompt's last token, even where the other
reply lies in between.
"""

short = collate([(prompt_ids[-3:], replies)])
draw.tree(short, encoding)

"""## 3. Who may look at whom

A token may look at the prompt and at its own reply, up to itself. The mask says so
({model.tree_mask}). A reply never sees the other one. Next to the right mask are three wrong ones:

* **plain causal**: the second reply sees the first one, as if it went on with it.
* **siblings**: each reply sees what the other one has said so far.
* **no prompt**: a reply sees only itself. It has forgotten the question.
"""


def masks(batch):
    """Builds the right mask and three wrong ones, each (1, 1, T, T): 0 where a token sees another,
    -inf where not."""
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
wide ({model.GPT}). It imitates demonstrations of other posts for 60 steps ({losses.sft}). That is
enough to learn which words are common in replies, but not to tell the facts of the post. We count
in float64, so that your machine gets the same digits.
"""


def example(index):
    """Encodes a training post and two demonstrations of it."""
    texts = [demonstration(0, "train", index, person) for person in range(2)]
    ids = [encoding.encode_ordinary(text) + [encoding.eot_token] for text in texts]
    return encoding.encode_ordinary(post(0, "train", index)), ids


torch.set_default_dtype(torch.float64)
torch.manual_seed(2)
config = GPTConfig(block_size=96, vocab_size=encoding.n_vocab, n_layer=2, n_head=2, n_embd=32)
reference = GPT(config)
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
at once ({model.GPT.response_logps}). We open that function here, to see the tokens too. The hidden
states are read where a token is predicted, and nowhere else. Then each reply's tokens are added up
({data.TreeBatch.sum_tokens}).
"""


def by_token(policy, batch, mask):
    """Computes the log-prob of every token of the replies, in nats, (R,)."""
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
as any language model runs ({model.GPT.logits}). The sums are the same. With a wrong mask they are
not. Look at what changes, and for which reply.
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

"""Plain causal moves only the second reply, siblings both, and without the prompt all is different.
No wrong mask raises an error, and two of them are off by so little that no training curve would
show it. That is why a test compares the tree with separate sequences (tests/test_tree.py).

## 6. Where training starts

Training starts with a policy that *is* the reference. So both log-ratios are 0, and so is the
margin h ({losses.log_ratio_margin}), whatever the pair. Every loss has a value there that you can
tell without a model. If your first step shows another one, something is wired wrongly.

Some losses need more than log-probs: rewards, and samples from the reference for the KL. The data
set keeps them as columns ({data.Dataset}), and the loss takes what it needs
({losses.batch_loss}). Here three reward models disagree about how much better
the chosen reply is: by 1, 4 or 7 points. These scores are made up for this page. The oracle's gap
is 4, which is their mean.
"""

generator = torch.Generator().manual_seed(1)
samples = reference.generate([prompt_ids] * 4, 24, stop=encoding.eot_token, generator=generator)
rewards = torch.tensor([[[0.5, 2.0, 3.5], [-0.5, -2.0, -3.5]]], dtype=torch.float64)    # (1, 2, 3)
dataset = Dataset([(prompt_ids, replies + samples)], rewards.numpy(), n_samples=4)
with torch.no_grad():
    dataset.ref_logps = reference(dataset.batch([0])).numpy()       # (1, 6)
batch = dataset.batch([0])

h = log_ratio_margin(batch.pair_up(batch.ref_logps), batch.ref_logps[:, :2])
print(f"h = {h.item():.0f}, reward margins {reward_margin(rewards)[0].tolist()}\n")
print("loss             value    slope, chosen   slope, rejected")
for name in PREFERENCE_LOSSES:
    flags = knobs(name) | ({"gamma": 0.01} if "gamma" in knobs(name) else {})
    logps = batch.ref_logps.clone().requires_grad_()                # the policy is the reference
    loss = batch_loss(name, logps, batch, **flags).sum()
    slopes = torch.autograd.grad(loss, logps)[0][0]
    print(f"{name:14}{loss.item():8.3f}{slopes[0].item():17.3f}{slopes[1].item():18.3f}")

"""DPO's value is ln 2, that of d-DPO the square of 4, and e-DPO's the square of 1, the nearest of
its three targets. A step goes against the slope: the chosen reply's is negative, so its log-prob
should rise. The rejected one's slope is the opposite (unless a loss divides by the lengths). These
losses see only the difference of the two. The KL adds nothing to these two slopes: it holds on to
the samples.

## 7. What each loss wants

Now move the policy away from the reference, and look at the loss over h. Where is it lowest?
({losses.dpo}, {losses.ipo}, {losses.d_dpo}, {losses.e_dpo})
"""

h = torch.linspace(-4, 10, 1401, dtype=torch.float64)              # (N,)
logps = torch.stack([h / 2, -h / 2], dim=1)                         # (N, 2)
ref = torch.zeros_like(logps)
family = rewards.expand(len(h), 2, 3)
curves = {"dpo": dpo(logps, ref), "ipo": ipo(logps, ref), "d-dpo": d_dpo(logps, ref, family),
          "e-dpo": ensemble_distill(logps, ref, family, beta=1.0)}
lowest = {name: h[curve < curve.min() + 1e-9] for name, curve in curves.items()}
for name, places in lowest.items():
    print(f"{name:6} is lowest at h =", ", ".join(f"{place:g}" for place in places.tolist()))

draw.curves(h, curves, lowest)

"""DPO's lowest place is the end of the picture, wherever you end it: it always wants more. IPO
wants h = 1 / (2 tau) from every pair. d-DPO wants what its reward model says. And e-DPO has three
places to choose from.

How does e-DPO choose? It asks which reward model fits the policy best *now*
({losses.best_member}). As h grows, the answer goes up a staircase.
"""

member = best_member(logps, ref, family, beta=1.0)                  # (N,)
for step in member.diff().nonzero()[:, 0]:
    edge = h[step:step + 2].mean()
    print(f"up to h = {edge:.1f} model {member[step]} fits best, then model {member[step + 1]}")

draw.staircase(h, (reward_margin(family) - h[:, None]) ** 2, member)

"""The gradient comes from the best member alone. At the start that is model 0, the one closest to
the reference. It asks for the smallest change. This is caution, or as the paper says, pessimism.

## 8. Down to the logits

The slope of DPO is -1/2 and 1/2 for the two sums. From there it goes to the tokens, and from each
token to the logits, the scores of all words in the vocabulary. Take a token of the rejected reply
with probability p. Its own logit has the slope 1/2 (1 - p), and all other logits together have as
much with the other sign. What one word loses, the others gain, the likely ones most.
"""

pair = collate([(prompt_ids, replies)])
hidden = reference.transformer(pair.tokens, pair.position, masks(pair)["right"],
                               read=pair.predictor)                 # (R, C)
logits = reference.lm_head(hidden)                                  # (R, vocab)
token_logp = F.log_softmax(logits, dim=1).gather(1, pair.target[:, None])[:, 0]     # (R,)
loss = dpo(pair.sum_tokens(token_logp), ref_logps).sum()
slopes = torch.autograd.grad(loss, logits)[0]                       # (R, vocab)
print("reply   token                p   slope of its logit   of all others")
for r, (slot, token) in enumerate(zip(pair.slot, pair.target)):
    own = slopes[r, token].item()
    print(f"{slot + 1:5}   {encoding.decode([token]):14}{token_logp[r].exp():8.3f}"
          f"{own:16.3f}{slopes[r].sum() - own:18.3f}")

"""The two replies share words. What happens to " my coworker" in the *chosen* reply, when you only
lower the *rejected* one? Take one small step of plain gradient descent on its log-prob.
"""

lowered = deepcopy(reference)
lowered(pair)[0, 1].backward()
with torch.no_grad():
    for parameter in lowered.parameters():
        parameter -= 0.003 * parameter.grad
    mask = masks(pair)["right"]
    change = by_token(lowered, pair, mask) - by_token(reference, pair, mask)        # (R,)
for number, total in enumerate(pair.sum_tokens(change)[0].tolist(), 1):
    print(f"reply {number}: {total:+.2f} nats")

draw.changes(pair, change, encoding)

"""The rejected reply falls, and the chosen one falls with it, by its shared words. A loss that sees
only h does not mind, as long as the rejected one falls faster. [degeneracy.md](degeneracy.md) is
about what comes of that.

## 9. One step, thirty steps

Now train, with the optimizer of the real runs ({train_policy.adamw}): on this one pair, again and
again, with each of four losses. The numbers are those that a run reports
({train_policy.statistics}), in nats.
"""

KL_WEIGHT = {"dpo": {}, "p-dpo": {"gamma": 0.1}, "d-dpo": {}, "e-dpo": {"gamma": 0.01}}
history, trained = {}, {}
print("loss    step   chosen change   rejected change        h")
for name, gamma in KL_WEIGHT.items():
    policy, history[name] = deepcopy(reference), []
    optimizer = adamw(policy, lr=0.001)
    for step in range(31):
        logps = policy(batch)                                       # (1, 6)
        numbers = {key: value.item() for key, value in statistics(logps, batch).items()}
        history[name].append(numbers)
        if step in (1, 30):
            print(f"{name:6}{step:6}{numbers['chosen_change']:16.2f}"
                  f"{numbers['rejected_change']:18.2f}{numbers['margin']:9.2f}")
        if step < 30:               # the last step is only evaluated
            batch_loss(name, logps, batch, beta=1.0, **gamma).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    trained[name] = policy

draw.training(history)

"""After one step all four are at about the same place: AdamW makes the first step equally long,
whatever the size of the gradient. After thirty, DPO has run off, and would go on. Its chosen reply
has become much *less* likely, although its loss is nearly 0. d-DPO has come to its target, 4, and
e-DPO to its nearest one, 1.

(We tried four seeds for the reference, and chose this one because it shows the run-off and the KL
clearly. DPO ran off with all four, but how far the chosen reply fell differs a lot: by 44, 7, 35
and 3 nats.)

## 10. The KL

How far has a policy moved from what the reference would say? KL(ref ‖ pi) is the mean, over replies
sampled from the reference, of how much log-prob they have lost ({losses.forward_kl}). Four samples
have been in the tree since part 6, and the KL terms of p-DPO and e-DPO were computed on them. We
also draw 32 fresh ones, which no policy has seen.
"""

generator = torch.Generator().manual_seed(2)
fresh = collate([(prompt_ids, reference.generate([prompt_ids] * 32, 24, stop=encoding.eot_token,
                                                 generator=generator))])
print("loss    KL, the four samples   KL, fresh samples")
with torch.no_grad():
    for name, policy in trained.items():
        seen = forward_kl(policy(batch)[:, 2:], batch.ref_logps[:, 2:]).item()
        unseen = forward_kl(policy(fresh), reference(fresh)).item()
        print(f"{name:6}{seen:22.2f}{unseen:20.2f}")

"""On fresh samples the order is clear: DPO has lost nearly everything that the reference would say.
The others are close to it. A KL is never negative, but on the four samples two estimates are: those
policies have learnt these samples by heart. So an estimate on samples that were trained on is too
small, and only fresh samples measure the KL.

Where does all this happen in a real run? In twenty lines in the middle of {train_policy.main}: rows
of the batch, log-probs, loss, backward, step. You have seen each of them now.
"""
