# SPDX-License-Identifier: Apache-2.0
"""Two versions of the project against each other: each in a process of its own, taking turns, judged by their pairs.

One round is a turn of each. A pair is the ratio of their times in a round, so a load that lasts longer than a round
cancels. A turn is the fastest of a few calls, because interruptions only add time. Processes differ by luck (where
their memory lies). So a verdict of slower counts only if a second pair of fresh processes comes to it as well.

    verdict    the median of the ratios and its interval (order statistics, 99.8 %)
    slower     the interval lies above 1 + tolerance, or after all rounds the median above 1 + 1.5 tolerance
    faster     the interval lies below 1
    same       neither; ``resolution`` is the smallest slowdown that this many rounds could have told from noise
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.source import Source

TOLERANCE = 0.05
# a turn lasts about so long, and has so many calls unless they are slow, so that one interruption is not all of it
_TURN_SECONDS, _TURN_CALLS, _SLOW_SECONDS = 0.1, 3, 0.3
_ERROR = 0.002
# rounds after which a clear result ends the race; looking after every one would find a clear one by chance
_LOOKS = (11, 15, 21, 31, 45)
# of the larger peak, and MB: what one run differs from the next
_MEMORY_SHARE, _MEMORY_MB = 0.10, 8.0


class LostError(RuntimeError):
    """A process failed at a call that it had managed before."""


class Worker:
    """A process that has one job of one version ready and times it when told to."""

    def __init__(self, source: Source, device: str = "cpu", threads: int | None = None) -> None:
        self.source = source
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.paired_worker", device, str(threads or 0)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=source.environment(), cwd=source.tree,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            # its end of the pipe is closed, or ours
            answer = ""
        if not answer:
            return {"error": f"the process ended with exit code {self._process.wait()}"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def seconds(self, calls: int) -> list[float]:
        """Of each of some calls."""
        answer = self.ask(do="time", calls=calls)
        if "error" in answer:
            raise LostError(f"{self.source.name}: {answer['error']}")
        found: list[float] = answer["seconds"]
        return found

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def interval(values: Sequence[float], error: float = _ERROR) -> tuple[float, float]:
    """Bounds of the median by order statistics: whatever the distribution, at most ``error`` lies outside.

    Fewer values than the error asks for give their range.
    """
    ordered, count = sorted(values), len(values)
    outside, skip = 2 * 0.5**count, 0
    # dropping one more on each side adds the chance of exactly `skip + 1` heads
    while outside + 2 * math.comb(count, skip + 1) * 0.5**count <= error:
        skip += 1
        outside += 2 * math.comb(count, skip) * 0.5**count
    return ordered[skip], ordered[count - 1 - skip]


@dataclass(frozen=True)
class Verdict:
    """What the pairs say of one job.

    Args:
        verdict: ``slower``, ``same``, ``faster``, ``wrong``, ``lost``, ``new`` or ``memory``.
        why: in words, where time is not the matter.
        ratio, low, high: median of new / base, and its interval. resolution: see the module's text.
        base_ms, new_ms: medians. base_mb, new_mb: peaks of one call above what the inputs take.
        rounds: pairs that were taken.
    """

    verdict: str
    why: str | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    resolution: float | None = None
    base_ms: float | None = None
    new_ms: float | None = None
    base_mb: float | None = None
    new_mb: float | None = None
    rounds: int = 0

    @property
    def fails(self) -> bool:
        return self.verdict in ("slower", "wrong", "lost", "memory")


def _race(base: Worker, new: Worker, rounds: int, tolerance: float) -> tuple[list[float], list[float]]:
    """Seconds of each in every round; ends early once the interval is clear of the tolerance on either side."""
    seconds = max(min(worker.seconds(1)[0] for worker in (base, new)), 1e-6)
    calls = max(_TURN_CALLS if seconds < _SLOW_SECONDS else 1, min(200, math.ceil(_TURN_SECONDS / seconds)))
    taken: dict[Worker, list[float]] = {base: [], new: []}
    for turn in range(rounds):
        for worker in (base, new) if turn % 2 == 0 else (new, base):
            taken[worker].append(min(worker.seconds(calls)))
        if turn + 1 in _LOOKS:
            low, high = interval([n / b for n, b in zip(taken[new], taken[base], strict=True)])
            if low > 1 + tolerance or high < 1 + 1.5 * tolerance:
                break
    return taken[base], taken[new]


def judge(
    base: Source, new: Source, job: Any, *, rounds: int, tolerance: float, device: str, threads: int | None
) -> Verdict:
    """Race two versions at one job."""
    verdict = _judge_once(base, new, job, rounds, tolerance, device, threads)
    if verdict.verdict in ("slower", "memory"):
        # luck makes one of the two, a change makes both
        again = _judge_once(base, new, job, rounds, tolerance, device, threads)
        if not again.fails or (again.ratio or math.inf) < (verdict.ratio or math.inf):
            verdict = again
    return verdict


@contextlib.contextmanager
def _workers(sources: Sequence[Source], device: str, threads: int | None) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        found = []
        for source in sources:
            found.append(Worker(source, device, threads))
            stack.callback(found[-1].close)
        yield found


def _judge_once(
    base: Source, new: Source, job: Any, rounds: int, tolerance: float, device: str, threads: int | None
) -> Verdict:
    with _workers((base, new), device, threads) as (old_worker, new_worker):
        built = {worker: worker.ask(do="build", job=asdict(job)) for worker in (old_worker, new_worker)}
        before, after = built[old_worker], built[new_worker]
        if "error" in after or after.get("wrong"):
            problem = after.get("error") or after["wrong"]
            lost = "error" in after and "error" not in before
            return Verdict("lost" if lost else "wrong", problem)
        if "error" in before or before.get("wrong"):
            return Verdict("new", f"base: {before.get('error') or before['wrong']}")
        if before["sizes"] != after["sizes"]:
            return Verdict("new", "base has other sizes under this name")
        try:
            old, now = _race(old_worker, new_worker, rounds, tolerance)
        except LostError as error:
            return Verdict("lost", str(error))
        peaks = {worker: worker.ask(do="peak").get("peak_mb") for worker in (old_worker, new_worker)}
    ratios = [n / b for n, b in zip(now, old, strict=True)]
    low, high = interval(ratios)
    ratio = statistics.median(ratios)
    base_mb, new_mb = peaks[old_worker], peaks[new_worker]
    name, why = "same", None
    if low > 1 + tolerance or ratio > 1 + 1.5 * tolerance:
        name = "slower"
    elif base_mb is not None and new_mb is not None and new_mb > base_mb * (1 + _MEMORY_SHARE) + _MEMORY_MB:
        name, why = "memory", f"peak rose from {base_mb:.0f} to {new_mb:.0f} MB"
    elif high < 1:
        name = "faster"
    return Verdict(
        verdict=name,
        why=why,
        ratio=ratio,
        low=low,
        high=high,
        resolution=tolerance + max(0.5 * tolerance, (ratio - low) / ratio),
        base_ms=1000 * statistics.median(old),
        new_ms=1000 * statistics.median(now),
        base_mb=base_mb,
        new_mb=new_mb,
        rounds=len(ratios),
    )


def table(verdicts: Sequence[tuple[Any, Verdict]]) -> str:
    """A line per job for a reader."""
    heading = ("job", "base ms", "new ms", "ratio", "interval", "tells from", "base MB", "new MB", "verdict")
    lines = [heading]
    for job, v in verdicts:
        number = lambda value, form: "-" if value is None else form.format(value)  # noqa: E731
        lines.append((
            str(job), number(v.base_ms, "{:.2f}"), number(v.new_ms, "{:.2f}"), number(v.ratio, "{:.3f}"),
            "-" if v.low is None else f"{v.low:.3f} to {v.high:.3f}",
            number(v.resolution and 100 * v.resolution, "{:.0f} %"), number(v.base_mb, "{:.0f}"),
            number(v.new_mb, "{:.0f}"), v.verdict + (f": {v.why}" if v.why else ""),
        ))  # fmt: skip
    width = [max(len(line[column]) for line in lines) for column in range(len(heading) - 1)]
    return "\n".join(
        "  ".join([cell.ljust(size) if column == 0 else cell.rjust(size)
                   for column, (cell, size) in enumerate(zip(line, width, strict=False))] + [line[-1]])
        for line in lines
    )  # fmt: skip
