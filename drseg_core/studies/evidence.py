# SPDX-License-Identifier: Apache-2.0
"""Every study of whether the graph helps, in one call, and one page that sets them side by side."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drseg_core.checkpoints.versions import library_versions
from drseg_core.evaluation.report import markdown_table
from drseg_core.files import write_text_atomic
from drseg_core.scenes.plan import time_text
from drseg_core.studies import figures, report
from drseg_core.studies.expected_time import expected_seconds
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.runner import SCORES, provenance, run_variants, seconds
from drseg_core.studies.setting import Setting
from drseg_core.studies.training import StudyFiles
from drseg_core.studies.training_free import training_free
from drseg_core.studies.training_free_page import interval

NAME = "evidence"
TITLE = "Does the graph help? All studies that ask"
STUDIES = (
    "table2",
    "table2-priors",
    "table3",
    "table6",
    "sweep-neighbour-share",
    "sweep-edge-temperature",
    "sweep-edge-decay",
    "sweep-residual-start",
)
# rows of the tables, and what each is compared with; rows of a sweep are compared with its default
_PAIRS = {
    "table2": (("pdgr", "baseline"), ("pdgr_k1", "baseline"), ("pdgr", "pdgr_k1"), ("all", "all_k1")),
    "table2-priors": (("pdgr_constant", "pdgr_k1"), ("pdgr_dinov2", "pdgr_dinov2_k1")),
    "table3": (("drseg_v1", "drseg_v1_k1"), ("drseg_v3", "drseg_v3_k1")),
}
_log = logging.getLogger(__name__)


class Compared(NamedTuple):
    """A row less another, seed by seed, in points of the mean over the test sets; ``half`` of the 95 % interval."""

    study: str
    row: str
    against: str
    mean: float
    half: float
    by_seed: tuple[float, ...]

    @property
    def wins(self) -> bool:
        """Whether it is above in every seed, and its interval above zero."""
        return min(self.by_seed) > 0 and self.mean > self.half

    def __str__(self) -> str:
        # adding zero after rounding leaves no minus before it
        mean = f"{round(self.mean, 2) + 0.0:+.2f}"
        return f"{mean} ± {self.half:.2f}" if self.half == self.half else mean


def evidence(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Run ``training-free`` and all trained studies about the graph; says before how long they take, then what is left.

    Where CLIP has random weights, the dual encoder that stands for it learned from captions alone. Each study keeps its
    own files, ``OUT/evidence.md`` compares their rows. What is complete is taken as it is.

    Args:
        setting: what they are run on.
        out: folder of the studies.
        jobs: processes.
        command: as it was typed, for the pages.

    Returns:
        Why parts failed, by study and name.
    """
    trained = dataclasses.replace(setting, start="contrast") if setting.needs_start else setting
    files = [StudyFiles(name, trained, out, command) for name in STUDIES]
    owners = {id(item): one for one in files for item in one.planned}
    planned = list({item.folder: item for one in files for item in one.planned}.values())
    kept = {item.folder for item in planned if (item.folder / SCORES).is_file()}
    expected = time_text(expected_seconds(planned, jobs))
    _log.info(
        "study evidence: %d trainings, %d of them complete; about %s without reading and optimiser",
        len(planned),
        len(kept),
        expected,
    )
    problems = {
        f"training-free, {name}": one for name, one in training_free(setting, out, jobs=jobs, command=command).items()
    }
    begin, ended = time.monotonic(), set[Path]()

    def done(item: PlannedVariant, scores: dict[str, Any] | None, problem: str | None) -> None:
        owners[id(item)].add(item, scores, problem)
        if item.folder not in kept | ended:
            ended.add(item.folder)
            complete = len(kept) + len(ended)
            # what was complete before took no time, and tells nothing of what is left
            missing = (time.monotonic() - begin) / len(ended) * (len(planned) - complete)
            left = f"about {time_text(missing)} left" if missing else "none left"
            _log.info("study evidence: %d of %d trainings, %s", complete, len(planned), left)

    run_variants([item for one in files for item in one.planned], jobs=jobs, done=done)
    for one in files:
        one.write()
        one.draw()
        problems |= {f"{one.name}, {name}": problem for name, problem in one.problems.items()}
    trained_by = {**provenance(planned), "seconds": seconds(planned)}
    name, by_study = NAME + setting.suffix, {one.study.name: compared(one) for one in files}
    content = {
        "study": name,
        "title": TITLE,
        **trained.record(),
        "command": command,
        **trained_by,
        "versions": library_versions(),
        "not_run": problems,
        "found": {study: [pair._asdict() for pair in pairs] for study, pairs in by_study.items()},
    }
    write_text_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text_atomic(out / f"{name}.md", page(by_study, trained, command, trained_by))
    _draw([pair for pairs in by_study.values() for pair in pairs], out / f"{name}.png")
    return problems


