"""The kernels on a CUDA device: the checks of the interpreter, larger offsets, and no wait for the device."""

import pytest

from benchmarks.check_kernels import check_all


@pytest.mark.gpu
def test_every_check_on_the_device():
    assert check_all("cuda") > 100
