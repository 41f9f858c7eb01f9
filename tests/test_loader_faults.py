"""Faults of samples and shards: replaced, counted and named, or a clear error; never a hang, never silence."""

import io
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.shards import ShardReader
from tests.support.damage import flip_a_bit, overwrite, rows_of
from tests.support.photos import jpeg, make_dataset, photo_crop
from tests.support.raw_dataset import make_raw_dataset

DECODERS = ("cpu", "dali")
SAMPLES = 24


def open_loader(path, decoder="cpu", *, batch=8, rank=0, world=1, quarantine="", **options):
    options = {"max_bad_fraction": 0.2, "workers": 2, **options}
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, quarantine_path=str(quarantine), **options),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3,
        global_batch=batch, rank=rank, world_size=world,
    )  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, count=SAMPLES, sides=(40, 90))


def run_to_the_end(loader, epochs=3):
    for _ in range(epochs * loader.steps_per_epoch):
        next(loader)


DAMAGE = {
    "one bit of the body": flip_a_bit,
    "a smear of random bytes": lambda d, i: overwrite(d, i, 200, random.Random(0).randbytes(400)),
    "zeroed bytes": lambda d, i: overwrite(d, i, 200, bytes(400)),
    "end missing": lambda d, i: overwrite(d, i, int(rows_of(d)[i]["size"]) - 2, b"\0\0"),
    "a page in place of the image": lambda d, i: overwrite(d, i, 0, b"<!DOCTYPE html><html>"),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_sample_is_replaced_counted_and_named(dataset, tmp_path, kind, decoder):
    DAMAGE[kind](dataset, 5)
    quarantine = tmp_path / "quarantine.jsonl"
    with open_loader(dataset, decoder, quarantine=quarantine) as loader:
        ids = [i for _ in range(3 * loader.steps_per_epoch) for i in next(loader).sample_ids.tolist()]
        assert loader.bad_samples == 1
    assert len(ids) == 3 * SAMPLES
    assert 5 not in ids
    assert set(ids) == set(range(SAMPLES)) - {5}
    (entry,) = map(json.loads, quarantine.read_text().splitlines())
    assert entry["sample"] == 5
    assert entry["where"].startswith("shard-00000")
    assert entry["where"].endswith(".jpg")
    assert "crc32" in entry["reason"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_replacements_do_not_depend_on_the_number_of_ranks(dataset, decoder):
    for sample in (2, 11, 17):
        flip_a_bit(dataset, sample)

    def run(world):
        parts = []
        for rank in range(world):
            with open_loader(dataset, decoder, rank=rank, world=world) as loader:
                parts.append([next(loader) for _ in range(6)])
        return [
            (torch.cat([b.sample_ids for b in step]).tolist(), torch.cat([b.images for b in step]).numpy().tobytes(),
             torch.cat([b.plan.ids_mask for b in step]).numpy().tobytes(), torch.cat([b.labels for b in step]).tolist())
            for step in zip(*parts, strict=True)
        ]  # fmt: skip

    alone = run(1)
    assert alone == run(2) == run(4)
    assert not {2, 11, 17} & {i for step in alone for i in step[0]}
    labels = rows_of(dataset)["label"]
    assert all(step[3] == labels[step[0]].tolist() for step in alone)


def test_decoders_agree_on_replacements(dataset):
    flip_a_bit(dataset, 7)
    with open_loader(dataset, "cpu") as cpu, open_loader(dataset, "dali") as dali:
        for _ in range(6):
            ours, theirs = next(cpu), next(dali)
            assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
            assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_replacement_feeds_all_its_repeats(dataset, decoder):
    flip_a_bit(dataset, 7)
    with open_loader(dataset, decoder, repeats=4) as loader:
        ids = torch.cat([next(loader).sample_ids for _ in range(loader.steps_per_epoch)]).reshape(-1, 4)
    assert (ids == ids[:, :1]).all()
    assert 7 not in ids


@pytest.mark.parametrize("decoder", DECODERS)
def test_too_many_bad_samples_stop_the_run(dataset, decoder):
    for sample in range(0, SAMPLES, 2):
        flip_a_bit(dataset, sample)
    message = r"\d+ of 24 samples are bad.*max_bad_fraction.*patchmill verify"
    with open_loader(dataset, decoder, max_bad_fraction=0.1) as loader, pytest.raises(ValueError, match=message):
        run_to_the_end(loader)


def test_no_bad_sample_is_allowed_when_the_limit_is_zero(dataset):
    flip_a_bit(dataset, 0)
    with open_loader(dataset, max_bad_fraction=0.0) as loader, pytest.raises(ValueError, match="1 of 24 samples"):
        run_to_the_end(loader)


def with_broken_table(data):
    """A JPEG whose quantisation table claims an impossible number: header and end are there, no decoder takes it."""
    at = data.index(b"\xff\xdb")
    return data[: at + 4] + b"\x07" + data[at + 5 :]


def undecodable():
    photo = photo_crop(np.random.default_rng(0), "coffee.png")
    good = jpeg(photo)
    avif = io.BytesIO()
    Image.fromarray(photo).save(avif, "AVIF")
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html></html>",
        "nothing but a png's start": b"\x89PNG\r\n\x1a\n",
        "png cut short": b"\x89PNG\r\n\x1a\n" + bytes(60),
        "jpeg without an end": good[: len(good) // 2],
        "jpeg with a broken table": with_broken_table(good),
        "avif cut short": avif.getvalue()[: len(avif.getvalue()) // 2],
    }


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", undecodable())
def test_a_sample_that_no_decoder_takes_is_replaced(tmp_path, kind, decoder):
    """The table agrees with these bytes, as it may for data that were not packed by this program."""
    rng = np.random.default_rng(1)
    samples = [jpeg(photo_crop(rng, "chelsea.png")) for _ in range(12)]
    samples[4] = undecodable()[kind]
    path = make_raw_dataset(tmp_path / "set", samples)
    quarantine = tmp_path / "quarantine.jsonl"
    with open_loader(path, decoder, batch=6, quarantine=quarantine) as loader:
        ids = [i for _ in range(6) for i in next(loader).sample_ids.tolist()]
    assert set(ids) == set(range(12)) - {4}
    assert json.loads(quarantine.read_text())["sample"] == 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_wrong_size_in_the_table_is_a_bad_sample(tmp_path, decoder):
    """Windows are drawn by the table: a larger size would put them outside of the image."""
    rng = np.random.default_rng(1)
    path = make_raw_dataset(tmp_path / "set", [jpeg(photo_crop(rng, "chelsea.png", (64, 64))) for _ in range(12)])
    rows = rows_of(path)
    rows["width"][3] = rows["height"][3] = 5000
    np.save(path / "samples.npy", rows)
    with open_loader(path, decoder, batch=6, shuffle="none") as loader:
        ids = [i for _ in range(4) for i in next(loader).sample_ids.tolist()]
    assert 3 not in ids
    assert loader.bad_samples == 1


@pytest.mark.parametrize("cut", [0.3, 0.95])
def test_the_verdict_on_a_cut_image_does_not_depend_on_the_crop(tmp_path, cut):
    """DALI decodes down to the window's last row only: alone, it would notice a cut in some epochs only."""
    good = jpeg(photo_crop(np.random.default_rng(0), "chelsea.png", (150, 150)))
    path = make_raw_dataset(tmp_path / "set", [good, good[: int(len(good) * cut)]])
    for seed_epoch in range(16):
        with open_loader(path, "dali", batch=2, max_bad_fraction=1.0) as loader:
            loader.seek(seed_epoch, 0)
            assert next(loader).sample_ids.tolist() == [0, 0]


def test_shards_of_another_dataset_are_refused(dataset, tmp_path):
    """Same names and sizes, other bytes: no checksum fits."""
    for shard in dataset.glob("*.tar"):
        shard.write_bytes(random.Random(0).randbytes(shard.stat().st_size))
    with open_loader(dataset, max_bad_fraction=0.001) as loader, pytest.raises(ValueError, match="samples are bad"):
        next(loader)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_shard_lost_during_the_run(dataset, decoder):
    with open_loader(dataset, decoder, max_bad_fraction=0.001) as loader:
        for shard in dataset.glob("*.tar"):
            shard.unlink()
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            next(loader)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_shard_cut_during_the_run_is_no_bus_error(dataset, decoder):
    with open_loader(dataset, decoder, max_bad_fraction=0.001) as loader:
        next(loader)
        for shard in dataset.glob("*.tar"):
            with shard.open("r+b") as file:
                file.truncate(100)
        with pytest.raises(ValueError, match=r"cut short: 0 of \d+ bytes"):
            run_to_the_end(loader)


def test_all_replacements_bad_is_an_error_and_no_endless_loop(dataset):
    for sample in range(SAMPLES):
        flip_a_bit(dataset, sample)
    with open_loader(dataset, max_bad_fraction=1.0) as loader, pytest.raises(ValueError, match="no good sample in 100"):
        next(loader)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hanging_read_is_an_error_within_the_timeout(dataset, monkeypatch, decoder):
    release = threading.Event()
    loader = open_loader(dataset, decoder, timeout_seconds=0.5)
    monkeypatch.setattr(loader.maker.feeder.store, "read", lambda ids: release.wait(60))
    with pytest.raises(TimeoutError, match=r"no batch within 0.5 s.*data\.timeout_seconds"):
        next(loader)
    release.set()
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("fault of ours"), SystemExit(3)])
def test_a_dying_worker_is_that_error(dataset, monkeypatch, decoder, error):
    def die(ids):
        raise error

    with open_loader(dataset, decoder) as loader:
        monkeypatch.setattr(loader.maker.feeder.store, "read", die)
        with pytest.raises(type(error)):
            next(loader)


@pytest.mark.parametrize("decoder", DECODERS)
def test_closing_and_forgetting_end_all_threads(dataset, decoder):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("patchmill")]

    with open_loader(dataset, decoder) as loader:
        next(loader)
        assert ours()
    assert not ours()
    loader = open_loader(dataset, decoder)
    next(loader)
    del loader
    deadline = time.monotonic() + 10
    while ours() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ours()


