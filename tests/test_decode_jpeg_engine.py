"""The JPEG engine counts only if nvJPEG lists one and the driver's video library is there; DALI's threads follow it."""

import ctypes
import logging
import re
from typing import Any

import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode import jpeg_engine
from patchmill.pipeline.decode.dali import DaliDecoder, ThreadCounts
from patchmill.pipeline.decode.jpeg_engine import VIDEO_LIBRARY, find_jpeg_engine, jpeg_engine_answers
from patchmill.pipeline.loader import DataConfig, build_loader
from tests.support.photos import make_dataset


class FakeNvjpeg:
    """nvJPEG on a machine with some JPEG engines."""

    def __init__(self, engines: int) -> None:
        self.engines, self.handles = engines, 0

    def nvjpegCreateEx(self, *_: object) -> int:
        self.handles += 1
        return 0

    def nvjpegDestroy(self, handle: object) -> int:
        self.handles -= 1
        return 0

    def nvjpegGetHardwareDecoderInfo(self, handle: object, engines: object, cores: object) -> int:
        ctypes.cast(engines, ctypes.POINTER(ctypes.c_uint))[0] = self.engines  # type: ignore[arg-type]
        ctypes.cast(cores, ctypes.POINTER(ctypes.c_uint))[0] = 1  # type: ignore[arg-type]
        return 0


@pytest.fixture
def machine(monkeypatch):
    """Sets up a loader of libraries that finds those given, and forgets what was asked before."""

    def of(nvjpeg: FakeNvjpeg | None, video: bool) -> list[str]:
        asked: list[str] = []

        def load(name: str) -> object:
            asked.append(name)
            if name == VIDEO_LIBRARY and video:
                return object()
            if "nvjpeg" in name and nvjpeg is not None:
                return nvjpeg
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(jpeg_engine, "_nvjpeg_names", lambda: iter(["libnvjpeg.so.13"]))
        jpeg_engine_answers.cache_clear()
        return asked

    yield of
    jpeg_engine_answers.cache_clear()


@pytest.mark.parametrize(
    ("nvjpeg", "video", "engines", "verdict"),
    [
        (FakeNvjpeg(8), True, 8, "8 JPEG engines of 1 cores answer"),
        (FakeNvjpeg(8), False, 0, r"lists 8 .* cannot use; .*libnvcuvid.so.1\) is missing: start the container with"),
        (FakeNvjpeg(0), True, 0, "lists no JPEG engine .*consumer cards do not"),
        (None, True, None, "nvJPEG is not installed here"),
    ],
)
def test_an_engine_needs_nvjpeg_and_the_video_library(machine, nvjpeg, video, engines, verdict):
    machine(nvjpeg, video)
    found = find_jpeg_engine()
    assert found.engines == engines
    assert re.search(verdict, found.verdict)
    assert nvjpeg is None or nvjpeg.handles == 0


def test_a_missing_engine_is_logged_once(machine, caplog):
    asked = machine(FakeNvjpeg(8), video=False)
    with caplog.at_level(logging.WARNING):
        assert not jpeg_engine_answers()
        first = len(asked)
        assert not jpeg_engine_answers()
    assert len(asked) == first
    (record,) = caplog.records
    assert "NVIDIA_DRIVER_CAPABILITIES" in record.getMessage()
    assert "more threads of the host" in record.getMessage()


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 16, 64])
def test_threads_fit_the_cores(workers):
    for engine in (True, False):
        counts = ThreadCounts.of(workers, readers_decode=False, engine=engine)
        assert min(counts) >= 1
        assert counts.dali <= workers
        assert counts.readers == max(1, workers // 4)
    few, many = (ThreadCounts.of(workers, readers_decode=False, engine=engine).dali for engine in (True, False))
    assert few <= many


def test_only_decoding_on_a_gpu_asks_for_the_engine(machine, tmp_path):
    pytest.importorskip("nvidia.dali")
    asked = machine(FakeNvjpeg(8), video=True)
    path = make_dataset(tmp_path, count=4, sides=(40, 60))
    config = DataConfig(path=str(path), decoder="dali", workers=16, last_batch="fill")
    options: dict[str, Any] = dict(image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=0, global_batch=4)
    with build_loader(config, **options) as loader:
        assert isinstance(loader.maker.decoder, DaliDecoder)
        assert loader.maker.decoder.threads == ThreadCounts(readers=4, dali=14)
        assert not asked
        common = {name: getattr(loader.maker.decoder, name) for name in ("image_size", "channels", "interpolation")}
        decoder = DaliDecoder(
            loader.maker.feeder, workers=16, batches_ahead=2, device=torch.device("cuda"), **common
        )  # builds nothing on the device before `batches`
    assert asked
    assert decoder.threads == ThreadCounts(readers=4, dali=8)
