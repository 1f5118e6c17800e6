"""Generation in shapes that never change, for devices that compile every new shape (torch_xla).

It draws the same tokens from the same random numbers as GPT.generate, of which it is a part; what
differs is that rows that have ended go on to the end of their batch, and that nothing is sliced by
how far the generation has come: the cache's last column is always the newest token.
"""
import numpy as np
import torch
import torch.nn.functional as F

from support.device import FEW_SHAPES, random_numbers, round_up, sync
from support.logprobs import head_weight, product_type
from support.sampling import draw


def generate_static(gpt, prompts, max_new_tokens, temperature, stop, generator, on_token=None,
                    top_k=None, top_p=None, batch_size=256):
    """One response for each of at most batch_size prompts. gpt: a model.GPT; the others as in
    GPT.generate. Returns lists of tokens."""
    config, device = gpt.config, gpt.lm_head.weight.device
    n_prompts, lengths = len(prompts), [len(prompt) for prompt in prompts]
    steps = min(max_new_tokens, config.block_size - min(lengths))
    B = 8 if n_prompts <= 8 else batch_size             # rows of padding repeat the first prompt
    T = round_up(max(lengths), FEW_SHAPES // 2)
    tokens = np.zeros((B, T), np.int64)
    for row in range(B):
        prompt = prompts[row if row < n_prompts else 0]
        tokens[row, :len(prompt)] = prompt
    length = np.array(lengths + [lengths[0]] * (B - n_prompts))
    visible = np.zeros((B, 1, 1, T + max_new_tokens), bool)
    visible[:, 0, 0, :T] = np.arange(T) < length[:, None]       # the prompt; no new token as yet
    tokens, length, visible = (torch.from_numpy(array).to(device)
                               for array in (tokens, length, visible))

    dtype = product_type(gpt.lm_head.weight)
    head, _ = head_weight(gpt.lm_head.weight, dtype)                    # (vocab, C)
    shape = (B, config.n_head, T + max_new_tokens, config.n_embd // config.n_head)
    keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
    values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
    position = torch.arange(T, device=device).clamp(max=config.block_size - 1).expand(B, T)
    cache = [(k, v, 0) for k, v in zip(keys, values)]
    hidden = gpt.transformer(tokens, position, cache=cache)             # (B, T, C)
    hidden = hidden[torch.arange(B, device=device), length - 1]         # (B, C)

    last = T + max_new_tokens - 1
    going, new = np.arange(n_prompts), []               # GPT.generate's rows, which set the order
    ended = np.zeros(n_prompts, bool)                   # of random numbers
    for _ in range(steps):
        random = torch.zeros(B, 1, dtype=torch.float64)
        random[going] = random_numbers(len(going), generator, torch.device("cpu"))
        logits = F.linear(hidden, head).float()                         # (B, vocab)
        token = draw(logits, temperature, random.to(device), top_k, top_p)      # (B,)
        for array in (*keys, *values):                  # one column to the left
            array[:, :, T:last] = array[:, :, T + 1:].clone()
        seen = torch.ones_like(visible[..., :1])
        visible = torch.cat([visible[..., :T], visible[..., T + 1:], seen], dim=3)
        position = length.clamp(max=config.block_size - 1)[:, None]     # (B, 1)
        length = length + 1
        cache = [(k, v, last) for k, v in zip(keys, values)]
        hidden = gpt.transformer(token[:, None], position, visible, cache)[:, 0]
        sync(device)
        new.append(token.cpu().numpy()[:n_prompts])
        if on_token is not None:
            on_token(new[-1].tolist())
        if stop is not None:
            ended[going] |= new[-1][going] == stop
            if ended[going].all():
                break
            if (~ended[going]).sum() <= len(going) // 2:
                going = going[~ended[going]]

    responses = []
    for prompt, response in zip(prompts, np.stack(new, axis=1).tolist()):
        response = response[:config.block_size - len(prompt)]
        if stop in response:
            response = response[:response.index(stop) + 1]
        responses.append(response)
    return responses
