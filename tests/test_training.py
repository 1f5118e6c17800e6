"""The training scripts, compared with a trainer that is as plain as can be.

Of the repository, the plain trainer below has the networks and the tokenizer. It makes its rows
from the text itself, and runs every prompt and response as a sequence of its own, in float64: no
tree, no cache, no micro-batches. Every loss's equation is written out as the paper has it, and so
are the annealing of gamma, clipping, the learning rate and AdamW. After a few steps,
train_policy.py and train_rm.py must have arrived at its weights and have logged its numbers.

What could as well be otherwise is taken from the repository: the random order of a file's rows,
which of them make up a batch, which pairs D_rho's random choice gives, the seed of the samples for
the KL term. A new loss is tested here once its equation stands in EQUATIONS.
"""
import hashlib
import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reward
import tinytldr
import train_policy
import train_rm
from data import BatchOrder, Dataset, biased_subset
from losses import PREFERENCE_LOSSES
from model import GPT, GPTConfig
from reward import RewardModel
from support.tokens import random_order

SEED = 7
BETA, TAU, GAMMA = 0.7, 0.3, (0.3, 0.9)
LR = 1e-3
GRAD_CLIP = 1e-4        # so small that AdamW's epsilon counts: elsewhere it makes rounding visible
BATCH, MICRO_BATCH, N_EVAL = 8, 3, 13
MAX_NEW_TOKENS = 6
BLOCK_SIZE = 40
SHARED_FLAGS = [f"--seed={SEED}", f"--lr={LR}", f"--batch_size={BATCH}", f"--n_eval={N_EVAL}",
                "--eval_every=1000", "--device=cpu", "--dtype=float32", "--tokenizer=tinytldr"]

# ------------------------------------------------------------------ the data, as files and as rows


@dataclass
class Row:
    """A prompt, K responses (token ids, the best first), and what training takes as given."""
    prompt: list
    responses: list
    rewards: list = None            # of each response: a list of M numbers
    ref_logps: list = None          # of each response
    samples: list = ()              # responses drawn from the reference, for the KL term
    ref_sample_logps: list = ()


def split_of(prompt):
    """A prompt's split goes by the first byte of its SHA-256."""
    number = hashlib.sha256(prompt.encode()).digest()[0]
    if number < 26:
        return "validation"
    return "test" if number < 52 else "train"


def letters(rng, shortest, longest):
    size = rng.integers(shortest, longest + 1)
    return "".join(rng.choice(list("abcdefghijklmnop"), size=size))


def prompt_for(split, rng, shortest=1, longest=9):
    """Letters that the hash puts into this split."""
    prompt = letters(rng, shortest, longest) + ":"
    while split_of(prompt) != split:
        prompt = letters(rng, shortest, longest) + ":"
    return prompt


def make_records(K):
    """(prompt, K responses, the scores of each by three reward models), 42 in mixed order. The
    scores often disagree with the order of a pair. Three records to train on are special: one with
    a response that no model can read, one with equal responses, and one with a prompt that has to
    lose its start to fit before the responses."""
    rng = np.random.default_rng(K)
    records = []
    for split in rng.permutation(["train"] * 22 + ["validation"] * 18 + ["test"] * 2):
        texts = [first + letters(rng, 0, 7) for first in rng.permutation(list("xyz"))[:K]]
        scores = np.round(2 * rng.normal(size=(K, 3)), 2).tolist()
        records.append((prompt_for(split, rng), texts, scores))
    training = [number for number, record in enumerate(records) if split_of(record[0]) == "train"]
    too_long, equal, filling = [records[training[i]] for i in (4, 8, 12)]
    too_long[1][0] *= BLOCK_SIZE
    equal[1][:] = ["same"] * K
    records[training[12]] = prompt_for("train", rng, BLOCK_SIZE, BLOCK_SIZE), *filling[1:]
    return records


def write_file(path, records):
    """Pairs as chosen and rejected; rankings as responses in any order, ranked by their scores."""
    with open(path, "w", encoding="utf-8") as file:
        for prompt, texts, scores in records:
            record = {"prompt": prompt, "responses": texts, "scores": scores}
            if len(texts) == 2:
                record = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1],
                          "score_chosen": scores[0], "score_rejected": scores[1]}
            file.write(json.dumps(record) + "\n")


