"""operator's launcher -> [ahead_of_time] -> cubin, registers and spills: compiles Triton kernels where there is no GPU.

A launcher runs on meta tensors with its kernel replaced by a recorder; what it would have launched is compiled for the
wanted architecture just as the JIT would specialise it (multiples of 16, ones and None), and the `cuobjdump` in
Triton's wheel reads the resource usage out of the cubin.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Usage:
    """What one thread of a compiled kernel uses; stack and local bytes are spills."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    widest_load_bits: int


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < n < 2**31 for n in grid)
        assert all(n < 2**16 for n in grid[1:]), "CUDA's limit for the second and third grid dimension"
        return self.arguments.update


def record_launch(module: ModuleType, kernel_name: str, launcher: str, *args: Any) -> Recorder:
    """Run a launcher of a kernels/*_triton.py module on meta tensors and return what it would have launched."""
    kernel = getattr(module, kernel_name)
    recorder = Recorder(kernel)
    setattr(module, kernel_name, recorder)
    try:
        getattr(module, launcher)(*args)
    finally:
        setattr(module, kernel_name, kernel)
    assert recorder.arguments, f"{launcher} did not launch {kernel_name}"
    return recorder


def compile_launch(recorder: Recorder, capability: int) -> Usage:
    """Compile a recorded launch for sm_<capability> and read its resource usage."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorder.kernel.params):
        value = recorder.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        is_wide = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if specialize and is_wide:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    options = {"num_warps": recorder.arguments["num_warps"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read_usage(compiled.asm["cubin"], compiled.asm["ptx"])


def _type_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type_of(v) for v in value)
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_usage(cubin: bytes, ptx: str) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    widest = max(int(count or 1) * int(bits) for count, bits in loads)
    return Usage(numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"], widest)
