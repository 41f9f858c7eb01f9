"""Pictures show what they say: the block's own attention, principal components as colours, the pixels as they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools import cli
from patchmill.tools.reconstruct import mask_columns, parse_mask
from patchmill.trainer.checkpoints.interop import build_encoder, write_checkpoint
from patchmill.trainer.draw.sheet import GAP, Column, coloured, write_sheet
from patchmill.trainer.evaluate.attention import attention_weights, class_attention, feature_colours
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.photos import make_dataset, photograph
from tests.support.small_models import TINY, random_checkpoint


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(random_checkpoint())


@pytest.fixture(scope="module")
def images():
    photo = torch.from_numpy(photograph("astronaut.png").copy())
    return torch.stack([photo[i : i + 32, 2 * i : 2 * i + 32] for i in range(0, 200, 40)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset and a checkpoint of the tiny model."""
    root = tmp_path_factory.mktemp("look")
    make_dataset(root, count=12)
    write_checkpoint(random_checkpoint(), root / "model.safetensors")
    return root


@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_is_what_the_block_computes(block, encoder, images):
    weights = attention_weights(encoder, images, block)
    assert weights.shape == (5, TINY.num_heads, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, TINY.num_heads, 17))
    attention, given = encoder.blocks[block].attn, []
    handle = attention.register_forward_hook(lambda module, args, output: given.append((args[0], output)))
    with torch.no_grad():
        encoder(images)
        x, output = given[0]
        v = attention.qkv(x)[..., 2 * TINY.embed_dim :].unflatten(-1, (TINY.num_heads, -1)).transpose(1, 2)
        ours = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    handle.remove()
    torch.testing.assert_close(ours, output)
    assert not attention._forward_pre_hooks


def test_maps_are_the_class_tokens_row_without_itself(encoder, images):
    weights, maps = attention_weights(encoder, images), class_attention(encoder, images)
    assert maps.shape == (5, TINY.num_heads, 4, 4)
    assert torch.equal(maps.flatten(2), weights[:, :, 0, 1:])
    torch.testing.assert_close(maps.sum((2, 3)) + weights[:, :, 0, 0], torch.ones(5, TINY.num_heads))


@pytest.mark.parametrize("block", [2, -3])
def test_a_block_that_is_not_there(block, encoder, images):
    with pytest.raises(ValueError, match=f"no block {block}: this encoder has 2, 0 to 1"):
        attention_weights(encoder, images, block)


