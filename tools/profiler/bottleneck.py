"""Finds which stage limits a run from measured costs, and says so in one sentence: by how much, and what comes next.

The model is that of operational analysis (Denning and Buzen, "The operational analysis of queueing network models",
1978). A run is a chain of stages with queues between them. Each stage holds some resources for a while for every image:
a decoding thread, a core, the storage, the device. A resource with c servers that an image holds for s seconds can
serve c / s images a second, and a run goes at most as fast as its slowest resource:

    decode holds a thread and a core for 1.5 ms, resize for 0.5 ms, the step holds the device for 0.4 ms
    2 threads: 2 / 2.0 ms = 1,000 images/s    2 cores: 1,000 images/s    device: 1 / 0.4 ms = 2,500 images/s
    The threads bind, and decode takes most of their time: "decode binds: 1,000 of the 2,500 images/s ..."

This is an upper bound: short queues and varying stages lose a little. Two predictions lose the same, so gains are
predicted as ratios (remedies.py). Pure functions of measured numbers; nothing is timed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

THREADS = "reader threads"
CORES = "cores"
STORAGE = "storage"
LINK = "host-to-device link"
FRONT = "loader's thread"
"""one thread that plans batches, moves them to the device and draws their masks"""
GIL = "Python interpreter"
"""its lock, which only one thread of a process can hold: planning and bookkeeping"""
DEVICE = "device"
STEP = "step"

CLOSE = 1.15
"""resources within this ratio bind together: the bound is least exact there"""
STRAGGLES, STRAGGLES_IN_NOISE = 1.25, 2.0
"""a rank this many times slower than the median of the others delays them; on a machine that others use too"""


@dataclass(frozen=True)
class Stage:
    """The cost of one image at a stage."""

    name: str
    holds: Mapping[str, float]
    """seconds by resource"""
    spread: float = 0.0
    """half of the interquartile range of these seconds, over their median"""


@dataclass(frozen=True)
class Model:
    """Stages, and the number of servers of each resource (threads, cores; 1 for a single device)."""

    stages: Sequence[Stage]
    servers: Mapping[str, float]

    def held(self, resource: str) -> float:
        """Returns the seconds for which one image holds a resource, over all stages."""
        return sum(stage.holds.get(resource, 0.0) for stage in self.stages)

    def supplies(self) -> dict[str, float]:
        """Returns the images per second of each resource that a stage holds, slowest first."""
        held = {name: self.held(name) for name in self.servers}
        rates = {name: self.servers[name] / seconds for name, seconds in held.items() if seconds > 0}
        return dict(sorted(rates.items(), key=lambda item: item[1]))

    def images_per_s(self) -> float:
        """Returns the bound on the whole: the rate of the slowest resource."""
        return next(iter(self.supplies().values()))

    def without(self, name: str) -> "Model":
        """Returns the model without a stage."""
        return replace(self, stages=[stage for stage in self.stages if stage.name != name])

    def largest(self, resource: str) -> Stage:
        """Returns the stage that holds a resource longest."""
        return max(self.stages, key=lambda stage: stage.holds.get(resource, 0.0))


@dataclass(frozen=True)
class Verdict:
    """The stage that binds."""

    stage: str
    """it holds the binding resource longest"""
    resource: str
    share: float
    """of the binding resource's time that this stage takes"""
    images_per_s: float
    """the bound"""
    measured: float | None
    """images per second of the whole; None where only its parts were measured"""
    wanted: float | None
    """images per second of a step that never waits; None where no step was measured"""
    next_stage: str | None
    next_resource: str | None
    headroom: float | None
    """rate of the next resource over that of the binding one"""
    certain: bool
    """whether the two rates differ by more than the measurements spread"""
    sentence: str


def judge(model: Model, noise: str | None = None, measured: float | None = None) -> Verdict:
    """Names the binding stage.

    Args:
        noise: why small differences cannot be trusted; None on a quiet machine.
        measured: images per second of the whole.
    """
    supplies = model.supplies()
    resource, rate = next(iter(supplies.items()))
    stage = model.largest(resource)
    share = stage.holds[resource] / model.held(resource)
    has_step = any(each.name == STEP for each in model.stages)
    wanted = supplies.get(DEVICE) if has_step else None
    follower = next(((r, s) for r, s in supplies.items() if model.largest(r).name != stage.name), None)
    next_stage = model.largest(follower[0]) if follower else None
    headroom = follower[1] / rate if follower else None
    doubt = stage.spread + next_stage.spread if next_stage else stage.spread
    certain = headroom is None or headroom > 1 + max(doubt, 0.5 if noise else 0.0)
    verdict = Verdict(
        stage.name, resource, share, rate, measured, wanted,
        next_stage.name if next_stage else None, follower[0] if follower else None, headroom, certain, "",
    )  # fmt: skip
    return replace(verdict, sentence=_sentence(verdict, model, noise))


def straggler(own_seconds_R: Sequence[float], noise: str | None = None) -> int | None:
    """Finds the rank that the others wait for, from each rank's seconds a step before they meet; None if they are even.

    Example: [0.10, 0.11, 0.31, 0.10] -> 2
    """
    if len(own_seconds_R) < 2:
        return None
    *others, longest = sorted(own_seconds_R)
    limit = (STRAGGLES_IN_NOISE if noise else STRAGGLES) * others[len(others) // 2]
    return own_seconds_R.index(longest) if longest > limit else None


def rounded(rate: float) -> str:
    """Formats a rate: 0.05, 2.6, 196 or 12,345."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def _sentence(verdict: Verdict, model: Model, noise: str | None) -> str:
    rate, facts = verdict.images_per_s, []
    if verdict.stage == STEP:
        facts.append(f"the step binds: {rounded(rate)} images/s")
        data = model.without(STEP).supplies()
        if data:
            times = next(iter(data.values())) / rate
            facts.append(f"the loader {f'could give {times:.1f} times as many' if times > CLOSE else 'just keeps up'}")
    else:
        if verdict.wanted is None:
            facts.append(f"{verdict.stage} binds the loader: {rounded(rate)} images/s")
        else:
            of_step = f"{rounded(rate)} of the {rounded(verdict.wanted)} images/s that the step could take"
            facts.append(f"{verdict.stage} binds: {of_step} ({rate / verdict.wanted:.0%})")
        if verdict.share < 1:
            held = counted(verdict.resource, model.servers[verdict.resource])
            facts.append(f"it takes {verdict.share:.0%} of the time of the {held}")
        if verdict.next_stage and verdict.headroom is not None:
            facts.append(f"{verdict.next_stage} would bind next, at {verdict.headroom:.1f} times this rate")
    text = "; ".join(facts) + "."
    if verdict.measured is not None and not 1 / CLOSE < verdict.measured / rate < CLOSE:
        text += f" As a whole it ran at {rounded(verdict.measured)} images/s{f' while {noise}' if noise else ''}."
    elif noise:
        text += f" Measured while {noise}."
    if not verdict.certain:
        reason = "" if noise else ": they are closer than their measurements spread"
        text += f" Too noisy to tell {verdict.stage} from {verdict.next_stage}{reason}."
    elif verdict.headroom is not None and verdict.headroom < CLOSE and verdict.stage != STEP:
        text += " They are near to balance: relieving one alone gains little."
    return text


def counted(resource: str, servers: float) -> str:
    """Names a resource with the number of its servers: "2 cores", "device"."""
    count = round(servers, 1)
    return resource if count == 1 else f"{count:g} {resource}"
