"""Files that mean harm or are broken: nothing in them runs, and the message says what is wrong and what to do."""

import argparse
import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from patchmill.tools import cli
from patchmill.trainer.checkpoints.files import config_json, write_pth
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import load_encoder, read_checkpoint, write_checkpoint
from tests.support.small_models import TINY, random_checkpoint

HINTS = Hints(num_heads=4, decoder_num_heads=2, norm_pix_loss=False)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def save_pth(path, change):
    tensors = dict(random_checkpoint(TINY).tensors)
    change(tensors)
    torch.save({"model": tensors}, path)
    return path


PAYLOADS = {
    "beside the tensors": lambda payload, tensors: {"model": tensors, "args": payload},
    "among the tensors": lambda payload, tensors: {"model": {**tensors, "extra": payload}},
    "in the namespace": lambda payload, tensors: {"model": tensors, "args": argparse.Namespace(hook=payload)},
    "as the whole file": lambda payload, tensors: payload,
}


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PAYLOADS)
def test_a_pickle_payload_does_not_run(place, zip_format, tmp_path, capsys):
    marker, path = tmp_path / "ran", tmp_path / "m.pth"
    content = PAYLOADS[place](Payload(marker), random_checkpoint(TINY).tensors)
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"holds more than tensors \(\w+\.system\); nothing of it was run"):
        load_encoder(path)
    assert cli.run("import", [str(path), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "ask its author for safetensors" in capsys.readouterr().err
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is live: only the reader kept it from running
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_does_not_run(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "m.bin"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="nothing of it was run"):
        read_checkpoint(path)
    assert not marker.exists()


def cut_points(size):
    return sorted({0, 1, 2, 7, 8, 100, size // 3, size // 2, size - 1000, size - 30, size - 1})


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_cut_files(kind, tmp_path):
    whole = tmp_path / f"whole.{kind}"
    original = random_checkpoint(TINY)
    if kind == "pth":
        write_pth(original.tensors, "model", TINY, whole)
    else:
        write_checkpoint(original, whole)
    data = whole.read_bytes()
    for size in cut_points(len(data)):
        path = tmp_path / f"cut{size}.{kind}"
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="fetch it again") as caught:
            read_checkpoint(path, HINTS)
        assert path.name in str(caught.value)


def test_no_weights_at_all(tmp_path):
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="fetch it again"):
        read_checkpoint(page)
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no named tensors but the keys model"):
        read_checkpoint(tmp_path / "empty.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds no named tensors but a Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"has an unknown format: .* its names are conv1\.weight"):
        read_checkpoint(tmp_path / "resnet.safetensors")


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


FAULTS = {
    "missing": (drop("blocks.1.norm2.bias", "norm.weight"), r"2 missing: blocks\.1\.norm2\.bias, norm\.weight"),
    "missing in the decoder": (drop("mask_token"), r"1 missing: mask_token"),
    "no decoder head": (drop("decoder_embed.weight"), r"is missing decoder_embed\.weight"),
    "no positions": (drop("pos_embed"), r"is missing pos_embed, .* give a checkpoint of"),
    "extra": (put("blocks.0.ls1.gamma", torch.zeros(32)), r"1 extra: blocks\.0\.ls1\.gamma\. .*would change"),
    "a block too far": (put("blocks.9.norm1.bias", torch.zeros(32)), r"missing: blocks\.2\..* extra: blocks\.9\.norm1"),
    "shape": (put("norm.bias", torch.zeros(31)), r"1 of another shape: norm\.bias is \(31,\), not \(32,\)"),
    "dimensions": (put("pos_embed", torch.zeros(17, 32)), r"pos_embed has the shape \(17, 32\), expected 3 dimensions"),
    "integers": (
        put("norm.bias", torch.zeros(32, dtype=torch.int8)),
        r"not floating point: norm\.bias is torch\.int8",
    ),
    "complex": (put("norm.bias", torch.zeros(32, dtype=torch.complex64)), r"norm\.bias is torch\.complex64"),
    "sparse": (put("norm.bias", torch.zeros(32).to_sparse()), r"not floating point: norm\.bias"),
    "oblong patches": (put("patch_embed.proj.weight", torch.zeros(32, 3, 8, 4)), "only square patches"),
    "nothing inside": (put("patch_embed.proj.weight", torch.zeros(0, 3, 8, 8)), r"has the shape \(0, 3, 8, 8\)"),
    "widths": (put("decoder_embed.weight", torch.zeros(24, 32)), r"of another shape: mask_token is \(1, 1, 16\)"),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, tmp_path):
    change, message = FAULTS[fault]
    path = save_pth(tmp_path / "m.pth", change)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path, HINTS)
    assert str(path) in str(caught.value)


HEADERS = {
    "no JSON": "{",
    "no table": "[1]",
    "unknown field": json.dumps({"colour": "red"}),
    "huge image": config_json(TINY).replace('"image_size": 32', '"image_size": 8000000000'),
    "huge depth": config_json(TINY).replace('"depth": 2', '"depth": 1000000000'),
    "words for numbers": config_json(TINY).replace('"depth": 2', '"depth": "many"'),
    "truth for numbers": config_json(TINY).replace('"depth": 2', '"depth": true'),
    "another width": config_json(TINY).replace('"embed_dim": 32', '"embed_dim": 64'),
    "heads that do not divide": config_json(TINY).replace('"num_heads": 4', '"num_heads": 5'),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_cannot_be(header, tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = random_checkpoint(TINY).tensors
    save_file(tensors, path, metadata={"format": "patchmill", "model": HEADERS[header]})
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        read_checkpoint(path)


def test_flipped_bytes_end_in_a_message_or_a_model(tmp_path):
    """300 damaged files of each kind: a ValueError, or a whole model (tensor bytes carry no checksum), nothing else."""
    original = random_checkpoint(TINY)
    write_pth(original.tensors, "model", TINY, tmp_path / "m.pth")
    write_checkpoint(original, tmp_path / "m.safetensors")
    rng = random.Random(0)
    refused = 0
    for kind in ("pth", "safetensors"):
        data = (tmp_path / f"m.{kind}").read_bytes()
        # the pickle, or the header: where a flip can do something else than change a number
        fragile = range(data.index(b"decoder_"), data.index(b"decoder_") + 5000) if kind == "pth" else range(9000)
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(3):
                broken[rng.choice(fragile)] ^= 1 << rng.randrange(8)
            (tmp_path / f"broken.{kind}").write_bytes(broken)
            try:
                read_checkpoint(tmp_path / f"broken.{kind}", HINTS)
            except ValueError:
                refused += 1
    assert refused > 300
