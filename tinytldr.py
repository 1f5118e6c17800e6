"""TinyTLDR: a little world of forum posts and summaries in which the true reward is known.

A post tells of six things (the slots below): who is involved, what happened, what was tried, how it
feels, what stands in the way, and the question. Each slot takes one of twelve facts; each fact has
two wordings in a post and one fixed clause in a summary. Sentences are shuffled now and then, and
chatter that matters to nobody is mixed in:

    POST: Sorry for the wall of text. My roommate is the problem here. Every night the speakers are
    on until two. I asked nicely and was laughed at. I am worn out by now. There is no money left
    for anything. Should I just pack up and leave?

    TL;DR: my roommate; loud music at night; asked nicely; exhausted; broke; move out?

A summary is clauses joined by "; ". **The oracle reward** of a summary is the sum of

    +1.5    for each key fact of the post that it states    (who, event, question), counted once
    +0.25   for each minor fact of the post that it states  (tried, feeling, obstacle), counted once
    -1.0    for each clause with a fact that is not in the post
    -1.0    for each clause of chatter
    -1.0    for each broken clause: not one of the world's clauses, or empty
    -0.02   for each token, the end-of-text token not counted

so the best summary states all six facts and nothing else. Demonstrations, from which the reference
policy learns, leave facts out, keep chatter, and now and then state a fact that is not in the post.

**Labels**: of two summaries the first is preferred with probability
sigmoid((R1 - R2) / LABEL_TEMPERATURE), a Bradley-Terry draw; with hard labels the higher reward
always wins. Ties are dropped.

Everything is a pure function of (seed, split, index), and no two posts are alike: the index is
mapped one-to-one to a combination of facts, and the splits use disjoint ranges of it.

    python tinytldr.py      # three posts, their demonstrations, and what the oracle says of each
"""
from functools import lru_cache

import numpy as np

from support.cache import cached, hash_weights, key
from support.passes import sample, to_text
from support.tokenizer import word_encoding


def table(text):
    """Lines of "a | b | c" as tuples."""
    lines = text.strip().splitlines()
    return [tuple(part.strip() for part in line.split("|")) for line in lines]


