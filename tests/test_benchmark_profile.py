"""The reading of a GPU profile, from rows as torch's profiler gives them (no GPU is needed to sort names)."""

from types import SimpleNamespace

import pytest

from benchmarks.kernel_profile import kind_of, profile_lines, summarise
from patchmill.trainer.config.model import ModelConfig

CPU, CUDA = SimpleNamespace(name="CPU"), SimpleNamespace(name="CUDA")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "matrix products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::...)", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<...>", "attention"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<...>>", "optimizer and guard"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("masked_loss_kernel", "ours"),
        ("gather_tokens_backward_kernel", "ours"),
        ("triton_per_fused_add_native_layer_norm_3", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl...>", "pointwise"),
    ],
)
def test_kernels_are_sorted_by_their_names(name, kind):
    assert kind_of(name) == kind


def row(key, microseconds, device=CUDA, count=2, shapes=(), annotation=False):
    return SimpleNamespace(
        key=key,
        self_device_time_total=microseconds,
        device_type=device,
        count=count,
        input_shapes=list(shapes),
        is_user_annotation=annotation,
    )


def test_each_kernel_counts_once():
    rows = [
        row("nvjet_tst_1", 3000),
        row("triton_poi_fused_gelu", 1000),
        row("Optimizer.step#AdamW.step", 9000, annotation=True),  # covers kernels that stand here by themselves
        row("aten::mm", 2000, CPU, shapes=[[100, 768], [768, 3072]]),  # launched nvjet_tst_1
        row("aten::mm", 1000, CPU, shapes=[[400, 512], [512, 1536]]),
    ]
    found = summarise(rows, ModelConfig(), steps=2)
    assert found.by_kind() == {"matrix products": 1.5, "pointwise": 0.5}
    assert found.products == {"encoder": 1.0, "decoder": 0.5}
    assert [kernel.launches for kernel in found.kernels] == [1, 1]
    (text, *_) = profile_lines("patchmill", found, 0.004)
    assert "matrix products 1.50 ms (38%)" in text
    assert "idle 2.00 ms (50%)" in text


@pytest.mark.parametrize(("width", "decoder"), [(768, 512), (1024, 512), (1280, 512)])
def test_products_know_their_side(width, decoder):
    config = ModelConfig(embed_dim=width, num_heads=16, decoder_embed_dim=decoder)
    for D, side in ((width, "encoder"), (decoder, "decoder")):
        for inner, out in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)):
            shapes = [[64, inner], [inner, out]]
            found = summarise([row("aten::mm", 1000, CPU, shapes=shapes)], config, 1)
            assert found.products[side] == 1.0, shapes
