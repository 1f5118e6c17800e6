"""The language model: a GPT-2 written out by hand, run over a tree of responses.

A batch is a `TreeBatch` (data.py): each row holds one prompt followed by its K responses, and the prompt is computed
once. Three things make that equal to K separate sequences: the attention mask (a response sees the prompt and itself,
not its siblings), the positions (every response starts again at the prompt's length), and where predictions are read
(each response's first token is predicted from the *last prompt position*, whichever response lies in between).

The weights are laid out and named as in Hugging Face's GPT-2, so that checkpoints go in and out unchanged.
"""
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from runtime import InputError, run_flags


@dataclass
class GPTConfig:
    """The architecture. The defaults are GPT-2 small."""
    block_size: int = 1024              # longest prompt + response, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    tie_word_embeddings: bool = True    # the output head shares the token embedding's weights


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)    # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, start, reads):
        B, T, C = x.size()                                           # rows, tokens, width
        q, k, v = self.c_attn(x).split(C, dim=2)                     # each (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)    # (B, heads, T, C / heads)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)    # (B, heads, T, C / heads)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)    # (B, heads, T, C / heads)
        if cache is not None:       # generation: write these T columns, attend to everything up to them
            cached_k, cached_v = cache
            cached_k[:, :, start:start + T], cached_v[:, :, start:start + T] = k, v
            k, v = cached_k[:, :, :start + T], cached_v[:, :, :start + T]  # (B, heads, start + T, C / heads)
        y, context = [], T - (mask.size(2) if mask is not None else 0)
        if reads > T - context:     # the context is plain causal: half the work of a mask
            y.append(F.scaled_dot_product_attention(q[:, :, :context], k[:, :, :context], v[:, :, :context], is_causal=True))
        if mask is not None:
            y.append(F.scaled_dot_product_attention(q[:, :, context:], k, v, attn_mask=mask))
        y = torch.cat(y, dim=2).transpose(1, 2).reshape(B, reads, C)
        return self.c_proj(y)                                              # (B, reads, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, start, reads):
        """x: (B, T, C). Returns (B, reads, C): the last `reads` tokens. What is only attended to needs no output."""
        x = x[:, x.size(1) - reads:] + self.attn(self.ln_1(x), mask, cache, start, reads)
        return x + self.mlp(self.ln_2(x))


def tree_mask(branch, context, dtype):
    """Who sees whom: token q attends to token k iff k <= q in the row and k is in the prompt or in q's own response.

    branch: (B, T), 0 for the prompt, k for response k, -1 for padding (which sees itself, so that no row of the
    softmax is empty, and which nothing else sees). context: the first columns, prompt in every row, which need no mask.
    Returns (B, 1, T - context, T), 0 where q may look and -inf where not, to be added to the scores; the 1 for the heads.
    """
    T = branch.size(1)
    query, key = branch[:, context:, None], branch[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()[context:]
    visible = causal & ((key == 0) | (key == query))                 # (B, T - context, T)
    return torch.zeros(visible.shape, dtype=dtype, device=branch.device).masked_fill(~visible, -math.inf).unsqueeze(1)


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, the final layer norm: everything below a head."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens, position, mask=None, cache=None, start=0, reads=None):
        """tokens, position: (B, T). mask: for the last columns, (B, 1, columns, keys), or None for plain causal attention.
        cache: for each layer a pair of (B, heads, columns, C / heads) tensors that this call fills from column `start`.
        Returns (B, reads, C), the last `reads` columns of the last layer (default: all)."""
        T = tokens.size(1)
        x = self.wte(tokens) + self.wpe(position)                    # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, mask, cache and cache[i], start, T if block is not self.h[-1] else reads or T)
        return self.ln_f(x)

    def tree(self, batch):
        """TreeBatch -> (B, T - context, C). The context is what responses look at and nobody reads: the last layer leaves
        it out, and below it costs no mask."""
        mask = tree_mask(batch.branch, batch.context, self.wte.weight.dtype)
        return self(batch.tokens, batch.position, mask, reads=mask.size(2))


class TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] for R tokens, by hand. Over a vocabulary of 50,000 the logits are the largest
    array there is, and passes over memory are what they cost: this one writes exp(logits) over the logits, and the gradient,
    one-hot(target) - softmax, over that, where autograd would make an array for each."""
    ROWS = 1024      # at a time: with GPT-2's vocabulary, 200 MB

    @staticmethod
    def forward(ctx, hidden, weight, target, keep):
        """hidden: (R, C), weight: (vocab, C), target: (R,) -> (R,) float32. keep: there will be a backward pass."""
        logps, ctx.kept = [], []
        for h, t in zip(hidden.split(TargetLogps.ROWS), target.split(TargetLogps.ROWS)):
            logits = h @ weight.t()                                         # (rows, vocab)
            top, wanted = logits.amax(dim=1, keepdim=True), logits.gather(1, t[:, None])       # (rows, 1) each
            exp = logits.sub_(top).exp_()                                   # (rows, vocab), in place
            # A sum in float32 copies what is bfloat16: a few rows at a time, the copy stays in the cache.
            total = torch.cat([part.sum(dim=1, keepdim=True, dtype=torch.float32) for part in exp.split(32)])   # (rows, 1)
            logps.append((wanted.float() - top.float() - total.log())[:, 0])
            if keep:
                ctx.kept.append((h, t, exp, total))
        ctx.weight = weight
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = [], None
        for g in grad[:, None].split(TargetLogps.ROWS):                     # g: (rows, 1)
            h, t, exp, total = ctx.kept.pop(0)      # it is overwritten, and freed: there is no second backward pass
            grad_logits = exp.mul_((-g / total).to(exp.dtype))              # (rows, vocab), in place: -g * softmax
            grad_logits[torch.arange(len(t), device=t.device), t] += g[:, 0].to(exp.dtype)     # + g * one-hot
            grad_hidden.append(grad_logits @ ctx.weight)                    # (rows, C)
            grad_weight = grad_logits.t() @ h if grad_weight is None else grad_weight.addmm_(grad_logits.t(), h)    # (vocab, C)
            del exp, grad_logits
        return torch.cat(grad_hidden), grad_weight, None, None


target_logps = torch.compiler.disable(TargetLogps.apply)      # torch.compile would make new arrays for what is done in place


def init_weights(module, config):
    """GPT-2's initialisation: N(0, 0.02), projections back into the residual stream scaled by 1 / sqrt(2 layers)."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
            nn.init.normal_(parameter, std=0.02 / scale)