def read_rows(records, split, demonstrations=False, order=None):
    """The usable rows of a split, in the random order of a file of so many, or in another.
    demonstrations: of their first response alone."""
    tokenizer = tinytldr.tokenizer()
    rows = []
    for i in random_order(len(records)) if order is None else order:
        prompt, texts, scores = records[i]
        if demonstrations:
            texts = texts[:1]
        responses = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in texts]
        too_long = max(map(len, responses)) >= BLOCK_SIZE
        equal = len(texts) > 1 and len(set(texts)) == 1
        if split_of(prompt) != split or too_long or equal:
            continue
        ranking = list(range(len(texts)))
        if len(texts) > 2:
            ranking.sort(key=lambda k: -sum(scores[k]))
        room = BLOCK_SIZE - max(map(len, responses))
        rows.append(Row(tokenizer.encode_ordinary(prompt)[-room:], [responses[k] for k in ranking],
                        [scores[k] for k in ranking]))
    return rows


def randomise(model, generator):
    """Weights of a model that is not at its start: nothing is zero, nothing is small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = ".ln_" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)


@dataclass
class Lab:
    """A folder with data files of pairs and of rankings of three (2.jsonl, 3.jsonl), a reference
    policy (ref) whose samples end now and then, and two reward models of its size (rms); and the
    rows of the files, {K: {split: rows}}."""
    root: Path
    rows: dict


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them only wait for each other in networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, hub_cache):
    root = tmp_path_factory.mktemp("training")
    tokenizer, generator = tinytldr.tokenizer(), torch.Generator().manual_seed(SEED)
    config = GPTConfig(BLOCK_SIZE, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=16)
    reference = GPT(config)
    randomise(reference, generator)
    with torch.no_grad():
        towards_end = reference.transformer.wte.weight[tokenizer.eot_token]
        reference.transformer.ln_f.bias += 5 * towards_end / towards_end.square().sum()
    reference.save_pretrained(root / "ref", tokenizer.eot_token)
    for name in ("short", "tall"):
        reward_model = RewardModel(config)
        randomise(reward_model, generator)
        reward_model.save_pretrained(root / "rms" / name, tokenizer.eot_token)

    lab = Lab(root, {})
    for K in (2, 3):
        records = make_records(K)
        write_file(root / f"{K}.jsonl", records)
        lab.rows[K] = {"train": read_rows(records, "train"),
                       "validation": read_rows(records, "validation")[:N_EVAL]}
        for rows in lab.rows[K].values():
            add_constants(rows, lab)
    return lab


# ------------------------------------------------------------------ networks, a sequence at a time


def load(kind, folder):
    return kind.from_pretrained(folder).double()


def logp_of(policy, prompt, response):
    """Summed log-prob of a response, by plain causal logits over prompt + response."""
    logits = policy.logits(torch.tensor([prompt + response]))[0]        # (tokens, vocab)
    logps = torch.log_softmax(logits, dim=1)[len(prompt) - 1:-1]        # (response tokens, vocab)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


def reward_of(reward_model, prompt, response):
    """The number that the head reads at the last token of prompt + response, or the sum of those
    that it reads at all tokens of the response."""
    tokens = torch.tensor([prompt + response])
    positions = torch.arange(len(prompt + response))[None]
    numbers = reward_model.score(reward_model.transformer(tokens, positions))[0, :, 0]
    read = {"last": numbers[-1:], "sum": numbers[len(prompt):]}[reward_model.config.reward_head]
    return read.sum()


# ------------------------------------------------------------------ the equations


@dataclass
class Pair:
    """Two responses of a row, the better one first."""
    changes: tuple                  # logp_pi - logp_ref of each
    h_per_token: torch.Tensor       # by mean log-probs of a token
    margins: list                   # r_m(better) - r_m(worse) of every reward model

    @property
    def h(self):
        """How many nats more than the reference the policy prefers the better one."""
        return self.changes[0] - self.changes[1]


def dpo(pair):
    return -torch.log(torch.sigmoid(BETA * pair.h))


def ipo(pair):
    return (pair.h - 1 / (2 * TAU)) ** 2


def ipo_per_token(pair):
    return (pair.h_per_token - 1 / (2 * TAU)) ** 2


def d_dpo(pair):
    return (sum(pair.margins) / len(pair.margins) - BETA * pair.h) ** 2


def e_dpo(pair):
    return min((margin - BETA * pair.h) ** 2 for margin in pair.margins)


# loss: (the loss of a pair, is gamma * KL(ref || pi) added?, its flags)
BETA_FLAG, TAU_FLAG = f"--beta={BETA}", f"--tau={TAU}"
SAMPLES = [f"--gamma={GAMMA[0]},{GAMMA[1]}", f"--max_new_tokens={MAX_NEW_TOKENS}"]
SCORES = "--rewards=scores"
EQUATIONS = {
    "dpo": (dpo, False, [BETA_FLAG]),
    "ipo": (ipo, False, [TAU_FLAG]),
    "ipo-per-token": (ipo_per_token, False, [TAU_FLAG]),
    "d-dpo": (d_dpo, False, [BETA_FLAG, SCORES]),
    "p-dpo": (dpo, True, [BETA_FLAG, *SAMPLES]),
    "dp-dpo": (d_dpo, True, [BETA_FLAG, SCORES, *SAMPLES]),
    "e-dpo": (e_dpo, True, [BETA_FLAG, SCORES, *SAMPLES]),
}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Preferences:
    """The objective of a preference loss over some rows, and what is watched with it."""

    def __init__(self, name):
        self.equation, self.has_kl, _ = EQUATIONS[name]

    def __call__(self, policy, rows, progress, _):
        """progress: how much of the training is over, from 0 to 1. Returns {name: mean}."""
        gamma = GAMMA[0] + (GAMMA[1] - GAMMA[0]) * progress
        changes = [self.changes(policy, row) for row in rows]
        pairs = [self.pairs(row, change) for row, change in zip(rows, changes)]

        def mean_over_pairs(value):
            return mean(mean(map(value, row_pairs)) for row_pairs in pairs)

        loss = mean_over_pairs(self.equation)
        watched = {"chosen_change": mean_over_pairs(lambda pair: pair.changes[0]),
                   "rejected_change": mean_over_pairs(lambda pair: pair.changes[1]),
                   "margin": mean_over_pairs(lambda pair: pair.h),
                   "accuracy": mean_over_pairs(lambda pair: is_right(pair.h))}
        if self.has_kl:
            kl = mean(ref_logp - logp_of(policy, row.prompt, sample) for row in rows
                      for sample, ref_logp in zip(row.samples, row.ref_sample_logps))
            loss = loss + gamma * kl
            watched["forward_kl"] = kl
        if self.equation is e_dpo:
            for m in range(len(rows[0].rewards[0])):
                watched[f"picked_{m}"] = mean_over_pairs(lambda pair: fits_best(pair, m))
        return {"loss": loss, **watched}

    def changes(self, policy, row):
        """logp_pi - logp_ref of each response of a row."""
        return [logp_of(policy, row.prompt, response) - ref_logp
                for response, ref_logp in zip(row.responses, row.ref_logps)]

    def pairs(self, row, change):
        pairs = []
        for i, j in itertools.combinations(range(len(row.responses)), 2):
            n_i, n_j = len(row.responses[i]), len(row.responses[j])
            margins = [r_i - r_j for r_i, r_j in zip(row.rewards[i], row.rewards[j])]
            pairs.append(Pair((change[i], change[j]), change[i] / n_i - change[j] / n_j, margins))
        return pairs


def fits_best(pair, m):
    """1 if of all reward models number m fits the pair best, else 0."""
    misfits = [((margin - BETA * pair.h) ** 2).item() for margin in pair.margins]
    return torch.tensor(float(misfits.index(min(misfits)) == m))


def is_right(margin):
    """1 if a margin is above zero, 0 if it is below, and a half for exactly zero."""
    return 0.5 + 0.5 * torch.sign(margin.detach())


def supervised(policy, rows, progress, all_rows):
    """-logp(y|x) per response token: in the mean over all batches, not within one of them."""
    logps = [logp_of(policy, row.prompt, response) for row in rows for response in row.responses]
    n_tokens = sum(len(response) for row in all_rows for response in row.responses)
    return {"loss": -sum(logps) / (n_tokens / len(all_rows) * len(rows))}


def reward_modelling(reward_model, rows, progress, _):
    """Bradley-Terry: -log of exp(r_better) / (exp(r_better) + exp(r_worse)), the mean over all the
    pairs of a row."""
    losses, margins, hits = [], [], []
    for row in rows:
        rewards = [reward_of(reward_model, row.prompt, y) for y in row.responses]
        pairs = list(itertools.combinations(rewards, 2))        # the better response first
        losses.append(mean(-torch.log(r.exp() / (r.exp() + s.exp())) for r, s in pairs))
        margins.append(mean(r - s for r, s in pairs))
        hits.append(mean(is_right(r - s) for r, s in pairs))
    return {"loss": mean(losses), "margin": mean(margins), "accuracy": mean(hits)}


# ------------------------------------------------------------------ the plain trainer


def add_samples(rows, reference, n_samples):
    """Responses from the reference to each row's prompt, in the order of the rows, one each and
    then another: what the seed gives. float32, because rounding could change a sample."""
    number = int(np.random.SeedSequence([SEED, 3]).generate_state(1)[0])
    prompts = [row.prompt for row in rows] * n_samples
    samples = reference.generate(prompts, MAX_NEW_TOKENS, temperature=1.0,
                                 stop=tinytldr.tokenizer().eot_token,
                                 generator=torch.Generator().manual_seed(number))
    for number, row in enumerate(rows):
        row.samples = samples[number::len(rows)]


@torch.no_grad()
def add_constants(rows, lab, n_samples=1):
    """The reference's samples and log-probs."""
    reference = load(GPT, lab.root / "ref")
    add_samples(rows, GPT.from_pretrained(lab.root / "ref"), n_samples)
    for row in rows:
        row.ref_logps = [logp_of(reference, row.prompt, y).item() for y in row.responses]
        row.ref_sample_logps = [logp_of(reference, row.prompt, y).item() for y in row.samples]


