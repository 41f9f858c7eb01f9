"""Checks whether a GPU's JPEG decoder answers, and if not, why not.

A100, H100, H200 and later have units that decode baseline JPEGs apart from their compute units. A container that was
started without the driver capability `video` loses them without a word: nvJPEG then decodes on CPU and compute units.
"""

import ctypes
import ctypes.util
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

HARDWARE = 3  # nvjpegBackend_t: NVJPEG_BACKEND_HARDWARE


class JpegEngine(NamedTuple):
    """What the machine says of its JPEG decoder."""

    engines: int | None
    """units; 0 where there are none, None where nobody could be asked"""
    cores: int
    """of each"""
    verdict: str
    """one sentence, with what to do where the decoder is missing"""


def find_jpeg_engine() -> JpegEngine:
    """Asks nvJPEG for its hardware decoder, and looks for the driver's video library.

    Returns:
        the engines found; the verdict names the likely reason where there are none.
    """
    library = _nvjpeg()
    if library is None:
        return JpegEngine(None, 0, "nvJPEG is not installed here, so that nobody could be asked (pip: nvidia-nvjpeg)")
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(HARDWARE, None, None, 0, ctypes.byref(handle))
    if status != 0 or not hasattr(library, "nvjpegGetHardwareDecoderInfo"):
        return JpegEngine(0, 0, f"nvJPEG has no hardware decoder here (status {status}){_why()}")
    engines, cores = ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    library.nvjpegDestroy(handle)
    if status != 0 or engines.value == 0:
        return JpegEngine(0, 0, f"nvJPEG lists no JPEG engine (status {status}){_why()}")
    return JpegEngine(engines.value, cores.value, f"{engines.value} JPEG engines of {cores.value} cores answer")


def _why() -> str:
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        given = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")
        return (
            "; the driver's video library (libnvcuvid.so.1) is missing too: start the container with "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility,video or all (it is {given or 'not set'})"
        )
    return "; the driver's video library is there, so that the GPU itself may have no engine (consumer cards do not)"


def _nvjpeg() -> ctypes.CDLL | None:
    """nvJPEG from pip's package (either layout) or from the CUDA toolkit."""
    names: list[str] = []
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found is not None else ():
        names += [str(path) for path in sorted(Path(folder).glob("*/lib/libnvjpeg.so.*"))]
    names += [name for name in (ctypes.util.find_library("nvjpeg"), "/usr/local/cuda/lib64/libnvjpeg.so") if name]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue  # another version, or without the libraries that it needs
    return None