def test_files_are_closed(dataset):
    def open_shards():
        names = [os.readlink(link) for link in Path("/proc/self/fd").glob("*") if link.is_symlink()]
        return [name for name in names if name.startswith(str(dataset)) and name.endswith(".tar")]

    with open_loader(dataset) as loader:
        next(loader)
        assert open_shards()
    assert not open_shards()


def test_quarantine_goes_on_where_it_was(dataset, tmp_path):
    flip_a_bit(dataset, 5)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    quarantine.parent.mkdir()
    quarantine.write_text(json.dumps({"sample": 1, "where": "before", "reason": "before"}) + "\n")
    with open_loader(dataset, quarantine=quarantine) as loader:
        for _ in range(3):
            next(loader)
    assert [json.loads(line)["sample"] for line in quarantine.read_text().splitlines()] == [1, 5]


def test_a_copied_dataset_is_the_same_dataset(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    with open_loader(dataset) as loader:
        next(loader)
        state = loader.state_dict()
        expected = next(loader).sample_ids.tolist()
    with open_loader(tmp_path / "copy") as loader:
        loader.load_state_dict(state)
        assert next(loader).sample_ids.tolist() == expected


def test_a_read_keeps_its_file_open(dataset, monkeypatch):
    """Whatever happens to the table of open files between looking one up and reading it."""
    reader, pread = ShardReader(open_dataset(dataset)), os.pread

    def meddling(descriptor, size, offset):
        reader.close()
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", meddling)
    assert all(isinstance(data, bytes) for data in reader.read(np.arange(reader.num_samples)))
    monkeypatch.undo()
    both, opened = threading.Barrier(2), reader._open_shard

    def at_once(shard):
        both.wait(timeout=30)
        return opened(shard)

    reader._open_shard = at_once
    files = []
    threads = [threading.Thread(target=lambda: files.append(reader._file(0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files[0] is files[1] is reader._open[0]
