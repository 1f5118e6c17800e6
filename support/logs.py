"""metrics.jsonl on a screen as well: --log=tensorboard or --log=wandb, optional packages."""
import os
from functools import partial

from support.flags import InputError
from support.processes import is_first


def log_package(name):
    """What --log needs, imported. InputError says how to get it."""
    try:
        if name == "tensorboard":
            from torch.utils import tensorboard
            return tensorboard
        import wandb
        return wandb
    except ImportError as error:
        raise InputError(f"--log={name} needs {name}: pip install {name}") from error


def open_log(name, folder, flags, first_step):
    """A function of (step, {name: number}) that shows a run's metrics; None without --log, and in
    all processes but the first.

    tensorboard reads them from the run folder. Where a run goes on or begins anew, what was there
    from first_step on is no longer shown. At wandb every start is a run of its own, in one group.
    """
    if name is None or not is_first():
        return None
    package = log_package(name)
    os.makedirs(folder, exist_ok=True)
    if name == "tensorboard":
        writer = package.SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=first_step)
        return partial(to_tensorboard, writer)
    try:
        run = package.init(project="nanopref", name=folder, group=folder, dir=folder, config=flags,
                           reinit="finish_previous")    # the members of a family
    except package.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--log=wandb: {reason} (WANDB_MODE=offline needs no account)") from error
    return partial(to_wandb, run)


def to_tensorboard(writer, step, values):
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()      # an interrupted run has what it logged


def to_wandb(run, step, values):
    run.log(values, step=step)
