"""Remote datasets: the same batches as local ones, and a cache that never holds half a shard, whatever happens."""

import json
import os
import shutil
import socket

import pytest

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read import remote
from patchmill.pipeline.read.connection import open_stream
from tests.support.http_server import has_ipv6, serve
from tests.support.photos import make_dataset

SAMPLES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), count=SAMPLES, sides=(40, 90), shard_size_mb=0.01)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)


def open_loader(path, cache="", *, batch=8, **options):
    options = {"shuffle": "window", "window_shards": 2, "workers": 2, **options}
    return build_loader(
        DataConfig(path=str(path), cache_dir=str(cache), **options),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=batch,
    )  # fmt: skip


def contents(loader, count=7):
    return [
        (b.epoch, b.step, b.sample_ids.tolist(), b.images.numpy().tobytes())
        for b in (next(loader) for _ in range(count))
    ]


@pytest.fixture(scope="module")
def expected(dataset):
    with open_loader(dataset) as loader:
        return contents(loader)


def cached_shards(cache):
    return sorted(path.name for path in cache.rglob("*.tar"))


def assert_only_whole_files(cache, dataset):
    for path in cache.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            assert path.read_bytes() == (dataset / path.name).read_bytes()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_manifest_cannot_write_or_delete_outside_the_cache(dataset, tmp_path, absolute):
    """The server names a file of ours as its shard, and once more one that is not there yet."""
    served, cache, ours = tmp_path / "served", tmp_path / "deep" / "cache", tmp_path / "ours"
    shutil.copytree(dataset, served)
    ours.mkdir()
    (ours / "kept.tar").write_text("kept")
    manifest = json.loads((served / "manifest.json").read_text())
    for shard, name in zip(manifest["shards"], ("kept.tar", "new.tar"), strict=False):
        shard["name"] = str(ours / name) if absolute else f"../../../ours/{name}"
    (served / "manifest.json").write_text(json.dumps(manifest))
    with serve(served) as server, pytest.raises(ValueError, match=r"manifest\.json names a shard .*kept\.tar"):
        open_loader(server.url, cache)
    assert [path.name for path in ours.iterdir()] == ["kept.tar"]
    assert not cache.exists()


def test_batches_are_those_of_the_local_dataset(dataset, expected, tmp_path):
    with serve(dataset) as server:
        with open_loader(server.url, tmp_path) as loader:
            assert contents(loader) == expected
        assert all(server.requests[path.name] == 1 for path in dataset.glob("*.tar"))
        with open_loader(server.url, tmp_path) as again:
            assert contents(again) == expected
        assert all(server.requests[path.name] == 1 for path in dataset.glob("*.tar"))  # from the cache
    assert_only_whole_files(tmp_path, dataset)


def test_state_goes_over_between_local_and_remote(dataset, expected, tmp_path):
    with open_loader(dataset) as local:
        contents(local, 4)
        state = local.state_dict()
    with serve(dataset) as server, open_loader(server.url, tmp_path) as loader:
        loader.load_state_dict(state)
        assert contents(loader, 3) == expected[4:]


@pytest.mark.parametrize("fault", ["cut", "500", "wrong", "slow"])
def test_a_fault_that_passes_is_not_noticed(dataset, expected, tmp_path, fault):
    with serve(dataset) as server:
        for name in ("manifest.json", "samples.npy", *(path.name for path in dataset.glob("*.tar"))):
            if (fault, name) != ("wrong", "manifest.json"):  # nothing says what a manifest must be
                server.faults[name] = [fault, fault]
        with open_loader(server.url, tmp_path) as loader:
            assert contents(loader) == expected
            assert loader.bad_samples == 0
    assert_only_whole_files(tmp_path, dataset)


@pytest.mark.parametrize(("fault", "reason"), [("cut", "could not be fetched in 5 attempts"), ("500", "5 attempts"),
                                               ("wrong", "sha256 differs from the manifest's")])  # fmt: skip
def test_a_fault_that_stays_stops_the_run_by_name(dataset, tmp_path, fault, reason):
    with serve(dataset) as server:
        for path in dataset.glob("*.tar"):
            server.faults[path.name] = [fault] * 99
        with open_loader(server.url, tmp_path) as loader, pytest.raises(ValueError, match=reason) as caught:
            next(loader)
    assert "shard-0000" in str(caught.value)
    assert cached_shards(tmp_path) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_missing_dataset_and_a_forbidden_one_are_said_at_once(dataset, tmp_path):
    nothing = r"nothing at http://127.*nowhere/manifest\.json"
    with serve(dataset) as server, pytest.raises(FileNotFoundError, match=nothing):
        open_loader(f"{server.url}/nowhere", tmp_path)
    with serve(dataset, {"manifest.json": ["403"]}) as server, pytest.raises(PermissionError, match="credentials"):
        open_loader(server.url, tmp_path)


