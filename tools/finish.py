"""part records -> [finish] -> manifest.json + samples.npy: joins the packed shards into one dataset.

Shards whose images were all rejected leave no gap: the others are renumbered. Everything here is a function of the
part records alone, so that it makes no difference who packed which shard, or when.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchmill.pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NAMES_NAME,
    QUARANTINE_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    Manifest,
    ShardInfo,
)
from patchmill.tools.pack import PixelSums, part_name
from patchmill.tools.store import PLAN_NAME, Store
from patchmill.tools.urls import redact


@dataclass(frozen=True)
class Parts:
    """All part records of a plan, as plan.json describes it."""

    plan: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def bad(self) -> int:
        """Images that were damaged or no images."""
        return sum(entry["kind"] == "bad" for record in self.records for entry in record["left_out"])


def read_part(store: Store, shard: int) -> dict[str, Any] | None:
    """The part record of a shard, None while there is none."""
    text = store.read_text(part_name(shard))
    return None if text is None else json.loads(text)


def verified_part(store: Store, shard: int) -> dict[str, Any] | None:
    """The part record of a shard whose tar and index still are what it says; None when it must be packed again."""
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


def read_parts(store: Store) -> Parts:
    """Every part record of the unfinished dataset; ValueError names the shards that are still missing."""
    text = store.read_text(PLAN_NAME)
    if text is None:
        raise ValueError(f"{redact(str(store.root))} holds no unfinished dataset: run `patchmill shard` first")
    plan = json.loads(text)
    records = [read_part(store, shard) for shard in range(plan["shards"])]
    missing = [str(shard) for shard, record in enumerate(records) if record is None]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {plan['shards']} shards are not packed yet (numbers {shown}): run the parts with them"
        )
    return Parts(plan, [record for record in records if record is not None])


def finish(store: Store, parts: Parts) -> Manifest:
    """Renumbers the shards where some are empty, writes the tables, and gives the dataset its name."""
    kept: list[dict[str, Any]] = []
    for record in parts.records:
        if record["rows"]:
            name = f"shard-{len(kept):06d}.tar"
            if name != record["name"]:
                store.rename(record["name"], name)
                store.rename(index_name(record["name"]), index_name(name))
            kept.append(record | {"name": name})
        else:
            store.delete(record["name"])
            store.delete(index_name(record["name"]))
    manifest = write_tables(
        store, kept, options=parts.plan["options"], classes=parts.plan["classes"],
        plan_sha256=parts.plan["fingerprint"],
        left_out=parts.plan["left_out"] + [entry for record in parts.records for entry in record["left_out"]],
    )  # fmt: skip
    store.publish()
    return manifest


def write_tables(
    store: Store, records: list[dict[str, Any]], *, options: dict[str, Any], classes: list[str], plan_sha256: str,
    left_out: list[dict[str, str]],
) -> Manifest:  # fmt: skip
    """Writes the sample table, the lists and last the manifest of these shards, in this order."""
    sums = PixelSums()
    for record in records:
        sums.merge(PixelSums(*record["sums"]))
    samples = np.concatenate([sample_rows(record["rows"], i) for i, record in enumerate(records)])
    manifest = make_manifest(
        options=options, classes=classes, samples=samples, sums=sums, quarantined=len(left_out),
        plan_sha256=plan_sha256,
        shards=[ShardInfo(r["name"], len(r["rows"]), r["bytes"], r["sha256"]) for r in records],
    )  # fmt: skip
    with store.writing(SAMPLES_NAME) as file:
        file.write(samples_bytes(samples))
    store.write_text(NAMES_NAME, json_lines([name for record in records for name in record["names"]]))
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
    """One JSON value a line; ASCII, so that any file name survives."""
    return "".join(json.dumps(value) + "\n" for value in values)


def index_name(tar_name: str) -> str:
    """The file name of a tar's DALI index."""
    return tar_name.removesuffix(".tar") + ".idx"