# slot -> (points, its twelve facts: wording in a post | another wording | clause in a summary)
SLOTS = {
    "who": (1.5, table("""
My roommate is the problem here. | The person I share a flat with is getting to me. | my roommate
This is about my older sister. | I grew up sharing everything with my sister. | my sister
My boss is who I have to write about. | The man who signs my paychecks is at it again. | my boss
I live next door to a difficult person. | Let me tell you about my neighbor. | my neighbor
I have been dating a guy for two years. | My boyfriend is the one I mean. | my boyfriend
The owner of my building is involved. | I rent from a strange landlord. | my landlord
A woman at work sits across from me. | It concerns a coworker on my floor. | my coworker
I have known my best friend since school. | The friend I trust most is part of this. \
    | my best friend
There is a cousin on my dad's side. | My cousin came to stay with us. | my cousin
A guy on our football team is involved. | We have a new teammate this season. | my teammate
My mother's brother visits a lot. | I am talking about my uncle. | my uncle
I pay a student to teach me maths. | My tutor comes by twice a week. | my tutor
""")),
    "event": (1.5, table("""
Every night the speakers are on until two. | The music never stops before sunrise. \
    | loud music at night
I lent them cash and never saw it again. | They owe me four hundred dollars. | unpaid loan
My lunch keeps vanishing from the fridge. | They eat whatever I cook for myself. | stolen food
They told everybody what I said in private. | A secret of mine is now common knowledge. \
    | shared my secret
They backed into my car and drove off. | There is a big dent in my car door. | damaged my car
They missed my birthday without a word. | Nobody showed up when I turned thirty. \
    | forgot my birthday
They read my messages while I was asleep. | I caught them going through my phone. | read my messages
They took the credit for my report. | My idea was presented under another name. | stole my idea
Their dog barks from morning to evening. | A dog howls behind the wall all day. | noisy dog
They cancelled our trip an hour before. | The holiday we planned was called off. \
    | cancelled our trip
They smoke inside although I have asthma. | The whole place smells of cigarettes. | smoking indoors
They lied to me about where they were. | I found out that the story was made up. | lied to me
""")),
    "tried": (0.25, table("""
I asked nicely and was laughed at. | A polite request got me nowhere. | asked nicely
I left a note on the door. | I put my complaint in writing and taped it up. | left a note
I shouted once and regret it. | We had a screaming match in the hallway. | had a fight
I went quiet and waited for it to pass. | I have been ignoring it for weeks. | ignored it
I told my parents about it. | My mum and dad know all of it now. | told my parents
I called the police one time. | An officer came and took down my name. | called the police
I offered to split the costs. | I said that I would pay half. | offered to pay half
I wrote a long email to explain. | I sent them three pages by email. | sent an email
I talked to a counselor. | A therapist heard the whole story. | saw a therapist
I bought them a gift to make peace. | I baked a cake as a peace offering. | gave a gift
I stayed at a hotel for some days. | I slept elsewhere for a week. | stayed elsewhere
I set clear rules and wrote them down. | We agreed on rules in the kitchen. | set rules
""")),
    "feeling": (0.25, table("""
I am worn out by now. | I have no energy left at all. | exhausted
It makes my blood boil. | I am so mad that I shake. | furious
I cry when nobody is looking. | It breaks my heart a little. | sad
I get scared when I hear footsteps. | I feel unsafe in my own home. | afraid
Part of me thinks it is my fault. | I keep blaming myself for it. | guilty
I do not know what to think any more. | None of it makes sense to me. | confused
I feel like a fool. | I could sink into the ground for shame. | embarrassed
I eat alone and talk to no one. | It has been a lonely time. | lonely
My stomach is in knots all day. | I worry about it from dawn to dusk. | anxious
I wish that I had what they have. | I admit that I am a bit envious. | jealous
I expected so much better. | It let me down badly. | disappointed
Strangely I do not care much. | It leaves me cold by now. | numb
""")),
    "obstacle": (0.25, table("""
There is no money left for anything. | My account is empty until payday. | broke
Our lease runs for another year. | I signed a contract until next summer. | stuck in the lease
My final exams are in two weeks. | I have to study day and night. | exams soon
There is a baby in the house. | Our little one is four months old. | new baby
I moved here from another country. | I know hardly anyone in this town. | new in town
I had an operation last month. | The doctors told me to rest. | bad health
We all have the same friends. | Our circles overlap completely. | same friends
I need them for my visa papers. | My permit depends on their signature. | visa trouble
I work nights at the hospital. | My shifts start at ten in the evening. | night shifts
My family would never forgive me. | At home everyone takes their side. | family pressure
I have no proof of any of it. | It is my word against theirs. | no proof
I promised to keep the peace. | I gave my word not to make a scene. | made a promise
""")),
    "question": (1.5, table("""
Should I just pack up and leave? | Is it time to find a new place? | move out?
Do I say sorry first? | Should the apology come from me? | apologize?
Is it wrong to go to court over this? | Would a lawyer take my case? | sue them?
Should I cut them off for good? | Do I end all contact? | cut contact?
How do I bring it up without a fight? | What is a calm way to raise this? | how to talk about it?
Should I give it one more chance? | Can people like that change? | second chance?
Do I tell everyone what happened? | Should the others hear the truth? | tell others?
Is it normal to feel this way? | Am I making too much of it? | overreacting?
Should I look for another job? | Do I hand in my notice? | quit my job?
How can I get even? | Is a little revenge all right? | take revenge?
Who can I ask for help? | Where does one go for support? | where to get help?
Should I wait until it is over? | Is it smarter to sit this out? | wait it out?
""")),
}
# sentence in a post | clause in a summary that kept it
CHATTER = table("""
Sorry for the wall of text. | sorry for the length
I am typing this on my phone. | typed on a phone
English is not my first language. | bad english
This is a throwaway account. | throwaway account
I have been reading this forum for years. | long time reader
It is raining here and the coffee is cold. | rainy day
My cat is asleep on the keyboard. | cat on keyboard
Thanks in advance to all of you. | thanks in advance
I will answer questions in the comments. | will answer comments
I never thought that I would post here. | first post here
""")

