"""loader and step profiles -> [profile_model] -> stages and servers for the verdict: who holds what for how long.

Reader threads read, check, decode and resize. One more thread plans batches, moves them to the device and draws their
masks. Planning and bookkeeping hold Python's lock. Everything on the host holds a core for its CPU time; a step on a
CPU does too. A stage holds its thread for its wall time; but a reading thread's stage that only computes, and took less
than twice its CPU time, was kept waiting by other programs: it is counted with its CPU time. Storage counts as a
resource where the shards do not fit the memory, so that every epoch reads it again. Of the cores those count that other
programs left to the running loader.
"""

from collections.abc import Mapping

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, GIL, LINK, STEP, STORAGE, THREADS, Model, Stage
from patchmill.tools.profiler.loader import LoaderProfile
from patchmill.tools.profiler.stages import StageCost

DECODER = "decoder"
"""DALI's graph, which has threads and queues of its own"""
HOLDERS: Mapping[str, tuple[str, ...]] = {
    "plan": (FRONT, GIL),
    "storage": (THREADS,),
    "checks": (THREADS,),
    "decode": (THREADS,),
    "resize": (THREADS,),
    "bookkeeping": (THREADS, GIL),
    "masks": (FRONT,),
    "host copy": (FRONT,),
}
"""what a stage holds besides a core"""
COMPUTES = ("checks", "decode", "resize", "bookkeeping")
"""stages of the reader threads that have nothing to wait for"""
WAITS = 2.0
"""times its CPU time: a stage that took longer did wait"""


def loader_model(profile: LoaderProfile) -> Model:
    """The loader by itself."""
    stages = [_stage(cost, profile) for cost in profile.stages]
    one = dict.fromkeys((FRONT, GIL, LINK, STORAGE, DECODER), 1.0)
    left = max(profile.together.cores_used, profile.cores - profile.together.others, 1.0)  # one can always be had
    return Model(stages, {THREADS: float(profile.workers), CORES: left, **one})


def with_step(model: Model, seconds: float, cpu_seconds: float, spread: float) -> Model:
    """The loader and a step that takes so many seconds, and CPU seconds of this host, for an image."""
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
