"""
Several processes of torchrun that train as one, on the GPUs of one machine or of many.
"""
from __future__ import annotations

import contextlib
import math
import os

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import common
from common import Problem


def rank_and_world():
    """(rank, world): the number of this process and how many there are, as torchrun says; without
    it (0, 1). Problem: only some of what it sets is there."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    there = {name: os.environ[name] for name in names if name in os.environ}
    rank, world = there.get("RANK", "0"), there.get("WORLD_SIZE", "1")
    if (rank, world) == ("0", "1"):
        return 0, 1
    if len(there) < len(names) or not (rank + world).isdecimal() or int(rank) >= int(world):
        os.environ.pop("LOCAL_RANK", None)      # or nobody tells this
        raise Problem(f"{', '.join(f'{k}={v}' for k, v in there.items())} in the environment: "
                      f"torchrun sets all of {', '.join(names)}. Start with it, or unset these")
    return int(rank), int(world)

def own_device(name, world):
    """What --device says, and for one of several processes that may choose, a GPU of its own.
    Problem: there are fewer than processes."""
    if world == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise Problem(f"{here} processes need as many GPUs; torch {torch.__version__} finds {gpus}")
    return f"cuda:{os.environ['LOCAL_RANK']}"

joined = False      # whether this process has been one of several; common.run asks

def join_others(rank, world, device):
    """Problem: the processes do not find each other."""
    global joined
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)   # what asks for no device in particular, as --fsdp, gets it
    try:
        store, *_ = next(dist.rendezvous("env://"))
        # When torchrun starts all anew, the addresses of those before are still in there.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank,
                                world_size=world, device_id=device if on_gpu else None)
    except (RuntimeError, ValueError) as error:
        raise Problem("the processes do not find each other at MASTER_ADDR, MASTER_PORT: "
                      f"{error}") from None
    joined = True

def check_flags(cfg, world, dtype):
    """Problem: flags that do not go with so many processes."""
    if cfg.fsdp and (world == 1 or dtype == "float16" or cfg.compile):
        raise Problem("--fsdp needs several processes, as torchrun starts them, and goes neither "
                      "with float16 nor with --compile; --fsdp=False does without it")
    if cfg.batch_size % world:
        raise Problem(f"--batch_size={cfg.batch_size} cannot be shared evenly by {world} processes")

def of_first(make, rank, world, device):
    """What make() returns in the first process, in all of them: machines need not share a disk.
    A Problem there is one in all."""
    made = [None, None]
    try:
        made[0] = make() if rank == 0 else None
    except Problem as problem:
        made[1] = problem
    if world > 1:
        dist.broadcast_object_list(made, device=device)
    if made[1]:
        raise made[1]
    return made[0]

@contextlib.contextmanager
def first_process_first(world):
    """What the first process of each machine prepares and downloads within it, its others find."""
    first_here = world == 1 or common.is_first_here()
    if not first_here:
        dist.barrier()
    yield first_here
    if first_here and world > 1:
        dist.barrier()

def average_gradients(model, world):
    """Puts their mean over the processes in their place, by one call after the last batch of a
    step. DistributedDataParallel would begin during the backward pass, which then could not be a
    CUDA graph: that costs more than the wait."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(world)
    dist.all_reduce(flat)
    means = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads)])

def share(model):
    """--fsdp: from here on each process keeps its share of every parameter, and of what belongs to
    it, and has some layers whole only while it computes with them. The gradients come averaged."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise Problem(f"--fsdp needs PyTorch 2.6; this is {torch.__version__}") from None
    layers = list(model.backbone["layers"])
    some = math.ceil(len(layers) / 8)   # at once: Python needs milliseconds for each such group
    for i in range(0, len(layers), some):
        fully_shard(layers[i:i + some])
    fully_shard(model)

def whole(tree, keep=True):
    """The tree with each shared tensor whole, in the memory of a CPU where it is one to keep, else
    None: all processes have to ask for it. What is not shared stays as it is."""
    def of_all(t):
        if not hasattr(t, "full_tensor"):
            return t
        t = t.full_tensor()
        return t.cpu() if keep else None    # one by one, as a GPU need not hold all of them
    return tree_map(of_all, tree)

def load_moments(optimizer, moments):
    """Gives an optimizer the moments of a checkpoint, {number of a parameter: {name: tensor}}, each
    shared as its parameter is. All else of the optimizer, as its learning rate, the flags say."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: shared_like(of_one, parameters[i]) for i, of_one in moments.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

def shared_like(tensors, parameter):
    """{name: tensor} of an optimizer for this parameter, shared as it is."""
    if not hasattr(parameter, "device_mesh"):
        return tensors
    from torch.distributed.tensor import distribute_tensor
    place = parameter.device_mesh, parameter.placements
    return {name: distribute_tensor(t.to(parameter.device), *place) if t.dim() > 0 else t
            for name, t in tensors.items()}

def gather(state, world):
    """A state of the rows of all processes, which each have every world-th one, to be saved."""
    def of_all(t):
        parts = [torch.empty_like(t) for _ in range(world)]
        dist.all_gather(parts, t)
        return torch.stack(parts, dim=1).flatten(0, 1)
    return [tuple(map(of_all, layer)) if world > 1 else tuple(layer) for layer in state]

def sum_over_all(number, world):
    """The sum over all processes of a tensor of one number, as a float: it waits for the device."""
    if world > 1:
        dist.all_reduce(number)
    return number.item()

def leave(world):
    """Ends what join_others began, once all processes have come so far."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
