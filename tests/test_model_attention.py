"""Attention's backends: the rule by shape, the same in a compiled graph, and the numbers of the written-out form."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from patchmill.pipeline.config import MaskConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model import attention as module
from patchmill.trainer.model.attention import (
    allowed_backends,
    attention,
    attention_backend,
    describe_backends,
    fused_attention,
)

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


def random_qkv(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, dtype=dtype).requires_grad_() for tokens in (20, 50, 50)]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [50, 64, 65, 197, 256, 257, 1024])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 512])
def test_cudnn_is_never_allowed_and_something_always_runs(dtype, tokens, head_dim):
    backends = allowed_backends(dtype, tokens, head_dim)
    assert SDPBackend.CUDNN_ATTENTION not in backends
    assert backends[-1] == SDPBackend.MATH  # runs everywhere
    assert (backends[0] == SDPBackend.FLASH_ATTENTION) == (dtype in HALF and head_dim <= 256)


def test_a_benchmark_may_force_one_backend(monkeypatch):
    monkeypatch.setattr(module, "forced", SDPBackend.CUDNN_ATTENTION)
    assert allowed_backends(torch.bfloat16, 197, 32) == [SDPBackend.CUDNN_ATTENTION]


def test_the_report_names_what_runs_by_shape():
    assert attention_backend(CPU, torch.bfloat16, 50, 64) == "products"
    vit_b = ModelConfig()
    assert describe_backends(vit_b, MaskConfig(), CPU, torch.bfloat16) == (
        "encoder products (50 x 64), decoder products (197 x 32)"
    )
    simmim = ModelConfig(kind="simmim")
    assert describe_backends(simmim, MaskConfig(), CPU, torch.bfloat16) == "encoder products (197 x 64)"


def test_a_cpu_takes_none_of_them(monkeypatch):
    monkeypatch.setattr(module, "fused_attention", None)
    assert attention(*random_qkv()).isfinite().all()


def test_both_forms_give_the_same_numbers():
    qkv = random_qkv()
    found, expected = fused_attention(*qkv), attention(*qkv)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(found.square().sum(), qkv),
        torch.autograd.grad(expected.square().sum(), qkv),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def recomputed(q, k, v):
    return checkpoint(fused_attention, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("function", [fused_attention, recomputed])
@pytest.mark.parametrize(
    ("forced", "is_fused"), [(None, True), (SDPBackend.MATH, False), (SDPBackend.FLASH_ATTENTION, True)]
)
def test_a_compiled_graph_holds_the_choice(function, forced, is_fused, monkeypatch):
    """A CPU has a flash backend as well, which shows whether the choice reaches the graph, forward and backward."""
    monkeypatch.setattr(module, "forced", forced)
    names: list[str] = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    qkv = random_qkv(torch.bfloat16)
    torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*qkv).sum().backward()
    torch.compiler.reset()
    flash = [name for name in names if "flash_attention" in name]
    assert bool(flash) == is_fused
    assert any("backward" in name for name in flash) == is_fused
    assert torch.backends.cuda.cudnn_sdp_enabled()  # the user's own settings are as before
