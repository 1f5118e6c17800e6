"""Defines the language model, GPT-2 or one of the Llama family, and runs it over a tree batch.

A batch is a `TreeBatch` (data.py): each row holds one prompt followed by its K responses, and the
prompt is computed once. Three things make that equal to K separate sequences: the attention mask (a
response sees the prompt and itself, not its siblings), the positions (every response starts again
at the prompt's length), and where predictions are read (each response's first token from the *last
prompt position*, whatever lies in between).

On a first read, follow GPT-2: the defaults of `GPTConfig`. Newer models do a few parts differently,
and each of those has a switch there: RoPE, RMSNorm, SwiGLU and grouped-query attention.
docs/models.md explains them and says which model has which. In memory, weights have the names that
they have in Hugging Face's GPT-2. On disk, each model is laid out as Hugging Face lays out its
family.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import load_lora, merge_lora
from support.backward import head_weight, product_type, rms_norm, token_logps
from support.checkpoint import (
    adapter_config,
    load_model,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
)
from support.device import FEW_SHAPES, computing, random_numbers, round_up, sync


@dataclass
class GPTConfig:
    """Describes an architecture. The defaults are GPT-2 small."""
    block_size: int = 1024              # longest prompt + response, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    tie_word_embeddings: bool = True    # the output head shares the token embedding's weights
    reward_head: str = "last"           # of a reward model: at the last token, or "sum"
    gelu: str = "tanh"                  # GPT-2's approximation, or "none": exact, as in nanoGPT
    # What later families do differently (docs/models.md)
    family: str = "gpt2"                # model_type in config.json: how the weights are saved
    n_kv_head: int = None               # heads of keys and values (None: as many as of queries)
    head_size: int = None               # numbers in a head (None: n_embd / n_head)
    n_inner: int = None                 # width inside an MLP (None: 4 n_embd)
    mlp: str = "gelu"                   # or "swiglu": SiLU(gate) * up
    norm: str = "layer"                 # LayerNorm, or "rms": RMSNorm
    norm_eps: float = 1e-5              # added under the root, so that nothing is divided by 0
    norm_after: bool = False            # norm what attention and MLP put out, not what they read
    qk_norm: str = None                 # norm queries and keys: each "head", or "all" at once
    qkv_bias: bool = True               # biases: of queries, keys and values,
    proj_bias: bool = True              # of attention's output,
    mlp_bias: bool = True               # of both layers of the MLP
    rope_theta: float = None            # base of RoPE's angles (None: positions are embedded)
    rope_scaling: dict = None           # Llama 3: some angles grow slower, for longer texts
    rope_layers: list = None            # which layers have RoPE, a 0 or 1 for each (None: all)
    token_ids: dict = None              # bos_token_id and the like, as they were in config.json


class RMSNorm(nn.Module):
    """Computes LayerNorm without a mean and a bias: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def new_norm(config):
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.head_size or config.n_embd // config.n_head
        width, kv_width = self.n_head * self.head_size, self.n_kv_head * self.head_size
        # One matrix gives queries, keys and values: one large product is faster than three.
        self.widths = [width, kv_width, kv_width]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.proj_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not None:
            each = self.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_size if each else width, config.norm_eps)
            self.k_norm = RMSNorm(self.head_size if each else kv_width, config.norm_eps)

    def forward(self, x, mask=None, cache=None, turns=None):
        """Computes self-attention over x: (B, T, C). mask, cache, turns: see Block. Returns
        (B, T, C)."""
        B, T, C = x.size()                                              # rows, columns, width
        q, k, v = self.c_attn(x).split(self.widths, dim=2)              # (B, T, heads * size)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)   # (B, heads, T, size)
        k = k.view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)    # (B, kv heads, T, size)
        v = v.view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)    # (B, kv heads, T, size)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if turns is not None:
            q, k = turn(q, *turns), turn(k, *turns)
        if cache is not None:       # store these T columns, attend to all that are stored
            keys, values, columns = cache                               # (B, kv heads, keys, size)
            keys[:, :, columns] = k
            values[:, :, columns] = v
            k, v = keys, values
        shared = self.n_head // self.n_kv_head      # heads of queries that share keys and values
        if shared > 1 and q.is_cuda:    # CUDA's fast kernels with a mask want a copy for each head
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=shared > 1)
        y = y.transpose(1, 2).reshape(B, T, self.widths[0])             # heads side by side
        return self.c_proj(y)


