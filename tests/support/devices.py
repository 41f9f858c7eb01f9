"""Checks that no value leaves the device for the host; describes one process on the CPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchmill.trainer.engine.world import World

CPU = torch.device("cpu")

ALONE = World(0, 1, CPU)


class NoHostSync(TorchDispatchMode):
    """Raises where a value leaves the device for the host."""

    LEAVING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.LEAVING:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_sync(monkeypatch):
    def leaves(name):
        def fail(*args, **kwargs):
            raise AssertionError(f"Tensor.{name} makes the host wait for the device")

        return fail

    with monkeypatch.context() as patch, NoHostSync():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, leaves(name))
        yield
