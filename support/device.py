"""Decides where to compute, in what precision, and with how many processes.

torchrun starts several processes, one for each accelerator:

    torchrun --nproc_per_node=N train_policy.py ...

All of them run the same script and draw the same batches. Each computes its share of the rows. Then
gradients and logged sums are added up, so that a run does not depend on how many processes there
are. The first one writes the files. Each process has the whole model, or with --fsdp a part of each
weight, of its gradient and of the optimizer's state. Files always hold whole tensors, so a run can
be resumed with any number of processes. Without torchrun there is one process, and the functions
for several do nothing.

If a process ends, the others say so (flags.lost_processes) and end too.
"""
import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from support.flags import OTHERS_ENDED, InputError

# What `setup` has chosen for this process. The shapes of batches are rounded up to a multiple of
# `multiple`. few_shapes: whether shapes should be few, because the device compiles a program for
# each of them (a TPU)
computing = SimpleNamespace(device="cpu", dtype="float32", multiple=1, few_shapes=False)
FEW_SHAPES = 128        # from this multiple on, shapes are powers of two times it: see round_up

BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if BY_TORCHRUN else 0        # of this process; 0 writes the files
PROCESSES = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN else 1     # how many there are

# tqdm's bar, which the first process shows, and only on a terminal
progress_bar = functools.partial(tqdm, leave=False, disable=None if RANK == 0 else True)


def setup(args):
    """Decides where this process computes, and in what precision (see `compute`). Replaces "auto"
    in --device and --dtype, seeds torch with --seed, and joins the processes of torchrun. Returns
    the torch.device. InputError if the flags ask for something that this machine does not have."""
    name = device_name(args.device)
    device = join(name)
    if name == "xla":
        import torch_xla
        device = torch_xla.device()
    flags = vars(args)
    for flag in ("batch_size", "n_eval"):
        if flags.get(flag, PROCESSES) < PROCESSES:
            raise InputError(f"--{flag}: {flags[flag]} rows are too few for {PROCESSES} processes")
    if flags.get("fsdp") and PROCESSES == 1:
        raise InputError("--fsdp: it would be ignored: there is one process; start several with "
                         "torchrun --nproc_per_node=N")
    if flags.get("fsdp") and flags["compile"]:
        raise InputError("--compile: it doesn't work with --fsdp, whose weights come and go")
    if args.dtype == "auto":
        fast = name == "xla" or name == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        args.dtype = "bfloat16" if fast else "float32"
    args.device = name
    computing.device, computing.dtype = device.type, args.dtype
    # torch_xla compiles a program for every shape, and so does the CPU's library for bfloat16
    # products. If the shapes of all batches differ, that takes a third of a step.
    computing.few_shapes = name == "xla"
    computing.multiple = 32 if args.dtype == "bfloat16" else 1
    if computing.few_shapes:
        computing.multiple = FEW_SHAPES
    keep_memory()
    if name == "cuda":      # cuDNN's attention makes a plan for every shape, and shapes vary
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(args.seed)
    return device


def device_name(name):
    """Returns the name of the device that --device stands for; "auto" is cuda if there is one, else
    cpu. InputError if this machine does not have the device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"       # mps is untried
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


def place(model, device, args):
    """Applies --gradient_checkpointing and --freeze to a model, and moves it from the CPU to the
    device, with --fsdp only this process's part. Returns the model."""
    if args.gradient_checkpointing:
        recompute_layers(model)
    if args.freeze:
        freeze(model.transformer, args.freeze)
    return shard(model, device, args.dtype) if args.fsdp else model.to(device)


def freeze(transformer, n):
    """Leaves the embeddings (and an output head that is tied to them) and the lowest n layers as
    they are. InputError if nothing above them is left to train."""
    if n >= len(transformer.h):
        raise InputError(f"--freeze={n}: the model has {len(transformer.h)} layers, and at least "
                         "one has to be trained")
    transformer.frozen = n
    for name, parameter in transformer.named_parameters():
        top = name.startswith("ln_f.") or name.startswith("h.") and int(name.split(".")[1]) >= n
        parameter.requires_grad_(top)


def recompute_layers(model):
    """Makes the backward pass compute each layer's attention and MLP again (in transformer.h),
    instead of keeping what they computed. That is most of a step's memory; it takes a third more
    time."""
    for layer in model.transformer.h:
        for part in (layer.attn, layer.mlp):
            if "forward" not in vars(part):     # a copy of such a model does so already
                part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False,
                                                 preserve_rng_state=False)  # there is no dropout


