"""Models a measured loader and step as stages that hold resources, for the verdict.

Reader threads read, check, decode and resize. The loader's thread plans batches, moves them to the device and draws
their masks. Planning and bookkeeping hold Python's lock. Everything on the host holds a core for its CPU time; so does
a step on a CPU. A stage holds its thread for its wall time. But where a computing stage of the reader threads took less
than twice its CPU time, other programs kept it waiting, and its CPU time counts. Storage counts as a resource where the
shards do not fit the memory, because every epoch then reads it again. Cores are those that other programs left.
"""

from collections.abc import Mapping

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, GIL, LINK, STEP, STORAGE, THREADS, Model, Stage
from patchmill.tools.profiler.loader import LoaderProfile, StageCost

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
"""what a stage holds besides a core"""
COMPUTES = ("checks", "decode", "resize", "bookkeeping")
"""stages of the reader threads that never wait for anything"""
WAITS = 2.0
"""times its CPU time: a stage that took longer did wait"""


def loader_model(profile: LoaderProfile) -> Model:
    """Models the loader by itself."""
    one = dict.fromkeys((FRONT, GIL, LINK, STORAGE, DECODER), 1.0)
    left = max(profile.together.cores_used, profile.cores - profile.together.others, 1.0)  # one can always be had
    servers = {THREADS: float(profile.workers), CORES: left, **one}
    return Model([_stage(cost, profile) for cost in profile.stages], servers)


def with_step(model: Model, seconds: float, cpu_seconds: float, spread: float) -> Model:
    """Adds a step that takes so many seconds, and CPU seconds of this host, for an image."""
    step = Stage(STEP, {DEVICE: seconds, CORES: cpu_seconds}, spread)
    return Model([*model.without(STEP).stages, step], {**model.servers, DEVICE: 1.0})


def _stage(cost: StageCost, profile: LoaderProfile) -> Stage:
    holders = HOLDERS[cost.name]
    if cost.name == "decode" and profile.decoder != "cpu":
        holders = (DECODER,) if profile.decoder == "dali" else (FRONT,)
    disturbed = cost.wall.median < WAITS * cost.cpu.median
    held = cost.cpu if disturbed and cost.name in COMPUTES and holders[0] == THREADS else cost.wall
    holds = {CORES: cost.cpu.median} | dict.fromkeys(holders, held.median)
    if cost.name == "host copy" and profile.link_seconds:
        holds[LINK] = profile.link_seconds
    if cost.name == "storage" and profile.storage and not profile.fits_memory:
        cold = profile.storage["cold"]
        holds |= {STORAGE: 1 / cold.images_per_s, THREADS: max(cost.wall.median, cold.p50_ms / 1e3)}
    return Stage(cost.name, holds, held.spread)
