# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: what is compared runs in turns in one process, so that a slow minute hits all of it alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: ``engine``, or what it is compared with.
        run: one call.
        repeats: timed calls; contenders that take a minute get fewer.
        fields: what its row says besides, e.g. ``{"note": "no decay"}``.
    """

    name: str
    run: Callable[[], object]
    repeats: int
    fields: dict[str, Any]


def host_and_whole(run: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Wall-clock seconds until a call returns, and until the device's queue is empty."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    returned = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
    return returned - begin, time.perf_counter() - begin


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    return host_and_whole(run, device)[1]


def gpu_state() -> dict[str, Any]:
    """Clocks (MHz), power (W), temperature (degrees C) and driver of the GPU; empty where nvidia-ml-py sees none."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except pynvml.NVMLError:
        return {}


def settle_clocks(run: Callable[[], object], most: float = 1.0) -> bool:
    """Call until three readings of the clock, 30 ms apart, are the same; whether they were within so many seconds."""
    seen: list[Any] = []
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        pause = time.perf_counter() + 0.03
        while time.perf_counter() < pause:
            run()
        clock = gpu_state().get("sm_mhz")
        seen.append(clock)
        if clock is None or (len(seen) > 2 and len(set(seen[-3:])) == 1):
            return clock is not None
    return False


class GraphSampler:
    """Seconds on a GPU of one call as a CUDA graph, with a cold second-level cache; ``warm`` leaves the cache as it is.

    What cannot be captured is launched call by call; ``captured`` says which it was.

    Args:
        run: one call, without host synchronisation if it is to be captured.

    ``flush`` is what is read before a cold call, twice as large as the cache.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        # What lies in the cache from the call before would flatter a kernel. This is read over it: what is written has
        # to leave the cache again while the call is timed.
        self.flush = torch.zeros(torch.cuda.get_device_properties().L2_cache_size // 2, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._call = run
        # a call may allocate or set up something for the first time: once more, then it is launched call by call
        self.captured = False
        for _ in range(2):
            if not self.captured:
                self._record(run)

    def _record(self, run: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            self._call, self.captured = graph.replay, True
        except RuntimeError:
            torch.cuda.synchronize()

    def __call__(self) -> float:
        torch.sum(self.flush, dim=0, out=self._sum)
        return self.warm()

    def warm(self) -> float:
        self._begin.record()
        self._call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


def interleave(contenders: Sequence[Contender], device: str = "cpu", beside: bool = True) -> list[list[float]]:
    """Seconds of every timed call, a list for each contender; those with fewer repeats are spread over the rounds.

    On a GPU every call is one CUDA graph if it can be captured, and its row says so (``cuda_graph``). Timing begins
    when the clock is steady, or after a second (``settled``). ``gpu`` is the state right after a contender's last call.
    With ``beside`` each call is followed by one with a warm cache, and one that is launched kernel by kernel. Their
    medians go to the fields ``warm_p50_ms`` and ``eager_p50_ms``. ``host_p50_ms`` is the time until the latter returns.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    others: list[list[tuple[float, float, float]]] = [[] for _ in contenders]
    samplers: list[Callable[[], float]] = []
    for contender in contenders:
        if device == "cuda":
            sampler = GraphSampler(contender.run)
            contender.fields["cuda_graph"] = sampler.captured
            samplers.append(sampler)
        else:
            samplers.append(lambda run=contender.run: seconds_of(run))  # type: ignore[misc]
    rounds = max((contender.repeats for contender in contenders), default=0)
    if samplers and device == "cuda":
        settled = settle_clocks(samplers[0])
        for contender in contenders:
            contender.fields["settled"] = settled
    for turn in range(rounds):
        for contender, sample, taken, other in zip(contenders, samplers, seconds, others, strict=True):
            due = (turn + 1) * contender.repeats // rounds
            if due > len(taken):
                taken.append(sample())
                if device == "cuda" and beside:
                    warm = sample.warm()  # type: ignore[attr-defined]
                    other.append((warm, *host_and_whole(contender.run, device)))
                if device == "cuda" and len(taken) == contender.repeats:
                    contender.fields["gpu"] = gpu_state()
    for contender, other in zip(contenders, others, strict=True):
        for name, values in zip(("warm", "host", "eager"), zip(*other, strict=True), strict=False):
            contender.fields[f"{name}_p50_ms"] = 1000 * statistics.median(values)
    return seconds
