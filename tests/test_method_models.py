"""SimMIM, mask tokens in MAE's encoder, the cross-attention decoder: each against its definition, and in training."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.interop import load_encoder, read_checkpoint
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine.optim import build_optimizer
from patchmill.trainer.engine.step import Guard, set_learning_rate, update
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.target_files import write_target
from patchmill.trainer.model.vit import PatchEmbed
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe
from tests.support.devices import ALONE, CPU, no_host_sync
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks
from tests.support.small_models import OBLONG
from tests.support.small_runs import assert_close_runs, twenty_steps

SMALL = dataclasses.replace(OBLONG, norm_pix_loss=False)
METHODS: dict[str, dict[str, Any]] = {
    "simmim": {"kind": "simmim"},
    "crossmae": {"kind": "crossmae"},
    "mask tokens": {"encoder_mask_tokens": True},
}


def case(method, count=3):
    """A model, images and a plan."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SMALL, **METHODS[method]))
    return model, *images_and_plan(count)


def images_and_plan(count, epoch=0):
    images = torch.randint(0, 256, (count, 32, 48, 3), dtype=torch.uint8)
    ids = torch.arange(count)
    return images, MaskPlan.draw(MaskConfig(), seed=1, epoch=epoch, sample_ids_B=ids, grid_hw=SMALL.grid_hw)


def without_masked_pixels(images, plan):
    """The images with other pixels in all masked patches."""
    rows, columns = SMALL.grid_hw
    masked = torch.zeros(len(images), rows * columns, dtype=torch.bool).scatter_(1, plan.ids_mask.long(), True)
    by_pixel = masked.view(-1, rows, columns).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.where(by_pixel[..., None], 255 - images, images)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_that_masked_pixels_are_only_a_target(method):
    model, images, plan = case(method)
    output, other = model(images, plan), model(without_masked_pixels(images, plan), plan)
    tokens = 24 if model.config.sees_mask_tokens else plan.ids_keep.shape[1]
    assert output.pred.shape == (3, plan.ids_mask.shape[1], 192)
    assert output.latent.shape == (3, 1 + tokens, 32)
    assert torch.equal(output.pred, other.pred)
    assert torch.equal(output.latent, other.latent)
    assert output.loss != other.loss


def tokens_by_hand(model, images, plan):
    """The published formula: x (1 - w) + mask_token w on all embedded patches, w = 1 where masked."""
    c = model.config
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(c.mean).view(-1, 1, 1)) / torch.tensor(c.std).view(
        -1, 1, 1
    )
    embedded = model.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    w = torch.zeros(len(images), c.num_patches, 1).scatter_(1, plan.ids_mask.long()[..., None], 1.0)
    return embedded * (1 - w) + model.mask_token * w + model.pos_embed[:, 1:]


@pytest.mark.parametrize("method", ["simmim", "mask tokens"])
def test_the_encoder_sees_mask_tokens_in_the_places_of_masked_patches(method):
    model, images, plan = case(method)
    expected = model.transform(tokens_by_hand(model, images, plan))
    torch.testing.assert_close(model(images, plan).latent, expected, rtol=1e-5, atol=1e-5)


def masked_target(images, plan):
    """The true patches in mask order: [B, M, P] in normalised units."""
    c = SMALL
    pixels = (images / 255 - torch.tensor(c.mean)) / torch.tensor(c.std)
    patches = pixels.view(-1, 4, 8, 6, 8, 3).transpose(2, 3).reshape(len(images), 24, 192)
    return patches.gather(1, plan.ids_mask.long()[..., None].expand(-1, -1, 192))


