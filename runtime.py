"""What both training loops share and nobody needs to read first: flags, errors, device set-up, the learning-rate
schedule, the cache of everything constant, passes over a data set, logging and checkpoints."""
import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import sys

import numpy as np
import torch
from tqdm import tqdm


# ---------------------------------------------------------------- errors and flags

class InputError(ValueError):
    """Something that the user gave is wrong. The message names it and says what would be right."""


def run(main):
    """Runs a script. An InputError becomes one line on standard error and exit code 2, with no traceback."""
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and says in one line what is wrong."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(message)


def positive(kind):
    """A flag's type: a number above zero."""
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"       # argparse prints it: "invalid positive int value: '0'"
    return parse


def not_negative(kind):
    """A flag's type: a number, zero or above."""
    def parse(text):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise ValueError
        return value
    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def seed(text):
    """A flag's type: what random generators take."""
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise ValueError
    return value


def fraction(text):
    """A flag's type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def device_flags(parser):
    """Where to compute and in what precision: what every script asks."""
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps", "xla"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of matrix products; weights, losses and sums stay float32 (auto: bfloat16 on cuda and xla)")


def shared_flags(doc):
    """The flags that train_policy.py and train_rm.py have in common. A default of None is resolved by the script."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tinytldr", help="tinytldr, a JSONL/JSON/CSV/Parquet file, or a hub name")
    parser.add_argument("--out_dir", help="the run folder")
    parser.add_argument("--init_from", help="a run folder, a Hugging Face GPT-2 folder or hub name, or scratch")
    parser.add_argument("--tokenizer", help="tinytldr, or a tiktoken name (default: that of --init_from, else gpt2)")
    parser.add_argument("--max_steps", type=positive(int), help="optimizer steps")
    parser.add_argument("--batch_size", type=positive(int), help="rows (pairs) per optimizer step")
    parser.add_argument("--micro_batch_size", type=positive(int), help="rows per forward pass (default: the batch)")
    parser.add_argument("--lr", type=positive(float), help="peak learning rate: warm-up over 5%% of the steps, then a "
                                                           "cosine down to a tenth")
    parser.add_argument("--weight_decay", type=not_negative(float), default=0.0, help="AdamW's")
    parser.add_argument("--grad_clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=seed, default=0, help="of the data, of initialisation and of the batch order")
    parser.add_argument("--eval_every", type=positive(int), help="steps between evaluations, at which state is saved too")
    parser.add_argument("--n_eval", type=positive(int), default=256, help="rows in each evaluation during training")
    device_flags(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out_dir")
    # the preference data
    parser.add_argument("--rho", help="fraction of the training pairs in which the longer response is preferred, or 'all' "
                                      "for all pairs as they are (default: 0.2 on tinytldr, else all)")
    parser.add_argument("--n_pairs", type=positive(int), help="training pairs (default: 4000 on tinytldr, else all)")
    parser.add_argument("--pool", type=positive(int), default=10_000, help="tinytldr: pairs sampled, to choose from")
    parser.add_argument("--hard_labels", action="store_true", help="tinytldr: the higher oracle reward always wins")
    parser.add_argument("--relabel", help="a reward-model run folder: relabel the pairs of --data by it, as an oracle")
    return parser


def resolve_rho(args):
    """--rho as a number, or None for all pairs."""
    rho = args.rho if args.rho is not None else "0.2" if args.data == "tinytldr" else "all"
    try:
        return None if rho == "all" else fraction(rho)
    except ValueError:
        raise InputError(f"--rho: a fraction between 0 and 1, or all; not {rho!r}") from None


# ---------------------------------------------------------------- device

def setup(args):
    """-> (device, autocast): where to compute, and a function that makes the context to compute in."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "xla":
        try:
            import torch_xla
        except ImportError:
            raise InputError("--device=xla needs torch_xla: pip install torch_xla") from None
        device = torch_xla.device()
    elif (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device={name}: this machine has none; use --device=cpu")
    else:
        device = torch.device(name)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if name in ("cuda", "xla") else "float32"
    keep_memory()
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if args.dtype == "float32":
        return device, contextlib.nullcontext
    return device, lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def keep_memory():
    """Tells glibc to keep freed memory for the next step. Otherwise every large array is given back to the system when it is
    freed, and comes back one page at a time, each zeroed first: a fifth of a step on a CPU (LOG.md)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):       # another C library has other habits
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD: take what is below 1 GiB from the heap
        libc.mallopt(-1, -1)           # M_TRIM_THRESHOLD: never give the heap back


def check_out_dir(out_dir, flag="--out_dir"):
    """Says before the work, not after it, that a folder can't be made."""
    above = os.path.abspath(out_dir)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise InputError(f"{flag}: {out_dir!r} can't be made: {above!r} is {'a file' if os.path.isfile(above) else 'not writable'}")


def load_policy(args, device):
    """-> (policy, tokenizer): what --init_from means, a new model or a checkpoint, with the tokenizer that goes with it."""
    from data import get_tokenizer            # here, as data.py and model.py stand on this file
    from model import GPT, GPTConfig
    for flag in ("init_from", "rewards", "relabel"):
        for folder in (getattr(args, flag, None) or "").split(","):
            if folder and os.path.realpath(folder) == os.path.realpath(args.out_dir):
                raise InputError(f"--out_dir: {folder!r} is also --{flag}, which would be overwritten; name another folder")
    check_out_dir(args.out_dir)
    args.tokenizer = (args.tokenizer or run_flags(args.init_from).get("tokenizer")
                      or ("tinytldr" if args.data == "tinytldr" else "gpt2"))
    tokenizer = get_tokenizer(args.tokenizer)
    if args.init_from == "scratch":
        policy = GPT(GPTConfig(args.block_size, tokenizer.n_vocab, args.n_layer, args.n_head, args.n_embd))
    else:
        policy = GPT.from_pretrained(args.init_from)
    if policy.config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"--tokenizer: {args.tokenizer} has {tokenizer.n_vocab} tokens, the model of --init_from="
                         f"{args.init_from} only {policy.config.vocab_size}")
    return policy.to(device), tokenizer