def draw(logits, temperature, generator):
    """One token for each row, from softmax(logits / temperature); the most likely one if temperature is 0.

    By inverting the distribution function: one random number a row, where torch.multinomial draws one for each token of
    the vocabulary, a quarter of the time of sampling from a small model. logits: (B, vocab) float32 -> (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=1)
    kind = torch.float32 if logits.device.type == "mps" else torch.float64            # mps has no float64
    cumulative = F.softmax(logits / temperature, dim=1).to(kind).cumsum(dim=1)        # (B, vocab)
    where = logits.device if generator is None else generator.device                  # torch_xla has no generator of its own
    random = torch.rand(len(logits), 1, generator=generator, device=where, dtype=kind).to(logits.device)    # in [0, 1)
    token = torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)   # the first with more below it than that
    return token.squeeze(1).clamp(max=logits.size(1) - 1)


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

    def logits(self, tokens):
        """Plain causal logits, for every position. tokens: (B, T) int64 -> (B, T, vocab)."""
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)     # (B, T)
        return self.lm_head(self.transformer(tokens, position))

    def response_logps(self, batch):
        """Summed log-probability of every response given its prompt, in nats. TreeBatch -> (B, K) float32."""
        B, K = batch.last.size()
        hidden = self.transformer.tree(batch)                              # (B, T - context, C)
        # Rows of (B * (T - context), C), looked up as in an embedding: where responses share a predictor, its gradient is added up in a
        # fixed order, so that runs repeat to the byte; indexing with [] adds in any order on several threads.
        hidden = F.embedding(batch.predictor, hidden.flatten(0, 1))        # (R, C), R = response tokens in the batch
        weight, device = self.lm_head.weight, hidden.device.type
        if torch.is_autocast_enabled(device):      # bfloat16 products; what is added up after them stays float32
            hidden, weight = hidden.to(torch.get_autocast_dtype(device)), weight.to(torch.get_autocast_dtype(device))
        logps = target_logps(hidden, weight, batch.target, torch.is_grad_enabled())        # (R,)
        slots = torch.zeros(B * K + 1, device=logps.device).index_add(0, batch.slot, logps)
        return slots[:-1].view(B, K)                                       # the last slot collects padding

    forward = response_logps      # what torch.compile and DistributedDataParallel call

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop=None, generator=None, batch_size=None, on_token=None):
        """Samples one response for each prompt.

        prompts: list of non-empty token lists, none longer than block_size. temperature: 0 takes the most likely token.
        stop: the token that ends a response (it is part of the response). generator: a torch.Generator; the global random
        stream is left alone if it is given. batch_size: prompts at a time (default: up to 256, as the cache's memory
        allows). on_token: called after every step with the list of its new tokens, for streaming the response to one prompt.
        Responses also end after max_new_tokens, or where prompt and response fill block_size. Returns a list of token lists,
        in the order of the prompts.
        """
        if batch_size is None:
            columns = max(map(len, prompts), default=0) + max_new_tokens
            batch_size = max(1, min(256, 65_536 // columns))      # GPT-2 small: 4.8 GB of float32 keys and values at most
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))     # little padding in a batch
        responses = [None] * len(prompts)
        for at in range(0, len(prompts), batch_size):
            rows = longest_first[at:at + batch_size]
            batch = [prompts[i] for i in rows]
            for i, response in zip(rows, self._generate_batch(batch, max_new_tokens, temperature, stop, generator, on_token)):
                responses[i] = response
        return responses

    def _generate_batch(self, prompts, max_new_tokens, temperature, stop, generator, on_token):
        config, device = self.config, self.lm_head.weight.device
        B, T = len(prompts), max(len(prompt) for prompt in prompts)
        if not all(0 < len(prompt) <= config.block_size for prompt in prompts):
            raise ValueError(f"prompts must have 1 to {config.block_size} tokens")
        max_new_tokens = min(max_new_tokens, config.block_size - min(len(prompt) for prompt in prompts))
        tokens = torch.zeros(B, T, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        tokens, length = tokens.to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)   # (B, T), (B,)

        # Column c of the cache is prompt token c, padding on the right, up to T; new token t of every row is column
        # T + t. A new token sees its row's prompt and all new columns so far.
        column = torch.arange(T + max_new_tokens, device=device)
        visible = ((column < length[:, None]) | (column >= T))[:, None, None]        # (B, 1, 1, columns)
        shape = (B, config.n_head, T + max_new_tokens, config.n_embd // config.n_head)
        dtype = self.lm_head.weight.dtype if not torch.is_autocast_enabled(device.type) else torch.get_autocast_dtype(device.type)
        cache = [(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
                 for _ in range(config.n_layer)]

        hidden = self.transformer(tokens, torch.arange(T, device=device).expand(B, T), cache=cache)   # (B, T, C)
        hidden = hidden[torch.arange(B, device=device), length - 1]                   # (B, C) at each last prompt token
        rows, ended = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
        new = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
        for t in range(max_new_tokens):
            logits = self.lm_head(hidden).float()                                     # (B, vocab)
            token = draw(logits, temperature, generator)                              # (B,)
            new[rows, t] = token
            if on_token is not None:
                on_token(token.tolist())
            if stop is not None:
                ended |= token == stop
                going = int((~ended).sum())
                if going == 0:
                    break
                if going <= len(rows) // 2:       # go on with the rows that have not ended: half the work
                    keep = ~ended
                    rows, token, length, visible, ended = (x[keep] for x in (rows, token, length, visible, ended))
                    cache = [(cached_k[keep], cached_v[keep]) for cached_k, cached_v in cache]
            if t + 1 < max_new_tokens:
                position = (length + t).clamp(max=config.block_size - 1)              # rows past the end are cut below
                hidden = self.transformer(token[:, None], position[:, None], visible[..., :T + t + 1], cache, T + t)[:, 0]

        responses = []
        for prompt, response in zip(prompts, new.tolist()):
            response = response[:config.block_size - len(prompt)]
            responses.append(response[:response.index(stop) + 1] if stop in response else response)
        return responses

    @classmethod
    def from_pretrained(cls, dir_or_hub_name):
        """Reads a GPT-2 checkpoint in Hugging Face layout, from a folder or, if there is none, from the hub."""
        config, tensors = read_checkpoint(dir_or_hub_name)
        if "score.weight" in tensors:
            raise InputError(f"{dir_or_hub_name}: this is a reward model, not a language model")
        model = cls(gpt_config(config, dir_or_hub_name))
        if model.config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors.get("transformer.wte.weight")
        load_tensors(model, tensors, dir_or_hub_name)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        """Writes config.json and model.safetensors, which `transformers` loads as a GPT2LMHeadModel. eos_token_id: the token
        that ends a text (default: the last one)."""
        tensors = self.state_dict()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        write_checkpoint(directory, tensors, self.config, eos_token_id, architectures=["GPT2LMHeadModel"])


# ---------------------------------------------------------------- checkpoints in Hugging Face's GPT-2 layout

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")   # HF's Conv1D: (in, out)


def gpt_config(config, where):
    """The GPTConfig in a Hugging Face config.json (a dict)."""
    if config.get("model_type") != "gpt2":
        raise InputError(f"{where}: config.json says model_type {config.get('model_type')!r}, and only 'gpt2' is supported")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(f"{where}: config.json says activation_function {activation!r}, and only 'gelu_new' is supported")
    for name, supported in (("layer_norm_epsilon", 1e-5), ("scale_attn_weights", True),
                            ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(name, supported) != supported:
            raise InputError(f"{where}: config.json says {name} {config[name]!r}, and only {supported!r} is supported")
    names = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
             "n_embd": "n_embd"}
    missing = [name for name in names.values() if name not in config]
    if missing:
        raise InputError(f"{where}: config.json has no {missing[0]!r}")
    for name in names.values():
        if not isinstance(config[name], int) or config[name] < 1:
            raise InputError(f"{where}: config.json says {name} {config[name]!r}, which is not a positive whole number")
    if config["n_embd"] % config["n_head"]:
        raise InputError(f"{where}: config.json says n_head {config['n_head']}, which does not divide n_embd {config['n_embd']}")
    return GPTConfig(**{ours: config[theirs] for ours, theirs in names.items()},
                     tie_word_embeddings=config.get("tie_word_embeddings", True))


def read_checkpoint(dir_or_hub_name):
    """-> (config.json as a dict, {name: tensor} with the names and shapes of this file's modules)."""
    is_folder, reason = os.path.isdir(dir_or_hub_name), None
    if not is_folder and (str(dir_or_hub_name).startswith((".", "/", "~", "out/")) or str(dir_or_hub_name).count("/") > 1):
        raise InputError(f"{dir_or_hub_name}: no such folder")     # not "name" or "owner/name": don't ask the hub

    def find(filename):
        """The path of a file in the folder, or of its copy from the hub; None if there is none."""
        nonlocal reason
        if is_folder:
            path = os.path.join(dir_or_hub_name, filename)
            return path if os.path.isfile(path) else None
        try:
            from huggingface_hub import hf_hub_download     # comes with datasets
            return hf_hub_download(dir_or_hub_name, filename)
        except Exception as error:     # the hub raises a dozen kinds, from offline to misspelt
            reason = reason or type(error).__name__
            return None

    def find_or_fail(filename):
        if path := find(filename):
            return path
        if is_folder:
            raise InputError(f"{dir_or_hub_name}: no {filename} in this folder (is the run finished?)")
        raise InputError(f"{dir_or_hub_name}: no such folder, and the hub gave no {filename} ({reason}); without network, copy the "
                         "model's config.json and model.safetensors into a folder and name that")

    try:
        with open(find_or_fail("config.json"), encoding="utf-8") as file:
            config = json.load(file)
        if path := find("model.safetensors"):
            tensors = load_file(path)
        elif path := find("model.safetensors.index.json"):         # large checkpoints come in several files
            with open(path, encoding="utf-8") as file:
                shards = sorted(set(json.load(file)["weight_map"].values()))
            tensors = {name: tensor for shard in shards for name, tensor in load_file(find_or_fail(shard)).items()}
        elif path := find("pytorch_model.bin"):                    # old ones come as torch's own file
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(find_or_fail("model.safetensors"))      # which says that it is not there
    except InputError:
        raise
    except Exception as error:     # torch and safetensors raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{dir_or_hub_name}: unreadable checkpoint: {reason}") from error
    if not isinstance(config, dict) or not isinstance(tensors, dict) or not all(
            isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
        raise InputError(f"{dir_or_hub_name}: unreadable checkpoint: not a configuration with named tensors")
    named = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):       # old checkpoints store the causal mask
            continue
        if name.split(".")[0] in ("wte", "wpe", "h", "ln_f"):         # saved from a bare GPT2Model
            name = "transformer." + name
        named[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return config, named


def load_tensors(model, tensors, where):
    """model.load_state_dict, with a checkpoint of another shape reported in one line."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if tensors.get(name) is None:
            raise InputError(f"{where}: the checkpoint has no tensor {name!r}")
        if tensors[name].shape != tensor.shape:
            raise InputError(f"{where}: {name!r} has shape {tuple(tensors[name].shape)}, and config.json asks for "
                             f"{tuple(tensor.shape)}")
    unknown = sorted(set(tensors) - set(wanted))
    if unknown:
        raise InputError(f"{where}: the checkpoint has a tensor {unknown[0]!r}, which config.json has no place for")
    model.load_state_dict(tensors)


def write_checkpoint(directory, tensors, config, eos_token_id, **fields):
    """Writes config.json and model.safetensors. The flags that a run keeps in its config.json stay there."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "config.json")
    end = config.vocab_size - 1 if eos_token_id is None else eos_token_id
    flags = run_flags(directory)
    known = {"nanopref": flags} if flags else {}
    known.update(model_type="gpt2", n_positions=config.block_size, n_ctx=config.block_size, vocab_size=config.vocab_size,
                 n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, activation_function="gelu_new",
                 layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                 tie_word_embeddings=config.tie_word_embeddings, bos_token_id=end, eos_token_id=end, **fields)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=2)
        file.write("\n")
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    tensors = {name: (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous() for name, tensor in tensors.items()}
    temporary = os.path.join(directory, "model.safetensors.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, os.path.join(directory, "model.safetensors"))      # nothing half-written
