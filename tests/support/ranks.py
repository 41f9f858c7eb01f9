"""Runs a function on several ranks, one process each, as torchrun starts them."""

import contextlib
import os
import socket

import torch
from torch.multiprocessing.spawn import start_processes


def run_ranks(size, worlds, function, *args):
    """Calls function(rank, *args) on `size` ranks over gloo, which may join `worlds` times; raises what a rank raised.

    The function must be importable. Between two worlds it calls `next_world`: a store's port cannot be used again at
    once.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(worlds)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    start_processes(_rank, (size, ports, function, args), nprocs=size, start_method="spawn")


def next_world():
    """Lets the next join use the next port."""
    first, *rest = os.environ["PORTS"].split()
    os.environ.update(MASTER_PORT=first, PORTS=" ".join(rest))


def _rank(rank, size, ports, function, args):
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()}, PORTS=" ".join(map(str, ports)))
    function(rank, *args)
