# SPDX-License-Identifier: Apache-2.0
"""One Triton kernel, compiled for one GPU without one: what it takes, and whether its text keeps the rules.

All that is here is part of the key of a row in ``bench/aot_baseline.json``: a change has every kernel built again.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from drseg_kernels._launch import Device

from bench import sass
from bench.aot_variants import Variant
from bench.work import NOMINAL, work_of


@dataclass(frozen=True)
class Target:
    """A GPU: its architecture, the device whose sizes the launch rule is given, and what one block may take.

    For predictions: its processors, their clock (the vendor's boost clock), and the warps and blocks that one holds.
    """

    arch: int
    name: str
    l2_bytes: int
    shared_bytes: int
    processors: int
    clock_mhz: int
    warps: int
    blocks: int

    @property
    def machine(self) -> str:
        return f"sm_{self.arch}{'a' if self.arch >= 90 else ''}"

    @property
    def device(self) -> Device:
        return Device(self.name, self.l2_bytes, self.shared_bytes, f"sm_{self.arch}")


TARGETS = (
    Target(80, "NVIDIA A100-SXM4-80GB", 40 << 20, 166_912, 108, 1410, 64, 32),
    Target(90, "NVIDIA H100 80GB HBM3", 50 << 20, 232_448, 132, 1980, 64, 32),
    Target(120, "NVIDIA GeForce RTX 5090", 96 << 20, 101_376, 170, 2407, 48, 24),
)


def compiled_for(variant: Variant, arch: int) -> Any:
    """What Triton makes of a variant: ``asm`` has its texts and the machine code, ``metadata`` the shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = [name for name in names if name.isupper() and name not in variant.constants]
    if unknown:
        raise ValueError(f"{variant.name}: compile-time arguments are missing; expected {', '.join(unknown)}, got none")
    signature = {name: "constexpr" if name in variant.constants else variant.types.get(name, "i32") for name in names}
    # torch's allocations are aligned; offsets inside them are not assumed to be
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if variant.types.get(name, "").startswith("*") or name in variant.even
    }
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)


def build(variant: Variant, target: Target) -> tuple[str, dict[str, int]]:
    """PTX of a variant, what the assembler says it takes (bytes, registers per thread), and where the loops of the
    kernel are described the instructions that a program issues at ``NOMINAL``."""
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = compiled_for(variant, target.arch)
    ptx = compiled.asm["ptx"]
    tool = getattr(get_ptxas(target.arch), "path", None) or get_ptxas(target.arch)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        fused = [] if variant.options.get("enable_fp_fusion", True) else ["--fmad=false"]
        command = [tool, "-v", *fused, f"--gpu-name={target.machine}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    figures = {"shared": compiled.metadata.shared, **read_log(log)}
    work = work_of(variant, NOMINAL)
    if work is not None and sass.disassembler() is not None:
        loop = sass.loops(sass.disassemble(compiled.asm["cubin"]))
        # a loop that the compiler has done away with leaves the figure unknown
        with contextlib.suppress(ValueError):
            figures["issue"] = round(variant.options["num_warps"] * sass.issued(loop, work.loops))
    return ptx, figures


def read_log(log: str) -> dict[str, int]:
    """Figures of ``ptxas -v``."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    figures = {}
    for name, pattern in patterns.items():
        found = re.findall(pattern, log)
        if len(found) != 1:
            raise RuntimeError(
                f"aot: ptxas says {name} {len(found)} times; expected once, got: {' '.join(log.split())}"
            )
        figures[name] = int(found[0])
    return figures


_SOURCE = re.compile(r"(mul|mad)\.lo\.[subx]32\b")
_GLOBAL = re.compile(r"\b(?:ld|st|atom|red|cp)\.[\w.:]*global")
_OPERAND = re.compile(r"\[([^\]]*)\]")
_REGISTER = re.compile(r"%\w+")


def narrow_addresses(ptx: str) -> list[str]:
    """Accesses to global memory whose address depends on a 32-bit product, which wraps silently."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    tainted: set[str] = set()
    size = -1
    # again for registers that a loop carries backwards
    while size != len(tainted):
        size = len(tainted)
        for line in lines:
            body = re.sub(r"^@!?%\w+\s+", "", line)
            operation, _, operands = body.partition(" ") if " " in body else body.partition("\t")
            registers = _REGISTER.findall(operands)
            if not registers or operation.startswith(("ld.", "st.", "cp.", "setp", "bra", "atom", "red.")):
                continue
            if _SOURCE.match(operation) or tainted.intersection(registers[1:]):
                tainted.add(registers[0])
    found = []
    for line in lines:
        # a copy names its target in shared memory first
        address = _OPERAND.findall(line)[-1:] if _GLOBAL.search(line) else []
        if address and tainted.intersection(_REGISTER.findall(address[0])):
            found.append(f"an address depends on a 32-bit product: {line}")
    return found


def ptx_problems(ptx: str, fusion: bool, bounded: bool = False) -> list[str]:
    """Rules of the text: float32 stays float32, nothing is kept in local memory, addresses are 64 bits wide, unless the
    launcher has bounded them."""
    found = [] if bounded else narrow_addresses(ptx)
    for line in ptx.splitlines():
        if "tf32" in line:
            found.append(f"a product is rounded to TF32: {line.strip()}")
        if re.match(r"\s*\.local\b", line):
            found.append(f"an array lies in local memory: {line.strip()}")
        if not fusion and re.match(r"\s*(@!?%\w+\s+)?fma\.\w+\.f32", line):
            found.append(f"a product is fused although fusion is off: {line.strip()}")
    return found
