"""Plain WebDataset tars as a stream: the same kind of batches, exact restarts, and no fewer samples in silence."""

import io
import json
import tarfile

import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.plan.stream import label_of
from patchmill.pipeline.read import connection as streams
from patchmill.pipeline.read.tar import TarDamage, tar_members, tar_samples
from tests.support.http_server import serve
from tests.support.photos import make_dataset, make_photo_crops

SHARDS, PER_SHARD = 4, 6
SAMPLES = SHARDS * PER_SHARD


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """Four tars as any program may have made them; shard i holds samples i * 6 to i * 6 + 5, labelled by number."""
    crops = make_photo_crops(SAMPLES, sides=(40, 90))
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"train-{shard:03d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                add(tar, f"a/{i:05d}.jpg", crops[i][1])
                add(tar, f"a/{i:05d}.cls", str(i).encode())
    return tmp_path


def open_loader(path, *, batch=8, rank=0, world=1, decoder="cpu", **options):
    options = {"workers": 2, "samples_per_epoch": SAMPLES, "shuffle_buffer": 10, "max_bad_fraction": 0.2, **options}
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, **options),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3,
        global_batch=batch, rank=rank, world_size=world,
    )  # fmt: skip


def content(batch):
    masks = batch.plan.ids_mask.numpy().tobytes()
    return batch.epoch, batch.step, batch.labels.tolist(), batch.images.numpy().tobytes(), masks


def run(loader, steps):
    for _ in range(steps):
        next(loader)


def pattern(folder):
    return f"{folder}/train-{{000..003}}.tar"


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_every_sample_comes_once_an_epoch_in_another_order(tars, decoder):
    with open_loader(pattern(tars), decoder=decoder) as loader:
        assert loader.steps_per_epoch == 3
        epochs = [[i for _ in range(3) for i in next(loader).labels.tolist()] for _ in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(SAMPLES))}) == 4


def test_no_shuffle_keeps_the_order_of_the_tars(tars):
    with open_loader(pattern(tars), shuffle="none") as loader:
        assert [i for _ in range(3) for i in next(loader).labels.tolist()] == list(range(SAMPLES))


def test_decoders_agree(tars):
    with open_loader(pattern(tars)) as cpu, open_loader(pattern(tars), decoder="dali") as dali:
        for _ in range(4):
            ours, theirs = next(cpu), next(dali)
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert torch.equal(ours.plan.ids_keep, theirs.plan.ids_keep)
            assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 0.5


def test_resume_at_every_step_of_two_epochs(tars):
    with open_loader(pattern(tars)) as loader:
        whole, states = [], [loader.state_dict()]
        for _ in range(7):
            whole.append(content(next(loader)))
            states.append(loader.state_dict())
    for cut in range(7):
        with open_loader(pattern(tars)) as loader:
            loader.load_state_dict(json.loads(json.dumps(states[cut])))
            assert [content(next(loader)) for _ in range(7 - cut)] == whole[cut:]


def test_ranks_share_the_shards_and_take_equal_steps(tars):
    seen = []
    for rank in range(2):
        with open_loader(pattern(tars), rank=rank, world=2) as loader:
            assert loader.steps_per_epoch == 3
            seen.append({i for _ in range(3) for i in next(loader).labels.tolist()})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(SAMPLES))
    with pytest.raises(ValueError, match="4 shards cannot be shared by 8 ranks"):
        open_loader(pattern(tars), rank=0, world=8)


def test_state_of_another_number_of_ranks_is_refused(tars):
    with open_loader(pattern(tars), world=2) as loader:
        state = loader.state_dict()
    with open_loader(pattern(tars)) as loader, pytest.raises(ValueError, match="world_size: was 2, is 1"):
        loader.load_state_dict(state)


def test_draws_are_those_of_the_sample_whatever_its_batch(tars):
    with open_loader(pattern(tars)) as small, open_loader(pattern(tars), batch=24) as large:
        images = {
            i: image
            for b in (next(small) for _ in range(3))
            for i, image in zip(b.labels.tolist(), b.images, strict=True)
        }
        batch = next(large)
    assert all(torch.equal(images[i], image) for i, image in zip(batch.labels.tolist(), batch.images, strict=True))


