"""The loader's promises: the same batches for any number of ranks, after any restart, each sample once an epoch."""

import json
import sys

import numpy as np
import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.loader import DataConfig, _has_dali, _make_decoder, build_loader
from tests.support.photos import make_dataset

SAMPLES, BATCH = 22, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), count=SAMPLES, sides=(40, 90))


def open_loader(path, *, rank=0, world=1, batch=BATCH, seed=3, start=(0, 0), decoder="cpu", size=32, **options):
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, workers=2, **options),
        image_size=size,
        patch_size=8,
        channels=3,
        mask=MaskConfig(),
        seed=seed,
        global_batch=batch,
        rank=rank,
        world_size=world,
        start_epoch=start[0],
        start_step=start[1],
    )


def take(loader, count):
    """Everything of the next batches that a step could see, as comparable bytes."""
    return [content(next(loader)) for _ in range(count)]


def content(batch):
    tensors = (batch.images, batch.plan.ids_keep, batch.plan.ids_mask, batch.plan.ids_restore, batch.labels)
    return batch.epoch, batch.step, batch.sample_ids.tolist(), *(tensor.numpy().tobytes() for tensor in tensors)


def global_batches(path, world, count, start=(0, 0), **options):
    """The ranks' batches joined in rank order."""
    ranks = []
    for rank in range(world):
        with open_loader(path, rank=rank, world=world, start=start, **options) as loader:
            ranks.append([next(loader) for _ in range(count)])
    joined = []
    for parts in zip(*ranks, strict=True):
        assert len({(part.epoch, part.step) for part in parts}) == 1
        images = torch.cat([part.images for part in parts])
        masks = torch.cat([part.plan.ids_mask for part in parts])
        ids = torch.cat([part.sample_ids for part in parts])
        joined.append((parts[0].epoch, parts[0].step, ids.tolist(), images.numpy().tobytes(), masks.numpy().tobytes()))
    return joined


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": "window", "window_shards": 2}, {"repeats": 2}, {"decoder": "dali"}]
)
def test_the_union_over_ranks_is_the_same_for_1_2_and_4(dataset, options):
    alone = global_batches(dataset, 1, 5, **options)
    assert alone == global_batches(dataset, 2, 5, **options)
    assert alone == global_batches(dataset, 4, 5, **options)


def test_going_on_with_2_ranks_where_4_stopped(dataset):
    alone = global_batches(dataset, 1, 7)
    with open_loader(dataset, rank=3, world=4) as loader:
        take(loader, 3)
        state = loader.state_dict()
    with open_loader(dataset, rank=1, world=2) as loader:
        loader.load_state_dict(state)
        position = loader.state_dict()["epoch"], loader.state_dict()["step"]
    assert alone[3:] == global_batches(dataset, 2, 4, start=position)


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_resume_at_every_step_of_two_epochs(dataset, decoder):
    with open_loader(dataset, decoder=decoder) as loader:
        steps = 2 * loader.steps_per_epoch
        whole, states = [], [loader.state_dict()]
        for _ in range(steps + 1):
            whole.append(content(next(loader)))
            states.append(json.loads(json.dumps(loader.state_dict())))
    assert [item[:2] for item in whole] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    for cut in range(steps + 1):
        with open_loader(dataset, decoder=decoder) as loader:
            loader.load_state_dict(states[cut])
            assert take(loader, steps + 1 - cut) == whole[cut:]


def test_state_belongs_to_the_batch_last_handed_out_and_not_to_the_prefetched(dataset):
    with open_loader(dataset, prefetch_batches=4) as loader:
        first = next(loader)
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (first.epoch, first.step + 1)
        rest = take(loader, 3)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 1})
        assert take(loader, 3) == rest


def test_a_start_past_the_end_of_an_epoch_is_the_next_epoch(dataset):
    with open_loader(dataset, start=(0, 2)) as late, open_loader(dataset, start=(1, 0)) as early:
        assert take(late, 1) == take(early, 1)


def test_every_sample_comes_once_an_epoch(dataset):
    with open_loader(dataset, batch=SAMPLES) as loader:
        first, second = next(loader), next(loader)
    assert sorted(first.sample_ids.tolist()) == sorted(second.sample_ids.tolist()) == list(range(SAMPLES))
    assert first.sample_ids.tolist() != second.sample_ids.tolist()


def test_drop_leaves_the_rest_out_and_fill_completes_it(dataset):
    with open_loader(dataset) as dropping, open_loader(dataset, last_batch="fill") as filling:
        assert (dropping.steps_per_epoch, filling.steps_per_epoch) == (2, 3)
        seen = [i for _ in range(3) for i in next(filling).sample_ids.tolist()]
    assert sorted(seen[:SAMPLES]) == list(range(SAMPLES))
    assert seen[SAMPLES:] == seen[: 24 - SAMPLES]


