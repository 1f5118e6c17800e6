"""Builds TinyTLDR, a toy world of forum posts and summaries in which the true reward is known.

A post tells six things (the slots below): who is involved, what happened, what was tried, how it
feels, what stands in the way, and the question. Each slot has eight possible facts. Each fact has
two wordings in a post and one fixed clause in a summary. The sentences of some posts are shuffled,
and all posts have some chatter that is beside the point:

    POST: Long time reader here. My roommate is the problem. The music never stops. I made a polite
    request. I am worn out. There is no money left. Should I pack up and leave?

    TL;DR: my roommate; loud music; asked nicely; exhausted; broke; move out?

A summary is a list of clauses joined by "; ". **The oracle reward** of a summary is the sum of

    +1    for each fact of the post that it states, counted once
    -3    for each clause with a fact that is not in the post
    -3    for each clause of chatter
    -3    for each broken clause: not one of the world's clauses, or empty

so the best summary states all six facts and nothing else. The reference policy learns from
demonstrations, which have habits. Their facts come in any order. Many of them open with chatter.
Most have only two clauses. Some state a fact that is not in the post. dev/LOG.md says why the world
is like this, and which others were tried before; experiments/world.py measures it.

**Labels**: of two summaries, the one with the higher reward is preferred. Ties are dropped. If the
label temperature T is above 0, labels are noisy: the first summary is preferred with probability
sigmoid((R1 - R2) / T), a Bradley-Terry draw.

A post is a pure function of (seed, split, index). No two posts have the same facts: each index has
its own combination of facts, whatever the seed (which draws the wording), and the splits use
disjoint ranges of the index.

    python tinytldr.py      # three posts, their demonstrations, and what the oracle says of each
"""
from functools import lru_cache

import numpy as np

from support.columns import cached, hash_model, key, sample
from support.device import in_float32
from support.tokenizer import fingerprint, prompt_ids, to_text, word_encoding


def table(text):
    """Reads lines of "a | b | c" as a list of tuples, ("a", "b", "c") each."""
    lines = text.strip().splitlines()
    return [tuple(part.strip() for part in line.split("|")) for line in lines]


# slot -> its eight facts: wording in a post | another wording | clause in a summary
SLOTS = {
    "who": table("""
My roommate is the problem. | I share a flat with him. | my roommate
This is about my sister. | She is my older sibling. | my sister
My boss is at it again. | He signs my paychecks. | my boss
A neighbor bothers me. | They live next door. | my neighbor
It concerns my landlord. | I rent from this man. | my landlord
A coworker is involved. | Her desk faces mine. | my coworker
I mean my best friend. | We met in first grade. | my best friend
My cousin came to stay. | He is my aunt's son. | my cousin
"""),
    "event": table("""
The music never stops. | Their speakers shake the walls. | loud music
I lent out four hundred dollars. | My money never came back. | unpaid loan
My lunch keeps vanishing. | Someone eats what I cook. | stolen food
My secret is out. | They told everyone my story. | shared my secret
There is a dent in my car. | They backed into my door. | damaged my car
Nobody came when I turned thirty. | My birthday was ignored. | forgot my birthday
My phone was searched. | They went through my chats. | read my messages
They took credit for my report. | My idea got another name. | stole my idea
"""),
    "tried": table("""
I made a polite request. | I asked in a friendly way. | asked nicely
I taped a letter up. | There is a note on the door. | left a note
We had a screaming match. | I shouted once. | had a fight
I have been silent. | I waited for it to pass. | ignored it
I called the police. | An officer came by. | called the police
I would split the costs. | I said that I would pay half. | offered to pay half
A therapist heard it all. | I talked to a counselor. | saw a therapist
I baked a peace cake. | I bought them a present. | gave a gift
"""),
    "feeling": table("""
I am worn out. | I have no energy left. | exhausted
My blood boils. | I shake with anger. | furious
I cry at night. | It breaks my heart. | sad
I feel unsafe now. | Every footstep scares me. | afraid
I blame myself. | Maybe it is my fault. | guilty
I feel like a fool. | I could die of shame. | embarrassed
I talk to no one. | I eat alone. | lonely
My stomach is in knots. | I worry all day. | anxious
"""),
    "obstacle": table("""
There is no money left. | My account is empty. | broke
Our lease runs another year. | I signed until next summer. | stuck in the lease
My exams are near. | I study day and night. | exams soon
There is a baby here. | Our son is four months old. | new baby
I just moved here. | I know nobody in town. | new in town
We have the same friends. | Our circles overlap. | same friends
My visa depends on them. | I need their signature. | visa trouble
I have no proof. | It is my word against theirs. | no proof
"""),
    "question": table("""
Should I pack up and leave? | Is it time to move? | move out?
Do I say sorry first? | Must I apologize? | apologize?
Would a lawyer help? | Can I go to court? | sue them?
Do I end all contact? | Should I cut them off? | cut contact?
How do I bring it up? | What is a calm way to ask? | how to talk about it?
Should I give another chance? | Can people change? | second chance?
Do I tell everyone? | Should others hear the truth? | tell others?
Am I making too much of it? | Is it normal to feel this? | overreacting?
"""),
}
# Sentences in a post. In a summary each is a clause, without its full stop and capitals.
CHATTER = """
Sorry for the wall of text.
I am on my phone.
English is not my first language.
This is a throwaway.
Long time reader here.
My cat is asleep on me.
Thanks in advance.
It is my first post.
""".strip().splitlines()