def test_an_epoch_longer_than_the_tars_starts_them_over(tars):
    with open_loader(pattern(tars), samples_per_epoch=40) as loader:
        labels = [i for _ in range(5) for i in next(loader).labels.tolist()]
    assert sorted(labels[:SAMPLES]) == list(range(SAMPLES))
    assert len(set(labels[SAMPLES:])) == 40 - SAMPLES


def test_indexes_count_the_samples(tmp_path):
    dataset = make_dataset(tmp_path, count=SAMPLES, sides=(40, 90), shard_size_mb=0.02)
    shards = sorted(dataset.glob("*.tar"))
    path = f"{dataset}/shard-{{000000..{len(shards) - 1:06d}}}.tar"
    with open_loader(path, samples_per_epoch=0) as loader:
        assert loader.num_samples == SAMPLES
    (dataset / "shard-000000.idx").unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.idx.*data\.samples_per_epoch"):
        open_loader(path, samples_per_epoch=0)


@pytest.mark.parametrize("fault", ["", "cut", "500", "slow"])
def test_over_http_with_faults(tars, fault, monkeypatch):
    monkeypatch.setattr(streams, "FIRST_PAUSE_SECONDS", 0.01)
    with open_loader(pattern(tars)) as loader:
        expected = [content(next(loader))[2:] for _ in range(4)]
    faults = {f"train-{i:03d}.tar": [fault, "", fault] for i in range(SHARDS)}
    with serve(tars, faults) as server, open_loader(pattern(server.url)) as loader:
        assert [content(next(loader))[2:] for _ in range(4)] == expected


def test_a_shard_that_is_not_there_is_said_without_secrets(tars, monkeypatch):
    monkeypatch.setattr(streams, "FIRST_PAUSE_SECONDS", 0.01)
    with serve(tars) as server:
        address = server.url.replace("http://", "http://user:PASSWORD@") + "/train-{000..004}.tar?sig=SECRET"
        with open_loader(address, shuffle="none") as loader, pytest.raises(OSError, match=r"train-004\.tar") as caught:
            run(loader, 9)
    assert not {word for word in ("PASSWORD", "SECRET", "user") if word in str(caught.value)}


def test_pipes_run_only_with_leave(tars):
    command = f"pipe:cat {tars}/train-000.tar"
    with pytest.raises(ValueError, match=r"data\.allow_pipe"):
        open_loader(command)
    with open_loader(command, allow_pipe=True, samples_per_epoch=PER_SHARD, batch=6) as loader:
        assert sorted(next(loader).labels.tolist()) == list(range(PER_SHARD))
    failing = open_loader(command + "; exit 3", allow_pipe=True, samples_per_epoch=PER_SHARD, batch=6)
    with failing as loader, pytest.raises(ValueError, match="exit code 3"):
        next(loader)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4].offset
    if kind == "header":
        data[third + 20] ^= 1
    elif kind == "two zero blocks":
        data[third : third + 1024] = bytes(1024)
    elif kind == "cut at an entry":
        del data[third:]
    elif kind == "cut within an entry":
        del data[third + 700 :]
    elif kind == "not a tar":
        data = bytearray(b"<html>" * 400)
    elif kind == "empty":
        data = bytearray()
    elif kind == "compressed":
        import gzip

        data = bytearray(gzip.compress(bytes(data)))
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["header", "two zero blocks", "cut at an entry", "cut within an entry", "not a tar", "empty", "compressed"]
)
def test_a_damaged_tar_ends_the_run_by_name(tars, kind):
    damage(tars / "train-002.tar", kind)
    with (
        open_loader(pattern(tars)) as loader,
        pytest.raises(ValueError, match=r"train-002\.tar .*(damaged|cut short|no tar)"),
    ):
        run(loader, 4)


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_bad_samples_are_left_out_or_replaced_and_named(tars, tmp_path, decoder):
    crops = make_photo_crops(PER_SHARD, seed=9, sides=(40, 90))
    with tarfile.open(tars / "train-001.tar", "w") as tar:
        for i, (_, data) in enumerate(crops):
            add(tar, f"b/{i}.jpg", data)
            add(tar, f"b/{i}.cls", str(100 + i).encode())
        add(tar, "b/html.jpg", b"<html>no image</html>")
        add(tar, "b/nothing.cls", b"7")
        add(tar, "b/pickle.pkl", b"cos\nsystem\n(S'true'\ntR.")
        add(tar, "b/broken.jpg", crops[0][1][:-200] + b"\xff\xd9")
        add(tar, "../../outside.jpg", crops[1][1])
    quarantine = tmp_path / "bad.jsonl"
    with open_loader(
        pattern(tars), decoder=decoder, quarantine_path=str(quarantine), samples_per_epoch=32, max_bad_fraction=0.5
    ) as loader:
        labels = [i for _ in range(4) for i in next(loader).labels.tolist()]
    assert set(range(100, 100 + PER_SHARD)) <= set(labels)
    named = {json.loads(line)["where"].rpartition(":")[2] for line in quarantine.read_text().splitlines()}
    assert {"b/html", "b/nothing", "b/pickle"} <= named
    # nothing but a checksum or a strict decoder tells that image data ended early; DALI fills in grey
    assert ("b/broken" in named) == (decoder == "cpu")
    assert not (tars.parent / "outside.jpg").exists()


