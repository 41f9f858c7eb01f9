"""Every launcher goes the whole way through Triton's runtime (binding, compiling, loading, launching), without a GPU.

The ahead-of-time tests say what the kernels become; this says that a call with these arguments gets there, tuples of
floats and words beyond 31 bits included. The driver is a stub (stub_driver.py).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from tests.support import stub_driver

EXPECTED = {
    "mask_indices_kernel": ["4 1 1 of 32", "4 1 1 of 128"],
    "gather_patches_kernel": ["28 1 1 of 64"],
    "masked_loss_kernel": ["76 1 1 of 128"],
    "scale_kernel": ["221 1 1 of 128"],
    "gather_tokens_kernel": ["40 2 1 of 128", "40 2 1 of 128"],
    "invert_ids_kernel": ["4 1 1 of 128"],
    "gather_tokens_backward_kernel": ["52 2 1 of 128"],
    "unshuffle_kernel": ["50 2 1 of 128"],
    "unshuffle_backward_kernel": ["50 2 1 of 128"],
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, which Triton's runtime needs as well")
def test_every_launcher_reaches_the_driver(tmp_path):
    stub_driver.build(tmp_path)
    command = [sys.executable, stub_driver.__file__]
    root = Path(__file__).parent.parent
    environment = stub_driver.environment(tmp_path) | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    launches: dict[str, list[str]] = {}
    kernel = ""
    for line in done.stderr.splitlines():
        if line.startswith("loads "):
            kernel = line.removeprefix("loads ")
        elif line.startswith("launch "):
            launches.setdefault(kernel, []).append(line.removeprefix("launch "))
    assert launches == EXPECTED
