"""Makes a model with an optimizer state, and writes it as a checkpoint."""

import torch

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine.optim import build_optimizer
from patchmill.trainer.engine.step import Guard
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.small_models import SMALLEST

GUARD = Guard(torch.device("cpu"))


def save(run, step, model, optimizer, loader=None):
    """Writes a checkpoint as the trainer does."""
    state = {"loader": loader or {"epoch": 0, "step": 0, "fingerprint": {}}}
    return checkpoint.write(run, step, checkpoint.take_snapshot(model, optimizer, GUARD, state))


def trained_pair(config=SMALLEST, seed=0):
    """A model and its optimizer after one update with made-up gradients."""
    torch.manual_seed(seed)
    model = MaskedAutoencoder(config)
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer
