"""Every Triton kernel compiles to machine code without a GPU and does not spill; the code of sm_90 stays within limits.

sm_80, sm_100, sm_120 and AMD's gfx942 are compiled, never run.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from patchmill.kernels import gather_triton, masked_loss_triton, permute_triton, tokens_triton, unshuffle_triton
from tests.support.ahead_of_time import GPU, compile_launch, record_launches  # needs Triton

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, DECODER = 1024, 512
# patch size, image size, encoder width
PRODUCTION = {"B16": (16, 224, 768), "L16": (16, 224, 1024), "H14": (14, 224, 1280), "L16-448": (16, 448, 1024)}
# Patches of the models above. Sorts take 2 to 9 s to compile, so only sm_90 compiles all sizes.
MASK_SIZES = {"sm_80": (256,), "sm_90": (196, 256, 784, 3136), "sm_100": (784,), "sm_120": (196,), "gfx942": (196,)}


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
    gather, tokens, shuffle, loss = gather_triton, tokens_triton, unshuffle_triton, masked_loss_triton
    calls: tuple[tuple[Any, ...], ...] = (
        (gather, "gather_patches", images, keep, patch, MEAN, STD, dtype),
        (tokens, "gather_tokens", meta(BATCH, 1 + patches, width, dtype=dtype), keep, pos, 1),
        (tokens, "gather_tokens", decoded, mask, None, 1),
        (tokens, "gather_tokens_backward", queries, mask, 1 + patches, 1),
        (shuffle, "unshuffle", meta(BATCH, 1 + kept, DECODER, dtype=dtype), token, decoder_pos, restore, 1),
        (shuffle, "unshuffle_backward", decoded, restore, kept, 1),
        (loss, "masked_loss", pred, images, mask, patch, MEAN, STD, True, 2, True),
        (loss, "masked_loss", pred, images, mask, patch, MEAN, STD, False, 1, False),
        (loss, "masked_loss_backward", meta(dtype=torch.float32), pred),
    )
    launches: dict[str, Any] = {}
    for i, (module, launcher, *args) in enumerate(calls):
        launches |= {f"{i} {launch.name}": launch for launch in record_launches(module, launcher, *args)}
    return launches


def mask_launches(target: str) -> dict:
    samples = meta(BATCH, dtype=torch.int64)
    arguments = {n: (samples, samples if n == 256 else None, (1, 2), 3, n, n // 4) for n in MASK_SIZES[target]}
    return {f"{n}": record_launches(permute_triton, "mask_indices", *a)[0] for n, a in arguments.items()}


# Of ViT-B/16 (16 x 16 patches) and ViT-H/14 in bf16: instructions of a warp, registers, bits of the widest load and
# store. Compiled with Triton 3.6 and 3.7; another compiler may need a tenth more before something is wrong.
LIMITS = {
    "B16": {
        "0 gather_patches": (900, 96, 64, 128),
        "1 gather_tokens": (315, 56, 128, 128),
        "2 gather_tokens": (160, 40, 128, 128),
        "3 invert_ids": (145, 32, 32, 32),
        "3 gather_tokens_backward": (390, 72, 128, 128),
        "4 unshuffle": (690, 80, 128, 128),
        "5 unshuffle_backward": (730, 72, 128, 128),
        "6 masked_loss": (1230, 112, 128, 128),
        "7 masked_loss": (800, 80, 128, 32),
        "8 scale": (95, 40, 128, 128),
    },
    "H14": {"0 gather_patches": (910, 104, 32, 64), "6 masked_loss": (1330, 112, 64, 64)},
}
COMPILED = [
    *((model, torch.bfloat16, GPU) for model in PRODUCTION),
    ("B16", torch.float32, GPU),
    *(("B16", dtype, "sm_80") for dtype in (torch.bfloat16, torch.float32)),
    *((model, torch.bfloat16, target) for model in ("B16", "H14") for target in ("sm_100", "sm_120")),
    ("B16", torch.bfloat16, "gfx942"),
]


@pytest.mark.parametrize(("model", "dtype", "target"), COMPILED, ids=str)
def test_a_model_s_kernels_compile_without_spills(model, dtype, target):
    # one after another: two threads that parse kernels at once trip over each other in CPython 3.11's ast module
    for name, launch in model_launches(*PRODUCTION[model], dtype).items():
        usage = compile_launch(launch, target)
        print(model, dtype, target, name, usage)
        assert usage.registers <= 128, (name, usage)  # 16 warps an SM at least
        assert usage.stack_bytes == usage.local_bytes == 0, (name, usage)
        if target == GPU and dtype == torch.bfloat16 and name in LIMITS.get(model, {}):
            instructions, registers, load_bits, store_bits = LIMITS[model][name]
            assert usage.instructions <= instructions, (name, usage)
            assert usage.registers <= registers, (name, usage)
            assert (usage.load_bits, usage.store_bits) == (load_bits, store_bits), (name, usage)


@pytest.mark.parametrize("target", MASK_SIZES)
def test_mask_kernels_compile_without_spills(target):
    for name, launch in mask_launches(target).items():
        usage = compile_launch(launch, target)
        print("mask", name, target, usage)
        assert usage.stack_bytes == usage.local_bytes == 0, (name, usage)
