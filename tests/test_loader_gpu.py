"""The loader with batches on a CUDA device: what it promises on the CPU, across streams, with every decoder.

Needs simplejpeg and scikit-image for its photographs; DALI where it is installed (a bare GPU machine has neither).
"""

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("simplejpeg", reason="photographs are encoded with it; docs/gpu.md says how it comes here")
pytest.importorskip("skimage", reason="its photographs are the test images")
pytest.importorskip("dacite", reason="a run writes its config with it")

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import BatchMaker, DataConfig, build_loader
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import get_recipe, with_options
from tests.support.photos import make_dataset

pytestmark = pytest.mark.gpu
MOST_LEVELS = 2.0
"""mean distance of nvJPEG's pixels from TurboJPEG's: its chroma is not interpolated, and rounding differs"""


@pytest.fixture(autouse=True)
def _forget_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("gpu"), count=48, sides=(64, 64))


def batches(path, decoder, device, count=6, **options):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="a GPU machine may be without it")
    config = DataConfig(path=str(path), decoder=decoder, workers=4, timeout_seconds=60.0, **options)
    with build_loader(
        config, image_size=64, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=16, device=device
    ) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("decoder", ["cpu", "resident", "dali"])
@pytest.mark.parametrize("options", [{}, {"repeats": 2}], ids=str)
def test_batches_on_the_device_are_those_of_the_cpu(dataset, decoder, options):
    found = batches(dataset, decoder, "cuda", **options)
    for batch, expected in zip(found, batches(dataset, "cpu", "cpu", **options), strict=True):
        assert batch.images.is_cuda
        assert torch.equal(batch.sample_ids.cpu(), expected.sample_ids)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        for name, ids in vars(expected.plan).items():
            assert torch.equal(getattr(batch.plan, name).cpu(), ids), name
        levels = (batch.images.cpu().int() - expected.images.int()).abs().float()
        assert levels.mean() <= {"cpu": 0.0, "resident": 0.05, "dali": MOST_LEVELS}[decoder]


@pytest.mark.parametrize("decoder", ["cpu", "resident", "dali"])
def test_a_slow_copy_reads_what_was_decoded(dataset, decoder, monkeypatch):
    """Batches are copied out of the decoder's memory on a stream; the decoder may not write over them before that."""
    expected = batches(dataset, decoder, "cuda", count=12)
    copy = BatchMaker._to_device

    def slow(self, tensor):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds on this stream
        return copy(self, tensor)

    monkeypatch.setattr(BatchMaker, "_to_device", slow)
    for batch, other in zip(batches(dataset, decoder, "cuda", count=12), expected, strict=True):
        assert torch.equal(batch.images, other.images)


@pytest.mark.parametrize("decoder", ["cpu", "resident", "dali"])
def test_a_slow_step_trains_on_its_own_batch(dataset, decoder):
    """The step's stream lags behind the host: memory of a batch may not be given away before the step has read it."""
    expected = [batch.images.double().sum().item() for batch in batches(dataset, decoder, "cuda", count=20)]
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    config = DataConfig(path=str(dataset), decoder=decoder, workers=4, timeout_seconds=60.0)
    sums = []
    with build_loader(
        config, image_size=64, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=16, device="cuda"
    ) as loader:
        for _ in range(20):
            batch = next(loader)
            torch.cuda._sleep(20_000_000)
            sums.append(batch.images.double().sum())
            del batch
    assert torch.stack(sums).tolist() == expected


def run(dataset, out, steps, **options):
    recipe = with_options(
        get_recipe("mae-tiny"),
        model__image_size=64,
        data__path=str(dataset),
        data__decoder="cpu",
        data__workers=2,
        train__global_batch=16,
        train__total_steps=steps,
        train__save_every_steps=3,
        train__tensorboard=False,
        train__deterministic=True,
        out=str(out),
        device="cuda",
        **options,
    )
    return pretrain(recipe)


@pytest.mark.parametrize("graphed", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(dataset, tmp_path, graphed):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(dataset, whole, 12, train__cuda_graph=graphed)
    run(dataset, parts, 12, train__cuda_graph=graphed)
    for checkpoint in (parts / "checkpoints").iterdir():
        if checkpoint.name > "step-00000006":
            for path in checkpoint.iterdir():
                path.unlink()
            checkpoint.rmdir()
    again = run(dataset, parts, 12, train__cuda_graph=graphed)
    assert again.resumed_from is not None
    assert again.resumed_from.name == "step-00000006"
    first, second = (
        load_file(folder / "checkpoints" / "step-00000012" / "model.safetensors") for folder in (whole, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