def learning_rate(step, max_steps):
    """Up to LR over 5% of the steps, then half a cosine down to zero."""
    warm_up = max(1, int(0.05 * max_steps))
    if step < warm_up:
        return LR * (step + 1) / warm_up
    angle = math.pi * (step - warm_up) / (max_steps - warm_up)
    return LR * (1 + math.cos(angle)) / 2


class AdamW:
    """Loshchilov & Hutter (2019), Algorithm 2."""

    def __init__(self, model):
        self.parameters = dict(model.named_parameters())
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, gradients, t, lr):
        """t: 1 for the first step."""
        for name, p in self.parameters.items():
            g, m, v = gradients[name], self.m[name], self.v[name]
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.95 * v + 0.05 * g ** 2)
            p -= lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)


def clipped(gradients, longest):
    """(the gradients, shortened if they are longer together than `longest`; their length before)"""
    norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
    return {name: g * min(1, longest / norm) for name, g in gradients.items()}, norm


def plainly_trained(model, objective, train, watched, max_steps, grad_clip, order_seed=SEED):
    """Trains the model, and returns what metrics.jsonl should say.

    objective: (model, rows, progress, all rows of the split) -> {name: mean}; watched: {split:
    rows}."""
    lengths = [sum(map(len, [row.prompt, *row.responses, *row.samples])) for row in train]
    order, optimizer = BatchOrder(np.array(lengths), BATCH, order_seed), AdamW(model)
    lines, window = [], []
    for step in range(max_steps + 1):
        if step in (0, max_steps):
            lines.append({"step": step})
            for split, rows in watched.items():
                with torch.no_grad():
                    means = objective(model, rows, step / max_steps, rows)
                lines[-1] |= {f"{split}/{name}": value.item() for name, value in means.items()}
        if step == max_steps:
            return lines

        means = objective(model, [train[i] for i in order.rows(step)], step / max_steps, train)
        gradients = torch.autograd.grad(means["loss"], list(optimizer.parameters.values()))
        gradients = dict(zip(optimizer.parameters, gradients))
        gradients, norm = clipped(gradients, grad_clip)
        optimizer.step(gradients, step + 1, learning_rate(step, max_steps))
        numbers = {name: value.item() for name, value in means.items()
                   if not name.startswith("picked")}           # of evaluations alone
        window.append(numbers | {"grad_norm": norm})
        if (step + 1) % 10 == 0 or step + 1 == max_steps:
            lines.append({"step": step})
            lines[-1] |= {name: mean(means[name] for means in window) for name in window[0]}
            window = []


