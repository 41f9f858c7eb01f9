"""Checkpoints through files: ours -> each format -> ours, bit for bit, with what only a config can say."""

import argparse
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from patchmill.tools import cli
from patchmill.trainer.checkpoints.checkpoint import load_model
from patchmill.trainer.checkpoints.export import write_files
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import load_encoder, read_checkpoint, write_checkpoint
from patchmill.trainer.checkpoints.names import encoder_only, to_format
from tests.support.small_models import B16, TINY, WIDE, random_checkpoint, same_bits, windows

FORMATS = ("patchmill", "mae", "timm", "hf", "detectron2", "mmseg")
WHOLE = ("patchmill", "mae", "hf")


@pytest.mark.parametrize("decoder", [True, False], ids=["whole", "encoder"])
@pytest.mark.parametrize("config", [TINY, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("target", FORMATS)
def test_export_and_import_give_back_the_very_model(target, config, decoder, tmp_path, capsys):
    original = random_checkpoint(config, decoder=decoder)
    write_checkpoint(original, tmp_path / "ours.safetensors")
    argv = [str(tmp_path / "ours.safetensors"), "--format", target, "--out", str(tmp_path / "out")]
    if target == "hf" and config is WIDE:
        assert cli.run("export", argv) == 2
        assert "give --to.image-size N" in capsys.readouterr().err
        assert not list(tmp_path.glob(".*"))
        return
    assert cli.run("export", argv) == 0
    back = [str(tmp_path / "out"), "--out", str(tmp_path / "back.safetensors")]
    assert cli.run("import", back) == 0
    found = read_checkpoint(tmp_path / "back.safetensors")
    assert found.config == config
    expected = original.tensors if target in WHOLE else encoder_only(original.tensors)
    assert same_bits(found.tensors, expected)
    assert found.has_decoder == (decoder and target in WHOLE)
    assert not list(tmp_path.glob(".*"))
    assert cli.run("import", back) == 2  # nothing is written over
    assert "exists already" in capsys.readouterr().err


def test_a_whole_vit_b_through_files(tmp_path):
    tensors = windows(B16)
    write_files(tmp_path, "hf", random_checkpoint(TINY)._replace(config=B16, tensors=tensors))
    found = read_checkpoint(tmp_path)
    assert found.config == B16
    assert same_bits(found.tensors, tensors)


def test_an_imported_whole_model_is_a_checkpoint_of_ours(tmp_path):
    original = random_checkpoint(TINY)
    write_files(tmp_path, "mae", original)
    assert cli.run("import", [str(tmp_path / "model.pth"), "--out", str(tmp_path / "m.safetensors")]) == 0
    model, _ = load_model(tmp_path / "m.safetensors")
    assert model.config == TINY
    assert same_bits(model.state_dict(), original.tensors)


def test_published_training_checkpoint(tmp_path):
    """torch.save of model, optimizer, epoch, scaler and an argparse.Namespace, as facebookresearch/mae writes."""
    shallow = dataclasses.replace(B16, depth=2, decoder_depth=1)
    tensors = random_checkpoint(shallow).tensors
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True, input_size=224)
    more = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 7, "scaler": {"scale": 65536.0}}
    torch.save({"model": tensors, **more, "args": args}, tmp_path / "ck.pth")
    found = read_checkpoint(tmp_path / "ck.pth")
    assert found.config == shallow  # heads from the published sizes, the grid from the positions, the target from args
    assert found.notes == []
    assert same_bits(found.tensors, tensors)


def test_a_file_that_says_nothing_of_its_target_is_noted(tmp_path):
    torch.save({"model": random_checkpoint(TINY).tensors}, tmp_path / "m.pth")
    heads = Hints(num_heads=4, decoder_num_heads=2)
    found = read_checkpoint(tmp_path / "m.pth", heads)
    assert found.config == dataclasses.replace(TINY, norm_pix_loss=True)
    assert [note for note in found.notes if "--source.norm-pix-loss False" in note]
    found = read_checkpoint(tmp_path / "m.pth", dataclasses.replace(heads, norm_pix_loss=False))
    assert found.config == TINY
    assert found.notes == []


