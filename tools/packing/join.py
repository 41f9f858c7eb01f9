"""Joins the part records of packed shards into one dataset: manifest.json and samples.npy.

Shards whose images were all rejected leave no gap: the others are renumbered. The result is a function of the part
records alone; who packed which shard, and when, makes no difference.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from patchmill.pipeline.read.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NAMES_NAME,
    QUARANTINE_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    Manifest,
    ShardInfo,
    check_shard_name,
    index_name,
)
from patchmill.pipeline.read.urls import redact
from patchmill.tools.packing.destination import PLAN_NAME, Store
from patchmill.tools.packing.pack_shard import PixelSums
from patchmill.tools.packing.plan import part_name, shard_name


def read_part(store: Store, shard: int) -> dict[str, Any] | None:
    """The part record of a shard, None while there is none."""
    text = store.read_text(part_name(shard))
    if text is None:
        return None
    record = json.loads(text)
    check_shard_name(record["name"], part_name(shard))
    return record


def verified_part(store: Store, shard: int) -> dict[str, Any] | None:
    """The part record of a shard whose tar and index still match it; None when the shard must be packed again."""
    record = read_part(store, shard)
    if record is None:
        return None
    try:
        for name, sha256 in ((record["name"], record["sha256"]), (index_name(record["name"]), record["index_sha256"])):
            if store.sha256(name) != sha256:
                return None
    except FileNotFoundError:
        return None
    return record


def read_plan(store: Store) -> dict[str, Any]:
    """plan.json of an unfinished dataset whose shards are all packed. Raises ValueError that names missing ones."""
    text = store.read_text(PLAN_NAME)
    if text is None:
        raise ValueError(f"{redact(str(store.root))} is not an unfinished dataset: run `patchmill shard` first")
    plan = json.loads(text)
    missing = [str(shard) for shard in range(plan["shards"]) if not store.has(part_name(shard))]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {plan['shards']} shards are not packed yet (numbers {shown}): run their parts"
        )
    return plan


def read_parts(store: Store, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The part records in order, one at a time: all of them together may not fit in memory."""
    for shard in range(plan["shards"]):
        record = read_part(store, shard)
        assert record is not None, shard  # read_plan saw it
        yield record


def finish(store: Store, plan: dict[str, Any]) -> Manifest:
    """Renumbers the shards around empty ones, writes the tables and publishes the dataset."""
    left_out: list[dict[str, str]] = list(plan["left_out"])

    def renumbered() -> Iterator[dict[str, Any]]:
        count = 0
        for record in read_parts(store, plan):
            left_out.extend(record["left_out"])
            if not record["rows"]:
                store.delete(record["name"])
                store.delete(index_name(record["name"]))
                continue
            name = shard_name(count)
            count += 1
            if name != record["name"]:
                store.rename(record["name"], name)
                store.rename(index_name(record["name"]), index_name(name))
            yield record | {"name": name}

    manifest = write_tables(
        store, renumbered(), options=plan["options"], classes=plan["classes"], plan_sha256=plan["fingerprint"],
        left_out=left_out,
    )  # fmt: skip
    store.publish()
    return manifest


def write_tables(
    store: Store, records: Iterable[dict[str, Any]], *, options: dict[str, Any], classes: list[str], plan_sha256: str,
    left_out: list[dict[str, str]],
) -> Manifest:  # fmt: skip
    """Writes the sample table and the lists of these shards, and the manifest last.

    `left_out` is written after all records were read: reading them may add to it.
    """
    sums, shards, tables = PixelSums(), list[ShardInfo](), list[np.ndarray]()
    with store.writing(NAMES_NAME) as file:
        for record in records:
            tables.append(sample_rows(record["rows"], len(shards)))
            shards.append(ShardInfo(record["name"], len(record["rows"]), record["bytes"], record["sha256"]))
            sums.merge(PixelSums(*record["sums"]))
            file.write(json_lines(record["names"]).encode())
    samples = np.concatenate(tables)
    manifest = make_manifest(
        options=options, classes=classes, samples=samples, sums=sums, quarantined=len(left_out),
        plan_sha256=plan_sha256, shards=shards,
    )  # fmt: skip
    with store.writing(SAMPLES_NAME) as file:
        file.write(samples_bytes(samples))
    store.write_text(QUARANTINE_NAME, json_lines(left_out))
    store.write_text(MANIFEST_NAME, manifest.to_json())
    return manifest


def make_manifest(
    *, options: dict[str, Any], classes: list[str], shards: list[ShardInfo], samples: np.ndarray, sums: PixelSums,
    quarantined: int, plan_sha256: str,
) -> Manifest:  # fmt: skip
    """The manifest of these shards and this sample table."""
    mean, std = mean_and_std(sums)
    return Manifest(
        format_version=FORMAT_VERSION,
        options=options,
        classes=classes,
        num_samples=len(samples),
        shards=shards,
        mean=mean,
        std=std,
        channels=len(mean),
        quarantined=quarantined,
        plan_sha256=plan_sha256,
        samples_sha256=hashlib.sha256(samples_bytes(samples)).hexdigest(),
        statistics={"pixels": {"count": sums.pixels, "sums": list(sums.sums), "squares": list(sums.squares)}}
        | {
            column: {
                "min": int(values.min()),
                "mean": round(int(values.sum()) / len(values), 2),
                "max": int(values.max()),
            }
            for column, values in ((name, samples[name].astype(np.int64)) for name in ("width", "height", "size"))
        },
    )


def mean_and_std(sums: PixelSums) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel in 0..1 units, six decimals, from exact integer sums."""
    mean, std = [], []
    for total, squares in zip(sums.sums, sums.squares, strict=True):
        variance = (squares * sums.pixels - total * total) / sums.pixels**2  # exact integers up to the division
        mean.append(round(total / sums.pixels / 255, 6))
        std.append(round(variance**0.5 / 255, 6))
    return tuple(mean), tuple(std)


def sample_rows(rows: list[list[int]], shard: int) -> np.ndarray:
    """SAMPLE_DTYPE rows from a part record's (offset, size, crc32, format, width, height, label)."""
    return np.array([(shard, *row) for row in rows], SAMPLE_DTYPE)


def samples_bytes(samples: np.ndarray) -> bytes:
    """The content of samples.npy."""
    out = io.BytesIO()
    np.lib.format.write_array(out, samples, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def json_lines(values: list[Any]) -> str:
    """One JSON value per line, in ASCII: any file name survives."""
    return "".join(json.dumps(value) + "\n" for value in values)
