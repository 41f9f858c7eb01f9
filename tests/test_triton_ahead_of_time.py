"""Every Triton kernel compiles to machine code for sm_80, sm_90 and sm_100 without a GPU, and does not spill."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from patchmill.kernels import gather_triton, masked_loss_triton, permute_triton, unshuffle_triton
from tests.support.ahead_of_time import compile_launch, record_launch  # needs Triton

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, DECODER = 1024, 512
# patch size, image size, encoder width
PRODUCTION = {"B16": (16, 224, 768), "L16": (16, 224, 1024), "H14": (14, 224, 1280), "L16-448": (16, 448, 1024)}
# Patches of the models above; the largest sort (448 pixels, patch 8) takes 9 s to compile and is left to one target.
MASK_SIZES = {80: (196, 256, 784), 90: (196, 256, 784, 3136), 100: (196, 256, 784)}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def model_launches(patch: int, size: int, width: int, dtype: torch.dtype) -> dict:
    """What one training step of a model launches, apart from the mask."""
    patches = (size // patch) ** 2
    kept = patches // 4
    images = meta(BATCH, size, size, 3, dtype=torch.uint8)
    keep, mask, restore = (meta(BATCH, n, dtype=torch.int32) for n in (kept, patches - kept, patches))
    pos, decoder_pos = meta(1 + patches, width, dtype=torch.float32), meta(1 + patches, DECODER, dtype=torch.float32)
    token, pred = meta(DECODER, dtype=torch.float32), meta(BATCH, patches - kept, 3 * patch * patch, dtype=dtype)
    decoded, queries = meta(BATCH, 1 + patches, DECODER, dtype=dtype), meta(BATCH, patches - kept, DECODER, dtype=dtype)
    gather, shuffle, loss = gather_triton, unshuffle_triton, masked_loss_triton
    calls: tuple[tuple[Any, ...], ...] = (
        (gather, "gather_patches", images, keep, patch, MEAN, STD, dtype),
        (gather, "gather_tokens", meta(BATCH, 1 + patches, width, dtype=dtype), keep, pos, 1),
        (gather, "gather_tokens", decoded, mask, None, 1),
        (gather, "gather_tokens_backward", queries, mask, 1 + patches, 1),
        (shuffle, "unshuffle", meta(BATCH, 1 + kept, DECODER, dtype=dtype), token, decoder_pos, restore, 1),
        (shuffle, "unshuffle_backward", decoded, restore, kept, 1),
        (loss, "masked_loss", pred, images, mask, patch, MEAN, STD, True, 2, True),
        (loss, "masked_loss", pred, images, mask, patch, MEAN, STD, False, 1, False),
    )
    launches = {}
    for i, (module, launcher, *args) in enumerate(calls):
        launches[f"{i} {launcher}"] = record_launch(module, f"{launcher}_kernel", launcher, *args)
    launches["scale"] = record_launch(loss, "scale_kernel", "masked_loss_backward", meta(dtype=torch.float32), pred)
    return launches


def mask_launches(capability: int) -> dict:
    samples = meta(BATCH, dtype=torch.int64)
    arguments = {n: (samples, samples if n == 256 else None, (1, 2), 3, n, n // 4) for n in MASK_SIZES[capability]}
    name = "mask_indices"
    return {f"{n}": record_launch(permute_triton, f"{name}_kernel", name, *a) for n, a in arguments.items()}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("model", "dtype"), [*((model, torch.bfloat16) for model in PRODUCTION), ("B16", torch.float32)], ids=str
)
def test_a_model_s_kernels_compile_without_spills(model, dtype, capability):
    # one after another: two threads that parse kernels at once trip over each other in CPython 3.11's ast module
    for name, launch in model_launches(*PRODUCTION[model], dtype).items():
        usage = compile_launch(launch, capability)
        print(model, dtype, f"sm_{capability}", name, usage)
        assert usage.registers <= 128, (name, usage)  # 16 warps an SM at least
        assert usage.stack_bytes == usage.local_bytes == 0, (name, usage)
        # token rows are read in words of 8 or 16 bytes; the bytes of an image are only as aligned as a row of a patch
        wide = 64 if "tokens" in name or "shuffle" in name or name == "scale" else 32
        assert usage.widest_load_bits >= wide, (name, usage)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_mask_kernels_compile_without_spills(capability):
    for name, launch in mask_launches(capability).items():
        usage = compile_launch(launch, capability)
        print("mask", name, f"sm_{capability}", usage)
        assert usage.stack_bytes == usage.local_bytes == 0, (name, usage)
