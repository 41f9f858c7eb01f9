"""The encoder as a plain module: the trained model's features on whole images, in PyTorch and in ONNX."""

import dataclasses
import json

import pytest
import torch

from patchmill.tools import cli
from patchmill.trainer.checkpoints import onnx_export
from patchmill.trainer.checkpoints.checkpoint import Snapshot, write
from patchmill.trainer.checkpoints.files import config_json
from patchmill.trainer.checkpoints.interop import build_encoder, load_encoder, write_checkpoint
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.toml import to_toml
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.recipes.pretrain import with_options
from tests.support.small_models import TINY, WIDE, random_checkpoint

# large enough that the exporter keeps the class token and the positions apart instead of folding them into a constant
LARGER = dataclasses.replace(WIDE, image_size=(64, 96))


def uint8_images(config, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, *config.image_hw, config.channels), dtype=torch.uint8, generator=generator)


def trained(config):
    checkpoint = random_checkpoint(config)
    model = MaskedAutoencoder(config)
    model.load_state_dict(checkpoint.tensors)
    return checkpoint, model.eval()


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["square", "wide"])
def test_features_are_the_models_with_every_patch_kept(config, tmp_path):
    checkpoint, model = trained(config)
    write_checkpoint(checkpoint, tmp_path / "m.safetensors")
    images = uint8_images(config)
    every = torch.arange(config.num_patches, dtype=torch.int32).expand(len(images), -1).contiguous()
    with torch.inference_mode():
        latent = model.encode(images, every)
        cls_token, patches = load_encoder(tmp_path / "m.safetensors")(images)
    # the same fp32 arithmetic, with a convolution for the patch embedding's matrix product
    torch.testing.assert_close(cls_token, latent[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches, latent[:, 1:], rtol=1e-5, atol=1e-5)


def test_it_shares_the_parameters_of_a_model_in_training():
    _, model = trained(TINY)
    encoder = Encoder(model)
    ours = dict(model.named_parameters())
    assert all(parameter is ours[name] for name, parameter in encoder.named_parameters())
    assert not [name for name in encoder.state_dict() if name not in model.state_dict()]


def test_normalised_images_are_taken_apart():
    encoder = build_encoder(random_checkpoint(TINY))
    images = uint8_images(TINY)
    mean, std = torch.tensor(TINY.mean), torch.tensor(TINY.std)
    by_hand = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(encoder.normalise(images), by_hand, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(by_hand).patches, encoder(images).patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, 3), torch.zeros(1, 32, 40, 3, dtype=torch.uint8)],
    ids=["normalised", "floats", "another size"],
)
def test_other_images_are_refused_with_the_way_out(images):
    with pytest.raises(ValueError, match=r"takes torch\.uint8 \[B, 32, 32, 3\] \(channels last\).*encoder\.encode"):
        build_encoder(random_checkpoint(TINY))(images)


def test_low_precision_parameters_give_low_precision_features():
    encoder = build_encoder(random_checkpoint(TINY)).to(torch.bfloat16)
    assert encoder(uint8_images(TINY)).cls_token.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's exporter warns of its own code
@pytest.mark.parametrize(("config", "limit"), [(TINY, 2**31), (LARGER, 0)], ids=["one file", "weights beside"])
def test_onnx_computes_the_same_for_any_batch(config, limit, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", limit)
    checkpoint = random_checkpoint(config)
    write_checkpoint(checkpoint, tmp_path / "m.safetensors")
    argv = [str(tmp_path / "m.safetensors"), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    assert cli.run("export", argv) == 0
    assert "onnxruntime agrees with PyTorch within" in capsys.readouterr().out
    assert (tmp_path / "onnx" / "encoder.onnx.data").exists() == (limit == 0)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder.onnx")
    assert [value.name for value in session.get_outputs()] == ["class_token", "patch_tokens"]
    for batch in (1, 2, 5):
        images = uint8_images(config, batch)
        with torch.inference_mode():
            expected = build_encoder(checkpoint)(images)
        for ours, theirs in zip(expected, session.run(None, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)
    # nothing of the machine that wrote it, such as the paths of the source files
    assert b"encoder.py" not in (tmp_path / "onnx" / "encoder.onnx").read_bytes()


def run_folder(root):
    """A run folder as pretrain leaves it, with secrets where paths are."""
    run = root / "runs" / "secret-place"
    config = with_options(
        PretrainConfig(model=TINY), out=str(run), data__path="s3://secret-bucket/photos/?key=SECRET", seed=3
    )
    header = {"format": "patchmill", "model": config_json(TINY)}
    state = {"loader": {"epoch": 1, "step": 2, "fingerprint": {"dataset": "f" * 64, "seed": 3}}}
    for step in (10, 20):
        write(run, step, Snapshot(header, random_checkpoint(TINY).tensors, {"step.norm.bias": torch.ones(1)}, state))
    (run / "config.toml").write_text(to_toml(config))
    lines = [{"step": step, "epoch": step / 10, "loss": 0.5 - step / 100} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_card_tells_recipe_data_and_metrics_but_no_places(tmp_path):
    assert cli.run("export", [str(run_folder(tmp_path)), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Step 20 of the run. Data: `photos`, manifest sha256 `" + "f" * 64 in card
    assert "| loss | 0.3 |" in card  # the line of this step, not the file's last
    assert "seed = 3" in card
    assert 'ViTMAEForPreTraining.from_pretrained("THIS_FOLDER")' in card
    assert not [word for word in ("SECRET", "secret", str(tmp_path)) if word in card]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def test_a_file_without_a_run_has_a_card_that_says_so(tmp_path, capsys):
    write_checkpoint(random_checkpoint(TINY), tmp_path / "m.safetensors")
    argv = [str(tmp_path / "m.safetensors"), "--format", "timm", "--out", str(tmp_path / "out")]
    assert cli.run("export", argv) == 0
    assert "nothing is known of data and recipe" in (tmp_path / "out" / "README.md").read_text()
    assert cli.run("export", argv) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    argv = [*argv[:-1], str(tmp_path / "other"), "--pool", "avg", "--format", "hf"]
    assert cli.run("export", argv) == 2
    assert "--pool avg is for --format timm" in capsys.readouterr().err
