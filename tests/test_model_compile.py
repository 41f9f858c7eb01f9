"""The model under torch.compile: one graph, the same numbers, and every operator counted as free of matrix products."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.small_models import OBLONG


def case():
    """A model, images and a plan."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    plan = MaskPlan.draw(MaskConfig(), seed=1, epoch=0, sample_ids_B=torch.arange(3), grid_hw=OBLONG.grid_hw)
    return MaskedAutoencoder(OBLONG), images, plan


def test_forward_and_backward_are_one_graph_with_the_eager_numbers():
    model, images, plan = case()
    eager = model(images, plan)
    eager.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    # aot_eager traces as inductor does and runs the same kernels as eager mode, so that the bits are the same;
    # fullgraph raises at a graph break
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, plan)
    compiled.loss.backward()
    assert torch.equal(compiled.loss, eager.loss)
    assert torch.equal(compiled.pred, eager.pred)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_flop_counter_sees_only_matrix_products_of_visible_and_masked_tokens():
    model, images, plan = case()
    with FlopCounterMode(display=False) as counter:
        model(images, plan)
    B, c = 3, OBLONG
    kept, masked, patches = plan.ids_keep.shape[1], plan.ids_mask.shape[1], c.num_patches

    def block(queries, tokens, dim):
        linear = 2 * dim * dim * (queries * (1 + 1 + 8) + tokens * 2)  # q, proj and MLP of queries; k, v of all
        return linear + 4 * queries * tokens * dim

    flops = 2 * kept * c.patch_dim * c.embed_dim
    flops += c.depth * block(kept + 1, kept + 1, c.embed_dim)
    flops += 2 * (kept + 1) * c.embed_dim * c.decoder_embed_dim
    flops += (c.decoder_depth - 1) * block(patches + 1, patches + 1, c.decoder_embed_dim)
    flops += block(masked, patches + 1, c.decoder_embed_dim)
    flops += 2 * masked * c.decoder_embed_dim * c.patch_dim
    assert counter.get_total_flops() == B * flops
