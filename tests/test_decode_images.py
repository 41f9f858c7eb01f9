"""One documented result for every kind of image, on every decoder."""

import functools
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode.cpu import INTERPOLATIONS
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.image import decode_image, displayed_size, is_plain
from patchmill.pipeline.read.tiff import write_tiff
from tests.support.photos import jpeg, make_dataset, photo_crop
from tests.support.raw_dataset import make_raw_dataset

DECODERS = ("cpu", "dali")
SIDE = 64


def photo(seed=0, sides=(96, 140)):
    return Image.fromarray(photo_crop(np.random.default_rng(seed), "chelsea.png", sides))


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(photo(), "JPEG", quality=95, exif=exif)


def png_16_bit():
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 257), "PNG"), grey.astype(np.uint8)


def palette_png():
    image = photo().quantize(64)
    image.info["transparency"] = 3
    return encoded(image, "PNG", transparency=3)


def without_adobe_marker(data):
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def as_ycck(data):
    """The same coded values, declared to be YCCK: other colours, but defined ones."""
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\x02" + data[transform + 1 :]


KINDS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(photo(), "JPEG", quality=90),
    "progressive": lambda: encoded(photo(), "JPEG", quality=90, progressive=True),
    "grey": lambda: encoded(photo().convert("L"), "JPEG", quality=90),
    "cmyk": lambda: encoded(photo().convert("CMYK"), "JPEG", quality=90),
    "cmyk without adobe marker": lambda: without_adobe_marker(encoded(photo().convert("CMYK"), "JPEG", quality=90)),
    "ycck": lambda: as_ycck(encoded(photo().convert("CMYK"), "JPEG", quality=90)),
    "rgb jpeg": lambda: encoded(photo(), "JPEG", quality=90, keep_rgb=True),
    "444": lambda: encoded(photo(), "JPEG", quality=90, subsampling=0),
    "png": lambda: encoded(photo(), "PNG"),
    "png with alpha": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "png grey": lambda: encoded(photo().convert("L"), "PNG"),
    "png grey with alpha": lambda: encoded(photo().convert("LA"), "PNG"),
    "png palette": palette_png,
    "gif": lambda: encoded(photo(), "GIF"),
    "bmp": lambda: encoded(photo(), "BMP"),
    "webp": lambda: encoded(photo(), "WEBP", lossless=True),
    "tiff": lambda: write_tiff(np.asarray(photo())),
    "one pixel": lambda: encoded(photo().resize((1, 1)), "JPEG"),
    "one row": lambda: encoded(photo().resize((90, 1)), "JPEG"),
    "trailing bytes": lambda: encoded(photo(), "JPEG") + b"\0" * 100,
    **{f"orientation {i}": functools.partial(with_orientation, i) for i in range(1, 9)},
}