# ------------------------------------------------------------------ the comparison


def assert_weights(trained, plain):
    """All weights to 1e-5. The biases of keys are left out: attention does not depend on them, so
    that their gradient is rounding alone, which AdamW may make as long as any other."""
    trained = dict(trained.named_parameters())
    for name, wanted in plain.named_parameters():
        difference = (trained[name] - wanted).detach().abs()
        if name.endswith("c_attn.bias"):
            queries, keys, values = difference.chunk(3)
            difference = torch.cat([queries, values])
        assert difference.max() < 1e-5, name


def assert_metrics(out_dir, wanted, at_reference):
    """metrics.jsonl says the numbers of the plain trainer, to 1e-4. at_reference: does the training
    begin with margins of zero? Then rounding decides on the accuracy before the first step, which
    is the first line, and a part of the first mean over steps, the second line."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for number, (line, plain) in enumerate(zip(lines, wanted)):
        assert line.keys() == plain.keys()
        for name, value in plain.items():
            slack = 1e-4
            if at_reference and name.endswith("accuracy"):
                slack += {0: 0.5, 1: 0.5 / (lines[1]["step"] + 1)}.get(number, 0)
            assert line[name] == pytest.approx(value, rel=1e-4, abs=slack), (line["step"], name)


def check_policy(lab, out_dir, flags, objective, splits, max_steps=3, grad_clip=GRAD_CLIP):
    """train_policy.py arrives where the plain trainer does. splits: {split: rows}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_policy, "GRAD_CLIP", grad_clip)
        train_policy.main([*SHARED_FLAGS, f"--max_steps={max_steps}", f"--out_dir={out_dir}",
                           f"--init_from={lab.root}/ref", *flags])
    watched = {"validation": splits["validation"]}
    if objective is not supervised:
        some = np.random.default_rng(0).permutation(len(splits["train"]))[:N_EVAL]
        watched["train"] = [splits["train"][i] for i in some]
    policy = load(GPT, lab.root / "ref")
    wanted = plainly_trained(policy, objective, splits["train"], watched, max_steps, grad_clip)
    assert_weights(GPT.from_pretrained(out_dir), policy)
    assert_metrics(out_dir, wanted, at_reference=objective is not supervised)


