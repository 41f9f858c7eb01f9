"""Makes a dataset of tars that another program wrote: adds manifest, indexes and sample table, leaves the tars alone.

Every image is read and strictly decoded, as when packing. One that cannot be decoded stays in its tar but not in the
sample table: training never meets it. quarantine.jsonl names it.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from patchmill.pipeline.read.manifest import MANIFEST_NAME, ImageFormat, Manifest, index_name
from patchmill.pipeline.read.tar import TarDamage, image_format, index_of, split_key, walk_tar
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import track
from patchmill.tools.packing.destination import LocalStore
from patchmill.tools.packing.join import write_tables
from patchmill.tools.packing.listing import numbered_labels
from patchmill.tools.packing.normalise import Packed, Policy, normalise
from patchmill.tools.packing.pack_shard import PixelSums
from patchmill.tools.packing.strict_decode import Rejected
from patchmill.tools.packing.workers import map_in_processes


@dataclass(frozen=True)
class IndexArgs:
    """Makes a dataset of WebDataset tars that another program wrote: manifest, .idx and sample table next to the tars.

    Example:
        patchmill index tars/
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """The folder of the tars."""
    workers: int = 0
    """Processes; 0 is one per processor."""
    max_pixels: int = 100_000_000
    """Reject images whose header gives more pixels than this."""
    overwrite: bool = False
    """Replace an existing manifest, and trust what the tars hold now."""
    skip_damaged: bool = False
    """Leave out damaged tars instead of stopping at the first."""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(IndexArgs, "patchmill index", argv)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"no folder {args.folder}: give the folder of the tars")
    tars = sorted(args.folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{args.folder} has no .tar: pack images with `patchmill shard {args.folder} DATASET`")
    if (args.folder / MANIFEST_NAME).exists() and not args.overwrite:
        raise ValueError(f"{args.folder} has a {MANIFEST_NAME}: check it with `patchmill verify`, or give --overwrite")
    manifest = index_tars(tars, args)
    counts = f"{manifest.num_samples:,} images in {len(manifest.shards)} tars, {manifest.quarantined} left out"
    print(f"{args.folder}: {counts}")
    return 0


def index_tars(tars: list[Path], args: IndexArgs) -> Manifest:
    """Reads all tars and writes the tables. Raises ValueError for a damaged tar, or when no image can be read."""
    store = LocalStore(args.folder, args.folder)
    jobs = [(tar, args.max_pixels) for tar in tars]
    results = map_in_processes(index_tar, jobs, args.workers)
    found = list(track(results, "reading", len(jobs)))
    if (damaged := [record["damage"] for record in found if "damage" in record]) and not args.skip_damaged:
        raise ValueError(f"{damaged[0]}: repair or remove it, or give --skip-damaged (leaves out {len(damaged)} tars)")
    records = [record for record in found if record.get("rows")]
    if not records:
        raise ValueError(f"none of the {len(tars)} tars in {args.folder} has a readable image")
    classes = _class_names(args.folder / MANIFEST_NAME, _number_labels(records))
    for record in records:
        store.write_text(index_name(record["name"]), record["index"])
    left_out = [entry for record in found for entry in record.get("left_out", [])]
    left_out += [{"name": text, "kind": "bad", "reason": "damaged tar"} for text in damaged]
    return write_tables(store, records, options={"indexed": True}, classes=classes, plan_sha256="", left_out=left_out)


def index_tar(job: tuple[Path, int]) -> dict[str, Any]:
    """The part record of one tar, with labels as written in it; {"damage": text} when its structure is broken."""
    path, max_pixels = job
    rows, names, labels, left_out = [], [], [], []
    sums = PixelSums()
    with path.open("rb") as file:
        try:
            members = list(walk_tar(file))
        except TarDamage as damage:
            return {"damage": f"{path} {damage}"}
        written = {member.name: member for member in members if member.name.endswith(".cls")}
        for member in members:
            format = image_format(member.name)
            if format is None:
                continue
            data = member.read(file)
            try:
                packed = checked(data, format, max_pixels)
            except Rejected as rejected:
                left_out.append(
                    {"name": f"{path.name}/{member.name}", "kind": rejected.kind, "reason": rejected.reason}
                )
                continue
            assert packed.pixels is not None
            sums.add(packed.pixels, 3)
            rows.append([member.offset, member.size, zlib.crc32(data), int(format), packed.width, packed.height])
            names.append(f"{path.name}/{member.name}")
            split = split_key(member.name)
            label = written.get(f"{split[0]}.cls") if split else None
            labels.append(label.read(file).decode("utf-8", "replace").strip() if label else "")
        size = file.seek(0, 2)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "bytes": size, "index": index_of(members), "labels": labels, "left_out": left_out, "name": path.name,
        "names": names, "rows": rows, "sha256": sha256, "sums": [sums.pixels, sums.sums, sums.squares],
    }  # fmt: skip


def checked(data: bytes, format: ImageFormat, max_pixels: int) -> Packed:
    """Strictly decodes an image that stays unchanged. Raises Rejected when it is damaged or named as another format.

    Width and height are those of the displayed image, with EXIF orientation applied.
    """
    packed = normalise(data, Policy(max_pixels=max_pixels))
    starts = {ImageFormat.JPEG: b"\xff\xd8", ImageFormat.PNG: b"\x89PNG", ImageFormat.TIFF: data[:2]}
    if not data.startswith(starts[format]):
        raise Rejected(f"named as {format.name} but in another format: pack it again with `patchmill shard`")
    return packed


def _number_labels(records: list[dict[str, Any]]) -> list[str]:
    """Numbers the labels of all tars together and adds them to the rows; returns the classes."""
    labels, classes = numbered_labels([label for record in records for label in record["labels"]])
    place = 0
    for record in records:
        for row in record["rows"]:
            row.append(int(labels[place]))
            place += 1
    return classes


def _class_names(manifest: Path, numbers: list[str]) -> list[str]:
    """The class names of the manifest being replaced, if it is readable and has enough; else the numbers."""
    if not manifest.is_file():
        return numbers
    try:
        classes = Manifest.from_json(manifest.read_text("utf-8", "replace")).classes
    except ValueError:
        return numbers
    return classes if len(classes) >= len(numbers) else numbers
