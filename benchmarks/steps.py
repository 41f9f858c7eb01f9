"""Builds one training step in each of the ways that the benchmarks compare.

The published step is the published formulation (published_mae.py) with torch's default AdamW and bf16 autocast. Ours
draws its masks anew in every step, as the loader does. Either may be compiled as a whole or block by block, and
captured as one CUDA graph.
"""

import functools
import os
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from benchmarks.published_mae import PublishedMAE
from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.cuda_graph import EAGER_STEPS, GraphedUpdate
from patchmill.trainer.engine.optim import build_optimizer, parameter_groups
from patchmill.trainer.engine.step import Guard, StepValues, set_learning_rate, update
from patchmill.trainer.engine.world import World
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.recipes.pretrain import get_recipe

RECIPES = {"b16": "mae-vit-b16", "l16": "mae-vit-l16", "h14": "mae-vit-h14", "tiny": "mae-tiny"}
MASK = MaskConfig()
LEARNING_RATE = 1e-4
COMPILE_BACKEND = os.environ.get("COMPILE_BACKEND", "inductor")
"""of torch.compile; `eager` in a dry run, which traces and generates no code"""
Step = Callable[[], object]
Compiled = Literal["no", "model", "blocks"]


def random_images(config: ModelConfig, batch: int, device: torch.device) -> Tensor:
    """uint8 [B, H, W, C], always the same."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, *config.image_hw, config.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)


def published(
    config: ModelConfig,
    images: Tensor,
    attention: str,
    compiled: Compiled = "no",
    graphed: bool = False,
    fused: bool = False,
) -> Step:
    """The published step on these images, noise drawn anew each time, with torch's default or its fused AdamW.

    Args:
        attention: `explicit` or `sdpa`.
    """
    torch.manual_seed(0)
    model = PublishedMAE(config, attention).to(images.device)
    groups = parameter_groups(model, weight_decay=0.05)
    # None leaves the choice to torch: its for-each kernels on a GPU
    optimizer = torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=(0.9, 0.95), capturable=graphed, fused=True if fused else None
    )
    forward = compile_model(model, compiled)

    def step() -> Tensor:
        noise = torch.rand(len(images), config.num_patches, device=images.device)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            loss = forward(images, noise, MASK.ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Captured(step) if graphed else step


def ours(config: ModelConfig, images: Tensor, compiled: Compiled = "no", graphed: bool = False) -> Step:
    """Patchmill's step on these images, masks drawn anew each time."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(config).to(images.device)
    call = our_update(model, images.device, compiled, graphed)
    ids_B = torch.arange(len(images), device=images.device)
    epochs = iter(range(1 << 30))

    def step() -> None:
        epoch = next(epochs)
        plan = MaskPlan.draw(MASK, seed=0, epoch=epoch, sample_ids_B=ids_B, grid_hw=config.grid_hw)
        call(Batch(images, plan, ids_B, ids_B, epoch, 0))

    return step


def our_update(
    model: MaskedAutoencoder, device: torch.device, compiled: Compiled, graphed: bool
) -> Callable[[Batch], StepValues]:
    """Patchmill's update of a model in bf16, at a fixed learning rate."""
    optimizer = build_optimizer(model, get_recipe("mae-vit-b16").optim)
    set_learning_rate(optimizer, LEARNING_RATE)
    call = functools.partial(
        update,
        compile_model(model, compiled),
        optimizer,
        world=World(0, 1, device),
        guard=Guard(device, named_parameters=model.named_parameters()),
        autocast=torch.bfloat16,
    )
    return GraphedUpdate(call, cast(torch.optim.AdamW, optimizer)) if graphed else call


def compile_model(model: PublishedMAE | MaskedAutoencoder, how: Compiled) -> nn.Module:
    """The model as it is, compiled as one graph, or with its blocks compiled: one graph for each shape of block."""
    if how == "blocks":
        for block in (*model.blocks, *model.decoder_blocks):
            block.compile(fullgraph=True, dynamic=False, backend=COMPILE_BACKEND)
    return cast(nn.Module, torch.compile(model, fullgraph=True, backend=COMPILE_BACKEND)) if how == "model" else model


class Captured:
    """A step captured as one CUDA graph after a few eager ones; a call replays it.

    A graph knows only addresses. The step is held so that weights, moments and images stay where the graph reads and
    writes them.

    Returns (of a call):
        what the captured step returned, with the values of this replay.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.values = step()

    def __call__(self) -> object:
        self.graph.replay()
        return self.values