def copy_of(splits, with_samples):
    """The rows of a file, to be changed by a test; if its loss has no KL term, without samples."""
    copies = {}
    for split, rows in splits.items():
        copies[split] = [replace(row, samples=row.samples if with_samples else ()) for row in rows]
    return copies


# ------------------------------------------------------------------ the tests of train_policy.py

MICRO_BATCHES = f"--micro_batch_size={MICRO_BATCH}"


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("name", list(dict.fromkeys([*EQUATIONS, *PREFERENCE_LOSSES])))
def test_every_preference_loss(name, K, lab, tmp_path):
    """Three steps on pairs and on rankings of three, with rewards of three models from the data
    file."""
    if name not in EQUATIONS:
        pytest.skip(f"{name} has no equation in this file")
    equation, has_kl, flags = EQUATIONS[name]
    data = f"--data={lab.root}/{K}.jsonl"
    check_policy(lab, tmp_path, [f"--loss={name}", data, MICRO_BATCHES, *flags], Preferences(name),
                 copy_of(lab.rows[K], with_samples=has_kl))


@pytest.mark.parametrize("K", [2, 3])
def test_several_samples_for_the_kl_term(K, lab, tmp_path, monkeypatch):
    """The KL is the mean over the samples of a prompt."""
    monkeypatch.setattr(train_policy, "KL_SAMPLES", 3)
    splits = copy_of(lab.rows[K], with_samples=True)
    for rows in splits.values():
        add_constants(rows, lab, n_samples=3)
    flags = ["--loss=p-dpo", f"--data={lab.root}/{K}.jsonl", MICRO_BATCHES]
    check_policy(lab, tmp_path, flags + EQUATIONS["p-dpo"][2], Preferences("p-dpo"), splits)


@pytest.fixture
def ragged(lab, monkeypatch):
    """Rows of three responses and of two in turn, which the scripts get as data sets (files have as
    many in every row)."""
    splits = copy_of(lab.rows[3], with_samples=True)
    for rows in splits.values():
        for row in rows[::2]:
            row.responses, row.rewards = row.responses[:2], row.rewards[:2]
            row.ref_logps = row.ref_logps[:2]

    def preferences(data, split, *_):
        rewards = np.zeros((len(splits[split]), 3, 3), np.float32)
        for of_row, row in zip(rewards, splits[split]):
            of_row[:len(row.rewards)] = row.rewards
        return Dataset([(np.array(row.prompt), list(map(np.array, row.responses)))
                        for row in splits[split]], rewards)

    monkeypatch.setattr(reward, "preferences", preferences)
    return splits


