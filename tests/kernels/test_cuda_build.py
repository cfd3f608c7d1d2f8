# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels stays within the limits of every architecture. The install builds them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bench.aot import REGISTERS_PER_BLOCK
from bench.aot_build import TARGETS
from drseg_core.ops import _cuda

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "drseg_core" / "_lib" / "libdrseg_native_cuda.so"
# a block's shared memory on the smallest of them
MOST_SHARED = 99 << 10


def threads_of_kernels() -> dict[str, str]:
    """The kernels of the sources, and what they say of their threads."""
    found = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        for threads, name in re.findall(r"DRSEG_KERNEL\(([^,]+), \d+\)\s*(\w+)\(", path.read_text(encoding="utf-8")):
            found[name] = threads
    return found


def read_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and static shared memory by architecture and mangled name, of ``cuobjdump -res-usage``."""
    found, arch = {}, ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif name := re.match(r" Function (\S+):", line):
            function = name[1]
        elif usage := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[arch, function] = dict(
                zip(("registers", "stack", "shared", "local"), map(int, usage.groups()), strict=True)
            )
    return found


def threads(name: str, mangled: str, kernels: dict[str, str]) -> int:
    """Of a block; the number of warps is a template's third argument where it is one."""
    said = kernels[name]
    return int(said) if said.isdigit() else 32 * int(re.findall(r"Li(\d+)E", mangled)[1])


@pytest.fixture(scope="module")
def usage():
    if not LIBRARY.is_file():
        pytest.skip("the CUDA library was not built: nvcc was not there when drseg was installed")
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path)
    done = subprocess.run([str(tool), "-res-usage", str(LIBRARY)], capture_output=True, text=True, check=True)
    return read_usage(done.stdout)


@pytest.mark.promise("C26")
def test_every_kernel_is_built_for_every_architecture_and_spills_nothing(usage):
    kernels = threads_of_kernels()
    assert len(kernels) >= 4
    machines = {target.machine for target in TARGETS}
    assert {arch for arch, _ in usage} == machines
    for machine in machines:
        seen = set()
        for (arch, mangled), figures in usage.items():
            if arch != machine:
                continue
            (name,) = (name for name in kernels if re.search(rf"\d{name}(I|E)", mangled))
            seen.add(name)
            # the stack is where registers spill to
            assert figures["stack"] == figures["local"] == 0, (arch, mangled, figures)
            assert figures["shared"] <= MOST_SHARED
            # a multiprocessor gives registers out by eight, to four warps at a time
            warps = -(-threads(name, mangled, kernels) // 128) * 4
            registers = -(-figures["registers"] // 8) * 8
            assert warps * 32 * registers <= REGISTERS_PER_BLOCK, (arch, mangled, figures)
        assert seen == set(kernels), machine


def test_the_library_says_what_it_was_built_for(usage):
    reason, built_for = _cuda._load() if _cuda.LIBRARY.path() == LIBRARY else (None, ("80+", "90a", "120a"))
    assert reason is None and built_for == ("80+", "90a", "120a")
    assert _cuda.why_not("cpu") != _cuda.why_not("cuda")


USAGE = """
arch = sm_80
Resource usage:
 Function _ZN1a3oneIfLi8ELi12EEEvv:
  REG:255 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_figures_are_read():
    (key, figures), *others = read_usage(USAGE).items()
    assert not others and key == ("sm_80", "_ZN1a3oneIfLi8ELi12EEEvv")
    assert figures == {"registers": 255, "stack": 8, "shared": 16, "local": 0}
    assert threads("one", key[1], {"one": "WARPS * LANES"}) == 384
