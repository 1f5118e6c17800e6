"""--fsdp: every process keeps a part of each weight, of its gradient and of the optimizer's state.

By PyTorch's fully_shard: a layer's weights are put together before it computes and dropped after
it, so that a model may be too large for one device. All processes have to do so at the same moment:
each runs as many forward and backward passes (`micro_batches`, `share_in_step`). What is written to
a file is whole, so that a run goes on with any number of processes.
"""
import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from support.device import recompute_layers
from support.processes import processes


def place(model, device, args):
    """Moves a model to the device; with --fsdp only this process's part of it. Returns the model.

    The model, which is still on the CPU, has its layers in transformer.h, each with the parts attn
    and mlp. What else it has, such as the embeddings and the head, is put together for as long as
    the model computes; between passes its parameters are all parts, as the optimizer needs them.
    """
    if args.gradient_checkpointing:
        recompute_layers(model)
    if not args.fsdp:
        return model.to(device)
    # fully_shard warns of modules that return views: nothing here changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (processes(),))
    kind = MixedPrecisionPolicy()
    if args.dtype == "bfloat16":        # what autocast computes, but it would keep whole copies,
        kind = MixedPrecisionPolicy(torch.bfloat16, torch.float32)      # and twice as much travels
    for layer in model.transformer.h:
        fully_shard(layer.attn, mesh=mesh, mp_policy=kind)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=kind)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def full(tensor):
    """A tensor as a whole, in every process. All of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state, keep=True):
    """Nested dictionaries and lists with every tensor as a whole, on the CPU. All processes have to
    call this; those with keep=False, which write nothing, get None for tensors."""
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if torch.is_tensor(state):
        state = full(state)
        return state.cpu() if keep else None
    return state


def load_whole(model, tensors, optimizer=None, optimizer_state=None):
    """load_state_dict of a model, and of its optimizer, each from whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: part(tensor, own[name]) for name, tensor in tensors.items()})
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in optimizer_state["state"].items():
            for name, value in values.items():
                if value.dim() > 0:                     # not the count of steps
                    values[name] = part(value, parameters[number])
        optimizer.load_state_dict(optimizer_state)


def part(tensor, like):
    """This process's part of a whole tensor, if `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def gathered(model):
    """The model itself or, if it is sharded, a copy with whole weights, for as long as it is used.

    For sampling, where each token is a forward pass, and processes have different numbers of them.
    The copy takes 4 bytes for each parameter, on every device.
    """
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)                # makes one that is not sharded
    copy.load_state_dict({name: full(tensor) for name, tensor in model.state_dict().items()},
                         assign=True)
    return copy