def keep_memory():
    """Tells glibc to keep freed memory for the next step. Giving it back to the system and
    getting it again page by page takes a fifth of a step on a CPU (dev/LOG.md)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):   # other C libraries lack mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD: take what is below 1 GiB from the heap
        libc.mallopt(-1, -1)           # M_TRIM_THRESHOLD: never give the heap back


def round_up(n, multiple):
    """Rounds n up to a multiple of a number. If the number is FEW_SHAPES or more, shapes should be
    few, and n is rounded up to a power of two times the number."""
    if multiple < FEW_SHAPES:
        return -(-n // multiple) * multiple
    while multiple < n:
        multiple *= 2
    return multiple


def new_generator(device, seed):
    """Returns a torch.Generator on the device, or on the CPU for torch_xla, which has none."""
    return torch.Generator("cpu" if device.type == "xla" else device).manual_seed(seed)


def random_numbers(n, rows, generator, device):
    """Draws a random number in [0, 1) for the first n of some rows; the others get 0. Returns
    (rows, 1), float64, or float32 on mps, which has no float64."""
    where = new_generator(device, 0).device if generator is None else generator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.rand(n, 1, generator=generator, device=where, dtype=dtype)
    return torch.cat([numbers, numbers.new_zeros(rows - n, 1)]).to(device)


def sync():
    """Makes torch_xla run what it has only noted so far, the graph of a step."""
    import torch_xla
    torch_xla.sync()


# ------------------------------------------------------------------ several processes


def join(name):
    """Joins the processes that torchrun has started, if it has started any. name: that of the
    device. Returns the device of this process. InputError if a program other than torchrun has
    numbered this process: it may have started several, which would not know of each other."""
    if not BY_TORCHRUN:
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            if variable in os.environ:
                raise InputError(f"{variable} is set, but torchrun did not start this process; use "
                                 "torchrun --nproc_per_node=N for several processes, or unset "
                                 f"{variable} for a single one")
        return torch.device(name)
    if name in ("mps", "xla"):
        raise InputError(f"--device={name}: torchrun's processes can't share one; use "
                         "--device=cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        atexit.register(leave)
        signal.signal(signal.SIGTERM, exit_with_the_others)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def leave():
    """Ends the threads that talk to other processes, before Python ends. A thread that is left over
    sometimes aborts the process after its work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_with_the_others(number, frame):
    """Handles the SIGTERM that torchrun sends when it is told to stop or another process has ended,
    while there is nothing to save."""
    print(f"{os.path.basename(sys.argv[0])}: error: {OTHERS_ENDED}", file=sys.stderr)
    sys.exit(128 + number)


def wait():
    """Waits until all processes are here. Called after the first one has written what all
    of them read."""
    if PROCESSES > 1:
        dist.barrier()


def micro_batches(rows, size):
    """Splits this process's share of some rows, every n-th of n processes, into parts of at most
    `size`. A model sharded by --fsdp computes in all processes at once, so every process has the
    same number of parts, and none is empty. (With size 1 a row that is left over makes a part of
    two.)"""
    if PROCESSES == 1:
        return np.split(rows, range(size, len(rows), size))
    fewest, most = len(rows) // PROCESSES, -(-len(rows) // PROCESSES)
    if fewest == 0:
        raise InputError(f"--data: {len(rows)} rows are too few for {PROCESSES} processes")
    mine, parts = rows[RANK::PROCESSES], min(-(-most // size), fewest)
    cuts = [min(size * i, len(mine) - (parts - i)) for i in range(1, parts)]    # leave one for each
    return np.split(mine, cuts)


def own_share(n):
    """Returns the numbers of the parts that this process computes, of n parts of some work. All
    processes compute equally often (see micro_batches): one that has nothing left to do computes
    the last part again."""
    return [min(first + RANK, n - 1) for first in range(0, n, PROCESSES)]


def all_shares(results):
    """Returns what all processes computed, in the order of the parts. results: {number of a part:
    result}, of this process."""
    if PROCESSES > 1:
        everyone = [None] * PROCESSES
        dist.all_gather_object(everyone, results)
        results = {number: result for some in everyone for number, result in some.items()}
    return [results[number] for number in sorted(results)]


def add_up(numbers):
    """Sums each of {name: number} over all processes."""
    if PROCESSES == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist()))


def add_up_gradients(model):
    """Gives every process the gradient of the whole batch: the sum over their shares."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(parameters[0], DTensor):      # fully_shard has averaged; we want the sum
        for p in parameters:
            p.grad.mul_(PROCESSES)
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


# ------------------------------------------------------------------ --fsdp


def shard(model, device, dtype):
    """Splits the weights of a model, which is still on the CPU, over the processes with PyTorch's
    fully_shard, so that it may be too large for one device. Each process keeps its parts, which are
    what the optimizer needs. A layer's weights are put together while it computes, those of the
    embeddings and the head while the model does. So all processes compute at the same moment, and
    equally often (`micro_batches`, `own_share`). dtype: of the matrix products. Returns the model.
    """
    # fully_shard warns of modules that return views: nothing here changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (PROCESSES,))
    kind = MixedPrecisionPolicy()
    if dtype == "bfloat16":             # computes what autocast does, which would keep whole copies
        kind = MixedPrecisionPolicy(torch.bfloat16, torch.float32)      # and send twice as much
    for layer in model.transformer.h:
        fully_shard(layer.attn, mesh=mesh, mp_policy=kind)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=kind)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole_on_cpu(state, keep=True):
    """Returns nested dictionaries and lists with every tensor made whole, on the CPU. All processes
    call this; those with keep=False get None for each tensor."""
    if isinstance(state, dict):
        return {name: whole_on_cpu(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_on_cpu(value, keep) for value in state]
    if torch.is_tensor(state):
        state = state.full_tensor() if isinstance(state, DTensor) else state
        return state.cpu() if keep else None
    return state


def trained_state(model):
    """Returns a model's state dictionary without its frozen weights, which don't change."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False)
              if not weight.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_whole(model, tensors, optimizer=None, optimizer_state=None):
    """Loads a model, and its optimizer if it is given, from state dictionaries of whole tensors."""
    own = trained_state(model)
    if own.keys() != tensors.keys():
        raise ValueError("weights of other layers")
    model.load_state_dict({name: part(tensor, own[name]) for name, tensor in tensors.items()},
                          strict=False)         # without those that are not trained
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in optimizer_state["state"].items():
            for name, value in values.items():
                if value.dim() > 0:                     # not the count of steps
                    values[name] = part(value, parameters[number])
        optimizer.load_state_dict(optimizer_state)


def part(tensor, like):
    """Returns this process's part of a whole tensor if `like` is sharded, otherwise all of it."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def unsharded(model):
    """Returns the model itself, or if it is sharded a copy with whole weights (4 bytes each), for
    sampling, in which processes need different numbers of forward passes."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)                # makes one that is not sharded
    tensors = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    copy.load_state_dict(tensors, assign=True)
    return copy
