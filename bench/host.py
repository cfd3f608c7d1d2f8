# SPDX-License-Identifier: Apache-2.0
"""Host time and launches of a PDGR forward and step on the Triton backend, without a card.

    python -m bench host                   # this checkout
    python -m bench host --base HEAD~1     # beside another version, in turns

Kernels are compiled for an H100 and never run: the driver's call that would launch one only counts it, so that all
else is timed: Python, dispatch, autograd, and Triton's own binding of arguments. The grid is tiny, because the host
does the same for every size, and results mean nothing. What torch launches itself is counted by its operators: one
launch for each that computes or copies, which on a device may be more.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.aot_build import TARGETS
from bench.command import command_parser, positive
from bench.stub import card, launched

# a launch is none of these: they make views, or memory without content
_FREE = """alias as_strided chunk contiguous detach detach_ empty empty_like empty_strided expand flatten linear matmul
narrow new_empty permute reshape result_type resolve_conj resolve_neg select slice split squeeze t to to_copy transpose
split_with_sizes unflatten unsafe_view unsqueeze view view_as _reshape_alias _unsafe_view lift_fresh set_ resize_ item
is_nonzero new_empty_strided _to_copy mT numpy_T clone empty_permuted detach_copy dropout""".split()


def make(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], object]]:
    """A forward without gradients and a step of PDGR, with its defaults, at 2 x 16 nodes.

    In half precision features and prior are in it, and linear maps by autocast.
    """
    from drseg_core.nn import PDGR

    torch.manual_seed(0)
    pdgr = PDGR(16, 16, k=4, edge_hidden=16, keep_format=False, backend="triton")
    features, prior = (torch.randn(2, 16, 4, 4).to(dtype) for _ in range(2))
    leaves = [features.requires_grad_(), *pdgr.parameters()]
    grad = torch.ones_like(features)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            output: Tensor = pdgr(features, prior)
        return output

    def step() -> tuple[Tensor, ...]:
        with autocast:
            output = pdgr(features, prior)
        return torch.autograd.grad(output, leaves, grad)

    return {"forward": forward, "step": step}


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Within the block PDGR runs on the kernels of CUDA C++ where there are some, but for what they would compute."""
    from drseg_core.nn import pdgr

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"DRSEG_EMULATOR_RUN": "0"}))
        # the rows of a map are read by a kernel of Triton, which goes first
        for name in ("knn_graph", "edge_coefficient", "graph_layer"):
            by_name = functools.partial(_by_cuda, getattr(pdgr, name))
            stack.enter_context(mock.patch.object(pdgr, name, by_name))
        yield


def _by_cuda(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return op(*arguments, **{**options, "backend": "cuda"})


def _emulated_launches() -> int:
    from drseg_core.ops import _cuda

    if _cuda.why_not("cpu") is not None:
        return 0
    count = ctypes.CDLL(str(_cuda.LIBRARY.path())).drseg_native_cuda_launches
    count.restype = ctypes.c_int64
    return int(count())


def launches(run: Callable[[], object]) -> dict[str, int]:
    """What one call launches: kernels of ours by name, and torch's operators that compute or copy."""
    from torch.profiler import ProfilerActivity, profile

    run()
    launched.clear()
    before = _emulated_launches()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    count = collections.Counter(launched)
    if more := _emulated_launches() - before:
        count["CUDA C++"] = more
    for event in found.events():
        name = event.name.removeprefix("aten::")
        inside = any(child.name.startswith("aten::") and child.name[6:] not in _FREE for child in event.cpu_children)
        if event.name.startswith("aten::") and name not in _FREE and not inside:
            count[name] += 1
    return dict(sorted(count.items()))


def microseconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock microseconds of a call."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(found)


def one_round(repeats: int) -> dict[str, Any]:
    """Host time and launches of this process's version."""
    from drseg_kernels import graph_layer_dense, linear_map

    from drseg_core.ops import _cuda

    torch.set_num_threads(1)
    found = {}
    # what is launched at usual sizes
    usual = mock.patch.multiple(linear_map, LEAST_FLOP=0, LEAST_TERMS=1)
    dense = mock.patch.object(graph_layer_dense, "pays", lambda device, x, *_: x.dtype in graph_layer_dense.DTYPES)
    with card(next(target for target in TARGETS if target.arch == 90)), usual, dense:
        runs = make()
        runs |= {f"{name}, bfloat16": run for name, run in make(torch.bfloat16).items()}
        ways: dict[str, Any] = {"": contextlib.nullcontext}
        if _cuda.why_not("cpu") is None:
            ways[", CUDA C++"] = cuda_kernels
        for way, within in ways.items():
            with within():
                counts = {name: launches(run) for name, run in runs.items()}
                for run in runs.values():
                    microseconds(run, repeats // 4 + 1)
                for name, run in runs.items():
                    found[name + way] = {"us": microseconds(run, repeats), "launches": counts[name]}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("host", __doc__)
    parser.add_argument("--base", metavar="REF", help="another version beside this one")
    parser.add_argument("--repeats", type=positive, default=200, help="timed calls of a round")
    parser.add_argument("--rounds", type=positive, default=3, help="processes of each version, in turns")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        if "DRSEG_NATIVE_CUDA_LIBRARY" in os.environ:
            os.environ.pop("DRSEG_NATIVE", None)
        print(json.dumps(one_round(args.repeats)))
        return 0
    # nothing here needs the native library, and building it takes longer than the measurement
    os.environ["DRSEG_NATIVE"] = "0"
    from bench.source import SourceError, checkout, working_tree

    def child(source: Any) -> Any:
        command = [sys.executable, "-W", "ignore", "-m", "bench", "host", "--child", "--repeats", str(args.repeats)]
        done = subprocess.run(command, cwd=source.tree, env=source.environment(), capture_output=True, text=True)
        if done.returncode:
            raise SourceError(f"{source.name}: {' '.join(done.stderr.split())[-300:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def measure(*sources: Any) -> None:
        found: dict[str, list[Any]] = {source.name: [] for source in sources}
        for _ in range(args.rounds):
            for source in sources:
                found[source.name].append(child(source))
        kinds = dict.fromkeys(what for rounds in found.values() for what in rounds[0])
        for what in kinds:
            for name, rounds in found.items():
                if what not in rounds[0]:
                    continue
                us = statistics.median(one[what]["us"] for one in rounds)
                count = rounds[0][what]["launches"]
                words = ", ".join(f"{times} {op}" if times > 1 else op for op, times in count.items())
                print(f"{what:28}{name:5}{us:8.0f} us on the host, {sum(count.values())} launches: {words}")

    try:
        if args.base is None:
            measure(working_tree())
        else:
            with checkout(args.base) as base:
                measure(base, working_tree())
    except SourceError as error:
        print(f"host: {error}", file=sys.stderr)
        return 1
    return 0