def reference(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return make_raw_dataset(tmp_path_factory.mktemp("kinds"), [make() for make in KINDS.values()])


def loader_for(path, decoder, *, size=SIDE, channels=3, batch=1, **options):
    config = DataConfig(path=str(path), decoder=decoder, workers=2, **options)
    return build_loader(
        config, image_size=size, patch_size=16, channels=channels, mask=MaskConfig(), seed=3, global_batch=batch
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_pixels(kind):
    data = KINDS[kind]()
    image, expected = decode_image(data, 3), reference(data)
    assert image.shape == expected.shape
    # libjpeg-turbo's and Pillow's own colour conversion may round differently
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_kind_gives_the_documented_pixels(every_kind, decoder):
    """Centre crop and resize of every kind of file, against Pillow on the reference pixels."""
    options = {"shuffle": "none", "crop": "centre", "crop_fraction": 1.0, "flip": False, "max_bad_fraction": 0.0}
    with loader_for(every_kind, decoder, batch=len(KINDS), **options) as loader:
        images = next(loader).images.numpy()
    for kind, image in zip(KINDS, images, strict=True):
        upright = reference(KINDS[kind]())
        height, width = upright.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        window = Image.fromarray(upright[top : top + side, left : left + side])
        expected = np.asarray(window.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(image - expected).mean() < 0.5, kind


@pytest.mark.parametrize("decoder", DECODERS)
def test_16_bit_is_scaled_and_not_clipped(tmp_path, decoder):
    data, grey = png_16_bit()
    np.testing.assert_array_equal(decode_image(data, 1)[:, :, 0], grey)
    path = make_raw_dataset(tmp_path / "set", [data])
    with loader_for(path, decoder, crop="centre", crop_fraction=1.0, flip=False) as loader:
        images = next(loader).images
    assert images.float().mean() == pytest.approx(grey.mean(), abs=8)  # white all over if it were clipped


@pytest.mark.parametrize("decoder", DECODERS)
def test_decode_and_window_are_exact(tmp_path, decoder):
    """A window of the target's size needs no resize, so that every pixel must be Pillow's."""
    images = [photo(seed, sides=(2 * SIDE, 2 * SIDE)) for seed in range(4)]
    samples = [encoded(image, "JPEG", quality=90, subsampling=i % 3) for i, image in enumerate(images)]
    path = make_raw_dataset(tmp_path / "set", samples)
    with loader_for(path, decoder, batch=4, crop="centre", crop_fraction=0.5, flip=False, shuffle="none") as loader:
        batch = next(loader)
    for image, data in zip(batch.images.numpy(), samples, strict=True):
        np.testing.assert_array_equal(image, reference(data)[32 : 32 + SIDE, 32 : 32 + SIDE])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_is_pillows(interpolation):
    """Many windows of real photographs against Pillow's filter, along rows and then along columns as torch does.

    Pillow 13 takes columns first where that is cheaper: clipping in between then moves single pixels by up to 16.
    """
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    rng, means, maxima = np.random.default_rng(0), [], []
    for i in range(60):
        crop = photo_crop(rng, ("chelsea.png", "coffee.png", "rocket.jpg")[i % 3], sides=(20, 300))
        out = torch.empty(1, 3, 96, 80, dtype=torch.uint8).to(memory_format=torch.channels_last)
        source = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        INTERPOLATIONS[interpolation](source, [96, 80], False, None, None, out=out)
        in_rows = Image.fromarray(crop).resize((80, crop.shape[0]), method)
        difference = np.abs(out[0].permute(1, 2, 0).numpy() - np.asarray(in_rows.resize((80, 96), method)).astype(int))
        in_one_go = np.asarray(Image.fromarray(crop).resize((80, 96), method)).astype(int)
        means.append(np.abs(out[0].permute(1, 2, 0).numpy() - in_one_go).mean())
        maxima.append(difference.max())
    assert np.mean(means) < 0.1
    assert max(maxima) <= 8


@pytest.mark.parametrize(
    "options",
    [{}, {"repeats": 4}, {"channels": 1}, {"channels": 4, "repeats": 2}, {"crop": "fixed"}, {"size": (32, 96)},
     {"interpolation": "bilinear"}, {"crop_rule": "tf"}],
)  # fmt: skip
def test_decoders_agree(dataset, options):
    """Same samples, windows, flips and masks; images less than 0.3 grey levels apart on average."""
    distances = []
    with loader_for(dataset, "cpu", batch=8, **options) as cpu, loader_for(dataset, "dali", batch=8, **options) as dali:
        for _ in range(4):  # goes on into the next epoch
            ours, theirs = next(cpu), next(dali)
            assert (ours.epoch, ours.step) == (theirs.epoch, theirs.step)
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.plan.ids_mask, theirs.plan.ids_mask)
            assert ours.images.shape == theirs.images.shape
            distances.append((ours.images.int() - theirs.images.int()).abs().float().mean().item())
    assert np.mean(distances) < 0.3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), count=24)


def test_images_of_many_channels(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (SIDE, SIDE, 6), dtype=np.uint8) for _ in range(3)]
    path = make_raw_dataset(tmp_path / "set", [write_tiff(p) for p in pixels], channels=6)
    options = {"crop": "centre", "crop_fraction": 1.0, "flip": False, "shuffle": "none"}
    with loader_for(path, "cpu", channels=6, batch=3, **options) as loader:
        np.testing.assert_array_equal(next(loader).images.numpy(), np.stack(pixels))
    with pytest.raises(ValueError, match="6 channels; the model takes 3"):
        loader_for(path, "cpu")
    with pytest.raises(ValueError, match="decoder=cpu"):
        loader_for(path, "dali", channels=6)


def test_flip_mirrors_what_the_plan_says(dataset):
    with loader_for(dataset, "cpu", batch=24) as flipped, loader_for(dataset, "cpu", batch=24, flip=False) as straight:
        ours, plain = next(flipped), next(straight)
    mirrored = [torch.equal(a.flip(1), b) for a, b in zip(ours.images, plain.images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(ours.images, plain.images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 4 <= sum(mirrored) <= 20


def test_bombs_are_refused_before_they_are_decoded():
    honest = encoded(photo(), "JPEG")
    frame = honest.index(b"\xff\xc0")
    bomb = honest[: frame + 5] + (20000).to_bytes(2, "big") * 2 + honest[frame + 9 :]
    with pytest.raises(ValueError, match="20000 x 20000 pixels"):
        decode_image(bomb, 3)
    with pytest.raises(ValueError, match="20000 x 20000 pixels"):
        displayed_size(bomb)
    assert is_plain(honest, displayed_size(honest))
    assert not is_plain(bomb, displayed_size(honest))  # never reaches DALI, which would decode it
    png = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(ValueError, match="pixels"):
        decode_image(png, 3)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", jpeg(np.zeros((9, 9, 3), np.uint8))[:-40], b"\xff\xd8\xff\xe0" + bytes(99)]
)
def test_no_image_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"."):
        decode_image(data, 3)
