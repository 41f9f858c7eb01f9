"""Checks whether a GPU's JPEG decoder answers, and if not, why not.

A100, H100, H200 and later have units that decode baseline JPEGs apart from their compute units. nvJPEG 13.3 reaches
them through the driver's video library, which a container started without the driver capability `video` lacks. nvJPEG
then says nothing and decodes on CPU and compute units: host threads do the Huffman decoding below a megapixel.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HARDWARE = 3  # nvjpegBackend_t: NVJPEG_BACKEND_HARDWARE
VIDEO_LIBRARY = "libnvcuvid.so.1"

log = logging.getLogger(__name__)


class JpegEngine(NamedTuple):
    """What the machine says of its JPEG decoder."""

    engines: int | None
    """units; 0 where none can be used, None where nvJPEG is missing"""
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
        return JpegEngine(None, 0, "nvJPEG is not installed here, so it cannot be asked (pip: nvidia-nvjpeg)")
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(HARDWARE, None, None, 0, ctypes.byref(handle))
    if status != 0 or not hasattr(library, "nvjpegGetHardwareDecoderInfo"):
        return JpegEngine(0, 0, f"nvJPEG has no hardware decoder here (status {status}){_why()}")
    engines, cores = ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    library.nvjpegDestroy(handle)
    if status != 0 or engines.value == 0:
        return JpegEngine(0, 0, f"nvJPEG lists no JPEG engine (status {status}){_why()}")
    if not _has_video_library():
        return JpegEngine(0, 0, f"nvJPEG lists {engines.value} JPEG engines, which it cannot use{_why()}")
    return JpegEngine(engines.value, cores.value, f"{engines.value} JPEG engines of {cores.value} cores answer")


@functools.cache
def jpeg_engine_answers() -> bool:
    """Whether the JPEG engine can be used. Asks once for each process, and logs a warning if it cannot."""
    found = find_jpeg_engine()
    if not found.engines:
        log.warning("%s; more threads of the host decode JPEGs instead", found.verdict)
    return bool(found.engines)


def _has_video_library() -> bool:
    try:
        ctypes.CDLL(VIDEO_LIBRARY)
    except OSError:
        return False
    return True


def _why() -> str:
    if _has_video_library():
        return "; the driver's video library is there: the GPU itself may have no engine (consumer cards do not)"
    given = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")
    return (
        f"; the driver's video library ({VIDEO_LIBRARY}) is missing: start the container with "
        f"NVIDIA_DRIVER_CAPABILITIES=compute,utility,video or all (it is {given or 'not set'})"
    )


def _nvjpeg() -> ctypes.CDLL | None:
    for name in _nvjpeg_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue  # another version, or without the libraries that it needs
    return None


def _nvjpeg_names() -> Iterator[str]:
    """nvJPEG from pip's package (either layout) or from the CUDA toolkit."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found is not None else ():
        yield from map(str, sorted(Path(folder).glob("*/lib/libnvjpeg.so.*")))
    yield "/usr/local/cuda/lib64/libnvjpeg.so"
    if name := ctypes.util.find_library("nvjpeg"):  # last: it runs other programs
        yield name