def test_colours_are_the_principal_components():
    """Three planted directions come back as red, green and blue by their strength, whatever the place adds."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    strengths = torch.randn(20, 6, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    of_the_place = 50 * torch.randn(6, 16, generator=generator)
    features = strengths @ axes[:3] + of_the_place
    colours = feature_colours(features, (2, 3))
    assert colours.dtype == torch.uint8
    assert colours.shape == (20, 2, 3, 3)
    for channel in range(3):
        planted = (strengths - strengths.mean(0))[..., channel].flatten().numpy()
        found = colours[..., channel].flatten().numpy()
        inside = (found > 0) & (found < 255)
        assert 0.95 < inside.mean() < 1
        # 120 patches: planted directions are the components but for chance correlations between them
        assert abs(np.corrcoef(planted[inside], found[inside])[0, 1]) > 0.95
    assert torch.equal(colours, feature_colours(features, (2, 3)))


def test_a_sheet_holds_the_pixels_under_their_titles(tmp_path):
    pictures = torch.randint(0, 256, (3, 10, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.5, 0.5]]])
    columns = [Column("photo", pictures), Column("two\nlines", coloured(maps)), Column("", pictures[..., :1])]
    write_sheet(columns, tmp_path / "sheet.png", across=2, cell=20)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    head = sheet.shape[0] - 2 * (20 + GAP)
    strip = 3 * (40 + GAP) + 2 * GAP
    assert sheet.shape[1] == 2 * strip - GAP
    assert (sheet[:head] < 128).any()  # ink
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = head + row * (20 + GAP), GAP + column * strip
        photo = pictures[i].numpy().repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(sheet[top : top + 20, left : left + 40], photo)
        left += 40 + GAP
        shades = coloured(maps)[i, 0].numpy().repeat(20, 0)
        np.testing.assert_array_equal(sheet[top : top + 20, left : left + 40], np.stack([shades] * 20))
        left += 40 + GAP
        np.testing.assert_array_equal(sheet[top : top + 20, left : left + 40], photo[..., :1].repeat(3, 2))
    empty = sheet[head + 20 + GAP :, strip:]
    assert (empty == 255).all()


def test_large_pictures_are_shrunk(tmp_path):
    write_sheet([Column("", torch.full((2, 300, 150, 3), 90, dtype=torch.uint8))], tmp_path / "s.png", cell=100)
    assert Image.open(tmp_path / "s.png").size == (50 + 2 * GAP, 2 * (100 + GAP) + GAP)


def test_masks_in_words():
    default = MaskConfig("block", 0.6)
    assert parse_mask("0.85", default) == MaskConfig("block", 0.85)
    assert parse_mask("grid", default) == MaskConfig("grid", 0.6)
    assert parse_mask("random:0.9", default) == MaskConfig("random", 0.9)
    for wrong in ("diagonal", "1.5", "block:x"):
        with pytest.raises(ValueError, match="give a ratio"):
            parse_mask(wrong, default)


def test_columns_say_how_much_is_hidden(images):
    batch = Batch(
        images, MaskPlan(*[torch.empty(0)] * 3), torch.zeros(5), torch.arange(5, dtype=torch.int64), epoch=0, step=0
    )
    model = MaskedAutoencoder(TINY)
    for text, title in (("random:0.5", "random\n50% masked"), ("grid", "grid\n75% masked")):
        masked, reconstruction = mask_columns(model, batch, parse_mask(text, MaskConfig()), seed=0)
        assert masked.title == title
        share = (masked.images == 128).all(-1).float().mean().item()
        assert share == pytest.approx(int(title.split()[1][:2]) / 100, abs=0.01)  # a photograph has few such greys
        assert reconstruction.images.shape == images.shape


def test_reconstruct_under_several_masks(place):
    options = ["--checkpoint", str(place / "model.safetensors"), "--data.path", str(place / "dataset")]
    out = place / "masks.png"
    masks = ["random", "block:0.5", "grid"]
    assert cli.run("reconstruct", [*options, "--out", str(out), "--masks", *masks, "--images", "3"]) == 0
    side = 32 * 4
    assert Image.open(out).width == 7 * (side + GAP) + GAP
    assert 3 * (side + GAP) < Image.open(out).height < 3 * (side + GAP) + 60


@pytest.mark.parametrize(("show", "columns"), [(["features"], 2), (["attention"], 5), (["features", "attention"], 6)])
def test_look_draws_what_it_is_told(show, columns, place):
    options = ["--checkpoint", str(place / "model.safetensors"), "--data.path", str(place / "dataset")]
    out = place / "new" / f"{len(show)}-{show[0]}.png"
    assert cli.run("look", [*options, "--out", str(out), "--show", *show, "--images", "2", "--image-size", "64"]) == 0
    assert Image.open(out).width == columns * (64 * 2 + GAP) + GAP


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("look", ["--out", "x.jpg"], "must end in .png"),
        ("look", ["--out", "x.png", "--images", "0"], "--images must be at least 1"),
        ("look", ["--out", "x.png", "--block", "7"], "no block 7: this encoder has 2"),
        ("reconstruct", ["--out", "x.png", "--masks", "half"], "give a ratio (0.85), a kind (random, block, grid"),
        ("reconstruct", ["--out", "x.png", "--images", "0"], "--images and --across must be at least 1"),
    ],
)
def test_mistakes_are_one_line(command, options, message, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fixed = ["--checkpoint", str(place / "model.safetensors"), "--data.path", str(place / "dataset")]
    assert cli.run(command, [*fixed, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
