"""Packs a listing into a dataset: plans, resumes, packs and joins, without a screen.

`patchmill shard`, `patchmill merge`, the demo and the tests all use this file.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchmill.pipeline.read.manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest
from patchmill.pipeline.read.urls import redact
from patchmill.tools.packing.destination import PLAN_NAME, Store, is_disk_full, store_at
from patchmill.tools.packing.join import finish, json_lines, read_part, read_parts, read_plan, verified_part
from patchmill.tools.packing.listing import Listing
from patchmill.tools.packing.pack_shard import Progress, Stopped
from patchmill.tools.packing.plan import PackOptions, Plan, ShardTask, make_plan, part_name, pending
from patchmill.tools.packing.workers import pack_here, pack_in_processes, processors

MAX_BAD_FRACTION = 0.5
Engine = Callable[[Iterable[ShardTask], Store, Progress], None]


@dataclass
class Run:
    """Progress of a packing run: the totals of this part, and what is packed so far, earlier runs included."""

    total_images: int
    total_bytes: int
    images: int = 0
    bytes: int = 0
    bad: int = 0
    on_progress: Callable[["Run"], None] = field(default=lambda run: None)

    def add(self, images: int, size: int, bad: int) -> None:
        """Counts images that were just packed."""
        self.images, self.bytes, self.bad = self.images + images, self.bytes + size, self.bad + bad
        self.on_progress(self)


def pack_dataset(
    listing: Listing,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    workers: int = 1,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    part: tuple[int, int] = (0, 1),
    engine: Engine | None = None,
    on_progress: Callable[[Run], None] = lambda run: None,
) -> Manifest | None:
    """Packs a listing into the folder or URL `out`; resumes an interrupted run of the same plan.

    Returns:
        The manifest; None when other parts remain to be packed.
    Raises:
        ValueError: `out` holds anything else, the listing is empty, or too many images are bad.
        OSError: the output cannot be written.
    """
    store = store_at(out)
    store.refuse_foreign()
    plan = make_plan(listing, options or PackOptions())
    if (finished := finished_before(store, plan)) is not None:
        return finished
    begin(store, plan)
    mine = shards_of(plan, part)
    run = Run(
        total_images=sum(plan.shard_images(shard) for shard in mine),
        total_bytes=sum(plan.shard_bytes(shard) for shard in mine),
        on_progress=on_progress,
    )
    done = set()
    for shard in mine:
        if (record := verified_part(store, shard)) is not None:
            done.add(shard)
            run.add(plan.shard_images(shard), plan.shard_bytes(shard), count_bad(record))
    allowed = max_bad_fraction * run.total_images

    def report(images: int, size: int, bad: int) -> bool:
        run.add(images, size, bad)
        return run.bad <= allowed

    todo = len(mine) - len(done)
    try:
        if run.bad <= allowed and todo:
            _engine(engine, min(workers or processors(), todo))(pending(plan, done, *part), store, report)
    except Stopped:
        pass  # too many are bad: _too_bad says so, with examples
    except OSError as error:
        raise _named(error, store, plan, alone=part[1] == 1) from None
    if run.bad > allowed:
        raise _too_bad(store, plan, run, max_bad_fraction, alone=part[1] == 1)
    if part[1] > 1:
        return None
    return join(store)


def join(store: Store) -> Manifest:
    """Finishes a dataset whose shards are all packed."""
    plan = read_plan(store)
    if not any(record["rows"] for record in read_parts(store, plan)):
        examples = _examples([entry for record in read_parts(store, plan) for entry in record["left_out"]])
        store.abandon()
        raise ValueError(f"none of the {plan['images']} images can be packed: {examples}")
    try:
        return finish(store, plan)
    except OSError as error:
        if is_disk_full(error):
            remedy = "free some space and run the command again"
            raise OSError(f"no space left for the manifest in {shown(store.root)}: {remedy}") from None
        raise


def count_bad(record: dict[str, Any]) -> int:
    """Images of a part record that were damaged or not images."""
    return sum(entry["kind"] == "bad" for entry in record["left_out"])


def finished_before(store: Store, plan: Plan) -> Manifest | None:
    """The manifest when this plan is already packed at `out`. Raises ValueError when another dataset is there."""
    text = store.published_manifest()
    if text is None:
        return None
    manifest = Manifest.from_json(text, f"{shown(store.out)}/{MANIFEST_NAME}")
    if manifest.plan_sha256 != plan.fingerprint:
        raise ValueError(
            f"{shown(store.out)} holds a dataset of other images or options: give a new folder, or delete this one"
        )
    store.clean_published()
    return manifest


def begin(store: Store, plan: Plan) -> None:
    """Makes the unfinished folder, or resumes it. Raises ValueError when it belongs to another plan."""
    text = store.read_text(PLAN_NAME)
    if text is not None and json.loads(text)["fingerprint"] != plan.fingerprint:
        raise ValueError(
            f"{shown(store.root)} is an unfinished run with other images or options: delete it to start over, or run "
            "the command that started it"
        )
    store.create()
    description: dict[str, Any] = {
        "classes": plan.listing.classes,
        "fingerprint": plan.fingerprint,
        "images": len(plan.order),
        "left_out": plan.left_out,
        "options": plan.options.as_dict(),
        "shards": plan.num_shards,
    }
    store.write_text(PLAN_NAME, json.dumps(description))


def shards_of(plan: Plan, part: tuple[int, int]) -> range:
    """The shards of part i of n: every n-th, starting with i."""
    return range(part[0], plan.num_shards, part[1])


def shown(place: str | Path) -> str:
    """A folder or URL as a message may show it."""
    return redact(str(place))


def _engine(engine: Engine | None, workers: int) -> Engine:
    if engine is not None:
        return engine
    if workers == 1:
        return pack_here
    return lambda tasks, store, report: pack_in_processes(tasks, store, report, workers)


def _named(error: OSError, store: Store, plan: Plan, alone: bool) -> OSError:
    """The error, with what is kept of the run. Removes an unfinished folder without a complete shard, if `alone`."""
    done = sum(store.has(part_name(shard)) for shard in range(plan.num_shards))
    if not done and alone:
        store.abandon()
    if not is_disk_full(error):
        return OSError(f"cannot write {shown(store.root)}: {error.strerror or error} ({done} shards are kept)")
    kept = f"{done} of {plan.num_shards} shards are kept in {shown(store.root)}; " if done else "nothing was kept; "
    return OSError(
        f"no space left for {shown(store.out)} ({error.strerror}): {kept}free some space and run the same command again"
    )


def _too_bad(store: Store, plan: Plan, run: Run, max_bad_fraction: float, alone: bool) -> ValueError:
    records = [record for shard in range(plan.num_shards) if (record := read_part(store, shard)) is not None]
    left_out = [entry for record in records for entry in record["left_out"]]
    where = ""
    if records:
        store.write_text(QUARANTINE_NAME, json_lines(plan.left_out + left_out))
        where = f"the list so far is {shown(store.root)}/{QUARANTINE_NAME}; "
    elif alone:
        store.abandon()
    return ValueError(
        f"{run.bad} of {run.total_images} images are bad, above --max-bad-fraction {max_bad_fraction}"
        f"{_examples(left_out, ' (', ')')}: {where}repair the source, or give a larger fraction to leave them out"
    )


def _examples(left_out: list[dict[str, str]], before: str = "", after: str = "") -> str:
    shown = [f"{entry['name']}: {entry['reason']}" for entry in left_out if entry["kind"] != "ignored"][:3]
    return before + "; ".join(shown) + after if shown else ""