def compared(files: StudyFiles) -> list[Compared]:
    """The pairs of a study of which some seed has both."""
    study = files.study
    titles = {variant.name: variant.title for variant in study.variants}
    reference = "k_1" if study.name == "table6" else study.reference
    pairs = _PAIRS.get(study.name) or [(name, reference) for name in titles if name != reference]
    found = []
    for row, against in pairs:
        apart = report.differences(files.scores.get(against, {}), files.scores.get(row, {})) if against else []
        # a row without any difference is the same model under another option, and says nothing
        if against and any(apart):
            mean, half = interval(torch.tensor([apart], dtype=torch.float64))
            found.append(Compared(files.name, titles[row], titles[against], mean, half, tuple(apart)))
    return found


def page(
    by_study: Mapping[str, Sequence[Compared]], setting: Setting, command: str, trained_by: Mapping[str, Any]
) -> str:
    """The rows side by side, and what they say in five lines."""
    commits, machines = (trained_by[name] for name in ("commits", "machines"))
    rows = [
        {
            "study": f"[{pair.study}]({pair.study}.md)",
            "row": pair.row,
            "less": pair.against,
            "mIoU": str(pair),
            "above in seeds": f"{sum(value > 0 for value in pair.by_seed)} of {len(pair.by_seed)}",
            "wins": "yes" if pair.wins else "no",
        }
        for pairs in by_study.values()
        for pair in pairs
    ]
    quick = ["This is a quick run: it shows that the command ends, and nothing else.", ""] if setting.quick else []
    lines = [
        f"# {TITLE}",
        "",
        *quick,
        *[f"{place}. {line}" for place, line in enumerate(_in_words(by_study), 1)],
        "",
        "Points of mIoU over all test sets, a row less another: mean over the seeds "
        f"({', '.join(map(str, setting.seeds))}), ± half of its 95 % interval. *Wins*: above in every seed, and the "
        "interval above zero. K 1 is PDGR without a graph: each node has itself alone. What it gains is the gain of "
        "PDGR's linear layers."
        + ("" if setting.config.model.dino.weights else " The prior has random weights, where no other is named."),
        "",
        markdown_table(rows),
        "The same question without training: [training-free](training-free.md).",
        "",
        f"`{command}`; trained at commit {', '.join(commits) or '-'} on {' and '.join(machines) or '-'}; "
        f"{trained_by['seconds'] / 3600:.1f} hours of one process after another, each training once",
        "",
    ]
    return "\n".join(lines)


def _draw(pairs: Sequence[Compared], path: Path) -> None:
    """Every row's difference with its interval."""
    plt = figures.pyplot()
    if plt is None or not pairs:
        return
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.28 * len(pairs)))
    for place, pair in enumerate(pairs):
        color = figures.ACCENT if pair.wins else figures.INK
        half = pair.half if pair.half == pair.half else 0.0
        axis.errorbar(pair.mean, place, xerr=half, fmt="o", color=color, ecolor=color, markersize=4)
        axis.plot(pair.by_seed, [place] * len(pair.by_seed), "|", color=color, markersize=7)
    axis.axvline(0, color=figures.INK, linewidth=0.8)
    axis.set_yticks(range(len(pairs)), [_label(pair) for pair in pairs], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("mIoU, points; bars: 95 % interval over seeds", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figures.save(figure, path)


def _label(pair: Compared) -> str:
    """A row of a sweep is named by the option too: its own title may be a number."""
    option = pair.study.removesuffix("-contrast").removeprefix("sweep-").replace("-", " ")
    before = f"{option}, " if pair.study.startswith("sweep-") else ""
    return f"{before}{pair.row} less {pair.against}"


def _in_words(by_study: Mapping[str, Sequence[Compared]]) -> list[str]:
    modules = {(pair.row, pair.against): pair for pair in by_study.get("table2", ())}

    def of(row: str, against: str) -> str:
        found = modules.get((row, against))
        return "not scored" if found is None else str(found)

    others = [pair for name, pairs in by_study.items() if name.startswith("sweep-") for pair in pairs]
    winners = [f"{pair.row} ({pair.study}, {pair})" for pair in others if pair.wins]
    neighbours = by_study.get("table6", [])
    best = max(neighbours, key=lambda pair: statistics.fmean(pair.by_seed), default=None)
    return [
        f"PDGR in place of the canonical map: {of('+ PDGR', 'baseline')} against the baseline.",
        f"The same without a graph (K 1): {of('+ PDGR, K 1', 'baseline')}.",
        f"So the graph's own part is {of('+ PDGR', '+ PDGR, K 1')}. In all of DR-Seg it is "
        f"{of('all (DR-Seg)', 'all (DR-Seg), K 1')}.",
        "Of all numbers of neighbours "
        + ("none was scored." if best is None else f"{best.row} gains most against K 1: {best}.")
        + ("" if best is None or any(pair.wins for pair in neighbours) else " None wins."),
        f"Of {len(others)} rows with other options, these win: {', '.join(winners) or 'none'}.",
    ]
