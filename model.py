"""The language model: a GPT-2 written out by hand, run over a tree of responses.

A batch is a `TreeBatch` (data.py): each row holds one prompt followed by its K responses, and the
prompt is computed once. Three things make that equal to K separate sequences: the attention mask (a
response sees the prompt and itself, not its siblings), the positions (every response starts again
at the prompt's length), and where predictions are read (each response's first token from the *last
prompt position*, whatever lies in between).

The weights are named, and saved, as in Hugging Face's GPT-2.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoint import load_tensors, read_checkpoint, write_checkpoint
from support.device import compiles_every_shape, random_numbers
from support.logprobs import head_weight, product_type, token_logps
from support.sampling import draw
from support.static import generate_static


@dataclass
class GPTConfig:
    """The architecture. The defaults are GPT-2 small."""
    block_size: int = 1024              # longest prompt + response, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    tie_word_embeddings: bool = True    # the output head shares the token embedding's weights
    reward_head: str = "last"           # of a reward model: at the last token, or "sum"
    gelu: str = "tanh"                  # GPT-2's approximation, or "none": exact, as in nanoGPT


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, skip=0):
        """Self-attention over x: (B, T, C), for all columns but the first `skip`: 0 or T - Q.

        mask: (B, 1, Q, keys), for the last Q columns; those before them attend causally, which
        takes half the work of a mask. cache: see Transformer. Returns (B, T - skip, C).
        """
        B, T, C = x.size()                                              # rows, columns, width
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = self.c_attn(x).split(C, dim=2)                        # (B, T, C) each
        q = q.view(heads).transpose(1, 2)                               # (B, heads, T, C/heads)
        k = k.view(heads).transpose(1, 2)                               # (B, heads, T, C/heads)
        v = v.view(heads).transpose(1, 2)                               # (B, heads, T, C/heads)
        if cache is not None:       # write these T columns, attend to everything up to them
            cached_k, cached_v, start = cache
            cached_k[:, :, start:start + T] = k
            cached_v[:, :, start:start + T] = v
            k, v = cached_k[:, :, :start + T], cached_v[:, :, :start + T]
        context = T if mask is None else T - mask.size(2)               # columns without a mask
        y = []
        if skip < context:
            y.append(F.scaled_dot_product_attention(
                q[:, :, :context], k[:, :, :context], v[:, :, :context], is_causal=True))
        if mask is not None:
            y.append(F.scaled_dot_product_attention(q[:, :, context:], k, v, attn_mask=mask))
        y = torch.cat(y, dim=2)                                         # (B, heads, T - skip, ...)
        y = y.transpose(1, 2).reshape(B, T - skip, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = config.gelu

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """One layer; Transformer.forward puts its parts together."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)