STATED, UNSUPPORTED, CHATTERED, BROKEN = 1, -3, -3, -3

# The habits of demonstrations: how many clauses they have, how likely the first one is chatter, and
# how likely a fact is one that is not in the post.
N_CLAUSES = {1: 0.10, 2: 0.55, 3: 0.10, 4: 0.05, 5: 0.05, 6: 0.15}
OPENS_WITH_CHATTER = 0.4
MADE_UP = 0.03

FACT_OF_CLAUSE = {clause: (slot, i) for slot, facts in SLOTS.items()
                  for i, (_, _, clause) in enumerate(facts)}
CHATTER_CLAUSE = {sentence: sentence[:-1].lower() for sentence in CHATTER}
N_WORLDS = 8 ** len(SLOTS)                                          # combinations of facts: 262,144
SPLIT_START = {"train": 0, "validation": 200_000, "test": 230_000}  # a split's first index


# ------ posts and demonstrations


def facts_of(split, index):
    """Returns the facts of a post, {slot: number of the fact, 0 to 7}. No two posts have the same
    combination. ValueError if the split has no such index."""
    starts = sorted(SPLIT_START.values()) + [N_WORLDS]
    start = SPLIT_START[split]
    if not 0 <= index < starts[starts.index(start) + 1] - start:
        raise ValueError(f"the {split} split has no index {index}")
    # This permutes 0 ... 8^6 - 1. An odd step near the golden ratio of the whole spreads any range
    # of indices evenly, and the exclusive-or carries that over to the first slots.
    number = (start + index) * 162_013 % N_WORLDS
    number ^= number >> 9
    combination = {}
    for slot in SLOTS:
        number, combination[slot] = divmod(number, 8)
    return combination


@lru_cache(maxsize=8)
def post(seed, split, index):
    """Writes the text of a prompt: "POST: ...", a blank line, "TL;DR:". seed: of the wording, the
    order and the chatter; split, index: which post."""
    rng = np.random.default_rng([seed, SPLIT_START[split] + index, 0])
    sentences = [SLOTS[slot][i][rng.integers(2)] for slot, i in facts_of(split, index).items()]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    for c in rng.choice(len(CHATTER), size=rng.integers(1, 4), replace=False):
        sentences.insert(rng.integers(len(sentences) + 1), CHATTER[c])
    return "POST: " + " ".join(sentences) + "\n\nTL;DR:"


def demonstration(seed, split, index, person=0):
    """Writes a summary of a post as a person in a hurry might, with its leading space.

    person: 0, 1, 2, ...; each of them writes another summary of the same post.
    """
    rng = np.random.default_rng([seed, SPLIT_START[split] + index, 2 + person])
    text = post(seed, split, index)
    n_clauses = rng.choice(list(N_CLAUSES), p=list(N_CLAUSES.values()))
    clauses = []
    if rng.random() < OPENS_WITH_CHATTER:
        chatter = [clause for sentence, clause in CHATTER_CLAUSE.items() if sentence in text]
        clauses.append(rng.choice(chatter))
    facts = list(facts_of(split, index).items())
    rng.shuffle(facts)
    for slot, i in facts[:n_clauses - len(clauses)]:
        if rng.random() < MADE_UP:
            i = (i + rng.integers(1, 8)) % 8
        clauses.append(SLOTS[slot][i][2])
    return " " + "; ".join(clauses)


def demonstration_rows(seed, split):
    """Yields posts with four demonstrations each, {"prompt": str, "responses": [str] * 4}: 20,000
    posts to train on, or 1,000 of another split."""
    for i in range(20_000 if split == "train" else 1000):
        responses = [demonstration(seed, split, i, person) for person in range(4)]
        yield {"prompt": post(seed, split, i), "responses": responses}


# ------ the oracle


@lru_cache(maxsize=100_000)
def facts_in(prompt):
    """Reads off the text of a post which facts it states: a frozenset of (slot, number of the
    fact)."""
    stated = set()
    for slot, facts in SLOTS.items():
        for i, (wording, another, _) in enumerate(facts):
            if wording in prompt or another in prompt:
                stated.add((slot, i))
    return frozenset(stated)


