# SPDX-License-Identifier: Apache-2.0
"""What a training study found: means and spreads, a table beside the paper's, and whether the orders agree."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from drseg_core.evaluation.report import markdown_table
from drseg_core.studies.paper import PaperRow
from drseg_core.studies.tables import Section, TrainingStudy, Variant

METRICS = ("mIoU", "fwIoU", "mACC", "boundary", "novel")
TITLES = {"mIoU": "mIoU", "fwIoU": "fwIoU", "mACC": "mACC", "boundary": "boundary IoU", "novel": "novel classes, mIoU"}

TAUGHT = " with the labels of other scenes of the same kind, which rows without a prior never see"

Scores = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Of one variant: seed to test set to metric."""


class Spread(NamedTuple):
    """Mean and sample deviation over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None
    seeds: int


def over_tests(scores: Mapping[str, Mapping[str, Any]], metric: str, test: str | None = None) -> float | None:
    """The plain mean over the test sets that have the metric, or one set's."""
    sets = [scores[test]] if test is not None else list(scores.values())
    values = [row[metric] for row in sets if row.get(metric) is not None]
    return statistics.fmean(values) if values else None


def spread(scores: Scores, metric: str, test: str | None = None) -> Spread | None:
    """Mean and deviation over the seeds of the mean over test sets."""
    found = [value for value in (over_tests(row, metric, test) for row in scores.values()) if value is not None]
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def text_of(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.1f}" + (f" ± {value.deviation:.1f}" if value.deviation is not None else "")


class Order(NamedTuple):
    """Pairs of rows that the paper orders by mIoU: how many stand the same way here, and how many in every seed.

    Rows that are equal in every seed stand neither way.
    """

    pairs: int
    same: int
    same_in_every_seed: int
    opposite_in_every_seed: int
    equal: int


def order(variants: Sequence[Variant], scores: Mapping[str, Scores]) -> Order | None:
    """Compare the order of the rows with the paper's; None where it has fewer than two of them."""
    known = [
        variant for variant in variants if variant.paper and variant.paper.miou is not None and scores.get(variant.name)
    ]
    pairs = same = always = never = equal = 0
    for first, second in itertools.combinations(known, 2):
        assert first.paper is not None and second.paper is not None
        expected = (second.paper.miou or 0.0) - (first.paper.miou or 0.0)
        apart = differences(scores[first.name], scores[second.name])
        if expected == 0 or not apart:
            continue
        # as the paper has it: above 0
        agreeing = [value if expected > 0 else -value for value in apart]
        pairs += 1
        same += statistics.fmean(agreeing) > 0
        always += all(value > 0 for value in agreeing)
        never += all(value < 0 for value in agreeing)
        equal += not any(agreeing)
    return Order(pairs, same, always, never, equal) if pairs else None


def differences(first: Scores, second: Scores) -> list[float]:
    """mIoU of the second less that of the first, seed by seed."""
    found = []
    for seed in first.keys() & second.keys():
        a, b = over_tests(first[seed], "mIoU"), over_tests(second[seed], "mIoU")
        if a is not None and b is not None:
            found.append(b - a)
    return found


def rows(study: TrainingStudy, scores: Mapping[str, Scores], problems: Mapping[str, str]) -> list[dict[str, Any]]:
    """The table's rows; a variant that could not be run says why in the first column."""
    tests = list(dict.fromkeys(test for variant in scores.values() for row in variant.values() for test in row))
    used = [m for m in METRICS if any(spread(variant, m) is not None for variant in scores.values())]
    table = []
    for variant in study.variants:
        own, reason = scores.get(variant.name, {}), variant.why_not or problems.get(variant.name)
        if reason and own:
            reason = f"mean of {len(own)}; {reason}"
        row: dict[str, Any] = {"": variant.title + (f" ({'' if own else 'not run: '}{reason})" if reason else "")}
        row.update({TITLES[metric]: text_of(spread(own, metric)) for metric in used})
        if len(tests) > 1:
            row.update({f"mIoU, {test}": text_of(spread(own, "mIoU", test)) for test in tests})
        if study.reference is not None:
            row["against it"] = _against(scores, variant.name, study.reference)
        if any(variant.paper for variant in study.variants):
            row.update(_paper_columns(variant.paper))
        table.append(row)
    return table


def _against(scores: Mapping[str, Scores], name: str, reference: str) -> str | None:
    return None if name == reference else difference_text(scores.get(reference, {}), scores.get(name, {}))


