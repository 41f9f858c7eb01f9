"""Replaces Triton's CUDA driver by one that does nothing but print, for machines without a GPU.

With it Triton's own launchers run as on a GPU: arguments are bound and specialised, kernels compiled to sm_90, loaded
and launched, on CPU tensors whose addresses the stub takes for a device's. What it cannot show is what a kernel does.
Run as a program, it launches every kernel of the library once: `python tests/support/stub_driver.py FOLDER`.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef void *P;
typedef struct { unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared; P stream; P attributes; unsigned n;
} Config;
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 97 ? 232448 : 132; return 0; }
int cuDevicePrimaryCtxRetain(P *context, int device) { *context = (P)1; return 0; }
int cuDevicePrimaryCtxRetain_v2(P *context, int device) { *context = (P)1; return 0; }
int cuCtxGetCurrent(P *context) { *context = (P)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(P context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuModuleLoadData(P *module, const void *data) { *module = (P)2; return 0; }
int cuModuleUnload(P module) { return 0; }
int cuModuleGetFunction(P *function, P module, const char *name) {
  fprintf(stderr, "loads %s\\n", name); *function = (P)3; return 0; }
int cuFuncGetAttribute(int *value, int attribute, P function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(P function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(P function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, P function, P config) { *count = 1; return 0; }
int cuStreamIsCapturing(P stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) { *(uint64_t *)out = pointer; return 0; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **out, uint64_t pointer) {
  for (unsigned i = 0; i < count; i++) if (attributes[i] == 3) *(uint64_t *)out[i] = pointer;
  return 0; }
int cuLaunchKernelEx(const Config *c, P function, void **arguments, void **extra) {
  fprintf(stderr, "launch %u %u %u of %u\\n", c->grid_x, c->grid_y, c->grid_z, c->block_x); return 0; }
"""


def build(folder: Path) -> Path:
    """Compiles the stub into a folder, under the driver's name."""
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(SOURCE, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True)
    return library


def environment(folder: Path) -> dict[str, str]:
    """Where Triton finds the stub, and a cache of its own."""
    where = {
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    return {**os.environ, **where}


def launch_all() -> None:
    """Launches every kernel through the library's own launchers."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from patchmill.kernels import gather_triton, masked_loss_triton, permute_triton, tokens_triton, unshuffle_triton

    class StubDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(StubDriver())
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    samples = torch.arange(4)
    permute_triton.mask_indices(samples, None, (1, 2**32 - 1), 3, 196, 49)
    permute_triton.mask_indices(samples, samples, (1, 2), 399, 784, 196)
    images = torch.zeros(4, 224, 224, 3, dtype=torch.uint8)
    keep, mask, restore = (torch.zeros(4, size, dtype=torch.int32) for size in (49, 147, 196))
    gather_triton.gather_patches(images, keep, 16, *statistics, torch.bfloat16)
    pred, tokens = torch.zeros(4, 147, 768).bfloat16(), torch.zeros(4, 197, 512).bfloat16()
    positions = torch.zeros(197, 512)
    masked_loss_triton.masked_loss(pred, images, mask, 16, *statistics, True, 2, True)
    masked_loss_triton.masked_loss_backward(torch.tensor(1.0), pred)
    tokens_triton.gather_tokens(tokens, mask, None, 1)
    tokens_triton.gather_tokens(tokens, mask, positions, 1)
    tokens_triton.gather_tokens_backward(tokens[:, :147].contiguous(), mask, 197, 1)
    unshuffle_triton.unshuffle(tokens[:, :50].contiguous(), torch.zeros(512), positions, restore, 1)
    unshuffle_triton.unshuffle_backward(tokens, restore, 49, 1)


if __name__ == "__main__":
    launch_all()
    sys.stderr.flush()