def test_secrets_of_an_address_are_not_shown(dataset, tmp_path):
    with serve(dataset) as server:
        server.faults["manifest.json"] = ["500"] * 99
        address = server.url.replace("http://", "http://user:PASSWORD@") + "/?signature=SECRET"
        with pytest.raises(OSError, match="could not be fetched") as caught:
            open_loader(address, tmp_path)
    for secret in ("PASSWORD", "SECRET", "user"):
        assert secret not in str(caught.value)


def test_the_cache_keeps_to_its_limit(dataset, expected, tmp_path):
    sizes = {path.name: path.stat().st_size for path in dataset.glob("*.tar")}
    assert len(sizes) >= 8
    limit = 5 * max(sizes.values())
    with serve(dataset) as server, open_loader(server.url, tmp_path, cache_limit_gib=limit / 2**30) as loader:
        assert contents(loader, 3) == expected[:3]
        kept = sum(sizes[name] for name in cached_shards(tmp_path))
        assert kept <= limit
        assert contents(loader, 4) == expected[3:]
    assert sum(sizes[name] for name in cached_shards(tmp_path)) <= limit


def test_a_cache_too_small_for_a_window_is_refused(dataset, tmp_path):
    with serve(dataset) as server:
        with pytest.raises(ValueError, match=r"data\.cache_limit_gib.*window_shards"):
            open_loader(server.url, tmp_path, cache_limit_gib=1e-6)
        with pytest.raises(ValueError, match=r"shuffle=window"):
            open_loader(server.url, tmp_path, shuffle="global", cache_limit_gib=4e-5)


def test_remote_data_are_shuffled_by_windows_unless_told(dataset, tmp_path):
    with serve(dataset) as server, open_loader(server.url, tmp_path, shuffle="auto") as loader:
        assert loader.state_dict()["fingerprint"]["shuffle"] == "window"
    with open_loader(dataset, shuffle="auto") as loader:
        assert loader.state_dict()["fingerprint"]["shuffle"] == "global"


@pytest.mark.parametrize("address", ["ftp://host/data", "pipe:cat secrets", "http://169.254.169.254/latest"])
def test_addresses_that_are_not_opened(address, tmp_path):
    with pytest.raises(ValueError, match=r"not opened|allow_pipe"):
        open_loader(address, tmp_path, samples_per_epoch=8)


@pytest.mark.parametrize("host", ["169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]", "metadata.test"])
def test_a_redirect_to_a_link_local_address_is_not_followed(dataset, tmp_path, monkeypatch, host):
    def look_up(name, port, *args, **kwargs):
        metadata = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"169.254.169.{i}", port)) for i in (254, 253)]
        return metadata if name == "metadata.test" else getaddrinfo(name, port, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    said = r"http://127\.0\.0\.1:\d+/{}: .* is a link-local address"
    with serve(dataset) as server:
        server.moved |= dict.fromkeys(("shard-000000.tar", "manifest.json"), f"http://{host}/latest")
        with (
            pytest.raises(ValueError, match=said.format(r"shard-000000\.tar")),
            open_stream(f"{server.url}/shard-000000.tar") as tar,
        ):
            tar.read(1)
        with pytest.raises(ValueError, match=said.format(r"manifest\.json")):
            open_loader(server.url, tmp_path)
        assert server.requests["manifest.json"] == 1  # and no second attempt


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_an_address(dataset, expected, tmp_path):
    with serve(dataset, host="::1") as server:
        with open_loader(server.url, tmp_path) as loader:
            assert contents(loader) == expected
        with open_stream(f"{server.url}/shard-000000.tar") as tar:
            assert tar.read(1 << 20) == (dataset / "shard-000000.tar").read_bytes()


def test_shards_from_s3(dataset, expected, tmp_path, monkeypatch):
    server_module = pytest.importorskip("moto.server", reason="moto[server], a local S3 server, is not installed")
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("photos")
        for path in dataset.iterdir():
            bucket.put_file(str(path), f"photos/set/{path.name}")
        with open_loader("s3://photos/set", tmp_path / "cache") as loader:
            assert contents(loader) == expected
        bucket.pipe_file("photos/set/shard-000000.tar", b"other bytes")
        with open_loader("s3://photos/set", tmp_path / "other") as loader, pytest.raises(ValueError, match="sha256"):
            contents(loader, 3)
        with pytest.raises(FileNotFoundError, match="nothing at s3://photos/none"):
            open_loader("s3://photos/none", tmp_path / "cache")
    finally:
        server.stop()
    assert_only_whole_files(tmp_path / "cache", dataset)
    assert os.listdir(tmp_path / "cache")
