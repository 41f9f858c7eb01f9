"""patchmill features: every sample of a dataset once, in its place, through any checkpoint."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.tools import cli
from patchmill.trainer.checkpoints.interop import build_encoder, write_checkpoint
from patchmill.trainer.checkpoints.names import to_format
from tests.support.photos import make_dataset
from tests.support.small_models import TINY, random_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("features"), count=22)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    write_checkpoint(random_checkpoint(TINY), path)
    return path


@pytest.fixture(scope="module")
def expected(dataset):
    """Features of the centre crops in the dataset's order, in one batch."""
    data = DataConfig(path=str(dataset), shuffle="none", crop="centre", flip=False)
    with build_loader(
        data, image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=0, global_batch=22
    ) as loader:
        batch = next(iter(loader))
    assert batch.sample_ids.tolist() == list(range(22))
    with torch.inference_mode():
        return build_encoder(random_checkpoint(TINY))(batch.images)


def features(checkpoint, dataset, out, *options):
    return cli.run(
        "features", ["--checkpoint", str(checkpoint), "--data.path", str(dataset), "--out", str(out), *options]
    )


def test_rows_are_the_samples(checkpoint, dataset, expected, tmp_path, capsys):
    out = tmp_path / "f.safetensors"
    # 22 samples in batches of 4: the last one is filled up
    assert features(checkpoint, dataset, out, "--batch-size", "4", "--tokens", "cls", "mean", "patches") == 0
    assert "22 images, cls, mean, patches" in capsys.readouterr().out
    found = load_file(out)
    assert found.keys() == {"label", "cls", "mean", "patches"}
    # other batch sizes sum in another order
    torch.testing.assert_close(found["cls"], expected.cls_token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patches"], expected.patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["mean"], expected.patches.mean(1), rtol=1e-4, atol=1e-5)
    assert found["label"].tolist() == open_dataset(dataset).samples["label"].tolist()
    with safe_open(out, "pt") as file:
        assert file.metadata()["dataset"] == open_dataset(dataset).manifest.fingerprint()
    assert not list(tmp_path.glob(".*"))


def test_parquet_holds_the_same_rows(checkpoint, dataset, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out = tmp_path / "f.parquet"
    assert features(checkpoint, dataset, out, "--batch-size", "5", "--tokens", "patches", "cls") == 0
    table = parquet.read_table(out)
    assert table.column_names == ["sample_id", "label", "patches", "cls"]
    assert table["sample_id"].to_pylist() == list(range(22))
    assert table["label"].to_pylist() == open_dataset(dataset).samples["label"].tolist()
    np.testing.assert_allclose(np.array(table["cls"].to_pylist()), expected.cls_token, rtol=1e-4, atol=1e-5)
    shape = json.loads(table.schema.metadata[b"shape.patches"])
    patches = np.array(table["patches"].to_pylist()).reshape(-1, *shape)
    np.testing.assert_allclose(patches, expected.patches, rtol=1e-4, atol=1e-5)


def test_half_precision_and_another_size(checkpoint, dataset, tmp_path):
    out = tmp_path / "f.safetensors"
    options = ["--dtype", "float16", "--image-size", "64", "--tokens", "patches", "--batch-size", "8"]
    assert features(checkpoint, dataset, out, *options) == 0
    found = load_file(out)["patches"]
    assert found.dtype == torch.float16
    assert found.shape == (22, 64, 32)
    assert torch.isfinite(found).all()


def test_a_published_file_is_read_as_it_is(dataset, expected, tmp_path):
    torch.save({"model": to_format(random_checkpoint(TINY).tensors, "mae")}, tmp_path / "published.pth")
    out = tmp_path / "f.safetensors"
    hints = ["--source.num-heads", "4", "--source.decoder-num-heads", "2", "--tokens", "cls"]
    assert features(tmp_path / "published.pth", dataset, out, *hints) == 0
    torch.testing.assert_close(load_file(out)["cls"], expected.cls_token, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_bad_sample_has_no_features(kind, checkpoint, expected, tmp_path, capsys):
    dataset = make_dataset(tmp_path, count=22)
    opened = open_dataset(dataset)
    row = opened.samples[7]
    with open(opened.shard_path(row["shard"]), "r+b") as shard:
        shard.seek(int(row["offset"]) + int(row["size"]) // 2)
        shard.write(b"\xff" * 16)
    out = tmp_path / f"f.{kind}"
    allowed = ["--data.max-bad-fraction", "0.1", "--batch-size", "4", "--tokens", "cls"]
    assert features(checkpoint, dataset, out, *allowed) == 0
    assert "1 images could not be read, the first is sample 7: run `patchmill verify`" in capsys.readouterr().out
    good = [index for index in range(22) if index != 7]
    if kind == "safetensors":
        found = load_file(out)
        assert found["cls"][7].isnan().all()
        assert found["label"][7] == -1
        torch.testing.assert_close(found["cls"][good], expected.cls_token[good], rtol=1e-4, atol=1e-5)
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        assert sorted(parquet.read_table(out)["sample_id"].to_pylist()) == good


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_run_that_fails_leaves_nothing(kind, checkpoint, dataset, tmp_path, monkeypatch):
    from patchmill.trainer.model.encoder import Encoder

    monkeypatch.setattr(Encoder, "forward", lambda self, images: (_ for _ in ()).throw(OSError("the disk is full")))
    assert features(checkpoint, dataset, tmp_path / f"f.{kind}") == 2
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_work(checkpoint, dataset, tmp_path, capsys):
    assert features(checkpoint, dataset, tmp_path / "f.csv") == 2
    assert "must end in .safetensors or .parquet" in capsys.readouterr().err
    assert cli.run("features", ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "f.safetensors")]) == 2
    assert "give --data.path DIR" in capsys.readouterr().err
    assert features(checkpoint, dataset / "shard-000000.tar", tmp_path / "f.safetensors") == 2
    assert "run `patchmill index` on their folder" in capsys.readouterr().err
    assert features(checkpoint, dataset, tmp_path / "f.safetensors", "--image-size", "30") == 2
    assert "not a multiple of model.patch_size 8" in capsys.readouterr().err
