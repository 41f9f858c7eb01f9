"""Fine-tuning's rates, decay, frozen blocks and drop path."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from patchmill.trainer.config.evaluate import FinetuneConfig, Pool
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.evaluate.classifier import Classifier, path_scales
from patchmill.trainer.evaluate.finetune import build_optimizer
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.mae import MaskedAutoencoder
from tests.support.small_models import B16, TINY

GOLDEN = json.loads((Path(__file__).parent / "golden" / "layer_decay.json").read_text())


def classifier(config=TINY, pool="mean", head="linear"):
    return Classifier(Encoder(MaskedAutoencoder(config)), 5, pool, head)


def test_every_rate_is_the_golden_one():
    with torch.device("meta"):
        model = classifier(B16)
    model.tune(None)
    config = FinetuneConfig(layer_decay=GOLDEN["decay"], optim=OptimConfig(weight_decay=0.3))
    groups = build_optimizer(model, config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["rate_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, scale in GOLDEN["scales"].items():
        assert found[name][0] == pytest.approx(scale, rel=1e-12), name
    # published: neither biases, norms, class token nor positions are decayed
    free = {"cls_token", "pos_embed"}
    for name, (_, decay) in found.items():
        spared = name in free or name.endswith(".bias") or "norm" in name
        assert decay == (0.0 if spared else 0.3), name


@pytest.mark.parametrize(
    ("blocks", "learning"),
    [
        (0, set()),
        (0.5, {"blocks.1.norm2", "blocks.1.mlp"}),
        (1, {"blocks.1"}),
        (2, {"blocks.0", "blocks.1"}),
        (None, {"blocks.0", "blocks.1", "cls_token", "pos_embed", "patch_embed"}),
    ],
)
def test_only_the_tuned_blocks_learn(blocks, learning):
    model = classifier()
    model.tune(blocks)
    for name, parameter in model.named_parameters():
        tuned = name.startswith((*learning, "fc_norm", "head")) if learning else name.startswith(("fc_norm", "head"))
        assert parameter.requires_grad == tuned, name
    with pytest.raises(ValueError, match="has 2 blocks"):
        model.tune(3)


def test_the_features_are_the_encoders():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(MaskedAutoencoder(TINY))
    cls_token, patches = encoder(images)
    normed = encoder.normalise(images)
    pairs: list[tuple[Pool, torch.Tensor]] = [("cls", cls_token), ("mean", patches.mean(1))]
    for pool, expected in pairs:
        model = Classifier(encoder, 5, pool, "probe")
        torch.testing.assert_close(model.normalise(images.permute(0, 3, 1, 2) / 255), normed)
        torch.testing.assert_close(model.features(normed), expected)
    assert {"fc_norm.weight", "head.weight"} < set(classifier().state_dict())
    assert "norm.weight" not in classifier().state_dict()
    assert {"norm.weight", "head.0.running_mean", "head.1.weight"} < set(classifier(head="probe").state_dict())


def test_drop_path_rises_to_its_rate_and_keeps_the_mean():
    scales = path_scales(0, 1, np.arange(20_000), 4, 0.4, None).numpy()
    assert scales.shape == (8, 20_000)
    for block, rate in enumerate([0, 0.4 / 3, 0.8 / 3, 0.4]):
        for row in scales[2 * block : 2 * block + 2]:
            assert abs((row == 0).mean() - rate) < 0.015
            assert abs(row.mean() - 1) < 0.03
            assert row.max() == pytest.approx(1 / (1 - rate))
    assert np.corrcoef(scales[6], scales[7])[0, 1] < 0.05
    assert np.array_equal(path_scales(0, 1, np.array([77, 5]), 4, 0.4, None).numpy(), scales[:, [77, 5]])
    partial = path_scales(0, 1, np.arange(2000), 4, 0.4, 0.5).numpy()
    assert (partial[:7] == 1).all()
    assert (partial[7] == 0).any()


def test_a_dropped_branch_is_left_out():
    model, images = classifier(), torch.randn(2, 3, 32, 32)
    ones = torch.ones(4, 2)
    torch.testing.assert_close(model.features(images, ones), model.features(images))
    none = model.features(images, torch.zeros(4, 2))
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    torch.testing.assert_close(none, model.fc_norm(tokens.mean(1)))