def adamw(model, args, device):
    """The optimizer of both training scripts; its learning rate is set before every step."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                             fused=device.type in ("cpu", "cuda"))


def shape_multiple(device):
    """What `collate` rounds shapes up to, to be asked under autocast. torch_xla compiles each shape anew, and so does the CPU's library for bfloat16
    products (a third of a step when every batch has another shape), so they should see few."""
    return 128 if device.type == "xla" else 32 if torch.is_autocast_enabled(device.type) else 1


def end_step(device):
    """torch_xla runs a step's graph here; elsewhere there is nothing to do."""
    if device.type == "xla":
        import torch_xla
        torch_xla.sync()


def learning_rate(step, max_steps, peak):
    """Linear warm-up over the first 5% of the steps, then a cosine from the peak down to a tenth of it."""
    warmup = max(1, max_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- the cache: what is constant is computed once

def key(*parts):
    """A short hash of bytes, arrays and printable values, for the names of cached files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def hash_weights(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_examples(examples):
    digest = hashlib.sha256()
    for prompt, responses in examples:
        for ids in (prompt, *responses):
            digest.update(np.asarray(ids, np.int32).tobytes() + b"|")
        digest.update(b"\n")
    return digest.hexdigest()


def cached(folder, name, key, compute):
    """compute()'s value (anything that JSON can hold), from folder/name-key.json if it is there."""
    path = os.path.join(folder, f"{name}-{key}.json")
    if os.path.exists(path):
        print(f"{name}: from {path}")
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    value = compute()
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"      # two runs from one reference may be at it at the same time
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)
    return value


def cache_folder(init_from, out_dir):
    """The reference's own folder, so that all policies trained from it share one cache; the run's for a hub name."""
    return os.path.join(init_from if os.path.isdir(init_from) else out_dir, "cache")


# ---------------------------------------------------------------- passes over a data set