def rope(position, config, like):
    """Computes the angles of rotary position embedding, RoPE (Su et al., 2021).

    A query or key at position p is cut into pairs of numbers. Each pair is a point in a plane, and
    `turn` rotates pair i by p * theta^(-2i / size) radians. The product of a query and a key that
    are turned like that depends on their positions only through the distance between them.
    position: (B, T). Angles are float32 at least, whatever the weights are. Returns (cos, sin) of
    them, each (B, 1, T, size/2), in the type of matrix products with the tensor `like`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = config.head_size or config.n_embd // config.n_head
    pair = torch.arange(0, size, 2, device=position.device).to(dtype)       # 2i
    speed = 1 / config.rope_theta ** (pair / size)                          # radians per token
    if config.rope_scaling is not None:     # Llama 3: pairs that turn slowly turn slower still,
        scaling = config.rope_scaling       # judged by their rounds in the text it was trained on
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rounds = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        speed = (1 - kept) * speed / scaling["factor"] + kept * speed
    angle = position[:, None, :, None].to(dtype) * speed                    # (B, 1, T, size/2)
    return angle.cos().to(product_type(like)), angle.sin().to(product_type(like))


def turn(x, cos, sin):
    """Turns queries or keys, x: (B, heads, T, size), by the angles of `rope`. Pair i of a head is
    its numbers i and i + size/2. Returns the same shape."""
    first, second = x.chunk(2, dim=3)                                   # (B, heads, T, size/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.gated = config.mlp == "swiglu"
        fused = 2 * inner if self.gated else inner      # gate and up come from one matrix
        self.c_fc = nn.Linear(config.n_embd, fused, bias=config.mlp_bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.mlp_bias)
        self.gelu = config.gelu

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(x, approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = new_norm(config)
        self.attn = Attention(config)
        self.ln_2 = new_norm(config)
        self.mlp = MLP(config)
        self.norm_after = config.norm_after

    def forward(self, x, mask=None, cache=None, turns=None, read=None):
        """Computes one layer. x: (B, T, C). mask, read: see Transformer.forward. cache: this
        layer's entry of the cache there. turns: (cos, sin) from `rope`, or None for a layer without
        RoPE. Returns (B, T, C), or (R, C) with `read`."""
        if self.norm_after:
            x = x + self.ln_1(self.attn(x, mask, cache, turns))
        else:
            x = x + self.attn(self.ln_1(x), mask, cache, turns)
        if read is not None:
            # Picks places from all rows: x.flatten(0, 1)[read]. Some places are picked more than
            # once (the end of the prompt, for each response), so their gradients are added up;
            # F.embedding, a table look-up, adds them in a fixed order, the same in each run.
            x = F.embedding(read, x.flatten(0, 1))                      # (R, C)
        if self.norm_after:
            return x + self.ln_2(self.mlp(x))
        return x + self.mlp(self.ln_2(x))


def tree_mask(branch, dtype):
    """Builds the mask of a tree batch: token q sees token k if k is not after q in the row, and k
    belongs to the prompt or to q's own response.

    branch: (B, T), 0 for the prompt, k for response k, -1 for padding (which sees the prompt, so
    that no softmax is empty, and which no response sees).
    Returns (B, 1, T, T), 0 where q sees k and -inf where not, to be added to the scores.
    """
    T = branch.size(1)
    query, key = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    visible = causal & ((key == 0) | (key == query))                    # (B, T, T)
    mask = torch.zeros(visible.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill(~visible, -math.inf).unsqueeze(1)


class Transformer(nn.Module):
    """Computes all below the output head: token and position embeddings, layers, the final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.rope_theta is None:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = new_norm(config)
        self.frozen = 0         # with --freeze: how many of the lowest layers are not trained

    def forward(self, tokens, position, mask=None, cache=None, read=None, below=None):
        """Computes the hidden states that a head reads. Returns (B, T, C), or (R, C) with `read`.

        tokens, position: (B, T).
        mask: (B, 1, T, keys), added to the attention scores, or true where a token sees a key.
            Without a mask attention is causal.
        cache: used for generation. For each layer (keys, values, columns): two
            (B, kv heads, keys, size) tensors to attend to, and the columns of them in which this
            call stores its own keys and values, a slice or indices.
        read: (R,) int64, row * T + column of the tokens that the head reads. The last layer's MLP
            leaves the others out: most of a batch is prompt, where no prediction is read.
        below: (B, T, C) what the frozen layers compute, if that is known.
        """
        config = self.config
        first = self.frozen if below is not None else 0     # the lowest layer that is computed here
        x = self.wte(tokens)                                            # (B, T, C)
        if config.rope_theta is None:
            x, turns = x + self.wpe(position), None
        else:
            turns = rope(position, config, x)       # once for all layers
        if first > 0:
            x = below
        for i in range(first, len(self.h)):
            block, last = self.h[i], i == len(self.h) - 1
            turning = config.rope_layers is None or config.rope_layers[i]
            x = block(x, mask, cache[i] if cache else None, turns if turning else None,
                      read if last else None)
        return self.ln_f(x)


