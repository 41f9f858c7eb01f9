"""The kernels that no model uses yet: their code for sm_90, compiled without a GPU, stays within what is written down.

docs/performance.md has the same figures. Instructions of a warp, registers, bytes of stack (spills), shared memory.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from patchmill.kernels import add_norm_triton, short_attention_triton
from tests.support.ahead_of_time import GPU, compile_launch, record_launches  # needs Triton


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def norm_launches(width: int) -> list:
    x, column, row = meta(4096, width), meta(width, dtype=torch.float32), meta(4096, dtype=torch.float32)
    return [
        *record_launches(add_norm_triton, "add_norm", x, x, column, column, 1e-6),
        *record_launches(add_norm_triton, "add_norm_backward", x, x, x, column, row, row),
    ]


def attention_launches(tokens: int, heads: int, width: int) -> list:
    qkv, out = meta(512, tokens, 3, heads, width), meta(512, tokens, heads, width)
    lse = meta(512, heads, tokens, dtype=torch.float32)
    return [
        *record_launches(short_attention_triton, "short_attention", qkv),
        *record_launches(short_attention_triton, "short_attention_backward", out, qkv, out, lse),
    ]


LIMITS: dict[str, tuple[Any, ...]] = {
    "add_norm, 512": (norm_launches, (512,), (710, 104, 0, 4096), (720, 128, 0, 16384)),
    "add_norm, 768": (norm_launches, (768,), (740, 128, 0, 4096), (1190, 168, 0, 16384)),
    "attention, 50 x 64": (attention_launches, (50, 12, 64), (930, 128, 0, 32768), (980, 255, 0, 49152)),
    "attention, 197 x 32": (attention_launches, (197, 16, 32), (1610, 255, 32, 49152), (1120, 184, 0, 65536)),
    "attention, 257 x 32": (attention_launches, (257, 16, 32), (1580, 255, 40, 49152), (1000, 184, 0, 65536)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_candidate_s_code_stays_within_its_limits(name):
    launches, sizes, *limits = LIMITS[name]
    for launch, limit in zip(launches(*sizes), limits, strict=True):
        usage = compile_launch(launch, GPU)
        print(name, launch.name, usage)
        found = (usage.instructions, usage.registers, usage.stack_bytes + usage.local_bytes, usage.shared_bytes)
        assert all(f <= most for f, most in zip(found, limit, strict=True)), (name, launch.name, usage)
        assert usage.load_bits == usage.store_bits == 128, (name, launch.name, usage)