def test_rows_with_different_numbers_of_responses(lab, ragged, tmp_path):
    """Each row counts as much as any other, whatever number of pairs it has; the samples for the KL
    come after a row's own responses."""
    flags = ["--loss=e-dpo", f"--data={lab.root}/3.jsonl", MICRO_BATCHES, *EQUATIONS["e-dpo"][2]]
    check_policy(lab, tmp_path, flags, Preferences("e-dpo"), ragged)


@pytest.mark.parametrize("name", ["d-dpo", "e-dpo"])
def test_a_family_of_reward_models_on_disk(name, lab, tmp_path):
    """The rewards are those of each response alone, by every member."""
    equation, has_kl, flags = EQUATIONS[name]
    splits = copy_of(lab.rows[2], with_samples=has_kl)
    family = [load(RewardModel, lab.root / "rms" / member) for member in ("short", "tall")]
    for row in splits["train"] + splits["validation"]:
        row.rewards = [[reward_of(reward_model, row.prompt, response).item()
                        for reward_model in family] for response in row.responses]
    flags = [flag for flag in flags if flag != SCORES]
    flags += [f"--loss={name}", f"--rewards={lab.root}/rms", f"--data={lab.root}/2.jsonl"]
    check_policy(lab, tmp_path, [*flags, MICRO_BATCHES], Preferences(name), splits)


def test_relabelled_rows_keep_their_scores(lab, tmp_path):
    """--relabel orders the responses of a row by a reward model, and the scores that came with them
    go along; --n_pairs takes the first rows."""
    oracle = load(RewardModel, lab.root / "rms" / "tall")
    splits = copy_of(lab.rows[3], with_samples=True)
    splits["train"] = splits["train"][:17]
    for rows in splits.values():
        for row in rows:
            rewards = [reward_of(oracle, row.prompt, y).item() for y in row.responses]
            ranking = np.argsort(rewards)[::-1]
            row.responses = [row.responses[k] for k in ranking]
            row.rewards = [row.rewards[k] for k in ranking]
        add_constants(rows, lab)
    flags = ["--loss=e-dpo", f"--data={lab.root}/3.jsonl", f"--relabel={lab.root}/rms/tall",
             "--n_pairs=17", MICRO_BATCHES, *EQUATIONS["e-dpo"][2]]
    check_policy(lab, tmp_path, flags, Preferences("e-dpo"), splits)


def biased_rows(rows, bias):
    """The subset of pairs with a length bias: the repository's choice, if it is as it should be."""
    lengths = np.array([[len(y) for y in row.responses] for row in rows])
    subset = [rows[i] for i in biased_subset(lengths, bias, seed=SEED)]
    for row in subset:
        assert max(map(len, row.responses)) >= 1.1 * min(map(len, row.responses))
    n_longer = sum(len(row.responses[0]) > len(row.responses[1]) for row in subset)
    assert 0 < n_longer == round(bias * len(subset)) < len(subset)
    return subset


def test_rows_with_a_length_bias_keep_their_scores(lab, tmp_path):
    splits = copy_of(lab.rows[2], with_samples=True)
    splits["train"] = biased_rows(splits["train"], 0.4)
    add_constants(splits["train"], lab)                     # other rows, other samples
    flags = ["--loss=dp-dpo", f"--data={lab.root}/2.jsonl", "--rho=0.4", MICRO_BATCHES]
    check_policy(lab, tmp_path, flags + EQUATIONS["dp-dpo"][2], Preferences("dp-dpo"), splits)


def demonstrations():
    """{split: rows} of the chosen responses in the file of pairs."""
    records = make_records(2)
    return {"train": read_rows(records, "train", demonstrations=True),
            "validation": read_rows(records, "validation", demonstrations=True)[:N_EVAL]}


def test_supervised_fine_tuning(lab, tmp_path):
    """The loss is a mean over tokens, whatever the rows and micro-batches that they are in."""
    flags = ["--loss=sft", f"--data={lab.root}/2.jsonl", MICRO_BATCHES]
    check_policy(lab, tmp_path, flags, supervised, demonstrations())


