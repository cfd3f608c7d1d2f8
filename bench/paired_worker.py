# SPDX-License-Identifier: Apache-2.0
"""The process behind ``paired.Worker``: requests come as JSON lines, answers go back as JSON lines.

It runs in the tree that is raced and imports everything from there.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def _answer(request: dict[str, Any], state: dict[str, Any], device: str) -> dict[str, Any]:
    from bench import jobs, memory
    from bench.timing import GraphSampler, seconds_of

    if request["do"] == "build":
        job = jobs.Job.of(request["job"])
        engine = jobs.build(job, device)
        state["sample"] = GraphSampler(engine.run) if device == "cuda" else lambda: seconds_of(engine.run)
        state["run"] = engine.run
        sizes = {name: value for name, value in vars(job.case).items() if isinstance(value, int)}
        return {"wrong": engine.wrong, "sizes": sizes, "backends": engine.backends}
    if request["do"] == "time":
        # the other process has just used the caches
        state["sample"]()
        return {"seconds": [state["sample"]() for _ in range(request["calls"])]}
    if device == "cuda":
        return {"peak_mb": memory.rise(state["run"], device)}
    # what the allocator keeps from call to call comes on top
    return {"peak_mb": min(memory.rise(state["run"]) for _ in range(3))}


def main(device: str, threads: int) -> None:
    # whatever else is printed goes to standard error: the answers have their pipe to themselves
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    if threads:
        torch.set_num_threads(threads)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), state, device)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
