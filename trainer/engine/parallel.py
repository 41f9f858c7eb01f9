"""Applies fp8, activation checkpointing, sharding, compilation and DDP to a model from outside.

The model's code does not change: its parameters keep their names, and checkpoints hold whole tensors in any layout.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from patchmill.trainer.config.pretrain import TrainConfig
from patchmill.trainer.engine.world import World, autocast_dtype
from patchmill.trainer.model.crossmae import CrossBlock
from patchmill.trainer.model.vit import Block

_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # in torch 2.13
RECOMPILE_LIMIT = 64
"""compiled versions of a block's code: one for each shape of a block and each image size of a size schedule"""
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
"""DDP need not broadcast buffers: a fitted target is the same on all ranks and never changes"""


def distribute(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """Wraps a model for the training step. Sharding replaces parameters in place: build the optimizer afterwards.

    Raises:
        ValueError: this machine does not support an option.
    """
    sharded = world.size > 1 and config.parallel != "ddp"
    if config.fp8:
        _to_fp8(model, world)
    if config.compile and sharded:
        _compile_blocks(model, config)
    if config.activation_checkpointing:
        for block in blocks(model):
            block.forward = _recomputed(block)  # type: ignore[method-assign]
    if sharded:
        _shard(model, config, world)
    elif config.compile:
        model = cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False, mode=config.compile_mode))
    if world.size > 1 and config.parallel == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **KEEP_BUFFERS,
            static_graph=config.accum_steps == 1,  # accumulation alternates between two graphs
        )
    return model


def blocks(model: nn.Module) -> list[Block | CrossBlock]:
    """Returns the transformer blocks of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Block | CrossBlock)]


def _compile_blocks(model: nn.Module, config: TrainConfig) -> None:
    """Compiles the forward pass of each block, for training only; what lies between blocks runs eagerly.

    FSDP2's hooks gather a block's weights before its `forward` and cannot be compiled: a graph must end where they run.
    Blocks of equal shape share their code. Evaluations run eagerly, as they do under DDP.
    """
    import torch.compiler.config  # slow to import

    torch.compiler.config.recompile_limit = max(RECOMPILE_LIMIT, torch.compiler.config.recompile_limit)
    for block in blocks(model):
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, mode=config.compile_mode)
        block.forward = functools.partial(_in_training, compiled, block.forward)  # type: ignore[method-assign]


def _in_training(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return (compiled if torch.is_grad_enabled() else eager)(*args)


def _shard(model: nn.Module, config: TrainConfig, world: World) -> None:
    """Shards the model block by block with FSDP2 (ZeRO-3); hsdp shards within each node and replicates over nodes.

    A run in bf16 gathers the blocks' weights in bf16 and reduces their gradients in fp32 (docs/numerics.md). All other
    weights (embeddings, positions, tokens, last norms, heads) and the tokens between blocks keep their dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = world.device.type
    if config.parallel == "fsdp":
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    else:
        per_node = world.local_size
        mesh = init_device_mesh(kind, (world.size // per_node, per_node), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy()
    if autocast_dtype(config.precision, world.device) == torch.bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(model):
            _accept_bf16_weights(block, kind)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


class _LayerNormInFp32(nn.LayerNorm):
    """Computes in fp32 whatever the weights' dtype, as autocast does on a GPU; a CPU would refuse bf16 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def _accept_bf16_weights(block: nn.Module, device_type: str) -> None:
    """Runs a block's products in bf16 also where evaluations use no autocast, and its norms in fp32."""
    forward = block.forward
    block.forward = functools.partial(_in_bf16, forward, device_type)  # type: ignore[method-assign]
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = _LayerNormInFp32  # parameters keep their names, and compiled blocks share their code


def _in_bf16(forward: Callable[..., Tensor], device_type: str, *args: Tensor) -> Tensor:
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return forward(*args)


def _recomputed(block: nn.Module):  # type: ignore[no-untyped-def]
    forward = block.forward
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def _to_fp8(model: nn.Module, world: World) -> None:
    """Converts linear layers to torchao's dynamically scaled fp8 where both sizes are multiples of 16.

    Weights and names stay.
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ValueError("train.fp8 needs torchao: pip install torchao, or leave it out") from error
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < (8, 9):
        raise ValueError(f"train.fp8 needs a GPU with fp8 units (compute capability 8.9 on), not {world.device}")

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    convert_to_float8_training(model, module_filter_fn=fits)