def difference_text(first: Scores, second: Scores) -> str | None:
    """mIoU of the second less that of the first, seed by seed: mean ± deviation; None where no seed has both."""
    found = differences(first, second)
    if not found:
        return None
    deviation = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.1f}{deviation}"


def _paper_columns(row: PaperRow | None) -> dict[str, str | None]:
    columns = zip(("mIoU", "fwIoU", "mACC"), (row or PaperRow())[:3], strict=True)
    return {f"paper: {title}": None if value is None else f"{value:.2f}" for title, value in columns}


def by_set(study: TrainingStudy, scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Rows of mIoU / mACC on every test set, here and in the paper; none where the paper has none of the sets."""
    if not any(variant.paper and variant.paper.sets for variant in study.variants):
        return []
    tests = list(dict.fromkeys(test for variant in scores.values() for row in variant.values() for test in row))
    table: list[dict[str, Any]] = []
    for variant in study.variants:
        own = scores.get(variant.name, {})
        here = {test: [text_of(spread(own, metric, test)) for metric in ("mIoU", "mACC")] for test in tests if own}
        if here:
            table.append({"": variant.title, "of": "here", **{test: " / ".join(pair) for test, pair in here.items()}})
        there = variant.paper.sets if variant.paper and variant.paper.sets else {}
        pairs = {test: there.get(test) for test in tests or there}
        cells = {test: None if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}" for test, pair in pairs.items()}
        table.append({"": variant.title, "of": "paper", **cells})
    return table


def markdown(
    study: TrainingStudy, scores: Mapping[str, Scores], problems: Mapping[str, str], facts: Mapping[str, Any]
) -> str:
    """The report of a study.

    Args:
        study: its variants.
        scores: of each variant, by name.
        problems: why a variant failed, by name.
        facts: command, commits, seconds, data and steps, see :mod:`drseg_core.studies.training`.
    """
    title = next((variant.title for variant in study.variants if variant.name == study.reference), None)
    lines = [f"# {study.title}", ""]
    lines += [
        f"Trained on `{facts['data']}`, "
        + (f"{facts['seconds_each']:g} seconds each" if facts.get("seconds_each") else f"{facts['steps']} steps")
        + (f" after {facts['start_steps']} of the dual encoder" if facts["start_steps"] else "")
        + (", which saw captions alone" if facts.get("start") == "contrast" else "")
        + (f", the prior taught for {facts['prior_steps']} steps{TAUGHT}" if facts["prior_steps"] else "")
        + f", seeds {', '.join(map(str, facts['seeds']))}; scored on "
        + ", ".join(f"{test['name']} (`{test['spec']}`)" for test in facts["tests"])
        + (f", protocol {facts['protocol']}" if facts["protocol"] else "")
        + ". Percent, mean over the test sets, ± the deviation over seeds.",
        "",
        markdown_table(rows(study, scores, problems)),
    ]
    if title is not None:
        lines += [f"*Against it*: mIoU less that of {title}, seed by seed.", ""]
    if any(variant.paper for variant in study.variants):
        lines += [f"*Paper*: {study.paper}.", ""]
    agreement = order(study.variants, scores)
    if agreement is not None:
        lines += [
            f"Order: the paper orders {agreement.pairs} pairs of these rows by mIoU. {agreement.same} of them stand "
            f"the same way here, {agreement.same_in_every_seed} in every seed; {agreement.opposite_in_every_seed} "
            f"stand the other way in every seed{f', {agreement.equal} are equal' if agreement.equal else ''}.",
            "",
        ]
    if study.note:
        lines += [study.note, ""]
    if facts.get("seconds_each"):
        reached = [f"{name} {' / '.join(map(str, steps))}" for name, steps in facts["steps_reached"].items()]
        lines += [f"Steps in that time, by seed: {', '.join(reached)}.", ""]
    sets = by_set(study, scores)
    sections = [Section("Set by set", sets, "Percent, mIoU / mACC.")] if sets else []
    for section in (*sections, *study.sections):
        lines += [
            f"## {section.title}",
            "",
            *([section.note, ""] if section.note else []),
            markdown_table(section.rows),
        ]
    spent = f"; {facts['seconds'] / 60:.0f} minutes, one process after another" if facts.get("seconds") else ""
    where = f" on {' and '.join(facts['machines'])}" if facts.get("machines") else ""
    lines += [f"`{facts['command']}`; trained at commit {', '.join(facts['commits']) or '-'}{where}{spent}", ""]
    return "\n".join(lines)
