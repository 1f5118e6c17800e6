"""Decides where to compute, in what precision, and with what memory."""
import contextlib
import ctypes
import functools
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

from support.flags import InputError
from support.processes import join, processes, shard

# The device and the precision of this process, as setup chose them
computing = SimpleNamespace(device="cpu", dtype="float32")


def setup(args):
    """Decides where this process computes, and in what precision: see `compute`. Resolves --device
    and --dtype ("auto" in `args` is replaced), and seeds torch with --seed. Returns the
    torch.device."""
    name = device_name(args.device)
    device = join(name)
    if name == "xla":
        import torch_xla
        device = torch_xla.device()
    check_shares(vars(args))
    if args.dtype == "auto":
        fast = name == "xla" or name == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        args.dtype = "bfloat16" if fast else "float32"
    args.device = name
    computing.device, computing.dtype = device.type, args.dtype
    keep_memory()
    if name == "cuda":      # cuDNN's attention makes a plan for every shape, and shapes vary
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(args.seed)
    return device


def compute():
    """Returns the context in which every model runs. With --dtype=bfloat16 the matrix products are
    bfloat16 (torch.autocast); otherwise it changes nothing."""
    return torch.autocast(computing.device, torch.bfloat16, enabled=computing.dtype == "bfloat16")


@contextlib.contextmanager
def in_float32():
    """Computes in float32 inside the block, whatever --dtype says."""
    dtype, computing.dtype = computing.dtype, "float32"
    try:
        yield
    finally:
        computing.dtype = dtype


def device_name(name):
    """Returns the name of the device that --device means, "auto" too. InputError if this machine
    has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"       # mps: untried, if asked for
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if name == "xla":
        try:
            import torch_xla  # noqa: F401
        except ImportError:
            raise InputError("--device=xla needs torch_xla, of torch's own version: pip install "
                             "torch==2.9.0 'torch_xla[tpu]==2.9.0' (without [tpu] it computes on "
                             "the CPU, with PJRT_DEVICE=CPU)") from None
    elif missing.get(name):
        raise InputError(f"--device={name}: this machine has none; use --device=cpu")
    elif name == "mps" and torch.__version__ < (2, 12):
        raise InputError(f"--device=mps: torch {torch.__version__} has attention kernels that are "
                         "wrong there; install 2.12 or newer")
    return name


def check_shares(flags):
    """Raises InputError if several processes can't share the rows of a batch, or one has to
    share."""
    for name in ("batch_size", "n_eval"):
        if flags.get(name, processes()) < processes():
            raise InputError(f"--{name}: {flags[name]} rows are too few for {processes()} "
                             "processes")
    if flags.get("fsdp") and processes() == 1:
        raise InputError("--fsdp: it would be ignored: there is one process; start several by "
                         "torchrun --nproc_per_node=N")
    if flags.get("fsdp") and flags["compile"]:
        raise InputError("--compile: not with --fsdp, whose weights come and go")


def keep_memory():
    """Tells glibc to keep freed memory for the next step. Otherwise every large array is given back
    to the system when it is freed, and comes back one page at a time, each zeroed first: a fifth of
    a step on a CPU (dev/LOG.md)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):   # other C libraries have no such
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD: take what is below 1 GiB from the heap
        libc.mallopt(-1, -1)           # M_TRIM_THRESHOLD: never give the heap back


def recompute_layers(model):
    """Makes the backward pass compute each layer's attention and MLP once more instead of keeping
    what they had in between, most of a step's memory, for a third more time
    (--gradient_checkpointing).

    model: with its layers in transformer.h, each with the parts attn and mlp.
    """
    for layer in model.transformer.h:
        for part in (layer.attn, layer.mlp):
            if "forward" not in vars(part):     # else it is a copy of one that does so already
                part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False,
                                                 preserve_rng_state=False)  # there is no dropout


def place(model, device, args):
    """Moves a model, which is still on the CPU, to the device; with --fsdp only this process's part
    of it (processes.shard). Applies --gradient_checkpointing. Returns the model."""
    if args.gradient_checkpointing:
        recompute_layers(model)
    return shard(model, device, args.dtype) if args.fsdp else model.to(device)


def compiles_every_shape(device):
    """Returns whether a device compiles a program for each new shape, so that shapes should be
    few."""
    return device.type == "xla"


def shape_multiple():
    """Returns what batches' shapes are rounded up to. torch_xla compiles a program for every shape,
    and so does the CPU's library for bfloat16 products (a third of a step if all batches
    differ)."""
    if computing.device == "xla":
        return FEW_SHAPES
    return 32 if computing.dtype == "bfloat16" else 1


FEW_SHAPES = 128        # from here on shapes are powers of two


def round_up(n, multiple):
    """Rounds n up to a multiple; to a power of two times that where shapes should be few."""
    if multiple < FEW_SHAPES:
        return -(-n // multiple) * multiple
    while multiple < n:
        multiple *= 2
    return multiple


def compiled_graphs():
    """Returns how many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"]


def new_generator(device, seed):
    """Returns a torch.Generator on the device (torch_xla has none: on the CPU)."""
    return torch.Generator("cpu" if device.type == "xla" else device).manual_seed(seed)


def random_numbers(rows, n, generator, device):
    """Draws a random number in [0, 1) for each of these rows of n; the others get 0. Returns
    (n, 1), float64, or float32 on mps, which has none."""
    where = new_generator(device, 0).device if generator is None else generator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.zeros(n, 1, device=where, dtype=dtype)
    numbers[rows] = torch.rand(len(rows), 1, generator=generator, device=where, dtype=dtype)
    return numbers.to(device)


def sync(device):
    """Makes torch_xla run a step's graph; on other devices there is nothing to do."""
    if device.type == "xla":
        import torch_xla
        torch_xla.sync()