def judge(prompt, summary):
    """Judges each clause of a summary, as the oracle does: a list of (clause, verdict, points).

    prompt: the text of the post, which says what is true.
    """
    true = facts_in(prompt)
    told, verdicts = set(), []
    for clause in summary.split(";"):
        clause = clause.strip()
        fact = FACT_OF_CLAUSE.get(clause)
        if clause in CHATTER_CLAUSE.values():
            verdicts.append((clause, "chatter", CHATTERED))
        elif fact is None:
            verdicts.append((clause, "broken", BROKEN))
        elif fact not in true:
            verdicts.append((clause, "not in the post", UNSUPPORTED))
        elif fact in told:
            verdicts.append((clause, "said before", 0))
        else:
            verdicts.append((clause, f"states {fact[0]}", STATED))
            told.add(fact)
    return verdicts


def oracle_reward(prompt, summary):
    """Returns the true reward of a summary of a post, an integer: +1 for each fact of the post, -3
    for each clause that is made up, chatter or broken."""
    return sum(points for _, _, points in judge(prompt, summary))


# ------ pairs to learn from

# A split's first post that pairs are sampled for. In training, SFT has used the posts before it.
PAIRS_FROM = {"train": 100_000, "validation": 0, "test": 0}


def pair_rows(split, n, policy, encoding, cache, label_temperature=0, seed=0):
    """Samples n pairs of summaries from `policy` and labels them by the oracle, or reads them from
    the folder `cache` if they are there.

    encoding: the policy's tokenizer. Returns rows {"prompt": str, "responses": [preferred, other],
    "scores": [[reward], [reward]]}; fewer than n, because pairs with equal rewards are dropped.
    """
    posts = [post(seed, split, i) for i in range(100)]      # if you edit the world, this changes
    points = (STATED, UNSUPPORTED, CHATTERED, BROKEN)
    entry = key(hash_model(policy), *fingerprint(encoding), SLOTS, CHATTER, points, posts, split,
                PAIRS_FROM[split], n, label_temperature, seed)
    return cached(cache, f"{split}-pairs", entry, sample_pairs, split, n, policy, encoding,
                  label_temperature, seed)


def sample_pairs(split, n, policy, encoding, label_temperature, seed):
    """Samples and labels n pairs as `pair_rows` does, but without a cache. Prints how many pairs it
    drops because their rewards are equal or a summary is empty."""
    prompts = [post(seed, split, PAIRS_FROM[split] + i) for i in range(n)]
    room = max(1, policy.config.block_size - 64)            # the summary must fit
    ids = [prompt_ids(prompt, encoding)[-room:] for prompt in prompts for _ in range(2)]
    with in_float32():                                      # --dtype does not change the data
        samples = sample(policy, ids, 64, encoding.ends, seed=[seed, SPLIT_START[split]],
                         desc=f"sample {split} pairs")
    texts = [to_text(response, encoding) for response in samples]
    pairs = list(zip(texts[::2], texts[1::2]))
    rewards = np.array([[oracle_reward(prompt, summary) for summary in pair]
                        for prompt, pair in zip(prompts, pairs)])                   # (n, 2)
    rows = []
    labels = prefers_first(rewards, label_temperature, seed)
    for prompt, pair, r, first in zip(prompts, pairs, rewards, labels):
        if r[0] != r[1] and all(pair):
            order = [0, 1] if first else [1, 0]                 # the preferred one first
            rows.append({"prompt": prompt, "responses": [pair[k] for k in order],
                         "scores": [[float(r[k])] for k in order]})
    print(f"{split} pairs: {n} sampled, {n - len(rows)} dropped (equal rewards, or an empty "
          "summary)")
    return rows


def prefers_first(rewards, label_temperature=0, seed=0):
    """Tells which pairs prefer their first summary: the one with the higher reward, or at a label
    temperature above 0 a Bradley-Terry draw.

    rewards: (N, 2) oracle rewards. Returns (N,) bool. The caller has to drop ties.
    """
    gap = rewards[:, 0] - rewards[:, 1]
    if label_temperature == 0:
        return gap > 0
    chance = 1 / (1 + np.exp(-gap / label_temperature))
    return np.random.default_rng([seed, 1]).random(len(gap)) < chance


# ------ the tokenizer


@lru_cache(maxsize=1)
def tokenizer():
    """Makes the world's tokenizer, a tiktoken.Encoding with a token for every word of it. Any other
    text becomes bytes."""
    texts = [text for facts in SLOTS.values() for fact in facts for text in fact]
    texts += [text for chatter in CHATTER_CLAUSE.items() for text in chatter]
    return word_encoding("tinytldr", [*texts, "POST:", "TL;DR:", *(text + ";" for text in texts)])


if __name__ == "__main__":
    for example in range(3):
        prompt, summary = post(0, "train", example), demonstration(0, "train", example)
        print(f"{prompt}{summary}\n")
        for clause, verdict, points in judge(prompt, summary):
            print(f"  {points:+d}  {clause}  ({verdict})")
        print(f"  reward {oracle_reward(prompt, summary):+d}\n")