def init_weights(module, config):
    """Draws the weights as GPT-2 does: from N(0, 0.02), for projections into the residual stream
    divided by sqrt(2 n_layer). Biases are 0."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            added_up = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
            nn.init.normal_(parameter, std=0.02 / math.sqrt(added_up))


class GPT(nn.Module):
    """Defines the policy and the reference: a transformer with a vocabulary head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lora_base = None       # with a LoRA adapter (lora.py): the name of the model below it
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        init_weights(self, config)

    def _apply(self, fn, recurse=True):
        """Keeps tied weights tied. .to() and .double() call this, and on a TPU .to() would make two
        tensors of them."""
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        return self

    def logits(self, tokens):
        """Computes logits of plain sequences, at every position. tokens: (B, T) int64. Returns
        (B, T, vocab), in the type of the weights."""
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)     # (B, T)
        hidden = self.transformer(tokens, position)                     # (B, T, C)
        with torch.autocast(hidden.device.type, enabled=False):     # not rounded to bfloat16
            return self.lm_head(hidden.to(self.lm_head.weight.dtype))

    def response_logps(self, batch, fast=True):
        """Computes the summed log-prob of every response given its prompt, in nats.

        batch: a TreeBatch. fast: use support/backward.py, which needs less time and memory than
        log_softmax; fast=False gives the same numbers by the plain formula. Returns (B, K) float32,
        float64 for a float64 model.
        """
        mask = tree_mask(batch.branch, self.lm_head.weight.dtype)           # (B, 1, T, T)
        hidden = self.transformer(batch.tokens, batch.position, mask,
                                  read=batch.predictor, below=batch.below)  # (R, C)
        if fast and not computing.few_shapes:       # XLA fuses the plain formula
            logps = token_logps(hidden, self.lm_head.weight, batch.target)  # (R,)
        else:
            dtype = product_type(hidden)
            weight, _ = head_weight(self.lm_head.weight, dtype)
            logits = F.linear(hidden, weight)                               # (R, vocab)
            wide = torch.promote_types(dtype, torch.float32)
            logps = F.log_softmax(logits, dim=1, dtype=wide)                # (R, vocab)
            logps = logps.gather(1, batch.target[:, None]).squeeze(1)       # (R,)
        return batch.sum_tokens(logps)                                      # (B, K)

    # The same method under the name that policy(batch) calls, and that torch.compile compiles.
    forward = response_logps

    @classmethod
    def from_pretrained(cls, dir_or_hub_name, merge=True):
        """Reads a checkpoint in Hugging Face's layout, or a LoRA adapter together with its model,
        from a folder or else from the hub. docs/models.md lists the families. InputError says what
        is wrong with it.

        merge: whether to add an adapter to the model's weights. If not, it stays an adapter, which
        can be trained on.
        """
        config, tensors = read_checkpoint(dir_or_hub_name, head="lm_head")
        model = load_model(lambda: cls(GPTConfig(**config)), tensors, dir_or_hub_name)
        if adapter_config(dir_or_hub_name) is not None:     # it is an adapter: lora.py
            load_lora(model, dir_or_hub_name)
            if merge:
                merge_lora(model)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        """Writes config.json and model.safetensors, which `transformers` loads as a model of its
        family. If the model has a LoRA adapter, writes only that, in PEFT's layout. eos_token_id:
        the token that ends a text (default: the one of the checkpoint that was read, or else the
        vocabulary's last)."""
        if self.lora_base is not None:
            return write_adapter(directory, self)
        write_checkpoint(directory, self, eos_token_id)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop=None, generator=None,
                 batch_size=None, on_token=None, top_k=None, top_p=None):
        """Samples one response for each prompt: lists of tokens in, lists of tokens out.

        prompts: none empty, none longer than block_size. temperature: 0 takes the most likely
        token. stop: the token that ends a response, and is part of it, or a list of such tokens; a
        response also ends after max_new_tokens, or when it fills block_size. generator: a
        torch.Generator, so that sampling leaves the global random stream alone. batch_size: prompts
        at a time (default: as many as the cache's memory allows). on_token: called after every step
        with the list of new tokens. top_k, top_p: draw only from the likely tokens, see `likely`.
        """
        if not all(0 < len(prompt) <= self.config.block_size for prompt in prompts):
            raise ValueError(f"prompts must have 1 to {self.config.block_size} tokens")
        if batch_size is None:      # GPT-2 small: 4.8 GB of float32 keys and values at most
            columns = max(map(len, prompts), default=0) + max_new_tokens
            batch_size = max(1, min(256, 65_536 // columns))
        stops = torch.tensor([] if stop is None else stop, dtype=torch.long).flatten()
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))     # little padding
        responses = [None] * len(prompts)
        for first in range(0, len(prompts), batch_size):
            rows = order[first:first + batch_size]
            part = [prompts[i] for i in rows]
            sampled = self._generate_batch(part, max_new_tokens, temperature, stops, generator,
                                           batch_size, on_token, top_k, top_p)
            for i, response in zip(rows, sampled):
                responses[i] = response
        return responses

    def _generate_batch(self, prompts, max_new_tokens, temperature, stops, generator, batch_size,
                        on_token, top_k, top_p):
        """Samples one response for each of at most batch_size prompts; see generate.

        A layer's cache holds keys and values. Columns 0 to T - 1 are the prompts without their last
        tokens, padded on the right. Column T + t is the token that step t reads: first the prompt's
        last one, then the new ones. Equal prompts run through the model once. When half of the rows
        have ended, the others go on alone in a smaller batch. A row that has filled the block runs
        along, and what it draws is cut off. Each step draws by `draw`, with the random numbers that
        `random_numbers` gives the rows that go on, which are the first ones of the batch.
        On a device that compiles a program for every shape (a TPU) all shapes stay the same to the
        end. There T is a multiple of FEW_SHAPES / 2, and the first row is repeated until there are
        8 rows, or batch_size if 8 are too few.
        """
        config, device = self.config, self.lm_head.weight.device
        prompts, n = [tuple(prompt) for prompt in prompts], len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        T = max(1, max(lengths) - 1)
        steps = min(max_new_tokens, config.block_size - min(lengths))
        max_new_tokens = min(max_new_tokens, config.block_size - 1)
        few_shapes = computing.few_shapes
        if few_shapes:
            T = round_up(T, FEW_SHAPES // 2)
            prompts += prompts[:1] * ((8 if n <= 8 else batch_size) - n)
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        B = len(prompts)                                    # rows, one for each response
        P = B if few_shapes else len(distinct)              # rows of prompts

        # Run the prompts
        tokens = torch.zeros(P, T, dtype=torch.long)
        for prompt, i in distinct.items():
            tokens[i, :len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.long)
        dtype = product_type(self.lm_head.weight)
        attention = self.transformer.h[0].attn
        shape = (2, P, attention.n_kv_head, T + max_new_tokens, attention.head_size)
        layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        cache = [(*layer[..., :T, :], slice(0, T)) for layer in layers]
        position = torch.arange(T, device=device).clamp(max=config.block_size - 1).expand(P, T)
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        self.transformer(tokens.to(device), position, cache=cache, read=nothing)
        if len(distinct) < B:       # a row for each response
            prompt_of = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
            layers = [layer[:, prompt_of] for layer in layers]

        # Draw a token for each row, again and again
        token = torch.tensor([prompt[-1] for prompt in prompts], device=device)             # (B,)
        position = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)     # (B,)
        column = torch.arange(T + max_new_tokens, device=device)
        in_prompt = column < position[:, None]                          # (B, columns)
        newest = torch.tensor([T], device=device)                       # the column of `token`
        head, _ = head_weight(self.lm_head.weight, dtype)               # (vocab, C)
        new = torch.zeros(n, steps, dtype=torch.long)
        prompt_number = torch.arange(n)             # the prompts that the first rows answer
        ended = torch.zeros(n, dtype=torch.bool)    # which of these rows have ended
        for t in range(steps):
            visible = in_prompt | (column >= T) & (column <= newest)    # (B, columns)
            seen = len(column) if few_shapes else T + t + 1             # the others are empty
            cache = [(*layer[..., :seen, :], newest) for layer in layers]
            hidden = self.transformer(token[:, None], position[:, None],
                                      visible[:, None, None, :seen], cache)[:, 0]   # (B, C)
            logits = F.linear(hidden, head).float()                     # (B, vocab)
            random = random_numbers(n, len(logits), generator, device)  # (B, 1)
            token = draw(logits, temperature, random, top_k, top_p)     # (B,)
            position = (position + 1).clamp(max=config.block_size - 1)  # the rest is cut off
            newest = newest + 1
            if device.type == "xla":
                sync()
            drawn = token.cpu()[:n]
            new[prompt_number, t] = drawn
            if on_token is not None:
                on_token(drawn.tolist())
            ended |= torch.isin(drawn, stops)
            if ended.all():
                break
            if ended.sum() >= n / 2:                # drop the rows that have ended
                going, prompt_number = torch.where(~ended)[0].tolist(), prompt_number[~ended]
                n, ended = len(going), ended[~ended]
                if few_shapes:
                    going += going[:1] * (B - n)
                token, position, in_prompt = token[going], position[going], in_prompt[going]
                layers = [layer[:, going] for layer in layers]

        # Cut the responses where they end
        responses, ends = [], torch.isin(new, stops)                    # (n, steps)
        for prompt, response, is_end in zip(prompts, new.tolist(), ends.tolist()):
            length = min(len(response), config.block_size - len(prompt))
            if True in is_end[:length]:
                length = is_end.index(True) + 1
            responses.append(response[:length])
        return responses


