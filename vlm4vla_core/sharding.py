"""FSDP2: weights, gradients and optimizer states shared out among processes, by torch's own `fully_shard`.

Every vision block and decoder layer is gathered for itself while it computes. The rest (query, head, embeddings,
projector, norms) forms one group around the losses, gathered once per step.

Trap: parameters are then DTensors, of which each process holds a part. Whoever looks at whole values starts a
collective, which all processes must call; and modules may only be called inside `within`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone


def shard(losses: torch.nn.Module, backbone: Backbone, device: torch.device, world: int, *, bf16: bool) -> None:
    """Share out the parameters of `losses` (a module whose forward is a step's) in place, over `world` processes.

    The model may still lie on the CPU: each group moves to the device for itself. bf16: layers are gathered and
    computed in bfloat16, gradients are summed in fp32; the shards, which the optimizer sees, stay fp32.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    precision: dict[str, Any] = {"mp_policy": half} if bf16 else {}
    for name in (backbone.spec.blocks, backbone.spec.layers):
        for layer in backbone.base.get_submodule(name):
            _gather_outside(layer)
            fully_shard(layer, mesh=mesh, **precision)
    losses.within = lambda call: call()  # type: ignore[assignment]
    fully_shard(losses, mesh=mesh)
    register_fsdp_forward_method(losses, "within")


def _gather_outside(layer: Any) -> None:
    """Where a layer was compiled with its hooks, compile its forward alone: gathering is no part of a graph."""
    import torch

    if layer._compiled_call_impl is not None:
        layer._compiled_call_impl = None
        layer.forward = torch.compile(layer.forward, dynamic=False)


def check_sharded(module: torch.nn.Module, world: int) -> None:
    """Raise RuntimeError unless every parameter is a DTensor over `world` processes."""
    from torch.distributed.tensor import DTensor

    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != world:
            raise RuntimeError(f"FSDP over {world} processes was asked for, but {name} is a {type(parameter).__name__}")


def within(losses: Any, call: Callable[[], Any]) -> Any:
    """`call()`, with the modules of sharded `losses` usable in it, on all processes at once."""
    found = losses.within(call)
    losses.reshard()  # or what changes the shards next would not be seen
    return found


def full(value: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor (a collective), or the tensor itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Whole weights and optimizer state (parameter -> name -> value), on the CPU of the first process; else empty."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # An optimizer that has not stepped has no state, and torch's helper would make one up.
    state: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {}) if optimizer.state else {}
    return dict(weights), state


def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill a model, sharded or not, with whole weights by name. Raises RuntimeError on wrong shapes."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def as_sharded(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A whole tensor of the optimizer's state, laid out as its parameter; the count of steps stays as it is."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the same file, so nothing needs to be sent.
    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)