def test_fine_tuned_classifiers_give_their_encoder(tmp_path):
    tensors = random_checkpoint(TINY, decoder=False).tensors
    classifier = to_format(tensors, "timm", mean_pool=True)
    classifier |= {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    torch.save({"model": classifier}, tmp_path / "finetuned.pth")
    found = read_checkpoint(tmp_path / "finetuned.pth", Hints(num_heads=4))
    assert same_bits(found.tensors, tensors)
    assert found.notes == ["left out, not part of a ViT-MAE: head.bias, head.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_become_float32(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in random_checkpoint(TINY).tensors.items()}
    torch.save({"model": tensors}, tmp_path / "m.pth")
    found = read_checkpoint(tmp_path / "m.pth", Hints(num_heads=4, decoder_num_heads=2, norm_pix_loss=False))
    assert same_bits(found.tensors, {name: tensor.float() for name, tensor in tensors.items()})
    assert found.notes == [f"converted from {str(dtype).removeprefix('torch.')} to float32"]


def test_configs_of_transformers_are_read(tmp_path):
    """A folder of the hub: no note of ours in the header, everything from config.json and the processor's."""
    original = random_checkpoint(TINY)
    write_files(tmp_path, "hf", original)
    save_file(
        {name: tensor.contiguous() for name, tensor in to_format(original.tensors, "hf").items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = read_checkpoint(tmp_path)
    assert found.config == TINY
    assert found.notes == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    assert read_checkpoint(tmp_path).notes == ["config.json gives layer_norm_eps 1e-12; 1e-06 is used, as published"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="depth 3 in the config, 2 in the tensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_checkpoint(tmp_path)


def test_configs_of_timm_are_read(tmp_path):
    original = random_checkpoint(WIDE, decoder=False)
    write_files(tmp_path, "timm", original)
    save_file(to_format(original.tensors, "timm"), tmp_path / "model.safetensors")
    config = read_checkpoint(tmp_path).config
    assert (config.image_hw, config.num_heads, config.mean, config.std) == ((32, 56), 4, WIDE.mean, WIDE.std)


def test_hugging_face_header_and_eps(tmp_path):
    write_files(tmp_path, "hf", random_checkpoint(TINY))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    assert config["norm_pix_loss"] is False
    assert config["intermediate_size"] == 128


def test_what_a_format_cannot_say_is_asked_for(tmp_path):
    tensors = random_checkpoint(dataclasses.replace(TINY, image_size=(32, 56)), decoder=False).tensors
    torch.save({"model": tensors}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"how many heads .* give --source\.num-heads N"):
        read_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"28 patches, which is not a square: give --source\.image-size HEIGHT WIDTH"):
        read_checkpoint(tmp_path / "m.pth", Hints(num_heads=4))
    with pytest.raises(ValueError, match="28 patches; images of 32 x 32"):
        read_checkpoint(tmp_path / "m.pth", Hints(num_heads=4, image_size=32))
    assert read_checkpoint(tmp_path / "m.pth", Hints(num_heads=4, image_size=(32, 56))).config.grid_hw == (4, 7)
    tensors["patch_embed.proj.weight"] = torch.zeros(32, 5, 8, 8)
    torch.save({"model": tensors}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"5 channels: give --source\.mean and --source\.std"):
        read_checkpoint(tmp_path / "m.pth", Hints(num_heads=4, image_size=(32, 56)))


def test_folders_without_weights_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_encoder(tmp_path / "nothing.pth")


@pytest.mark.parametrize("command", ["export", "import", "features"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(command, ["--help"])
    assert ended.value.code == 0
    assert f"patchmill {command} " in capsys.readouterr().out.split("options")[0].split("Example:")[1]