def test_repeats_decode_once_and_draw_anew(dataset):
    with open_loader(dataset, repeats=4) as loader:
        assert loader.steps_per_epoch == SAMPLES * 4 // BATCH
        batches = [next(loader) for _ in range(loader.steps_per_epoch)]
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert torch.equal(ids[::4], ids[3::4])
    assert sorted(ids[::4].tolist()) == list(range(SAMPLES))
    images, masks = batches[0].images[:4], batches[0].plan.ids_mask[:4]
    assert not any(torch.equal(images[0], images[k]) or torch.equal(masks[0], masks[k]) for k in (1, 2, 3))
    with open_loader(dataset) as plain:  # repeat 0 is what the sample gives without repeats
        batch = next(plain)
    row = batch.sample_ids.tolist().index(ids[0].item())
    assert torch.equal(batch.images[row], images[0])


def test_threads_and_prefetch_change_nothing(dataset):
    with open_loader(dataset) as loader:
        expected = take(loader, 4)
    for options in ({"prefetch_batches": 1}, {"prefetch_batches": 5}, {"decoder": "cpu"}):
        with open_loader(dataset, **options) as loader:
            assert take(loader, 4) == expected


def test_epochs_seeds_and_batch_contents(dataset):
    with open_loader(dataset) as loader:
        batch = next(loader)
    assert batch.images.shape == (BATCH, 32, 32, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.plan.ids_keep.shape == (BATCH, 4)
    assert batch.labels.tolist() == np.load(dataset / "samples.npy")["label"][batch.sample_ids].tolist()
    with open_loader(dataset, seed=4) as other:
        assert next(other).sample_ids.tolist() != batch.sample_ids.tolist()


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 4}, "seed: was 3, is 4"), ({"batch": 4}, "global_batch: was 8, is 4"), ({"repeats": 2}, "repeats"),
     ({"shuffle": "none"}, "shuffle"), ({"last_batch": "fill"}, "last_batch")],
)  # fmt: skip
def test_another_setting_is_refused_by_name(dataset, change, name):
    with open_loader(dataset) as loader:
        state = loader.state_dict()
    with open_loader(dataset, **change) as loader, pytest.raises(ValueError, match=name):
        loader.load_state_dict(state)


def test_another_dataset_is_refused_by_name(dataset, tmp_path):
    other = make_dataset(tmp_path, count=SAMPLES, seed=1, sides=(40, 90))
    with open_loader(dataset) as loader:
        state = loader.state_dict()
    with open_loader(other) as loader, pytest.raises(ValueError, match="dataset: was"):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 6, "world": 4}, "multiple of world size"), ({"batch": 8, "world": 2, "repeats": 3}, "data.repeats"),
     ({"batch": 64}, "do not fill one global batch")],
)  # fmt: skip
def test_impossible_batches_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        open_loader(dataset, **options)


@pytest.mark.parametrize(
    "options",
    [{"decoder": "opencv"}, {"crop": "centred"}, {"repeats": 0}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)},
     {"crop_fraction": 0.0}, {"max_bad_fraction": 2.0}, {"workers": -1}],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(options):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(options))}"):
        DataConfig(**options)


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        open_loader("")
    with pytest.raises(FileNotFoundError, match="patchmill shard"):
        open_loader(tmp_path / "nothing")
    with pytest.raises(ValueError, match="multiple of the patch size"):
        build_loader(
            DataConfig(path=str(tmp_path)),
            image_size=30, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=1,
        )  # fmt: skip


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_another_size_on_the_way_keeps_samples_and_draws(dataset, decoder):
    """The batches after a change are those of a loader that had the size from the beginning."""
    options = {"decoder": decoder, "prefetch_batches": 3}
    with open_loader(dataset, size=(64, 64), **options) as large:
        expected = take(large, 6)
    with open_loader(dataset, **options) as loader:
        take(loader, 3)
        loader.set_image_size((64, 64))
        assert take(loader, 2) == expected[3:5]
        loader.set_image_size((32, 32))
        loader.set_image_size((64, 64))
        assert loader.state_dict()["step"] == 1
        assert take(loader, 1) == expected[5:]
        with pytest.raises(ValueError, match="60 x 60 is not a multiple of the patch size 8"):
            loader.set_image_size((60, 60))


def test_without_any_nvidia_package_the_cpu_decodes_for_a_gpu(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)  # an import fails as if it were not installed
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    assert not _has_dali()
    with open_loader(dataset) as loader:
        config = DataConfig(path=str(dataset), workers=1)
        decoder = _make_decoder(config, loader.maker.feeder, torch.device("cuda"), loader.maker.spec)
    assert isinstance(decoder, CpuDecoder)
    assert decoder.pin_memory
