"""Compiles Triton kernels without a GPU and reads what their machine code uses.

A launcher runs on meta tensors with its kernels replaced by recorders; what it would have launched is compiled for the
wanted architecture just as the JIT would specialise it (multiples of 16, ones and None). The `cuobjdump` and `nvdisasm`
in Triton's wheel read registers, spills and instructions out of the cubin; for AMD the assembly says them.
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


GPU = "sm_90"  # the one whose code is read; others are compiled
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Usage:
    """What one thread of a compiled kernel uses; stack and local bytes are spills.

    Instructions are all that a warp has, rare branches included; for AMD they and the widths are 0 (not read).
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: int = 0
    load_bits: int = 0
    store_bits: int = 0


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.name = kernel.__name__.removesuffix("_kernel")
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < n < 2**31 for n in grid)
        assert all(n < 2**16 for n in grid[1:]), "CUDA's limit for the second and third grid dimension"
        return self.arguments.update


def record_launches(module: ModuleType, launcher: str, *args: Any) -> list[Recorder]:
    """Run a launcher of a kernels/*_triton.py module on meta tensors and return what it would have launched."""
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    try:
        for name, recorder in recorders.items():
            setattr(module, name, recorder)
        getattr(module, launcher)(*args)
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    launched = [recorder for recorder in recorders.values() if recorder.arguments]
    assert launched, f"{launcher} launched nothing"
    return launched


def compile_launch(recorder: Recorder, target: str) -> Usage:
    """Compile a recorded launch for a target and read its resource usage."""
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
    options = {name: recorder.arguments[name] for name in ("num_warps", "num_stages") if name in recorder.arguments}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in compiled.asm:
        return _read_amd_usage(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_usage(compiled.asm["cubin"], compiled.metadata.shared)


def _type_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type_of(v) for v in value)
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_usage(cubin: bytes, shared_bytes: int) -> Usage:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[str(tools / "cuobjdump"), "--dump-resource-usage"], [str(tools / "nvdisasm"), "--print-code"]]
        outputs = [subprocess.run([*c, file.name], check=True, capture_output=True, text=True).stdout for c in commands]
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", outputs[0])}
    codes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", outputs[1])
    while codes[-1] == "NOP":  # padding behind the last instruction
        codes.pop()
    loads, stores = (max(map(_width, codes), default=0) for codes in _memory(codes))
    return Usage(numbers["REG"], numbers["STACK"], numbers["LOCAL"], shared_bytes, len(codes), loads, stores)


def _memory(codes: list[str]) -> tuple[list[str], list[str]]:
    return [c for c in codes if c.startswith("LDG")], [c for c in codes if c.startswith("STG")]


def _width(code: str) -> int:
    """Bits a thread moves with LDG.E.128 and the like; 32 unless it says."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", code)
    return int(sizes[0]) if sizes else 32


def _read_amd_usage(assembly: str, shared_bytes: int) -> Usage:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Usage(number("vgpr_count"), number("private_segment_fixed_size"), 4 * spilled, shared_bytes)
