"""environment -> [ranks and devices] -> everything: where this process stands, and what the ranks agree on.

Ranks come from torchrun's environment; a process started without it is a world of one. Tensors on the device are
reduced by NCCL (gloo on CPUs) and never make the host wait; the hosts agree among themselves through gloo.
"""

import ctypes
import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

LAST_WORDS_SECONDS = 5.0
"""how long ranks that lost the others wait to hear who is still there"""
LOST = ("gloo", "nccl", "connection closed", "connection reset", "socket closed", "pair closure", "operation timed out")
"""words by which collectives say that another rank is lost. When several are under way, gloo gives its full message to
one of them and a bare "Application timeout caused pair closure" to the rest"""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """ranks on this machine"""
    store: Store | None = None
    """torchrun's key-value store; None in a world of one"""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and draws the progress bar."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The average of a tensor on the device over all ranks, on every rank; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; waits for all of them, and every rank gets the same answer."""
        if self.size > 1:
            ballot = torch.tensor(float(flag))
            dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
            return bool(ballot > 0)
        return flag

    def agree(self, number: int) -> int:
        """The first rank's number, on every rank."""
        if self.size > 1:
            told = torch.tensor(number)
            dist.broadcast(told, src=0)
            return int(told)
        return number

    def gather(self, values: Tensor) -> list[Tensor]:
        """A tensor of one shape from every rank, in the order of ranks, in main memory."""
        values = values.cpu()
        if self.size == 1:
            return [values]
        every = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(every, values)
        return every

    def require_same(self, facts: dict[str, Any], remedy: str) -> None:
        """Compares plain values, by name, that all ranks must share.

        Raises:
            ValueError: on every rank, naming the ranks and what differs from the first one's.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, facts)
        differing = [
            f"{name}: {every[0].get(name)} on rank 0, {other.get(name)} on rank {rank}"
            for rank, other in enumerate(every)
            for name in sorted({*every[0], *other})
            if other.get(name) != every[0].get(name)
        ]
        if differing:
            more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise ValueError(f"the ranks do not agree ({'; '.join(differing[:8])}{more}): {remedy}")

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.any(False)


class StopVote:
    """Asks all ranks one step late, so that none waits: what was cast at one step is answered at the next.

    Signals reach ranks at different steps; acting on the common answer lets all of them stop after the same one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._open: tuple[dist.Work, Tensor] | None = None

    def cast(self, flag: bool) -> bool:
        """Casts this rank's vote and returns whether any rank had said yes the time before (alone: says now)."""
        if self.world.size == 1:
            return flag
        answer = self.close()
        ballot = torch.tensor(float(flag))
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._open = work, ballot
        return answer

    def close(self) -> bool:
        """The answer to the last vote, without casting another."""
        if self._open is None:
            return False
        work, ballot = self._open
        self._open = None
        work.wait()
        return bool(ballot > 0)


@contextmanager
def joined_world(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float = 600.0) -> Iterator[World]:
    """Joins the ranks that torchrun announced, and leaves them at the end.

    Raises:
        ValueError: cuda asked for and not there.
        ConnectionError: a rank died, or did not answer within the timeout; the message names it.
    """
    world = join_world(device, timeout_seconds)
    try:
        yield world
    except RuntimeError as error:
        missing = _missing_ranks(world) if _is_of_transport(error) else []
        if not missing:
            raise
        names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        raise ConnectionError(
            f"{names} of {world.size} died or did not answer for {timeout_seconds:g} s (train.rank_timeout_seconds); "
            f"see what torchrun printed of it. The same command resumes the run. (Rank {world.rank} saw: "
            f"{str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def join_world(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float = 600.0) -> World:
    """Finds this process's rank and device, and joins the process group that torchrun announced.

    Raises:
        ValueError: cuda asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for but torch sees no CUDA device; use --device cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        hold_memory()
    if size == 1:
        return World(rank, size, place)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if local_size == size:
        # torchrun keeps its store when it restarts workers, and what the dead ones wrote into it; over several nodes,
        # whose counts may differ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store of its own
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if kind == "cuda" else None,
    )
    return World(rank, size, place, local_size, PrefixStore("last words", store))


def hold_memory() -> None:
    """Lets glibc keep freed memory instead of giving it back and faulting it in again at every step (CPU training).

    Measured on ViT-B/16, batch 16: 131,000 page faults a step become 1,500 and a tenth of its time goes; the peak of
    memory stays.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def autocast_dtype(precision: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products, None for fp32; `auto` is bf16 on GPUs and on processors with bf16 units."""
    if precision == "fp32":
        return None
    if precision == "fp16":
        return torch.float16
    if precision == "bf16" or device.type == "cuda":
        return torch.bfloat16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else None


def _is_of_transport(error: RuntimeError) -> bool:
    """Whether an error says that other ranks were lost, not that something of our own is wrong."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in LOST)


def _missing_ranks(world: World) -> list[int]:
    """Ranks that do not report, after all that lost the connection had a moment to."""
    if world.store is None:
        return []
    try:
        world.store.set(str(world.rank), "here")
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while True:
            missing = [rank for rank in range(world.size) if not world.store.check([str(rank)])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)
    except RuntimeError:
        return [0]  # the store went away, and with it the rank (or launcher) that held it
