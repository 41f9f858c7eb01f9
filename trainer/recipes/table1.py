"""Defines a recipe for every row of Table 1 of He et al. 2021.

Each row changes one thing of the default: ViT-L/16 at 224 px for 800 epochs, decoder of 8 blocks of width 512, no mask
tokens in the encoder, pixels without normalisation, random-size crops, random masks of 75 %. docs/results.md has the
paper's accuracies.

The paper does not state how many heads decoders of other widths have (16 here, as in the published code) or how strong
its colour jitter is (0.4 here). table1-d-pca and table1-d-dvae need --target-path (`patchmill target`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import PretrainConfig

VIT_L16 = ModelConfig(embed_dim=1024, depth=24, num_heads=16, norm_pix_loss=False)

ROWS: dict[str, dict[str, dict[str, Any]]] = {
    **{f"a-depth-{depth}": {"model": {"decoder_depth": depth}} for depth in (1, 2, 4, 8, 12)},
    **{f"b-width-{width}": {"model": {"decoder_embed_dim": width}} for width in (128, 256, 512, 768, 1024)},
    "c-with-mask-tokens": {"model": {"encoder_mask_tokens": True}},
    "c-without-mask-tokens": {},
    "d-pixels": {},
    "d-normalised-pixels": {"model": {"norm_pix_loss": True}},
    "d-pca": {"model": {"target": "pca"}},
    "d-dvae": {"model": {"target": "dvae"}},
    "e-none": {"data": {"crop": "centre", "flip": False}},
    "e-crop-fixed": {"data": {"crop": "fixed"}},
    "e-crop-random": {},
    "e-crop-colour": {"data": {"colour_jitter": 0.4}},
    "f-random-75": {},
    "f-block-50": {"mask": {"kind": "block", "ratio": 0.5}},
    "f-block-75": {"mask": {"kind": "block"}},
    "f-grid-75": {"mask": {"kind": "grid"}},
}
"""changes to the default, by section"""


def table1(row: str) -> PretrainConfig:
    """Builds the config of a row."""
    plain = PretrainConfig(model=VIT_L16)
    changed = {name: dataclasses.replace(getattr(plain, name), **changes) for name, changes in ROWS[row].items()}
    return dataclasses.replace(plain, **changed)


TABLE1: dict[str, Callable[[], PretrainConfig]] = {f"table1-{row}": functools.partial(table1, row) for row in ROWS}
