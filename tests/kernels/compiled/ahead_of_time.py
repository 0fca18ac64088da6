"""Compiles kernels for GPUs that are not there, as they are launched for a model of seven billion parameters.

Launches are recorded: every wrapper runs once, and what it would have launched is compiled instead.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block of threads may have: CUDA C++ Programming Guide, table of compute capabilities;
# of gfx942 the local data share, from its instruction set's manual.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's, without what all of them end in."""
        return self.kernel.__name__.removesuffix("_kernel")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: bytes of shared memory and spills, registers of a thread, and instructions."""

    registers: int
    shared: int
    spilled: int
    tensor_cores: int
    asynchronous_copies: int


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Record what would be launched on a target, instead of launching it."""
    launches: list[Launch] = []
    options = {"num_warps", "num_stages", "enable_fp_fusion"}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
        given = {name: arguments.pop(name) for name in options & arguments.keys()}
        launches.append(Launch(kernel, arguments, given))

    hip = "6.0" if TARGETS[target].backend == "hip" else None
    with patch.object(JITFunction, "run", record), patch.object(torch.version, "hip", hip):
        yield launches


def compiled(launch: Launch, target: str) -> Resources:
    """Compile a launch for a target."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, special = launch.arguments[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=TARGETS[target], options=launch.options)
    return _of_amd(binary) if TARGETS[target].backend == "hip" else _of_nvidia(binary, TARGETS[target].arch)


def _of_nvidia(binary: Any, arch: int) -> Resources:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = binary.asm["ptx"]
    name = re.search(r"\.target (\S+?)[,\s]", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        shared=binary.metadata.shared,
        spilled=int(stores) + int(loads),
        tensor_cores=len(re.findall(r"\bmma\.sync|wgmma\.mma_async", ptx)),
        asynchronous_copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk", ptx)),
    )


def _of_amd(binary: Any) -> Resources:
    assembly = binary.asm["amdgcn"]

    def count(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])

    return Resources(
        registers=count("vgpr_count"),
        shared=binary.metadata.shared,
        # Scalars are spilled to lanes of vector registers; only those of vectors go to memory.
        spilled=4 * count("vgpr_spill_count"),
        tensor_cores=len(re.findall(r"v_mfma_", assembly)),
        asynchronous_copies=0,
    )


def launches_of(run: Callable[[], Any], target: str) -> list[Launch]:
    """What a call of a wrapper launches."""
    with recorded(target) as launches:
        run()
    return launches