def tree_mask(branch, context, dtype):
    """Token q sees token k iff k <= q in the row, and k is in the prompt or in q's own response.

    branch: (B, T), 0 for the prompt, k for response k, -1 for padding (which sees the prompt, so
    that no softmax is empty, and which no response sees). context: the first columns, prompt in
    every row, which need no mask.
    Returns (B, 1, T - context, T), 0 where q sees k and -inf where not, to be added to the scores.
    """
    T = branch.size(1)
    query, key = branch[:, context:, None], branch[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()[context:]
    visible = causal & ((key == 0) | (key == query))                # (B, T - context, T)
    mask = torch.zeros(visible.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill(~visible, -math.inf).unsqueeze(1)


class Transformer(nn.Module):
    """Everything below a head: token and position embeddings, the layers, the final layer norm."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens, position, mask=None, cache=None):
        """tokens, position: (B, T). mask: (B, 1, Q, keys) for the last Q columns, added to their
        attention scores, or true where they see; only these Q come out. Without one: plain causal
        attention. cache: for each layer (keys, values, start): (B, heads, columns, C/heads) tensors
        that this call fills from column `start`. Returns (B, Q, C), or (B, T, C) without a mask."""
        x = self.wte(tokens) + self.wpe(position)                   # (B, T, C)
        skip = 0
        for i, block in enumerate(self.h):
            if mask is not None and i == len(self.h) - 1:
                skip = x.size(1) - mask.size(2)     # the last layer: nobody reads the others
            layer_cache = cache[i] if cache is not None else None
            x = x[:, skip:] + block.attn(block.ln_1(x), mask, layer_cache, skip)
            x = x + block.mlp(block.ln_2(x))
        return self.ln_f(x)


def init_weights(module, config):
    """GPT-2's: N(0, 0.02); projections into the residual stream divided by sqrt(2 n_layer)."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            added_up = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
            nn.init.normal_(parameter, std=0.02 / math.sqrt(added_up))


class GPT(nn.Module):
    """The policy (and the reference): a transformer with a vocabulary head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        init_weights(self, config)

    def _apply(self, fn, recurse=True):
        """What .to() and .double() call; on a TPU the tied weights would come apart."""
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        return self

    def logits(self, tokens):
        """Plain causal logits for every position, in the type of the weights. tokens: (B, T) int64
        -> (B, T, vocab)."""
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)     # (B, T)
        hidden = self.transformer(tokens, position)                     # (B, T, C)
        with torch.autocast(hidden.device.type, enabled=False):     # not rounded to bfloat16
            return self.lm_head(hidden.to(self.lm_head.weight.dtype))

    def response_logps(self, batch, fast=True):
        """Summed log-prob of every response given its prompt, in nats.

        TreeBatch -> (B, K) float32 (float64 for a float64 model). fast=False: the same numbers by
        the plain formula.
        """
        B, K = batch.last.size()
        mask = tree_mask(batch.branch, batch.context, self.lm_head.weight.dtype)
        hidden = self.transformer(batch.tokens, batch.position, mask)       # (B, T - context, C)
        # Where each response token is predicted. hidden[predictor] would do, but its gradient is
        # added up in no fixed order: runs would not repeat to the byte.
        hidden = F.embedding(batch.predictor, hidden.flatten(0, 1))         # (R, C)
        if fast and not compiles_every_shape(hidden.device):    # XLA fuses the plain formula
            logps = token_logps(hidden, self.lm_head.weight, batch.target)  # (R,)
        else:
            dtype = product_type(hidden)
            weight, _ = head_weight(self.lm_head.weight, dtype)
            logits = F.linear(hidden, weight)                               # (R, vocab)
            wide = torch.promote_types(dtype, torch.float32)
            logps = F.log_softmax(logits, dim=1, dtype=wide)                # (R, vocab)
            logps = logps.gather(1, batch.target[:, None]).squeeze(1)       # (R,)
        slots = torch.zeros(B * K + 1, dtype=logps.dtype, device=logps.device)
        slots = slots.index_add(0, batch.slot, logps)       # each token's to its response's slot
        return slots[:-1].view(B, K)                        # the last slot collects padding

    forward = response_logps      # policy(batch), which torch.compile wraps

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop=None, generator=None,
                 batch_size=None, on_token=None, top_k=None, top_p=None):
        """Samples one response for each prompt: lists of tokens in, lists of tokens out.

        prompts: none empty, none longer than block_size. temperature: 0 takes the most likely
        token. stop: the token that ends a response, and is part of it; it also ends after
        max_new_tokens, or where it fills block_size. generator: a torch.Generator of its own, so
        that the global random stream is left alone. batch_size: prompts at a time (default: as the
        cache's memory allows). on_token: called after every step with the list of new tokens.
        top_k, top_p: draw likely tokens alone (support/sampling.py).
        """
        if not all(0 < len(prompt) <= self.config.block_size for prompt in prompts):
            raise ValueError(f"prompts must have 1 to {self.config.block_size} tokens")
        if batch_size is None:      # GPT-2 small: 4.8 GB of float32 keys and values at most
            columns = max(map(len, prompts), default=0) + max_new_tokens
            batch_size = max(1, min(256, 65_536 // columns))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))     # little padding
        responses = [None] * len(prompts)
        for first in range(0, len(prompts), batch_size):
            rows = order[first:first + batch_size]
            part = [prompts[i] for i in rows]
            arguments = max_new_tokens, temperature, stop, generator, on_token, top_k, top_p
            if compiles_every_shape(self.lm_head.weight.device):
                sampled = generate_static(self, part, *arguments, batch_size)
            else:
                sampled = self._generate_batch(part, *arguments)
            for i, response in zip(rows, sampled):
                responses[i] = response
        return responses

    def _generate_batch(self, prompts, max_new_tokens, temperature, stop, generator, on_token,
                        top_k, top_p):
        config, device = self.config, self.lm_head.weight.device
        lengths = [len(prompt) for prompt in prompts]
        max_new_tokens = min(max_new_tokens, config.block_size - min(lengths))
        prompts = [tuple(prompt) for prompt in prompts]
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        B, P, T = len(prompts), len(distinct), max(lengths) - 1     # equal prompts are run once
        tokens = torch.zeros(P, T, dtype=torch.long)
        for prompt, i in distinct.items():
            tokens[i, :len(prompt) - 1] = torch.as_tensor(prompt[:-1], dtype=torch.long)
        tokens = tokens.to(device)                                      # (P, T)
        prompt_of = torch.tensor([distinct[prompt] for prompt in prompts], device=device)   # (B,)
        length = torch.tensor(lengths, device=device)                   # (B,)

        # The cache: columns 0 to T - 1 are the prompt without its last token, padded on the right;
        # column T + t is the token that step t reads: that last one, then the new ones. It sees its
        # row's prompt, and all columns from T on so far.
        column = torch.arange(T + max_new_tokens, device=device)
        visible = (column < length[:, None] - 1) | (column >= T)        # (B, columns)
        visible = visible[:, None, None]                                # (B, 1, 1, columns)
        dtype = product_type(self.lm_head.weight)
        head, _ = head_weight(self.lm_head.weight, dtype)               # (vocab, C)
        shape = (P, config.n_head, T + max_new_tokens, config.n_embd // config.n_head)
        keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        if T > 0:       # fill the cache; the last column, which sees all, alone comes out
            position = torch.arange(T, device=device).expand(P, T)
            cache = [(k, v, 0) for k, v in zip(keys, values)]
            self.transformer(tokens, position, visible.new_ones(P, 1, 1, T), cache)
        if P < B:
            keys, values = [k[prompt_of] for k in keys], [v[prompt_of] for v in values]

        token = torch.tensor([prompt[-1] for prompt in prompts], device=device)     # (B,)
        rows = torch.arange(B, device=device)                           # those still going
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        new = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
        for t in range(max_new_tokens):
            position = (length + t - 1).clamp(max=config.block_size - 1)    # the rest is cut off
            cache = [(k, v, T + t) for k, v in zip(keys, values)]
            hidden = self.transformer(token[:, None], position[:, None],
                                      visible[..., :T + t + 1], cache)[:, 0]    # (rows, C)
            logits = F.linear(hidden, head).float()                     # (rows, vocab)
            random = random_numbers(len(rows), generator, device)       # (rows, 1)
            token = draw(logits, temperature, random, top_k, top_p)     # (rows,)
            new[rows, t] = token
            if on_token is not None:
                on_token(token.tolist())
            if stop is not None:
                ended |= token == stop
                going = int((~ended).sum())
                if going == 0:
                    break
                if going <= len(rows) // 2:     # half have ended: go on with the others alone
                    keep = torch.where(~ended)[0]
                    rows, token, length = rows[keep], token[keep], length[keep]
                    visible, ended = visible[keep], ended[keep]
                    keys, values = [k[keep] for k in keys], [v[keep] for v in values]

        responses = []
        for prompt, response in zip(prompts, new.tolist()):
            response = response[:config.block_size - len(prompt)]
            if stop in response:
                response = response[:response.index(stop) + 1]
            responses.append(response)
        return responses

    @classmethod
    def from_pretrained(cls, dir_or_hub_name):
        """Reads a GPT-2 checkpoint in Hugging Face's layout, from a folder or else from the hub.
        InputError says what is wrong with it."""
        config, tensors = read_checkpoint(dir_or_hub_name, head="lm_head")
        model = cls(GPTConfig(**config))
        load_tensors(model, tensors, dir_or_hub_name)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        """Writes config.json and model.safetensors, for `transformers` a GPT2LMHeadModel.
        eos_token_id: the token that ends a text (default: the last one)."""
        write_checkpoint(directory, self, eos_token_id, architectures=["GPT2LMHeadModel"])
