"""Several processes, one for each accelerator: torchrun --nproc_per_node=N train_policy.py ...

All go through the same script and draw the same batches. Each computes its share of the rows, and
gradients and logged sums are added up, so that a run does not depend on how many they are; the
first one writes. Without torchrun there is one process, and nothing here does anything. Each has
the whole model; with --fsdp (sharding.py) a part of it.

A process that ends takes the others with it: they say so (flags.lost_processes) and end as well.
"""
import atexit
import contextlib
import ctypes
import os
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
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
    """Has torchrun started this process?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starts_as_first():
    """Is this process the only one or torchrun's first? Known before it has joined the others."""
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
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    return rank() == 0


def wait():
    """Until all processes are here: after the first one has written what all will read."""
    if processes() > 1:
        dist.barrier()


def share(rows):
    """This process's part of some rows: every n-th, since rows may be sorted by length."""
    return rows[rank()::processes()]


def micro_batches(rows, size):
    """This process's share of some rows, in parts of at most `size`. Every process has as many
    parts, and none is empty: a model sharded by --fsdp computes in all processes at once. (Where
    size is 1 and one process has a row more than another, that row is in a part of two.)"""
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
    """What the first process has for this value: a decision that all have to take alike."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def add_up(array):
    """A numpy array, summed over all processes."""
    if processes() == 1:
        return array
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def add_up_numbers(numbers):
    """{name: number}, each summed over all processes."""
    return dict(zip(numbers, add_up(np.array(list(numbers.values()))).tolist()))


def end_with_parent():
    """Where Linux is: this process gets a SIGTERM when the one that started it ends, killed or
    not."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)          # PR_SET_PDEATHSIG


def any_of(value):
    """Is it true in any of the processes?"""
    return bool(add_up(np.array([bool(value)], np.int64))[0])


def add_up_gradients(model):
    """Gives every process the gradient of the whole batch: the sum over their shares."""
    if processes() == 1:
        return
    parameters = list(model.parameters())
    if isinstance(parameters[0], DTensor):      # fully_shard has taken the mean
        for p in parameters:
            p.grad.mul_(processes())
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def in_shares(compute, parts):
    """compute(part) of all parts, lists that are joined; each is computed by one process."""
    mine = {number: compute(parts[number]) for number in share(range(len(parts)))}
    if processes() > 1:
        everyone = [None] * processes()
        dist.all_gather_object(everyone, mine)
        mine = {number: result for results in everyone for number, result in results.items()}
    return [item for number in range(len(parts)) for item in mine[number]]


def progress_bar(**options):
    """tqdm's, where there is a terminal, of the first process."""
    return tqdm(disable=None if is_first() else True, leave=False, **options)
