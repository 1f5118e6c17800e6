"""Typical mistakes in the functions that a course leaves to write (runs/course.py), as patches.

tests/plumbing/test_mistakes.py applies each to a copy of the repository and looks at the first test
that fails: its name, or the first line of its message, has to name the idea.
"""
from typing import NamedTuple


class Mistake(NamedTuple):
    """name: what the student did; function: in which function, such as "losses.dpo"; old: a part of
    its source that is there once; new: what replaces it; idea: phrases of which a hint has to
    contain at least one to count as naming the idea."""
    name: str
    function: str
    old: str
    new: str
    idea: tuple


def of(function, *mistakes):
    """Makes the mistakes of a function: (name, old, new, idea, another idea, ...) each."""
    return [Mistake(name, function, old, new, idea) for name, old, new, *idea in mistakes]


MARGIN = "return log_ratio[:, 0] - log_ratio[:, 1]"
DPO = "return -F.logsigmoid(beta * h)"
IPO = "return (h - 1 / (2 * tau)) ** 2"
D_DPO = "return (target - beta * h) ** 2"
E_DPO = "(targets - beta * h[:, None]).square().min(dim=1).values + gamma * kl"
KL = "return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=1)"
BEST = "return (reward_margin(rewards) - beta * h[:, None]).square().argmin(dim=1)"
BRADLEY_TERRY = "return -F.logsigmoid(reward_margin(rewards))"
CUT_UP = """\
    order = order[:len(order) // batch_size * batch_size]
    plan = []
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        plan += list(part.reshape(-1, batch_size))
"""
CUT_UP_WITH_THE_REST = """\
    plan = []
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        plan += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
"""
WINDOWS = """\
for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]"""
READ_REWARDS = "read = batch.last.flatten() if last else batch.own"
RETURN_REWARDS = "return rewards.view_as(batch.last) if last else batch.sum_tokens(rewards)"
SDPA = """\
F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=shared > 1)"""
VISIBLE = "visible = causal & ((key == 0) | (key == query))"
LOGPS_OF_TOKENS = "token_logps(hidden, self.lm_head.weight, batch.target)"
LIKELY_P = "ordered = ordered * (before < top_p * ordered.sum(dim=1, keepdim=True))"
LIKELY = "return torch.zeros_like(probs).scatter(1, token, ordered)"
SEARCH = "torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)"
WARM_UP = "return peak * (step + 1) / warmup"
COSINE = "return peak * 0.5 * (1 + math.cos(math.pi * progress))"
ANNEALED = 'flags["gamma"] = first + (last - first) * step / args.max_steps'
INTERVAL = "return float(differences.mean()), float(1.96 * error)"