UNSUPPORTED, CHATTERED, BROKEN, PER_TOKEN = -1.0, -1.0, -1.0, -0.02
LABEL_TEMPERATURE = 0.5

WEIGHT = {slot: weight for slot, (weight, _) in SLOTS.items()}
FACT_OF_CLAUSE = {clause: (slot, i) for slot, (_, slot_facts) in SLOTS.items()
                  for i, (_, _, clause) in enumerate(slot_facts)}
CHATTER_CLAUSES = {clause for _, clause in CHATTER}
N_WORLDS = 12 ** len(SLOTS)                                       # combinations of facts: 2,985,984
SPLIT_START = {"train": 0, "validation": 2_000_000, "test": 2_400_000}      # a split's first index


# ------ posts and demonstrations


def facts_of(seed, split, index):
    """The facts of one post: {slot: number of the fact}; for each seed one-to-one in the index."""
    starts = sorted(SPLIT_START.values()) + [N_WORLDS]
    start = SPLIT_START[split]
    if not 0 <= index < starts[starts.index(start) + 1] - start:
        raise ValueError(f"the {split} split has no index {index}")
    # A step without a factor 2 or 3 makes the map a permutation of 0 ... 12^6 - 1; near the golden
    # ratio of the whole, it spreads any range of indices evenly over the world.
    number = ((start + index) * 1_845_439 + seed * 777_767_777) % N_WORLDS
    combination = {}
    for slot in SLOTS:
        number, combination[slot] = divmod(number, 12)
    return combination


def _rng(seed, split, index, purpose):
    return np.random.default_rng([seed, SPLIT_START[split] + index, purpose])


@lru_cache(maxsize=8)
def post(seed, split, index):
    """The text of one prompt: "POST: ...", a blank line, "TL;DR:"."""
    rng = _rng(seed, split, index, purpose=0)
    sentences = [SLOTS[slot][1][i][rng.integers(2)]
                 for slot, i in facts_of(seed, split, index).items()]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    for c in rng.choice(len(CHATTER), size=rng.integers(0, 4), replace=False):
        sentences.insert(rng.integers(len(sentences) + 1), CHATTER[c][0])
    return "POST: " + " ".join(sentences) + "\n\nTL;DR:"


def demonstration(seed, split, index, person=0):
    """A summary as a person in a hurry might write it, with its leading space. Every post can be
    summarised by any number of persons, 0, 1, 2 ..."""
    rng = _rng(seed, split, index, purpose=2 + person)
    text = post(seed, split, index)
    clauses = []
    for slot, i in facts_of(seed, split, index).items():
        u = rng.random()
        if u < 0.05:                                    # a fact that is not in the post
            i = (i + rng.integers(1, 12)) % 12
        elif u < 0.45:                                  # left out
            continue
        clauses.append(SLOTS[slot][1][i][2])
    for sentence, clause in CHATTER:                    # chatter kept
        if sentence in text and rng.random() < 0.6:
            clauses.insert(rng.integers(len(clauses) + 1), clause)
    return " " + "; ".join(clauses or ["first post here"])


def demonstration_rows(seed, split):
    """Posts with four demonstrations each, to learn from: yields rows of text."""
    for i in range(20_000 if split == "train" else 1000):
        responses = [demonstration(seed, split, i, person) for person in range(4)]
        yield {"prompt": post(seed, split, i), "responses": responses}


# ------ the oracle


@lru_cache(maxsize=100_000)
def facts_in(prompt):
    """What a post says, read from its text: the set of (slot, number of the fact)."""
    stated = set()
    for slot, (_, slot_facts) in SLOTS.items():
        for i, (wording, another, _) in enumerate(slot_facts):
            if wording in prompt or another in prompt:
                stated.add((slot, i))
    return frozenset(stated)


