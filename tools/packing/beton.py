"""Writes and lists FFCV's one-file format (.beton) without encoding a JPEG again.

FFCV's own writer encodes every image again, and hangs when a worker raises. This file uses FFCV's page allocator and
header in one process, sample after sample: an error stays an error, JPEG bytes stay unchanged, and equal datasets give
equal files. Images that are not JPEGs are stored as raw RGB pixels, the other kind that FFCV knows.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.read.manifest import Dataset, ImageFormat
from patchmill.tools.packing.listing import Listing, Method, make_entries, numbered_labels
from patchmill.tools.packing.strict_decode import decode, read_bytes

JPEG_MODE, RAW_MODE = 0, 1
LARGEST_SIDE = 2**16 - 1  # FFCV holds width and height in 16 bits
PAGE_BYTES = 2**23


def write_beton(dataset: Dataset, path: Path) -> None:
    """Writes the fields `image` (RGB) and `label` (-1 unknown) of a dataset, in its order.

    Raises ValueError for images that FFCV cannot hold: TIFFs, and sides above 65,535 pixels.
    """
    writer_module, fields = import_ffcv()
    samples = dataset.samples
    if (samples["format"] == ImageFormat.TIFF).any():
        raise ValueError(f"{dataset.root} has images of more than 3 channels, which FFCV's RGB field cannot hold")
    if max(samples["width"].max(), samples["height"].max()) > LARGEST_SIDE:
        raise ValueError(f"{dataset.root} has images wider or higher than {LARGEST_SIDE} pixels: pack with --resize")
    pixels = np.where(
        samples["format"] == ImageFormat.JPEG, 0, samples["width"].astype(np.int64) * samples["height"] * 3
    )
    largest = max(int(pixels.max()), int(samples["size"].max()))
    images: Any = fields.RGBImageField()
    images.encode = _store
    page_size = max(PAGE_BYTES, 1 << (largest - 1).bit_length())
    with whole_file(path) as unfinished:
        writer = writer_module.DatasetWriter(
            str(unfinished), {"image": images, "label": fields.IntField()}, page_size=page_size, num_workers=1
        )
        writer.num_samples = len(dataset)
        _write_samples(writer, writer_module, dataset)


def list_beton(path: Path, staging: Path) -> Listing:
    """Lists a .beton that has an RGB image field; raw pixels are copied into `staging` as PPM files, end to end."""
    import_ffcv()
    from ffcv.reader import Reader

    try:
        reader = Reader(str(path))
        image, label = _fields_of(reader)
        sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
        stored = np.array([sizes[int(row["data_ptr"])] for row in image], np.uint64)
    except (ValueError, AssertionError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a .beton with images, or is cut short: {error}") from None
    entries = make_entries(len(image))
    entries["method"] = Method.RAW
    entries["offset"], entries["stored"], entries["size"] = image["data_ptr"], stored, stored
    containers = [str(path)]
    raw = np.flatnonzero(image["mode"] == RAW_MODE)
    if len(raw):
        containers.append(str(_spool_pixels(path, image, entries, raw, staging)))
    entries["label"], classes = numbered_labels([str(int(value)) for value in label])
    return Listing([f"{i:08d}" for i in range(len(image))], entries, containers, classes)


def _write_samples(writer: Any, writer_module: Any, dataset: Dataset) -> None:
    writer.prepare()
    try:
        metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
        allocator = writer_module.MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
        with allocator:
            for i, row in enumerate(dataset.samples):
                sample = ((row, read_bytes(dataset, i)), int(row["label"]))
                writer_module.handle_sample(sample, i, metadata.dtype.names, metadata, allocator, writer.fields)
        del metadata  # it holds the shared memory open
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


def _store(destination: Any, image: tuple[np.void, bytes], malloc: Any) -> None:
    """FFCV's hook for one image: stores JPEG bytes unchanged, anything else as RGB pixels."""
    row, data = image
    mode = JPEG_MODE if row["format"] == ImageFormat.JPEG else RAW_MODE
    content = np.frombuffer(data, np.uint8)
    if mode == RAW_MODE:
        content = np.asarray(Image.fromarray(decode(data, ImageFormat(row["format"]))).convert("RGB")).reshape(-1)
    destination["mode"] = mode
    destination["height"], destination["width"] = row["height"], row["width"]
    destination["data_ptr"], storage = malloc(content.nbytes)
    storage[:] = content


def _fields_of(reader: Any) -> tuple[np.ndarray, np.ndarray]:
    """(image metadata, labels); labels are -1 when the file has none."""
    kinds = [type(handler).__name__ for handler in reader.handlers.values()]
    image = reader.metadata[f"f{kinds.index('RGBImageField')}"]
    if "IntField" not in kinds:
        return image, np.full(len(image), -1)
    return image, reader.metadata[f"f{kinds.index('IntField')}"]


def _spool_pixels(path: Path, image: np.ndarray, entries: np.ndarray, raw: np.ndarray, staging: Path) -> Path:
    """Copies the raw pixels of these rows into one file of PPM images and points their entries at it."""
    staging.mkdir(parents=True, exist_ok=True)
    spool = staging / "beton.spool"
    with path.open("rb") as source, spool.open("wb") as target:
        for i in raw:
            source.seek(int(entries["offset"][i]))
            pixels = source.read(int(entries["stored"][i]))
            entries["offset"][i], entries["container"][i] = target.tell(), 1
            header = b"P6 %d %d 255\n" % (image["width"][i], image["height"][i])
            entries["stored"][i] = entries["size"][i] = target.write(header) + target.write(pixels)
    return spool


def import_ffcv() -> tuple[Any, Any]:
    """(ffcv.writer, ffcv.fields). Raises ValueError when FFCV is not installed.

    Importing FFCV leaves torch with one thread. That would slow whatever this process does with torch afterwards, and
    change its last digits; so the number of threads is restored.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv.fields
        import ffcv.writer
    except ImportError as error:
        raise ValueError(
            f".beton files need FFCV ({error}): pip install 'patchmill[ffcv]' after the system's libopencv-dev and "
            "libturbojpeg0-dev"
        ) from None
    finally:
        torch.set_num_threads(threads)
    return ffcv.writer, ffcv.fields
