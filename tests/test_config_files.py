"""Configs: recipes hold the published numbers, files give back what was saved, mistakes are named."""

import dataclasses
import tomllib

import pytest
import tomli_w

from patchmill.pipeline.config import DataConfig
from patchmill.tools.console.pretrain_options import parse_pretrain
from patchmill.trainer.config.evaluate import FinetuneConfig, KnnConfig, ProbeConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.toml import from_toml, read_toml, to_toml
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.recipes.pretrain import RECIPES, get_recipe, with_options


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_config_gives_itself_back(name, tmp_path):
    config = with_options(get_recipe(name), data__path="shards", out="run", optim__clip_grad=1.0, seed=2**63 - 1)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert from_toml(path) == config


def test_unset_options_are_absent_and_come_back_unset(tmp_path):
    config = PretrainConfig()
    text = to_toml(config)
    assert "total_steps" not in text
    assert "clip_grad" not in text
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert from_toml(path).train.total_steps is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nglobal_bacth = 4\n", "global_bacth"),
        ('[train]\nglobal_batch = "many"\n', "global_batch"),
        ("[train\n", "TOML"),
        ("[model]\nimage_size = 225\n", "224"),
    ],
)
def test_a_wrong_config_file_names_what_is_wrong(text, named, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        from_toml(path)


@pytest.mark.parametrize("kind", [KnnConfig, ProbeConfig, FinetuneConfig])
def test_a_config_that_lists_every_option_of_data_still_loads(kind, tmp_path):
    """Earlier versions wrote them all, also those that the command did not obey."""
    path, config = tmp_path / "config.toml", kind()
    table = tomllib.loads(to_toml(config))
    table["data"] = tomllib.loads(to_toml(DataConfig())) | table["data"]
    assert table["data"]["repeats"] == 1
    path.write_text(tomli_w.dumps(table))
    assert read_toml(path, kind) == config
    table["data"]["repeats"] = 2
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(ValueError, match=r"config\.toml.*does not obey data\.repeats = 2; remove"):
        read_toml(path, kind)


@pytest.mark.parametrize(
    ("recipe", "embed_dim", "depth", "heads", "patch", "gflops"),
    [
        ("mae-vit-b16", 768, 12, 12, 16, 58.5),
        ("mae-vit-l16", 1024, 24, 16, 16, 124.2),
        ("mae-vit-h14", 1280, 32, 16, 14, 291.0),
    ],
)
def test_recipes_are_the_published_ones(recipe, embed_dim, depth, heads, patch, gflops):
    config = get_recipe(recipe)
    model = config.model
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (embed_dim, depth, heads, patch)
    assert (model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads) == (512, 8, 16)
    assert model.norm_pix_loss
    assert (config.mask.kind, config.mask.ratio) == ("random", 0.75)
    assert (config.data.scale, config.data.ratio) == ((0.2, 1.0), (3 / 4, 4 / 3))
    optim = config.optim
    assert (optim.blr, optim.betas, optim.weight_decay, optim.warmup_epochs) == (1.5e-4, (0.9, 0.95), 0.05, 40)
    assert (config.train.global_batch, config.train.total_epochs) == (4096, 800)
    assert train_flops_per_image(model, config.mask) / 1e9 == pytest.approx(gflops, rel=5e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patch_size": 15}, "multiple"),
        ({"num_heads": 5}, "heads"),
        ({"channels": 4}, "model.mean"),
        ({"std": (0.2, 0.2, 0.0)}, "positive"),
        ({"decoder_depth": 0}, "decoder_depth"),
    ],
)
def test_impossible_models_are_refused_with_the_option_s_name(options, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(ModelConfig(), **options)


def test_command_line_options_win_over_the_recipe():
    line = "--recipe mae-tiny --data.path d --out o --train.total-steps 7 --train.global-batch 8 --seed 5 --device cpu"
    config = parse_pretrain([*line.split(), "--data.decoder", "cpu", "--resume", "never", "--optim.blr", "1e-3"])
    assert (config.train.total_steps, config.train.global_batch, config.seed) == (7, 8, 5)
    assert (config.data.path, config.out, config.resume, config.optim.blr) == ("d", "o", "never", 1e-3)
    assert config.model == get_recipe("mae-tiny").model


def test_command_line_options_win_over_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(with_options(get_recipe("mae-tiny"), data__path="d", out="o", seed=9)))
    config = parse_pretrain(["--config", str(path), "--train.accum-steps", "2"])
    assert (config.seed, config.train.accum_steps, config.data.path) == (9, 2, "d")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--recipe mae-giant --data.path d --out o", "mae-vit-b16"),
        ("--data.path d --out o", "--recipe"),
        ("--recipe mae-tiny --out o", "--data.path"),
        ("--recipe mae-tiny --data.path d", "--out"),
    ],
)
def test_what_is_missing_is_named(line, named):
    with pytest.raises(ValueError, match=named):
        parse_pretrain(line.split())
