# SPDX-License-Identifier: Apache-2.0
"""What a machine has for measurements: versions, card, clocks, tools, and whether the kernels that were brought load.

    python -m bench place --out environment.json

Exit codes: 0, 1 (too old, or no CUDA device where ``--device cuda`` asks for one).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import carry, record
from bench.command import command_parser
from bench.timing import gpu_state


def _said(*command: str) -> str | None:
    """What a program prints; None where it is not there."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _counters() -> str | None:
    """Whether a user may read the card's counters, which ncu needs; None where the driver does not say."""
    try:
        lines = Path("/proc/driver/nvidia/params").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((line.split(":")[1].strip() for line in lines if line.startswith("RmProfilingAdminOnly")), None)


def loads(cubin: Path) -> str | None:
    """Why the driver does not load a compiled kernel; None where it does."""
    torch.zeros(1, device="cuda")
    module = ctypes.c_void_p()
    code = ctypes.CDLL("libcuda.so.1").cuModuleLoadData(ctypes.byref(module), cubin.read_bytes())
    return None if code == 0 else f"the driver says {code}"


def carried(folder: Path, device: str) -> dict[str, Any]:
    """What ``python -m bench carry`` left in a folder, and why it is of no use here (``problem``)."""
    kernels = sorted(folder.glob("*/*.cubin"))
    if not (folder / carry.NOTE).is_file() or not kernels:
        return {"kernels": len(kernels), "problem": f"nothing was brought along in {folder.name}"}
    note = json.loads((folder / carry.NOTE).read_text(encoding="utf-8"))
    here = {"triton": importlib.metadata.version("triton"), "python": platform.python_version()}
    # kernels are found by the files of Triton, which differ for every minor version of Python
    same = note["triton"] == here["triton"] and note["python"].split(".")[:2] == here["python"].split(".")[:2]
    problem = None if same else f"made with {note['triton']} for Python {note['python']}; here are {here}"
    if problem is None and device == "cuda":
        problem = loads(kernels[0])
    return {**note, "kernels": len(kernels), "problem": problem}


def found(device: str, folder: Path) -> dict[str, Any]:
    """Everything, for a file."""
    on_gpu = device == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    capability = torch.cuda.get_device_capability() if on_gpu else None
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **record.environment(device),
        "arch": capability and f"sm_{capability[0]}{capability[1]}",
        "gpu": gpu_state() if on_gpu else None,
        "nvidia_smi": _said("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv"),
        "nvcc": _said("nvcc", "--version"),
        "compute_sanitizer": shutil.which("compute-sanitizer"),
        "ncu": shutil.which("ncu"),
        "counters_for_admins_only": _counters(),
        "carried": carried(folder, device) if has_triton else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("place", __doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"place: no CUDA device; expected one, got torch {torch.__version__} without")
        return 1
    here = found(args.device, Path(os.environ.get("TRITON_CACHE_DIR", "build/carried")))
    if args.out is not None:
        args.out.write_text(json.dumps(here, indent=1) + "\n", encoding="utf-8")
    brought = here["carried"] or {"kernels": 0, "problem": None}
    words = brought["problem"] or f"{brought['kernels']} kernels brought along"
    print(" ".join(f"{name}={here[name]}" for name in ("python", "torch", "triton", "device")) + f"; {words}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10) or here["triton"] is None:
        print(f"place: too old; expected torch >= 2.10 and triton, got {torch.__version__} and {here['triton']}")
        return 1
    return 0