@torch.no_grad()
def score(model, examples, autocast=contextlib.nullcontext, tokens_per_batch=16_384, desc="score"):
    """model(TreeBatch) -> (b, K), over all examples: log-probs from a policy, rewards from a reward model. (N, K) array."""
    from data import collate
    device = next(model.parameters()).device
    sizes = np.array([len(prompt) + sum(map(len, responses)) for prompt, responses in examples])
    out, order, at = np.zeros((len(examples), len(examples[0][1])), np.float32), np.argsort(-sizes, kind="stable"), 0
    with tqdm(total=len(examples), desc=desc, disable=None, leave=False) as bar:
        while at < len(order):
            rows = order[at:at + max(1, tokens_per_batch // sizes[order[at]])]       # longest rows first
            with autocast():
                batch = collate([examples[i] for i in rows], shape_multiple(device)).to(device)
                out[rows] = model(batch).float().cpu().numpy()
            at += len(rows)
            bar.update(len(rows))
    return out


def sample(model, tokenizer, prompts, block_size, max_new_tokens=64, temperature=1.0, seed=0, autocast=contextlib.nullcontext,
           desc="sample"):
    """One response for each prompt. prompts: texts or lists of token ids. Returns (texts, lists of token ids), the ids
    with their end-of-text token (if the response came to its end) and the texts without.

    The random numbers come from a generator of their own: sampling never touches the training's random stream."""
    room = max(1, block_size - max_new_tokens)
    ids = [tokenizer.encode_ordinary(p)[-room:] if isinstance(p, str) else list(p) for p in prompts]
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu" if device.type == "xla" else device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    responses, size = [], 1024
    with tqdm(total=len(ids), desc=desc, disable=None, leave=False) as bar, autocast():
        for at in range(0, len(ids), size):
            responses += model.generate(ids[at:at + size], max_new_tokens, temperature, tokenizer.eot_token, generator)
            bar.update(len(responses) - at)
    texts = [tokenizer.decode([token for token in r if token != tokenizer.eot_token]) for r in responses]
    return texts, responses


# ---------------------------------------------------------------- the run folder

NOT_PART_OF_THE_RUN = {"out_dir", "resume", "device", "compile"}      # flags that may change on --resume


class Run:
    """A run folder: config.json (the flags, under "nanopref", beside the model's shape), metrics.jsonl, the model, and
    state.pt for resuming. A context manager, so that the metrics file is closed."""

    def __init__(self, args, model, optimizer, constants):
        """constants: a hash of what training takes as given (reference, data, rewards): resuming needs the same."""
        self.dir, self.model, self.optimizer, self.constants, self.first_step = args.out_dir, model, optimizer, constants, 0
        flags = vars(args)
        if args.resume:
            self._resume(flags)
        else:
            os.makedirs(self.dir, exist_ok=True)
            for stale in ("model.safetensors", "state.pt", "metrics.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.dir, stale))
            with open(os.path.join(self.dir, "config.json"), "w", encoding="utf-8") as file:
                json.dump({"nanopref": flags}, file, indent=2)
        self.file = open(os.path.join(self.dir, "metrics.jsonl"), "a", encoding="utf-8")

    def _resume(self, flags):
        before, path = run_flags(self.dir), os.path.join(self.dir, "state.pt")
        if not os.path.exists(path):
            raise InputError(f"--resume: there is no state.pt in {self.dir!r}; leave --resume out to start from the beginning")
        for name, value in flags.items():
            if name not in NOT_PART_OF_THE_RUN and before.get(name) != value:
                raise InputError(f"--resume: --{name} was {before.get(name)!r} and is {value!r}; it has to stay the same")
        metrics = os.path.join(self.dir, "metrics.jsonl")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            with open(metrics, encoding="utf-8") as file:
                lines = file.readlines()
        except Exception as error:     # torch raises many kinds for a damaged file
            raise InputError(f"--resume: state.pt or metrics.jsonl in {self.dir!r} is missing or damaged; leave --resume out to "
                             f"start from the beginning ({type(error).__name__})") from error
        if state["constants"] != self.constants:
            raise InputError("--resume: the reference, the data or the rewards have changed since the run began; start it again")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.first_step = state["step"]
        with open(metrics, "w", encoding="utf-8") as file:     # what was logged after the saved state will be logged again
            file.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < self.first_step)
        print(f"resumed {self.dir} at step {self.first_step}")

    def log(self, step, **values):
        """One line of metrics.jsonl. No times in it: the same seed gives the same bytes."""
        if not all(map(math.isfinite, values.values())):
            raise InputError(f"--lr: training diverged before step {step}: {values}; try a lower learning rate")
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def save_state(self, step):
        """All that `--resume` needs, in one file, so that the weights and the optimizer always belong together."""
        path = os.path.join(self.dir, "state.pt")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step,
                    "constants": self.constants, "rng": torch.get_rng_state()}, path + ".tmp")
        os.replace(path + ".tmp", path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def run_flags(folder):
    """The flags that a run was started with, from its config.json; {} for a folder that is no run of ours."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            flags = json.load(file).get("nanopref") or {}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path}: 'nanopref' is not an object of flags")
    return flags