def judge(prompt, summary):
    """What the oracle says of each clause, but for tokens: a list of (clause, verdict, points)."""
    true = facts_in(prompt)
    told, verdicts = set(), []
    for clause in summary.split(";"):
        clause = clause.strip()
        fact = FACT_OF_CLAUSE.get(clause)
        if clause in CHATTER_CLAUSES:
            verdicts.append((clause, "chatter", CHATTERED))
        elif fact is None:
            verdicts.append((clause, "broken", BROKEN))
        elif fact not in true:
            verdicts.append((clause, "not in the post", UNSUPPORTED))
        elif fact in told:
            verdicts.append((clause, "said before", 0.0))
        else:
            verdicts.append((clause, f"states {fact[0]}", WEIGHT[fact[0]]))
            told.add(fact)
    return verdicts


def oracle_reward(prompt, summary):
    """The true reward of a summary; the rules are at the top of this file."""
    n_tokens = len(tokenizer().encode_ordinary(summary))
    return sum(points for _, _, points in judge(prompt, summary)) + PER_TOKEN * n_tokens


# ------ pairs to learn from

PAIRS_FROM = {"train": 200_000, "validation": 0, "test": 0}     # first post: not those of SFT


def pair_rows(split, n, policy, encoding, cache, hard=False, seed=0):
    """n pairs of summaries sampled from `policy`, labelled by the oracle, as rows of text, kept in
    the folder `cache`. encoding: the policy's tokenizer. hard: labels without noise."""
    posts = [post(seed, split, i) for i in range(100)]      # an edited world is other data
    entry = key(hash_weights(policy), encoding.name, SLOTS, CHATTER, UNSUPPORTED, CHATTERED, BROKEN,
                PER_TOKEN, LABEL_TEMPERATURE, posts, split, PAIRS_FROM[split], n, hard, seed)
    return cached(cache, f"{split}-pairs", entry, sample_pairs, split, n, policy, encoding, hard,
                  seed)


def sample_pairs(split, n, policy, encoding, hard, seed):
    prompts = [post(seed, split, PAIRS_FROM[split] + i) for i in range(n)]
    room = max(1, policy.config.block_size - 64)            # the summary must fit
    ids = [encoding.encode_ordinary(prompt)[-room:] for prompt in prompts for _ in range(2)]
    samples = sample(policy, ids, 64, encoding.eot_token, seed=[seed, SPLIT_START[split]],
                     desc=f"sample {split} pairs")
    texts = [to_text(response, encoding) for response in samples]
    pairs = list(zip(texts[::2], texts[1::2]))
    rewards = np.array([[oracle_reward(prompt, summary) for summary in pair]
                        for prompt, pair in zip(prompts, pairs)])                   # (n, 2)
    rows = []
    for prompt, pair, r, first in zip(prompts, pairs, rewards, prefers_first(rewards, seed, hard)):
        if r[0] != r[1] and all(pair):
            rows.append({"prompt": prompt, "responses": pair if first else pair[::-1]})
    print(f"{split} pairs: {n} sampled, {n - len(rows)} dropped (equal rewards or an empty one)")
    return rows


def prefers_first(rewards, seed, hard=False):
    """Which pairs prefer their first summary. rewards: (N, 2) oracle rewards. Returns (N,) bool: a
    Bradley-Terry draw, or with `hard` the higher reward. Ties are for the caller to drop."""
    gap = (rewards[:, 0] - rewards[:, 1]) / LABEL_TEMPERATURE
    if hard:
        return gap > 0
    return np.random.default_rng([seed, 1]).random(len(gap)) < 1 / (1 + np.exp(-gap))


# ------ the tokenizer


@lru_cache(maxsize=1)
def tokenizer():
    """A tiktoken.Encoding with a token for every word of the world; other text is bytes."""
    texts = [text for _, slot_facts in SLOTS.values() for fact in slot_facts for text in fact]
    texts += [text for chatter in CHATTER for text in chatter]
    return word_encoding("tinytldr", [*texts, "POST:", "TL;DR:", *(text + ";" for text in texts)])


if __name__ == "__main__":
    for example in range(3):
        prompt, summary = post(0, "train", example), demonstration(0, "train", example)
        print(f"{prompt}{summary}\n")
        for clause, verdict, points in judge(prompt, summary):
            print(f"  {points:+.2f}  {clause}  ({verdict})")
        print(f"  reward {oracle_reward(prompt, summary):+.2f} (after {PER_TOKEN} a token)\n")
