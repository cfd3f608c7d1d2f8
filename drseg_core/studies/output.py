# SPDX-License-Identifier: Apache-2.0
"""What studies write that train nothing but their start: numbers, a page and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.checkpoints.versions import library_versions
from drseg_core.evaluation.report import markdown_table
from drseg_core.files import write_text_atomic
from drseg_core.studies import figures
from drseg_core.studies.seeds import Measured
from drseg_core.studies.setting import Setting


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and the deviation where there is more than one value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def write_study(
    name: str,
    title: str,
    text: str,
    rows: Sequence[Mapping[str, Any]],
    measured: Measured,
    setting: Setting,
    out: Path,
    command: str,
    draw: Callable[[Any], Any],
) -> dict[str, str]:
    """``NAME.json``, ``.md`` and ``.png`` of a study that trains nothing of its own; returns why seeds failed."""
    name += setting.suffix
    facts = {**setting.record(), "command": command, "commits": measured.commits, "versions": library_versions()}
    content = {"study": name, "title": title, **facts, "not_run": measured.problems, "found": measured.found}
    write_text_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    failed = "".join(f" Not run: {seed}: {problem}." for seed, problem in measured.problems.items())
    seeds = ", ".join(str(seed) for seed in setting.seeds if f"seed {seed}" not in measured.problems)
    whole = "" if setting.protocol is None else " Maps and features are of whole images, whatever the protocol's views."
    page = (
        f"# {title}\n\n{text}\n\n{markdown_table(rows)}\nSeeds {seeds}; ± the deviation over them. "
        f"Trained on `{setting.data}`.{whole}{failed}\n\n`{command}`, commit {', '.join(measured.commits) or '-'}\n"
    )
    write_text_atomic(out / f"{name}.md", page)
    plt = figures.pyplot()
    if plt is not None:
        figure = draw(plt)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figures.save(figure, out / f"{name}.png")
    return measured.problems