def draw(logits, temperature, random, top_k=None, top_p=None):
    """Draws one token for each row from softmax(logits / temperature), or from its `likely` part.
    At temperature 0 it takes the most likely token.

    It takes one random number for each row, and the first token at which the cumulative probability
    exceeds it. (torch.multinomial takes a random number for each token of the vocabulary.)
    logits: (B, vocab) float32; random: (B, 1) float64 (mps: float32) in [0, 1). Returns (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    probs = F.softmax(logits / temperature, dim=1).to(random.dtype)         # (B, vocab)
    cumulative = likely(probs, top_k, top_p).cumsum(dim=1)                  # (B, vocab)
    token = torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)  # first above
    return token.squeeze(1).clamp(max=logits.size(1) - 1)


def likely(probs, top_k=None, top_p=None):
    """Sets the probabilities of unlikely tokens to 0. First, the top_k most likely tokens are kept.
    Of these, top_p keeps the most likely ones: as few as hold this fraction of the probability that
    is left. Of two equally likely tokens, the one with the lower number comes first.

    probs: (B, vocab), not changed. Returns (B, vocab), not normalised: rows may sum to less than 1.
    """
    if top_k is None and top_p is None:
        return probs
    ordered, token = probs.sort(dim=1, descending=True, stable=True)        # (B, vocab)
    if top_k is not None:
        rank = torch.arange(probs.size(1), device=probs.device)
        ordered = ordered * (rank < top_k)
    if top_p is not None:
        before = ordered.cumsum(dim=1) - ordered        # of the tokens that are more likely
        ordered = ordered * (before < top_p * ordered.sum(dim=1, keepdim=True))
    return torch.zeros_like(probs).scatter(1, token, ordered)
