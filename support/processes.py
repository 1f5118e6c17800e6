"""Runs on several accelerators, one process for each: torchrun --nproc_per_node=N train_policy.py
...

All go through the same script and draw the same batches. Each computes its share of the rows, and
gradients and logged sums are added up, so that a run does not depend on how many they are; the
first one writes. Without torchrun there is one process, and nothing here does anything. Each has
the whole model; with --fsdp a part of each weight, of its gradient and of the optimizer's state.
What is written to a file is whole, so that a run goes on with any number of processes.

A process that ends takes the others with it: they say so (flags.lost_processes) and end as well.
"""
import atexit
import contextlib
import ctypes
import os
import signal
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from support.flags import OTHERS_ENDED, InputError


def join(name):
    """Joins the processes that torchrun has started, if it has. name: the device's, "cpu" or
    "cuda". Returns the device of this process. InputError if another program than torchrun has set
    a process's number: it may have started several, which would not know of each other."""
    if not by_torchrun():
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
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def by_torchrun():
    """Returns whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starts_as_first():
    """Returns whether this process is the only one or torchrun's first, also before it has joined
    the others."""
    return not by_torchrun() or os.environ["RANK"] == "0"


def leave():
    """Ends the threads that talk to other processes, before Python ends: one that is left would
    sometimes abort the process after its work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_with_the_others(number, frame):
    """Handles torchrun's SIGTERM while there is nothing to save: it is told to stop, or another
    process has ended."""
    print(f"{os.path.basename(sys.argv[0])}: error: {OTHERS_ENDED}", file=sys.stderr)
    sys.exit(128 + number)


def processes():
    """Returns how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    return rank() == 0


def wait():
    """Waits until all processes are here: after the first one has written what all will read."""
    if processes() > 1:
        dist.barrier()


def share(rows):
    """Returns this process's share of some rows: every n-th, since rows may be sorted by length."""
    return rows[rank()::processes()]


def micro_batches(rows, size):
    """Splits this process's share of some rows into parts of at most `size`. Every process has as
    many parts, and none is empty: a model sharded by --fsdp computes in all processes at once.
    (Where size is 1 and one process has a row more than another, that row is in a part of two.)"""
    if processes() == 1:
        return np.split(rows, range(size, len(rows), size))
    fewest, most = len(rows) // processes(), -(-len(rows) // processes())
    if fewest == 0:
        raise InputError(f"--data: {len(rows)} rows are too few for {processes()} processes")
    mine, parts = share(rows), min(-(-most // size), fewest)
    cuts = [min(size * i, len(mine) - (parts - i)) for i in range(1, parts)]    # leave one for each
    return np.split(mine, cuts)


def share_in_step(parts):
    """Yields (part, is it this process's?), as often in every process: where there is nothing left
    to do for this one, it computes the last part again."""
    for first in range(0, len(parts), processes()):
        number = first + rank()
        yield parts[min(number, len(parts) - 1)], number < len(parts)


def first_says(value):
    """Returns what the first process has for a value: a decision that all have to take alike."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def add_up(array):
    """Sums a numpy array over all processes."""
    if processes() == 1:
        return array
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def add_up_numbers(numbers):
    """Sums each of {name: number} over all processes."""
    return dict(zip(numbers, add_up(np.array(list(numbers.values()))).tolist()))


def end_with_parent():
    """Asks Linux, where it is there, for a SIGTERM when the process that started this one ends,
    killed or not."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)          # PR_SET_PDEATHSIG


def any_of(value):
    """Returns whether a value is true in any of the processes."""
    return bool(add_up(np.array([bool(value)], np.int64))[0])


def add_up_gradients(model):
    """Gives every process the gradient of the whole batch: the sum over their shares."""
    if processes() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(parameters[0], DTensor):      # fully_shard has taken the mean
        for p in parameters:
            p.grad.mul_(processes())
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def in_shares(compute, parts):
    """Computes compute(part) of all parts, each in one process. Returns the lists, joined."""
    mine = {number: compute(parts[number]) for number in share(range(len(parts)))}
    if processes() > 1:
        everyone = [None] * processes()
        dist.all_gather_object(everyone, mine)
        mine = {number: result for results in everyone for number, result in results.items()}
    return [item for number in range(len(parts)) for item in mine[number]]


def progress_bar(**options):
    """Returns tqdm's progress bar, which the first process shows where there is a terminal."""
    return tqdm(disable=None if is_first() else True, leave=False, **options)


# ------------------------------------------------------------------ --fsdp


def shard(model, device, dtype):
    """Splits a model's weights over the processes, by PyTorch's fully_shard: a layer's weights are
    put together before it computes and dropped after it, so that a model may be too large for one
    device. Returns the model.

    model: still on the CPU, with its layers in transformer.h, each with the parts attn and mlp.
    What else it has, such as the embeddings and the head, is put together for as long as the model
    computes; between passes its parameters are all parts, as the optimizer needs them. All
    processes have to compute at the same moment: each runs as many forward and backward passes
    (`micro_batches`, `share_in_step`). dtype: of the matrix products.
    """
    # fully_shard warns of modules that return views: nothing here changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (processes(),))
    kind = MixedPrecisionPolicy()
    if dtype == "bfloat16":             # what autocast computes, but it would keep whole copies,
        kind = MixedPrecisionPolicy(torch.bfloat16, torch.float32)      # and twice as much travels
    for layer in model.transformer.h:
        fully_shard(layer.attn, mesh=mesh, mp_policy=kind)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=kind)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def full(tensor):
    """Returns a tensor as a whole, in every process. All of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state, keep=True):
    """Returns nested dictionaries and lists with every tensor as a whole, on the CPU. All processes
    have to call this; those with keep=False, which write nothing, get None for tensors."""
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if torch.is_tensor(state):
        state = full(state)
        return state.cpu() if keep else None
    return state


def trained_state(model):
    """Returns a model's state dictionary without what stays as it is: its frozen weights."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False)
              if not weight.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_whole(model, tensors, optimizer=None, optimizer_state=None):
    """Loads a model, and its optimizer, from state dictionaries of whole tensors."""
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


def gathered(model):
    """Returns the model itself or, if it is sharded, a copy with whole weights, for sampling: each
    token is a forward pass, and processes have different numbers of them. The copy takes 4 bytes
    for each parameter, on every device."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)                # makes one that is not sharded
    copy.load_state_dict({name: full(tensor) for name, tensor in model.state_dict().items()},
                         assign=True)
    return copy