def test_a_stream_of_nothing_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        add(tar, "README", b"no extension, no sample")
    with (
        open_loader(tmp_path / "empty.tar", samples_per_epoch=8) as loader,
        pytest.raises(ValueError, match="no image"),
    ):
        next(loader)


def test_plain_tars_say_once_what_they_cannot_promise(tars, caplog):
    with open_loader(pattern(tars)) as loader:
        for _ in range(7):
            next(loader)
    warnings = [record.getMessage() for record in caplog.records if "no global order" in record.getMessage()]
    assert len(warnings) == 1
    assert "patchmill index" in warnings[0]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_sizes_of_every_tar_format(tmp_path, kind):
    long = "folder/" * 12 + "x" * (90 if kind == tarfile.USTAR_FORMAT else 200) + ".jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        add(tar, "first.jpg", b"1" * 513)
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, long, b"2")
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="first.jpg")
        add(tar, "a.seg.png", b"3")
    with (tmp_path / "a.tar").open("rb") as file:
        assert list(tar_members(file)) == [("first.jpg", b"1" * 513), (long, b"2"), ("a.seg.png", b"3")]


def test_members_of_one_key_are_one_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x/1.jpg", "x/1.CLS", "x/1.seg.png", "x/2.jpg", ".hidden", "noextension", "x/1.txt"):
            add(tar, name, name.encode())
    with (tmp_path / "a.tar").open("rb") as file:
        samples = [(key, sorted(parts)) for key, parts in tar_samples(file)]
    assert samples == [("x/1", ["cls", "jpg", "seg.png"]), ("x/2", ["jpg"]), ("x/1", ["txt"])]


def test_a_tar_cut_at_every_block_is_noticed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", bytes([i + 1]) * 700)
    data = (tmp_path / "a.tar").read_bytes()
    end = 3 * (512 + 1024)
    for size in range(0, end + 1, 256):
        with pytest.raises(TarDamage):
            list(tar_members(io.BytesIO(data[:size])))
    assert len(list(tar_members(io.BytesIO(data[: end + 512])))) == 3


@pytest.mark.parametrize(
    ("parts", "label"),
    [
        ({"cls": b"7\n"}, 7),
        ({"json": b'{"label": 3}'}, 3),
        ({"cls": b"cat"}, -1),
        ({"json": b"{}"}, -1),
        ({"json": b"[]"}, -1),
        ({}, -1),
    ],
)
def test_labels(parts, label):
    assert label_of(parts) == label