MISTAKES = [
    # ------ pairs
    *of("losses.log_ratio_margin",
        ("sides swapped", MARGIN, "return log_ratio[:, 1] - log_ratio[:, 0]", "swapped"),
        ("no reference", "log_ratio = logps - ref_logps", "log_ratio = logps",
         "reference is missing"),
        ("reference of the chosen side only", MARGIN, "return log_ratio[:, 0] - logps[:, 1]",
         "reference of the rejected"),
        ("sum of the sides", MARGIN, "return log_ratio[:, 0] + log_ratio[:, 1]",
         "sum of the two"),
        ("mean over the batch", MARGIN, "return (log_ratio[:, 0] - log_ratio[:, 1]).mean()",
         "mean over the pairs"),
        ("rows for columns", MARGIN, "return log_ratio[0] - log_ratio[1]", "rows"),
        ("ratio of probabilities", "log_ratio = logps - ref_logps",
         "log_ratio = (logps - ref_logps).exp()", "probabilities"),
        ("log-probs divided", "log_ratio = logps - ref_logps", "log_ratio = logps / ref_logps",
         "divided")),
    *of("losses.dpo",
        ("no minus", DPO, "return F.logsigmoid(beta * h)", "minus"),
        ("no beta", DPO, "return -F.logsigmoid(h)", "beta is missing"),
        ("divided by beta", DPO, "return -F.logsigmoid(h / beta)", "divided by beta"),
        ("mean over the batch", DPO, "return -F.logsigmoid(beta * h).mean()",
         "mean over the pairs"),
        ("sides swapped", DPO, "return -F.logsigmoid(-beta * h)", "swapped"),
        ("no log", DPO, "return -F.sigmoid(beta * h)", "log is missing"),
        ("log of sigmoid, which overflows", DPO, "return -F.sigmoid(beta * h).log()", "overflows",
         "extreme"),
        ("no reference", "h = log_ratio_margin(logps, ref_logps)", "h = logps[:, 0] - logps[:, 1]",
         "reference is missing"),
        ("beta outside the sigmoid", DPO, "return -beta * F.logsigmoid(h)",
         "beta is outside")),
    *of("losses.ipo",
        ("1 / 2 * tau", IPO, "return (h - 1 / 2 * tau) ** 2", "1 / 2 * tau", "brackets"),
        ("no 2", IPO, "return (h - 1 / tau) ** 2", "1 / tau"),
        ("no square", IPO, "return h - 1 / (2 * tau)", "square is missing"),
        ("absolute value", IPO, "return (h - 1 / (2 * tau)).abs()", "square is missing"),
        ("turned sign of h", IPO, "return (-h - 1 / (2 * tau)) ** 2", "swapped"),
        ("target is added", IPO, "return (h + 1 / (2 * tau)) ** 2", "swapped", "added"),
        ("mean over the batch", IPO, "return ((h - 1 / (2 * tau)) ** 2).mean()",
         "mean over the pairs"),
        ("tau as if it were beta", IPO, "return (tau * h - 0.5) ** 2", "tau * h",
         "tau as if it were beta")),

    # ------ distillation
    *of("losses.d_dpo",
        ("no square", D_DPO, "return target - beta * h", "square is missing"),
        ("no beta", D_DPO, "return (target - h) ** 2", "beta is missing"),
        ("sum of the reward models", "rewards.mean(dim=2)", "rewards.sum(dim=2)",
         "sum of the reward models"),
        ("the first reward model", "rewards.mean(dim=2)", "rewards[:, :, 0]",
         "first reward model"),
        ("turned sign of the target", D_DPO, "return (-target - beta * h) ** 2", "sign", "swapped"),
        ("mean of the squares", D_DPO,
         "return ((reward_margin(rewards) - beta * h[:, None]) ** 2).mean(dim=1)",
         "mean of the squares"),
        ("no reference", "h = log_ratio_margin(logps, ref_logps)", "h = logps[:, 0] - logps[:, 1]",
         "reference is missing"),
        ("half", D_DPO, "return 0.5 * (target - beta * h) ** 2", "half")),
    *of("losses.forward_kl",
        ("turned sign", KL, "return (logps_of_ref_samples - ref_logps_of_ref_samples).mean(dim=1)",
         "sign"),
        ("sum over samples", KL,
         "return (ref_logps_of_ref_samples - logps_of_ref_samples).sum(dim=1)",
         "sum over the samples"),
        ("mean over everything", KL,
         "return (ref_logps_of_ref_samples - logps_of_ref_samples).mean()", "mean over the"),
        ("weighted by the probabilities again", KL,
         "return (ref_logps_of_ref_samples.exp() * (ref_logps_of_ref_samples "
         "- logps_of_ref_samples)).sum(dim=1)", "weighted"),
        ("no estimate below 0", KL,
         "return (ref_logps_of_ref_samples - logps_of_ref_samples).clamp(min=0).mean(dim=1)",
         "negative"),
        ("over the prompts", KL,
         "return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=0)",
         "over the prompts"),
        ("the first sample alone", KL,
         "return ref_logps_of_ref_samples[:, 0] - logps_of_ref_samples[:, 0]", "first sample")),
    *of("losses.e_dpo",
        ("mean over members", E_DPO,
         "(targets - beta * h[:, None]).square().mean(dim=1) + gamma * kl", "mean over the members",
         "mean of the squares"),
        ("the worst member", E_DPO,
         "(targets - beta * h[:, None]).square().max(dim=1).values + gamma * kl",
         "worst member", "maximum"),
        ("minimum before the square", E_DPO,
         "(targets - beta * h[:, None]).min(dim=1).values.square() + gamma * kl",
         "before the square"),
        ("one member for the whole batch", E_DPO,
         "(targets - beta * h[:, None]).square()[:, (targets - beta * h[:, None]).square()"
         ".mean(dim=0).argmin()] + gamma * kl", "whole batch"),
        ("no gamma", E_DPO, "(targets - beta * h[:, None]).square().min(dim=1).values + kl",
         "gamma is missing"),
        ("no KL", E_DPO, "(targets - beta * h[:, None]).square().min(dim=1).values",
         "KL is missing"),
        ("KL subtracted", E_DPO,
         "(targets - beta * h[:, None]).square().min(dim=1).values - gamma * kl",
         "KL is subtracted"),
        ("no beta", E_DPO, "(targets - h[:, None]).square().min(dim=1).values + gamma * kl",
         "beta is missing"),
        ("no square", E_DPO, "(targets - beta * h[:, None]).abs().min(dim=1).values + gamma * kl",
         "square is missing"),
        ("the mean reward", E_DPO, "(targets.mean(dim=1) - beta * h).square() + gamma * kl",
         "mean reward")),
    *of("losses.best_member",
        ("the worst", "argmin(dim=1)", "argmax(dim=1)", "worst"),
        ("no square", ".square().argmin", ".argmin", "square is missing"),
        ("no beta", "beta * h[:, None]", "h[:, None]", "beta is missing"),
        ("over the pairs", "argmin(dim=1)", "argmin(dim=0)", "best pair of each member"),
        ("the value, not the index", "argmin(dim=1)", "min(dim=1).values", "index"),
        ("the largest margin", BEST, "return reward_margin(rewards).argmax(dim=1)",
         "largest margin")),

    # ------ bias
    *of("data.longer",
        ("no 10%", "10 * chosen >= 11 * rejected, 1", "chosen > rejected, 1", "10%", "ten percent"),
        ("sides swapped", "np.asarray(lengths, dtype=np.int64).T",
         "np.asarray(lengths, dtype=np.int64).T[::-1]", "swapped", "chosen one is longer"),
        ("more than 10%", "10 * chosen >= 11 * rejected, 1", "10 * chosen > 11 * rejected, 1",
         "exactly 10%"),
        ("1.1 is no binary fraction", "10 * chosen >= 11 * rejected, 1",
         "chosen >= 1.1 * rejected, 1", "exactly 10%"),
        ("10% of the longer one", "10 * chosen >= 11 * rejected, 1",
         "9 * chosen >= 10 * rejected, 1", "10% of the shorter"),
        ("never the rejected one", "-1, 0)", "0, 0)", "-1"),
        ("16 bits", "np.asarray(lengths, dtype=np.int64).T", "np.asarray(lengths).T", "16 bits",
         "overflow")),
    *of("data.relabel",
        ("the lowest first", "order = np.argsort(-rewards, axis=1)",
         "order = np.argsort(rewards, axis=1)", "highest first"),
        ("ties stay", ".take(np.flatnonzero(~undecided))", "", "tie"),
        ("rewards left behind", "np.take_along_axis(columns, order[:, :, None], axis=1)",
         "columns", "rewards"),
        ("rewards sorted by themselves", "np.take_along_axis(columns, order[:, :, None], axis=1)",
         "-np.sort(-columns, axis=1)", "rewards"),
        ("only two responses compared",
         "(np.diff(np.sort(rewards, axis=1), axis=1) == 0).any(axis=1)",
         "rewards[:, 0] == rewards[:, 1]", "tie"),
        ("nothing is said", "if undecided.any():", "if False:", "printed"),
        ("an empty data set", "if undecided.all():", "if False:", "no row is left",
         "leave nothing")),
    *of("data.biased_subset",
        ("rho of the rejected", "n_chosen = round(rho * n)", "n_chosen = n - round(rho * n)",
         "rho"),
        ("pairs twice", "rng.choice(chosen, n_chosen, replace=False)",
         "rng.choice(chosen, n_chosen)", "twice"),
        ("not in order", "np.sort(np.concatenate([", "np.array(np.concatenate([", "in order"),
        ("the first ones", "rng.choice(chosen, n_chosen, replace=False)", "chosen[:n_chosen]",
         "drawn at random"),
        ("no seed", "np.random.default_rng(seed)", "np.random.default_rng()", "seed"),
        ("the same seed always", "np.random.default_rng(seed)", "np.random.default_rng(0)",
         "seed"),
        ("rounded down", "n_chosen = round(rho * n)", "n_chosen = int(rho * n)", "rounded"),
        ("equal lengths too", "np.flatnonzero(sides == -1)", "np.flatnonzero(sides != 1)",
         "equal length"),
        ("no more than twice the smaller side", "n = len(chosen) + len(rejected)",
         "n = 2 * min(len(chosen), len(rejected))", "as many as possible"),
        ("any rho", "if not 0 <= rho <= 1:", "if False:", "rho", "refuse")),
    *of("data.batches",
        ("no second shuffle", "[plan[i] for i in rng.permutation(len(plan))]", "plan",
         "order of the batches", "order of all batches"),
        ("no first shuffle", "order = rng.permutation(len(lengths))",
         "order = np.arange(len(lengths))", "rows are shuffled"),
        ("the same in every epoch", "np.random.default_rng([seed, epoch])",
         "np.random.default_rng(seed)", "epoch"),
        ("epoch added to the seed", "np.random.default_rng([seed, epoch])",
         "np.random.default_rng(seed + epoch)", "default_rng([seed, epoch])"),
        ("not sorted", 'part = part[np.argsort(lengths[part], kind="stable")]', "part = part",
         "similar length"),
        ("one window", WINDOWS, "for start in [0]:\n        part = order", "window"),
        ("windows of one batch", WINDOWS, WINDOWS.replace("window * ", ""), "window"),
        ("a last batch that is smaller", CUT_UP, CUT_UP_WITH_THE_REST, "too few", "left out",
         "fills no batch"),
        ("always the same rows left out", "rng.permutation(len(lengths))",
         "rng.permutation(len(lengths) // batch_size * batch_size)", "same rows",
         "fills no batch"),
        ("ties in any order", 'np.argsort(lengths[part], kind="stable")',
         "np.argsort(lengths[part])", "ties"),
        ("nothing for few rows", "batch_size = min(batch_size, len(order))", "pass",
         "too few rows", "fewer rows than a batch")),

    # ------ reward
    *of("data.ranked_pairs",
        ("every pair weighs 1", "2 / (K * (K - 1))", "1.0", "weight"),
        ("1 / K", "2 / (K * (K - 1))", "1 / K", "weight"),
        ("the worse one first", "pairs.append(pair)", "pairs.append(pair[::-1])", "better"),
        ("neighbours only", "combinations(range(K), 2)", "zip(range(K - 1), range(1, K))",
         "all pairs"),
        ("the best against the others", "combinations(range(K), 2)",
         "[(0, k) for k in range(1, K)]", "all pairs"),
        ("float64 weights", "dtype=torch.float32", "dtype=torch.float64", "float32"),
        ("a shape of no pairs", ".view(-1, 2)", "", "(0, 2)", "no pair")),
    *of("losses.bradley_terry",
        ("no minus", BRADLEY_TERRY, "return F.logsigmoid(reward_margin(rewards))", "minus"),
        ("no log", BRADLEY_TERRY, "return -F.sigmoid(reward_margin(rewards))", "log is missing"),
        ("sides swapped", BRADLEY_TERRY, "return -F.logsigmoid(-reward_margin(rewards))",
         "swapped"),
        ("mean over the batch", BRADLEY_TERRY,
         "return -F.logsigmoid(reward_margin(rewards)).mean()", "mean over the pairs"),
        ("log of sigmoid, which overflows", BRADLEY_TERRY,
         "return -F.sigmoid(reward_margin(rewards)).log()", "overflows", "extreme"),
        ("each reward by itself", BRADLEY_TERRY,
         "return -F.logsigmoid(rewards[:, 0]) - F.logsigmoid(-rewards[:, 1])",
         "each reward by itself"),
        ("the chosen reward alone", BRADLEY_TERRY, "return -F.logsigmoid(rewards[:, 0])",
         "chosen reward alone")),
    *of("reward.RewardModel.forward",
        ("a causal mask", "mask = tree_mask(batch.branch, self.score.weight.dtype)", "mask = None",
         "sibling"),
        ("positions of the row", "batch.position, mask",
         "torch.arange(batch.tokens.size(1)).expand_as(batch.tokens), mask", "position"),
        ("the last column of the row", READ_REWARDS, "T = batch.tokens.size(1)\n        read = "
         "(torch.arange(1, len(batch.tokens) + 1) * T - 1).repeat_interleave(batch.last.size(1)) "
         "if last else batch.own", "last token"),
        ("the token before the last one", READ_REWARDS,
         "read = batch.last.flatten() - 1 if last else batch.own", "last token"),
        ("the predictors, not the tokens", READ_REWARDS,
         "read = batch.last.flatten() if last else batch.predictor", "own tokens"),
        ("always the last token", RETURN_REWARDS, "return rewards.view_as(batch.last) if last else "
         "rewards.new_zeros(batch.last.shape).flatten().index_copy(0, batch.slot, rewards)"
         ".view_as(batch.last)", "sum"),
        ("mean of the tokens", RETURN_REWARDS, "return rewards.view_as(batch.last) if last else "
         "batch.sum_tokens(rewards) / batch.lengths", "mean over its tokens"),
        ("bfloat16 rewards", "with torch.autocast(hidden.device.type, enabled=False):",
         "if True:", "float32")),

    # ------ tree
    *of("model.Attention.forward",
        ("scores not scaled", SDPA, SDPA[:-1] + ", scale=1.0)", "sqrt(size)"),
        ("scaled by the width", SDPA, SDPA[:-1] + ", scale=x.size(2) ** -0.5)", "sqrt(size)"),
        ("sees the future", "is_causal=mask is None", "is_causal=False", "causal"),
        ("mask ignored", "attn_mask=mask, is_causal=mask is None", "is_causal=True", "mask"),
        ("heads cut the wrong way", "q = q.view(B, T, self.n_head, self.head_size)"
         ".transpose(1, 2)", "q = q.view(B, self.n_head, T, self.head_size)", "head"),
        ("heads not side by side", "y.transpose(1, 2).reshape", "y.reshape", "side by side"),
        ("keys and queries exchanged", "q, k, v = self.c_attn", "k, q, v = self.c_attn", "queries"),
        ("no output projection", "return self.c_proj(y)", "return y", "c_proj"),
        ("keys not turned", "q, k = turn(q, *turns), turn(k, *turns)", "q = turn(q, *turns)",
         "RoPE", "turn"),
        ("values turned too", "q, k = turn(q, *turns), turn(k, *turns)",
         "q, k, v = turn(q, *turns), turn(k, *turns), turn(v, *turns)", "RoPE", "turn"),
        ("cache not read", "k, v = keys, values", "pass", "cache"),
        ("keys stored before they turn", "keys[:, :, columns] = k\n",
         "keys[:, :, columns] = turn(k, turns[0], -turns[1]) if turns else k\n", "cache")),
    *of("model.tree_mask",
        ("plain causal", VISIBLE, "visible = causal & (key >= 0)", "sibling"),
        ("no prompt", VISIBLE, "visible = causal & (key == query)", "prompt"),
        ("not causal", VISIBLE, "visible = ((key == 0) | (key == query)) & causal.any()",
         "after it", "later token"),
        ("not itself", ".tril()", ".tril(-1)", "itself"),
        ("the other triangle", ".tril()", ".triu()", "after it", "later token"),
        ("turned round", "masked_fill(~visible", "masked_fill(visible", "turned round", "inverted"),
        ("1 and 0", "return mask.masked_fill(~visible, -math.inf).unsqueeze(1)",
         "return visible.to(dtype).unsqueeze(1)", "-inf"),
        ("no axis for heads", ".unsqueeze(1)", "", "(B, 1, T, T)"),
        ("padding sees nothing", VISIBLE, VISIBLE + " & (query >= 0)", "padding")),
    *of("data.collate",
        ("first token from its neighbour", "before[0] = b * T + len(prompt) - 1", "pass",
         "last prompt position"),
        ("positions go on", "first_position = 0 if role == 0 else len(prompt)",
         "first_position = start", "position"),
        ("positions start at 0", "first_position = 0 if role == 0 else len(prompt)",
         "first_position = 0", "position"),
        ("predicted by itself", "np.arange(start - 1, end - 1)", "np.arange(start, end)",
         "predictor"),
        ("slots from 1", "slot[part] = b * K + k", "slot[part] = b * K + role", "slot"),
        ("slots of the whole batch", "slot[part] = b * K + k", "slot[part] = k", "slot"),
        ("rows forgotten in predictor", "before = b * T + np.arange", "before = np.arange",
         "predictor"),
        ("last is one too far", "last[b, k] = b * T + end - 1", "last[b, k] = b * T + end", "last"),
        ("lengths with what is only read", "lengths[b, k] = learnt.sum()",
         "lengths[b, k] = len(ids)", "lengths"),
        ("branches from 0", "branch[b, start:end] = role",
         "branch[b, start:end] = max(0, role - 1)", "branch"),
        ("padding is prompt", "branch = np.full((B, T), -1, np.int64)",
         "branch = np.zeros((B, T), np.int64)", "branch"),
        ("padding counts", "slot = np.full(R, B * K, np.int64)", "slot = np.zeros(R, np.int64)",
         "padding"),
        ("~tokens stay marked", "ids = np.where(learnt, ids, ~ids)", "pass", "~token"),
        ("~tokens are learnt", "learnt = ids >= 0", "learnt = ids == ids", "~token"),
        ("empty prompts pass", "if min(len(ids) for ids in (prompt, *responses)) == 0:",
         "if False:", "at least one token", "refuses"),
        ("lists only", "T = max(len(prompt) + sum(map(len, responses)) for prompt, responses "
         "in examples)", "T = max(len(sum(responses, prompt)) for prompt, responses in examples)",
         "array")),
    *of("model.GPT.response_logps",
        ("read at the token itself", "read=batch.predictor", "read=batch.own", "predictor"),
        ("a causal mask", "mask = tree_mask(batch.branch, self.lm_head.weight.dtype)",
         "mask = None", "sibling"),
        ("positions of the row", "batch.position, mask",
         "torch.arange(batch.tokens.size(1)).expand_as(batch.tokens), mask", "position"),
        ("mean per token", "return batch.sum_tokens(logps)",
         "return batch.sum_tokens(logps) / batch.lengths", "mean over its tokens"),
        ("probabilities", LOGPS_OF_TOKENS, LOGPS_OF_TOKENS + ".exp()", "log-prob"),
        ("logits", "logps = F.log_softmax(logits, dim=1, dtype=wide)", "logps = logits.to(wide)",
         "log_softmax", "plain formula"),
        ("softmax over the tokens", "logps = F.log_softmax(logits, dim=1, dtype=wide)",
         "logps = F.log_softmax(logits, dim=0, dtype=wide)", "log_softmax", "plain formula"),
        ("negative", LOGPS_OF_TOKENS, "-" + LOGPS_OF_TOKENS, "sign"),
        ("log-probs of what is read", "self.lm_head.weight, batch.target)",
         "self.lm_head.weight, batch.tokens.flatten()[batch.predictor])", "target")),

    # ------ generation
    *of("model.likely",
        ("without the one that crosses", "before = ordered.cumsum(dim=1) - ordered",
         "before = ordered.cumsum(dim=1)", "top_p"),
        ("of all the probability", "top_p * ordered.sum(dim=1, keepdim=True)", "top_p",
         "that is left"),
        ("normalised", LIKELY, "return torch.zeros_like(probs).scatter(1, token, ordered "
         "/ ordered.sum(dim=1, keepdim=True))", "normalised"),
        ("one too many", "rank < top_k", "rank <= top_k", "top_k"),
        ("the unlikely ones", "descending=True", "descending=False", "most likely"),
        ("sorted", LIKELY, "return ordered", "place"),
        ("of all that are as likely", "ordered = ordered * (rank < top_k)",
         "kept = ordered[:, min(top_k, probs.size(1)) - 1, None]\n"
         "        ordered = ordered * (ordered >= kept)", "equally likely", "ties"),
        ("changes its input", "return torch.zeros_like(probs).scatter(",
         "return probs.zero_().scatter(", "not changed")),
    *of("model.draw",
        ("times the temperature", "F.softmax(logits / temperature",
         "F.softmax(logits * temperature", "temperature"),
        ("no temperature", "F.softmax(logits / temperature", "F.softmax(logits", "temperature"),
        ("divides by 0", "if temperature == 0:", "if False:", "temperature 0"),
        ("impossible tokens", "right=True", "right=False", "probability of 0"),
        ("does not normalise", SEARCH, "torch.searchsorted(cumulative, random, right=True)",
         "sum to less than 1", "top_"),
        ("all tokens", "likely(probs, top_k, top_p).cumsum", "probs.cumsum", "top_"),
        ("the most likely always", "if temperature == 0:", "if True:", "random")),
    *of("model.GPT._generate_batch",
        ("attends to padding", "in_prompt = column < position[:, None]",
         "in_prompt = (column < T).expand(B, -1)", "padding"),
        ("one column too many", "in_prompt = column < position[:, None]",
         "in_prompt = column <= position[:, None]", "padding"),
        ("positions stand still", "position = (position + 1).clamp(", "position = position.clamp(",
         "position"),
        ("positions of the columns", "position = torch.tensor([len(prompt) - 1 for prompt in "
         "prompts], device=device)",
         "in_prompt = torch.tensor([len(prompt) - 1 for prompt in prompts])\n"
         "        position = torch.full((B,), T)", "position"),
        ("one column for all new tokens", "newest = newest + 1", "newest = newest", "column"),
        ("forgets its own tokens", "(column >= T) & (column <= newest)", "(column == newest)",
         "new tokens"),
        ("sees the columns to come", "(column >= T) & (column <= newest)", "(column >= T)",
         "columns"),
        ("responses to another prompt", "prompt_of = torch.tensor([distinct[prompt] for prompt in "
         "prompts], device=device)", "prompt_of = torch.arange(B, device=device) % P",
         "equal prompts"),
        ("without the stop", "length = is_end.index(True) + 1", "length = is_end.index(True)",
         "stop"),
        ("goes on after the stop", "if True in is_end[:length]:", "if False:", "stop"),
        ("beyond the block", "config.block_size - len(prompt))",
         "config.block_size - len(prompt) + 1)", "block"),
        ("temperature forgotten", "draw(logits, temperature, random",
         "draw(logits, 1.0, random", "temperature", "greedy"),
        ("rows mixed up when some end", "new[prompt_number, t] = drawn",
         "new[:len(drawn), t] = drawn", "rows"),
        ("positions of rows that have ended", "token[going], position[going], in_prompt[going]",
         "token[going], position[:len(going)], in_prompt[going]", "rows")),

    # ------ training
    *of("train_policy.learning_rate",
        ("no warm-up", WARM_UP, "return peak", "warm-up"),
        ("first step at 0", WARM_UP, "return peak * step / warmup", "first step", "warm-up"),
        ("a line, no cosine", COSINE, "return peak * (1 - progress)", "cosine"),
        ("down to half", COSINE, "return peak * 0.5 * (2 + math.cos(math.pi * progress) - 1) + "
         "peak * 0.25 * progress", "zero"),
        ("half the peak", COSINE, "return peak * 0.5 * math.cos(math.pi * progress)", "peak"),
        ("a whole wave", COSINE, "return peak * 0.5 * (1 + math.cos(2 * math.pi * progress))",
         "cosine"),
        ("cosine from step 0", "progress = (step - warmup) / max(1, max_steps - warmup)",
         "progress = step / max_steps", "after the warm-up", "cosine"),
        ("10% of warm-up", "max_steps // 20", "max_steps // 10", "5%"),
        ("no warm-up in short runs", "warmup = max(1, max_steps // 20)",
         "warmup = max_steps // 20 or max_steps", "short run", "few steps")),
    *of("train_policy.loss_flags",
        ("the first gamma always", ANNEALED, 'flags["gamma"] = first', "anneal"),
        ("the last gamma always", ANNEALED, 'flags["gamma"] = last', "anneal"),
        ("backwards", ANNEALED,
         'flags["gamma"] = last + (first - last) * step / args.max_steps', "anneal", "backwards"),
        ("a geometric row", ANNEALED,
         'flags["gamma"] = first * (last / first) ** (step / args.max_steps)', "linear"),
        ("from 0", ANNEALED, 'flags["gamma"] = last * step / args.max_steps', "first value"),
        ("one step too early", ANNEALED,
         'flags["gamma"] = first + (last - first) * (step + 1) / args.max_steps', "step 0",
         "first value"),
        ("a pair of numbers", ANNEALED, "pass", "number"),
        ("gamma for losses without one", 'if "gamma" in flags:', "if args.gamma:",
         "has no gamma", "without a KL")),
    *of("train_policy.statistics",
        ("an undecided pair is wrong", "(h > 0).float() + 0.5 * (h == 0)", "(h > 0).float()",
         "half"),
        ("an undecided pair is right", "(h > 0).float() + 0.5 * (h == 0)", "(h >= 0).float()",
         "half"),
        ("no weights", "batch.pair_weight * value for", "value for", "weight"),
        ("turned KL", "-change.gather", "change.gather", "sign"),
        ("no reference", "change = logps.detach() - batch.ref_logps", "change = logps.detach()",
         "reference is missing"),
        ("turned margin", "h = chosen - rejected", "h = rejected - chosen", "swapped"),
        ("sum over samples", ".mean(dim=1)", ".sum(dim=1)", "sum over the samples"),
        ("keeps the graph", "logps.detach()", "logps", "detach", "gradient"),
        ("a KL of pairs", "-change.gather(1, batch.samples).mean(dim=1)",
         "-change.mean(dim=1)", "samples")),
    *of("evaluate.interval",
        ("divides by N", "ddof=1", "ddof=0", "N - 1"),
        ("spread of the differences", "/ len(differences) ** 0.5", "", "sqrt(N)"),
        ("no root", "/ len(differences) ** 0.5", "/ len(differences)", "sqrt(N)"),
        ("one standard error", INTERVAL, "return float(differences.mean()), float(error)", "1.96"),
        ("the whole width", "1.96 * error", "2 * 1.96 * error", "half-width"),
        ("the median", "float(differences.mean())", "float(np.median(differences))", "mean")),
]
