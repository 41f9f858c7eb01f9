"""The loader in processes that really are ranks, and over many rebuilds: same batches, no memory left behind."""

import gc
import hashlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from tests.support.photos import make_dataset
from tests.support.ranks import next_world, run_ranks


def open_loader(path, rank=0, world=1, decoder="cpu"):
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, workers=1),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=8, rank=rank, world_size=world,
    )  # fmt: skip


def rows(batch):
    """Each image of a batch as (sample, hash of its pixels, hash of its mask)."""
    digests = [
        [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in tensor]
        for tensor in (batch.images, batch.plan.ids_mask)
    ]
    return list(zip(batch.sample_ids.tolist(), *digests, strict=True))


def gather_batches(rank, path, steps):
    """Run by every rank: rank 0 compares the joined batches with those of one process alone."""
    next_world()
    torch.distributed.init_process_group("gloo")
    with open_loader(path, rank, torch.distributed.get_world_size()) as loader, open_loader(path) as alone:
        for _ in range(steps):
            parts: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, rows(next(loader)))
            assert [row for part in parts for row in part] == rows(next(alone))
    torch.distributed.destroy_process_group()


def test_two_ranks_join_to_the_batches_of_one_process(tmp_path):
    """1, 2 and 4 ranks are compared in one process by test_loader_state.py; here they really are processes."""
    dataset = make_dataset(tmp_path, count=22, sides=(40, 90))
    run_ranks(2, 1, gather_batches, str(dataset), 5)


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_rebuilding_leaves_no_memory_behind(tmp_path, decoder):
    """Resident size over 20 rebuilds after 10 to warm up: less than 1 MB for each."""
    dataset = make_dataset(tmp_path, count=22, sides=(40, 90))

    def resident_after(rebuilds):
        for _ in range(rebuilds):
            with open_loader(dataset, decoder=decoder) as loader:
                for _ in range(loader.steps_per_epoch + 1):
                    next(loader)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    warm = resident_after(10)
    assert resident_after(20) - warm < 20e6