def test_supervised_fine_tuning_on_several_demonstrations(lab, tmp_path, monkeypatch):
    """The built-in task's rows have four demonstrations each; here it gets those of a file."""
    def rows_of_text(seed, split):
        for prompt, texts, _ in make_records(3):
            if split_of(prompt) == split:
                yield {"prompt": prompt, "responses": texts}

    monkeypatch.setattr(tinytldr, "demonstration_rows", rows_of_text)
    records = make_records(3)
    in_order = range(len(records))      # as they are made, which is in no file
    rows = {"train": read_rows(records, "train", order=in_order),
            "validation": read_rows(records, "validation", order=in_order)[:N_EVAL]}
    check_policy(lab, tmp_path, ["--loss=sft", MICRO_BATCHES], supervised, rows)


def test_warm_up_and_means_of_ten_steps(lab, tmp_path):
    """Forty steps: two of them are warm-up, and metrics.jsonl has the means of ten each."""
    flags = ["--loss=sft", f"--data={lab.root}/2.jsonl", MICRO_BATCHES]
    check_policy(lab, tmp_path, flags, supervised, demonstrations(), max_steps=40)


def test_gradients_that_are_short_are_not_clipped(lab, tmp_path):
    flags = ["--loss=sft", f"--data={lab.root}/2.jsonl", MICRO_BATCHES]
    check_policy(lab, tmp_path, flags, supervised, demonstrations(), grad_clip=1000)


# ------------------------------------------------------------------ the tests of train_rm.py


def check_reward_model(lab, out_dir, splits, grad_clip, steps=3, order_seed=SEED, head="last"):
    """The reward model in out_dir is where the plain trainer arrives from the reference's
    transformer and a head of zeros."""
    config = replace(GPT.from_pretrained(lab.root / "ref").config, reward_head=head)
    reward_model = RewardModel(config).double()
    reward_model.transformer = load(GPT, lab.root / "ref").transformer
    reward_model.score.weight.data.zero_()
    wanted = plainly_trained(reward_model, reward_modelling, splits["train"],
                             {"validation": splits["validation"]}, steps, grad_clip, order_seed)
    assert_weights(RewardModel.from_pretrained(out_dir), reward_model)
    assert_metrics(out_dir, wanted, at_reference=False)


def train_reward_models(lab, K, out_dir, *flags, grad_clip=GRAD_CLIP):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rm, "GRAD_CLIP", grad_clip)
        train_rm.main([*SHARED_FLAGS, "--max_steps=3", MICRO_BATCHES, f"--out_dir={out_dir}",
                       f"--init_from={lab.root}/ref", f"--data={lab.root}/{K}.jsonl", *flags])


@pytest.mark.parametrize("K", [2, 3])
def test_a_reward_model(K, lab, tmp_path):
    """On pairs, and on rankings of three."""
    train_reward_models(lab, K, tmp_path)
    check_reward_model(lab, tmp_path, copy_of(lab.rows[K], with_samples=False), GRAD_CLIP)


def test_a_reward_model_of_rows_with_different_numbers_of_responses(lab, ragged, tmp_path):
    train_reward_models(lab, 3, tmp_path)
    check_reward_model(lab, tmp_path, copy_of(ragged, with_samples=False), GRAD_CLIP)


def test_a_reward_model_that_sums(lab, tmp_path):
    train_reward_models(lab, 2, tmp_path, "--head=sum")
    check_reward_model(lab, tmp_path, copy_of(lab.rows[2], with_samples=False), GRAD_CLIP,
                       head="sum")


def test_a_family_of_reward_models(lab, tmp_path):
    """--bias: every member starts from the reference and learns from its own subset, for as many
    epochs, in another order than a single model; here with gradients that are not clipped."""
    train_reward_models(lab, 2, tmp_path, "--bias=0.3,0.6", "--max_steps=5", grad_clip=1000)
    for bias in (0.3, 0.6):
        splits = copy_of(lab.rows[2], with_samples=False)
        n_pairs = len(splits["train"])
        splits["train"] = biased_rows(splits["train"], bias)
        steps = round(5 * len(splits["train"]) / n_pairs)
        assert 0 < steps < 5
        check_reward_model(lab, tmp_path / str(bias), splits, 1000, steps, SEED + 1)
