"""Models a measured loader and step as stages that hold resources, for the verdict.

Reader threads read, check, decode and resize. The loader's thread plans batches, moves them to the device and draws
their masks. Planning and bookkeeping hold Python's lock. Everything on the host holds a core for its CPU time; so does
a step on a CPU. A stage holds its thread for its wall time. But where a computing stage of the reader threads took less
than twice its CPU time, other programs kept it waiting, and its CPU time counts. Storage counts as a resource where the
shards do not fit the memory, because every epoch then reads it again. Cores are those that other programs left.
"""

from collections.abc import Mapping
from typing import Any

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, GIL, LINK, STEP, STORAGE, THREADS, Model, Stage
from patchmill.tools.profiler.timing import spread

DECODER = "decoder"
"""DALI's graph, which has its own threads and queues"""
HOLDERS: Mapping[str, tuple[str, ...]] = {
    "plan": (FRONT, GIL),
    "storage": (THREADS,),
    "checks": (THREADS,),
    "decode": (THREADS,),
    "resize": (THREADS,),
    "bookkeeping": (THREADS, GIL),
    "masks": (FRONT,),
    "colour": (FRONT,),
    "host copy": (FRONT,),
}
"""what a stage holds besides a core; stages in the order in which an image passes them"""
COMPUTES = ("checks", "decode", "resize", "bookkeeping")
"""stages of the reader threads that never wait for anything"""
WAITS = 2.0
"""times its CPU time: a stage that took longer did wait"""


def loader_model(loader: dict[str, Any]) -> Model:
    """Models the loader of a report by itself."""
    one = dict.fromkeys((FRONT, GIL, LINK, STORAGE, DECODER), 1.0)
    left = max(
        loader["together"]["cores_used"], loader["cores"] - loader["together"]["others"], 1.0
    )  # one can always be had
    servers = {THREADS: float(loader["workers"]), CORES: left, **one}
    return Model([_stage(cost, loader) for cost in loader["stages"]], servers)


def with_step(model: Model, step: dict[str, Any]) -> Model:
    """Adds the step of a report: an image holds the device, and this host's cores for the CPU time."""
    seconds = step["seconds"]["median"] / step["batch"]
    stage = Stage(STEP, {DEVICE: seconds, CORES: step["cpu_seconds"] / step["batch"]}, spread(step["seconds"]))
    return Model([*model.stages, stage], {**model.servers, DEVICE: 1.0})


def _stage(cost: dict[str, Any], loader: dict[str, Any]) -> Stage:
    name, wall, cpu, holders = cost["name"], cost["wall"], cost["cpu"], HOLDERS[cost["name"]]
    if name == "decode" and loader["decoder"] != "cpu":
        holders = (DECODER,) if loader["decoder"] == "dali" else (FRONT,)
    disturbed = wall["median"] < WAITS * cpu["median"]
    held = cpu if disturbed and name in COMPUTES and holders[0] == THREADS else wall
    holds = {CORES: cpu["median"]} | dict.fromkeys(holders, held["median"])
    if name == "host copy" and loader["link_seconds"]:
        holds[LINK] = loader["link_seconds"]
    if name == "storage" and loader["storage"] and not loader["fits_memory"]:
        cold = loader["storage"]["cold"]
        holds |= {STORAGE: 1 / cold["images_per_s"], THREADS: max(wall["median"], cold["p50_ms"] / 1e3)}
    return Stage(name, holds, spread(held))