def test_simmim_is_a_linear_layer_on_masked_tokens_under_an_absolute_error():
    model, images, plan = case("simmim")
    output = model(images, plan)
    masked = output.latent[:, 1:].gather(1, plan.ids_mask.long()[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(output.pred, masked @ model.decoder_pred.weight.T + model.decoder_pred.bias)
    error = (output.pred - masked_target(images, plan)).abs().mean()
    assert output.loss.item() == pytest.approx(error.item(), rel=1e-6)
    assert {name.split(".")[0] for name, _ in model.named_parameters() if "decoder" in name} == {"decoder_pred"}


def test_mask_tokens_in_the_encoder_leave_the_decoder_as_it_is():
    model, images, plan = case("mask tokens")
    output = model(images, plan)
    x = output.latent @ model.decoder_embed.weight.T + model.decoder_embed.bias + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    every = model.decoder_pred(model.decoder_norm(x[:, 1:]))
    expected = every.gather(1, plan.ids_mask.long()[..., None].expand(-1, -1, 192))
    torch.testing.assert_close(output.pred, expected, rtol=1e-5, atol=1e-5)
    assert output.loss.item() == pytest.approx(
        (expected - masked_target(images, plan)).square().mean().item(), rel=1e-5
    )


def test_the_cross_attention_decoder_asks_visible_patches_and_never_masked_ones():
    model, images, plan = case("crossmae")
    output = model(images, plan)
    some = dataclasses.replace(plan, ids_mask=plan.ids_mask[:, 3:7].contiguous())
    torch.testing.assert_close(model(images, some).pred, output.pred[:, 3:7])
    decoder = dict(model.named_parameters())
    # torch's own attention, with keys and values of another width
    block = model.decoder_blocks[0].attn
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 32)
    q, (k, v) = block.q(x), block.kv(context).chunk(2, -1)
    heads = [t.view(3, -1, 2, 8).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 5, 16)
    torch.testing.assert_close(block(x, context), block.proj(expected), rtol=1e-5, atol=1e-6)
    assert decoder["decoder_blocks.0.attn.kv.weight"].shape == (32, 32)


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_train_every_parameter_without_a_wait_for_the_device(method, monkeypatch):
    model, images, plan = case(method, count=8)
    optimizer = build_optimizer(model, OptimConfig())
    set_learning_rate(optimizer, 1e-3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.arange(8)
    losses = []
    for number in range(3):
        batch = Batch(images, plan, ids, ids, 0, number)
        if number == 0:  # Adam's first step makes its state, and the host reads constants for it
            losses.append(update(model, optimizer, batch, world=ALONE, guard=Guard(CPU), autocast=torch.bfloat16).loss)
        else:
            with no_host_sync(monkeypatch):
                values = update(model, optimizer, batch, world=ALONE, guard=Guard(CPU), autocast=torch.bfloat16)
            losses.append(values.loss)
    assert losses[2] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (not parameter.requires_grad), name


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_one_graph_with_the_eager_numbers(method):
    model, images, plan = case(method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, plan)
    eager = model(images, plan)
    assert torch.equal(compiled.loss, eager.loss)
    assert torch.equal(compiled.pred, eager.pred)


def test_other_models_have_encoders_that_are_initialised_alike_and_evaluated_alike():
    for method in METHODS:
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(SMALL, **METHODS[method]))
        assert isinstance(model.patch_embed, PatchEmbed)
        features = Encoder(model).eval()(images_and_plan(2)[0])
        assert features.cls_token.shape == (2, 32)


def test_flops_of_an_encoder_with_mask_tokens():
    """The paper says 3.3 times for ViT-L (Table 1c): the ratio of training FLOPs."""
    config = get_recipe("mae-vit-l16").model
    slow = dataclasses.replace(config, encoder_mask_tokens=True)
    assert train_flops_per_image(slow, MaskConfig()) / train_flops_per_image(config, MaskConfig()) == pytest.approx(
        3.3, abs=0.1
    )


@pytest.mark.parametrize("method", METHODS)
def test_counted_flops_are_near_the_stated_ones(method):
    """MFU's formula counts embeddings and predictions of all patches, which are not computed for all."""
    wide = dataclasses.replace(SMALL, **METHODS[method], embed_dim=64, depth=6)
    model, (images, plan) = build_model(wide), images_and_plan(2)
    with FlopCounterMode(display=False) as counter:
        model(images, plan)
    assert 0.8 < counter.get_total_flops() * 3 / 2 / train_flops_per_image(wide, MaskConfig()) <= 1.0


RUNS = {name: {f"model__{key}": value for key, value in options.items()} for name, options in METHODS.items()}
RUNS["pca"] = {"model__target": "pca", "model__target_width": 16, "model__norm_pix_loss": False}
LAYOUTS = {"simmim": "ddp", "crossmae": "fsdp", "mask tokens": "fsdp", "pca": "ddp"}


def config_in(folder, dataset, run, name, **changes):
    """The config of a run, with the target that it needs."""
    path = str(folder / "pca.safetensors") if name == "pca" else ""
    return twenty_steps(dataset, folder / run, target_path=path, **RUNS[name], **changes)


def on_two_ranks(rank, dataset, folder):
    for name, layout in LAYOUTS.items():
        next_world()
        pretrain(config_in(folder, dataset, f"{name} two", name, train__parallel=layout))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs of each model, on one rank and on two."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(tmp_path_factory.mktemp("data"), count=40)
    basis = torch.linalg.qr(torch.randn(192, 16, generator=torch.Generator().manual_seed(0))).Q
    target = {"mean": torch.zeros(192), "basis": basis}
    write_target(target, twenty_steps("", "", **RUNS["pca"]).model, folder / "pca.safetensors")
    for name in RUNS:
        pretrain(config_in(folder, dataset, name, name))
    run_ranks(2, len(RUNS), on_two_ranks, dataset, folder)
    return folder


@pytest.mark.parametrize("method", RUNS)
def test_the_same_run_on_one_rank_and_two(method, runs):
    assert_close_runs(runs / method, runs / f"{method} two")


@pytest.mark.parametrize("method", RUNS)
def test_a_checkpoint_gives_the_model_back_and_its_encoder_to_everyone(method, runs):
    model, path = checkpoint.load_model(runs / f"{method} two")
    assert model.config == twenty_steps("", "", **RUNS[method]).model
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    read = read_checkpoint(path)
    assert not read.has_decoder
    assert (read.config.kind, read.config.encoder_mask_tokens) == ("mae", False)
    assert any("only the encoder was read" in note for note in read.notes)
    with torch.no_grad():
        assert torch.equal(load_encoder(path)(images).patches, Encoder(model)(images).patches)


def test_illegal_combinations_are_named():
    with pytest.raises(ValueError, match=r"encoder_mask_tokens is for model\.kind mae, not crossmae"):
        ModelConfig(kind="crossmae", encoder_mask_tokens=True)
    with pytest.raises(ValueError, match=r"model\.kind must be one of mae, simmim, crossmae"):
        ModelConfig(kind="beit")  # type: ignore[arg-type]
