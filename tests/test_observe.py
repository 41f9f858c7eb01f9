"""The observation point of loader and loop: every stage is seen, and seeing changes nothing."""

import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader
from patchmill.pipeline.observe import NOBODY
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from tests.support.photos import make_dataset

BATCHES, BATCH = 6, 8
LOADER = {"plan", "read", "check", "decode", "copy", "masks", "colour", "wait"}


class Witness:
    """Counts spans that ended and their images, and keeps which span was open around each."""

    def __init__(self):
        self.spans: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self.outer, self.lengths = {}, []
        self._lock, self._open = threading.Lock(), threading.local()

    @contextmanager
    def span(self, name, images):
        stack = self._open.__dict__.setdefault("names", [])
        outer = stack[-1] if stack else None
        stack.append(name)
        yield
        stack.pop()
        with self._lock:
            self.spans[name] += 1
            self.images[name] += images
            self.outer.setdefault(name, set()).add(outer)

    def queue(self, length):
        self.lengths.append(length)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=24, sides=(40, 60))


def batches(path, decoder, observer, repeats=1):
    config = DataConfig(path=str(path), decoder=decoder, workers=2, colour_jitter=0.4, repeats=repeats)
    with build_loader(
        config, image_size=32, patch_size=16, channels=3, mask=MaskConfig(), seed=5, global_batch=BATCH,
        observer=observer,
    ) as loader:  # fmt: skip
        return [next(loader) for _ in range(BATCHES)]


@pytest.mark.parametrize("decoder", ["cpu", "dali", "resident"])
def test_every_stage_of_the_loader_is_seen_and_batches_stay_the_same(decoder, dataset, tmp_path):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    path = make_dataset(tmp_path, count=24, sides=(48, 48)) if decoder == "resident" else dataset
    witness = Witness()
    for seen, unseen in zip(batches(path, decoder, witness), batches(path, decoder, NOBODY), strict=True):
        assert torch.equal(seen.images, unseen.images)
        assert torch.equal(seen.plan.ids_restore, unseen.plan.ids_restore)
        assert torch.equal(seen.sample_ids, unseen.sample_ids)
        assert torch.equal(seen.labels, unseen.labels)
    expected = LOADER | ({"chunk", "resize"} if decoder == "cpu" else set())
    assert set(witness.spans) == expected - ({"read"} if decoder == "resident" else set())
    assert witness.spans["wait"] == len(witness.lengths) == BATCHES
    assert witness.images["wait"] == BATCHES * BATCH
    assert witness.images["masks"] >= BATCHES * BATCH
    assert all(0 <= length <= 2 for length in witness.lengths)


def test_spans_nest_as_documented_and_count_crops(dataset):
    witness = Witness()
    batches(dataset, "cpu", witness, repeats=2)
    assert witness.outer["check"] == {"read"}
    assert witness.outer["read"] == witness.outer["decode"] == witness.outer["resize"] == {"chunk"}
    assert witness.outer["chunk"] == witness.outer["plan"] == witness.outer["masks"] == {None}
    assert witness.images["decode"] >= BATCHES * BATCH // 2
    assert witness.images["resize"] >= 2 * BATCHES * BATCH // 2


def test_a_run_is_the_same_bit_for_bit_when_it_is_observed(dataset, tmp_path):
    witness, weights = Witness(), []
    for name, observer in (("seen", witness), ("unseen", NOBODY)):
        config = with_options(
            get_recipe("mae-tiny"),
            model__image_size=32, model__embed_dim=32, model__depth=1, model__num_heads=2, model__decoder_embed_dim=16,
            model__decoder_num_heads=2, data__path=str(dataset), data__decoder="cpu", data__workers=2,
            train__global_batch=BATCH, train__total_steps=4, train__total_images=None, train__log_every_steps=2,
            train__save_every_steps=2, train__picture_every_epochs=1, train__tensorboard=False, device="cpu",
            out=str(tmp_path / name),
        )  # fmt: skip
        summary = pretrain(config, observer=observer)
        weights.append(load_file(checkpoint.folder(summary.run, 4) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert witness.spans["update"] == witness.spans["forward"] == witness.spans["wait"] == 4
    assert witness.images["update"] == witness.images["forward"] == 4 * BATCH
    assert witness.spans["metrics"] >= 2
    assert witness.spans["save"] == 2
    assert witness.spans["evaluate"] == 1
    assert witness.outer["forward"] == {"update"}
