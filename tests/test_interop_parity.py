"""Equal outputs in other people's code: transformers' ViTMAE and timm's ViT, loaded from what we export.

Neither is needed to use or test the rest, so that this file is skipped where they are missing; docs/interchange.md has
the commands for an environment of its own, and what they gave.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
import torch

from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools.export import Provenance, write_card
from patchmill.trainer.checkpoints.export import write_files
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import Checkpoint, build_encoder, read_checkpoint, resized
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.model.resize_weights import interpolate_positions
from tests.support.small_models import TINY, random_checkpoint, same_bits

transformers = pytest.importorskip("transformers", reason="transformers is not installed (docs/interchange.md)")

MAE = dataclasses.replace(TINY, image_size=64, embed_dim=64, num_heads=4, depth=3, norm_pix_loss=True)
WIDE = dataclasses.replace(MAE, image_size=(48, 80), channels=4, mean=(0.5,) * 4, std=(0.25,) * 4)
PLAIN = dataclasses.replace(MAE, norm_pix_loss=False, patch_size=16)


class Names(type):
    """A class whose every attribute is its own name."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Absent(types.ModuleType):
    """A module that has whatever is asked for."""

    __path__: list[str] = []  # noqa: RUF012 (what makes a module a package)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {})


class AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision where there is none: timm imports it for transforms, its ViT does without."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    """timm, with a stand-in for torchvision where that is missing (it does not import beside CPU builds of torch)."""
    finder = AbsentFinder()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(finder)
    try:
        yield pytest.importorskip("timm", reason="timm is not installed (docs/interchange.md)")
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


def images_of(config, batch=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, *config.image_hw, config.channels), dtype=torch.uint8, generator=generator)


def initialised(config, seed=0):
    """A checkpoint with the published initialisation, norms and biases moved off their ones and zeros."""
    torch.manual_seed(seed)
    tensors = MaskedAutoencoder(config).state_dict()
    moved = {
        name: tensor + 0.02 * torch.randn_like(tensor) if tensor.dim() == 1 else tensor
        for name, tensor in tensors.items()
    }
    return Checkpoint(config, moved, "mae", Path("none"), [])


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("config", [MAE, PLAIN], ids=["normalised pixels", "pixels"])
def test_transformers_gives_the_same_loss_prediction_and_latent(config, tmp_path):
    checkpoint = initialised(config)
    write_files(tmp_path, "hf", checkpoint)
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = MaskedAutoencoder(config)
    ours.load_state_dict(checkpoint.tensors)
    images = images_of(config)
    noise = torch.rand(len(images), config.num_patches, generator=torch.Generator().manual_seed(1))
    plan = MaskPlan.from_noise(noise, 0.75)
    pixels = build_encoder(checkpoint).normalise(images)
    with torch.inference_mode():
        published = theirs.eval()(pixels, noise=noise)
        found = ours.eval()(images, plan)
        latent = theirs.vit(pixels, noise=noise).last_hidden_state
    assert torch.equal(published.ids_restore, plan.ids_restore.long())
    at = plan.ids_mask.long()[..., None].expand(-1, -1, config.patch_dim)
    errors = {
        "loss": abs(found.loss.item() / published.loss.item() - 1),
        "prediction": relative(found.pred, published.logits.gather(1, at)),
        "latent": relative(found.latent, latent),
    }
    print("transformers", transformers.__version__, errors)
    assert max(errors.values()) < 1e-5


def test_transformers_loads_an_encoder_alone(tmp_path):
    checkpoint = random_checkpoint(MAE, decoder=False)
    write_files(tmp_path, "hf", checkpoint)
    theirs, info = transformers.ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = images_of(MAE)
    encoder = build_encoder(checkpoint)
    theirs.config.mask_ratio = 0.0
    in_order = torch.arange(MAE.num_patches).expand(len(images), -1).float()
    with torch.inference_mode():
        latent = theirs.eval()(encoder.normalise(images), noise=in_order).last_hidden_state
        cls_token, patches = encoder(images)
    assert relative(cls_token, latent[:, 0]) < 1e-5
    assert relative(patches, latent[:, 1:]) < 1e-5


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel"])
def test_what_transformers_saves_is_read(kind, tmp_path):
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    found = read_checkpoint(tmp_path / "saved")
    assert found.names == "hf"
    assert found.config == TINY
    hints = Hints(num_heads=4, decoder_num_heads=2, norm_pix_loss=False)
    assert same_bits(read_checkpoint(tmp_path / "memory.pth", hints).tensors, found.tensors)
    vit = theirs.vit if kind == "ViTMAEForPreTraining" else theirs
    vit.config.mask_ratio = 0.0
    images = images_of(TINY)
    encoder = build_encoder(found)
    in_order = torch.arange(TINY.num_patches).expand(len(images), -1).float()
    with torch.inference_mode():
        latent = vit(encoder.normalise(images), noise=in_order).last_hidden_state
        assert relative(encoder(images).patches, latent[:, 1:]) < 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("config", [MAE, WIDE], ids=["square", "wide, four channels"])
def test_timm_gives_the_same_features(timm, config, pool, tmp_path):
    checkpoint = initialised(config)
    write_files(tmp_path, "timm", checkpoint, pool=pool)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()  # strict
    encoder, images = build_encoder(checkpoint), images_of(config)
    pixels = encoder.normalise(images)
    with torch.inference_mode():
        if pool == "token":
            tokens = theirs.forward_features(pixels)
            cls_token, patches = encoder(images)
            error = max(relative(cls_token, tokens[:, 0]), relative(patches, tokens[:, 1:]))
            assert relative(theirs(pixels), cls_token) < 1e-5
        else:
            # timm norms the mean of the patches, where the pretrained encoder norms each
            encoder.norm = torch.nn.Identity()  # type: ignore[assignment]
            normed = torch.nn.functional.layer_norm(
                encoder(images).patches.mean(1), (config.embed_dim,), eps=1e-6,
                weight=checkpoint.tensors["norm.weight"], bias=checkpoint.tensors["norm.bias"],
            )  # fmt: skip
            error = relative(normed, theirs(pixels))
    print("timm", timm.__version__, pool, error)
    assert error < 1e-5


def test_vit_b_of_timm_takes_our_encoder(timm, tmp_path):
    config = dataclasses.replace(MAE, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    checkpoint = resized(initialised(config), image_size=160)
    write_files(tmp_path, "timm", checkpoint)
    theirs = timm.create_model(
        "vit_base_patch16_224.mae", num_classes=0, img_size=160, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
    ).eval()  # fmt: skip
    encoder, images = build_encoder(checkpoint), images_of(checkpoint.config, 2)
    with torch.inference_mode():
        error = relative(encoder(images).patches, theirs.forward_features(encoder.normalise(images))[:, 1:])
    print("timm", timm.__version__, "vit_base_patch16_224.mae", error)
    assert error < 1e-5


@pytest.mark.parametrize("grids", [((14, 14), (28, 28)), ((16, 16), (32, 32)), ((14, 14), (24, 40))])
def test_positions_equal_those_of_timm_and_transformers(timm, grids):
    old, new = grids
    table = torch.randn(1, 1 + old[0] * old[1], 32, generator=torch.Generator().manual_seed(0))
    ours = interpolate_positions(table, old, new)
    theirs = timm.layers.resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(ours, theirs)
    patch = 16
    config = transformers.ViTMAEConfig(
        image_size=old[0] * patch, patch_size=patch, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    embeddings = transformers.ViTMAEModel(config).embeddings
    with torch.inference_mode():
        embeddings.position_embeddings.copy_(table)
        tokens = torch.zeros(1, 1 + new[0] * new[1], 32)
        interpolated = embeddings.interpolate_pos_encoding(tokens, new[0] * patch, new[1] * patch)
    torch.testing.assert_close(ours, interpolated)


def test_the_card_is_one_of_the_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (docs/interchange.md)")
    write_card(tmp_path, "hf", MAE, True, Provenance())
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "masked-autoencoder" in card.data.tags
