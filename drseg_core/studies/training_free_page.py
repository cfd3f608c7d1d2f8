# SPDX-License-Identifier: Apache-2.0
"""What :mod:`drseg_core.studies.training_free` found, in numbers, on a page and in a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.evaluation.report import markdown_table
from drseg_core.extras import require
from drseg_core.files import write_text_atomic
from drseg_core.studies import controls, figures
from drseg_core.studies.controls import CONTROLS, WEIGHTS
from drseg_core.studies.training_free import (
    CLEAR,
    CNN_PROTOTYPES,
    CONTRAST,
    DECAYS,
    DENSE,
    DINO_PROTOTYPES,
    KS,
    NAME,
    STEPS,
    TITLE,
    Way,
)

# named on other features, before any of them was scored here: few neighbours of equal weight, what a training of PDGR
# begins with, and as many neighbours with weights that tell them apart
HEADS = {
    "K 8, equal weights": Way("", 8, 1.0, "flat", 2),
    "K 75, weights of Eq. 8 as a training begins": Way("", 75, 1.0, "learned start", 2),
    "K 75, weights exp(cos / 0.1)": Way("", 75, 1.0, "exp(cos / 0.1)", 2),
}
FEW, PAPER, SHARP = HEADS
VIEWS = ("raw", "class-centred")
TRIAL = "A trial of the program, not a result: a few drawn pictures, encoders that learned next to nothing."
# of a trial: what stands in the place of names of what was not there
_OF_A_TRIAL = {
    DINO_PROTOTYPES: "small random encoder, prototypes",
    CNN_PROTOTYPES: "another small random encoder, prototypes",
    "DINOv2": "stand-in",
    "real pieces": "drawn pieces",
    "Real pieces": "Drawn pieces",
}


def summary(found: Mapping[str, Mapping[str, Mapping[int, Any]]]) -> dict[str, Any]:
    """Means and paired differences of ``{encoder: {test set: {seed: scores}}}``.

    A difference is taken image by image, then as a mean over the seeds. Its 95 % interval is Student's, over images.
    """
    return {"found": {encoder: _of_encoder(by_test) for encoder, by_test in found.items()}}


def _of_encoder(by_test: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in by_test.values())))
    first = next(iter(by_test.values()))[seeds[0]]
    ways = [Way(*way) for way in first["ways"]]
    # (seeds, images, ways, 2) of all sets, and (seeds, ways, 2), mean over the sets
    image = torch.tensor(
        [[row for by_seed in by_test.values() for row in by_seed[seed]["image"]] for seed in seeds], dtype=torch.float64
    )
    pooled = {test: torch.tensor([by_seed[seed]["pooled"] for seed in seeds]) for test, by_seed in by_test.items()}
    mean = torch.stack(list(pooled.values())).mean(dim=0)
    place = {way: index for index, way in enumerate(ways)}
    gain = image - image[:, :, :1]
    curve: dict[str, list[list[Any]]] = {}
    for way in ways[1:]:
        key = f"{way.prior}; decay {way.decay:g}; {way.weights}"
        index = place[way]
        entry = [
            number
            for view in range(2)
            for number in (float(mean[:, index, view].mean()), *interval(gain[:, :, index, view]))
        ]
        rows = curve.setdefault(key, [[] for _ in KS])
        rows[KS.index(way.k)].append([round(number, 2) for number in entry])
    return {
        "seeds": seeds,
        "images": image.shape[1],
        "before": [[round(float(value), 2) for value in mean[:, 0, view]] for view in range(2)],
        "sets": {
            test: [round(float(rows[:, 0, view].mean()), 2) for view in range(2)] for test, rows in pooled.items()
        },
        "heads": {title: _of_head(head, place, image, mean) for title, head in HEADS.items()},
        "ways": curve,
    }


def _of_head(head: Way, place: Mapping[Way, int], image: Tensor, mean: Tensor) -> dict[str, Any]:
    """Of every prior in one way to spread: mIoU, gain over no graph and the published prior less it, by view."""

    def index(prior: str) -> int | None:
        # equal cosines have equal weights
        return place.get(head._replace(prior=prior, weights="flat" if prior == controls.DISTANCE else head.weights))

    found: dict[str, Any] = {}
    real = index(controls.REAL)
    for prior in CONTROLS:
        own = 0 if prior == controls.NONE else index(prior)
        if own is None:
            continue
        rows = []
        for view in range(2):
            gain, less = image[:, :, own, view] - image[:, :, 0, view], None
            if real is not None and real != own:
                less = _rounded(interval(image[:, :, real, view] - image[:, :, own, view]))
            by_seed = gain.mean(dim=1)
            rows.append(
                {
                    "mIoU": _rounded(mean[:, own, view].tolist()),
                    "gain": _rounded(interval(gain)),
                    "seeds": _rounded([float(by_seed.min()), float(by_seed.max())]),
                    "real less": less,
                }
            )
        found[prior] = rows
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def interval(apart: Tensor) -> tuple[float, float]:
    """Mean of (seeds, images) differences, and half of its 95 % interval over images."""
    require(NAME, "matching")
    from scipy.stats import t

    by_image = apart.mean(dim=0)
    count = len(by_image)
    if count < 2:
        return float(by_image.mean()), float("nan")
    half = float(t.ppf(0.975, count - 1)) * float(by_image.std()) / count**0.5
    return float(by_image.mean()), half


def write(content: Mapping[str, Any], out: Path) -> None:
    """``OUT/training-free.json``, ``.md`` and ``.png``."""
    facts = {key: value for key, value in content.items() if key != "found"}
    # numbers of one encoder in one line each: thousands of lines are no better to read
    found = ",\n".join(f"  {json.dumps(encoder)}: {json.dumps(rows)}" for encoder, rows in content["found"].items())
    text = json.dumps(facts, indent=1).removesuffix("\n}") + f',\n "found": {{\n{found}\n }}\n}}\n'
    write_text_atomic(out / f"{NAME}.json", text)
    write_text_atomic(out / f"{NAME}.md", page(content))
    _draw(content, out / f"{NAME}.png")


def page(content: Mapping[str, Any]) -> str:
    """The report as Markdown, of what the JSON holds."""
    trial = bool(content["quick"])
    found = content["found"]
    parts = [f"# {TITLE}\n", *((f"**{TRIAL}**\n",) if trial else ()), *([] if trial else [_in_words(found)])]
    parts += [_explained(content), "## Before anything is spread\n", markdown_table(_before(found))]
    for title in HEADS:
        parts += [f"## {title}, decay 1, two steps\n", markdown_table(_priors(found, title))]
    parts += [
        "*Gain*: mIoU of an image less that of the same image with no graph; mean ± half of its 95 % interval over "
        "images, after the mean over seeds; in brackets the lowest and the highest seed. *DINOv2 less it*: the same of "
        "two graphs. mIoU is of whole sets, so it differs by a little more or less.\n",
        "## Neighbours and weights\n",
        "Gain of raw logits after two steps, ± half of the 95 % interval.\n",
        markdown_table(_neighbours(found)),
        "## Steps\n",
        "The same with equal weights and decay 1.\n",
        markdown_table(_steps(found)),
        f"{content['machine']}; {content['seconds'] / 60:.0f} minutes, without what was kept from before.\n",
        f"`{content['command']}`, commit {', '.join(content['commits']) or '-'}\n",
    ]
    failed = "".join(f" Not run: {name}: {problem}." for name, problem in content["not_run"].items())
    text = "\n".join([*parts, *([failed.strip() + "\n"] if failed else [])])
    for name, own in _OF_A_TRIAL.items() if trial else ():
        text = text.replace(name, own)
    return text


def _explained(content: Mapping[str, Any]) -> str:
    steps, seeds = content["start_steps"], ", ".join(map(str, content["seeds"]))
    pieces = f" Real pieces: {', '.join(content['pieces'])}." if content["pieces"] else " No real pieces were given."
    parts = [
        f"Logits are spread over a graph, and nothing is trained after the encoder. *{CONTRAST}* and *{DENSE}* are the "
        f"stand-ins for CLIP, after {steps[CONTRAST]} and {steps[DENSE]} steps, seeds {seeds}, read as DR-Seg reads "
        f"CLIP. *{CLEAR}* has another last block (arXiv 2407.12442). They are asked by name on {content['images']} "
        "images of each test set of the landscapes. *prototypes* are cosines to class means of an encoder's features, "
        f"fitted on other pieces.{pieces} Of several images each is scored once, with the others fitted; a single one "
        "is cut into halves, each an image of its own. So no edge reaches what was fitted on.\n",
        "*Raw*: logits as they are. *Class-centred*: less the mean of each class, over the cells of the set, or of the "
        "pieces that were fitted on. A cell's class is that of all pixels below it.\n",
        "\n".join(f"* *{name}*: {text}." for name, text in CONTROLS.items()) + "\n",
        "*Learned start*: Eq. 8 with initial weights. K counts the node itself. Distance alone and the oracle "
        "are measured with decay 1: their many equal cosines need it.\n",
    ]
    return "\n".join(parts)


def _text(found: Sequence[float]) -> str:
    return f"{found[0]:+.1f} ± {found[1]:.1f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _before(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = []
    for encoder, own in found.items():
        line: dict[str, Any] = {"encoder": encoder, "images": str(own["images"])}
        for view, title in enumerate(VIEWS):
            line[f"mIoU, {title}"] = _mean(own["before"][view])
        for view, title in enumerate(VIEWS):
            line[f"by set, {title}"] = ", ".join(f"{test} {values[view]:.1f}" for test, values in own["sets"].items())
        table.append(line)
    return table


def _priors(found: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    table = []
    for encoder, own in found.items():
        for prior, rows in own["heads"][title].items():
            line: dict[str, Any] = {"encoder": encoder, "prior": prior}
            for view, name in enumerate(VIEWS):
                low, high = rows[view]["seeds"]
                line[f"mIoU, {name}"] = _mean(rows[view]["mIoU"])
                gain = None if prior == controls.NONE else f"{_text(rows[view]['gain'])} ({low:+.1f} to {high:+.1f})"
                line[f"gain, {name}"] = gain
            for view, name in enumerate(VIEWS):
                less = rows[view]["real less"]
                line[f"{controls.REAL} less it, {name}"] = None if less is None else _text(less)
            table.append(line)
    return table


def _neighbours(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = []
    for encoder, own in found.items():
        for prior in (controls.DISTANCE, controls.COLOUR, controls.REAL, controls.ORACLE):
            for decay in DECAYS:
                for weights in WEIGHTS:
                    rows = own["ways"].get(f"{prior}; decay {decay:g}; {weights}")
                    if rows is not None:
                        gains = {f"K {k}": _text(row[STEPS.index(2)][1:3]) for k, row in zip(KS, rows, strict=True)}
                        line = {"encoder": encoder, "prior": prior, "decay": f"{decay:g}", "weights": weights}
                        table.append(line | gains)
    return table


def _steps(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = []
    for encoder, own in found.items():
        for prior in CONTROLS:
            rows = own["ways"].get(f"{prior}; decay 1; flat")
            if rows is not None:
                line = {"encoder": encoder, "prior": prior}
                for k in (8, 75):
                    entries = rows[KS.index(k)]
                    line |= {
                        f"K {k}, {n} step{'s' if n > 1 else ''}": _text(entries[i][1:3]) for i, n in enumerate(STEPS)
                    }
                table.append(line)
    return table


def _in_words(found: Mapping[str, Any]) -> str:
    """Five lines of result, of raw logits: intervals without zero are counted, and all of them follow."""

    def told(title: str, prior: str, what: str, up: str, down: str) -> str:
        entries = [own["heads"][title].get(prior, [{}])[0].get(what) for own in found.values()]
        known = [entry for entry in entries if entry is not None]
        more, less = (sum(sign * mean > half for mean, half in known) for sign in (1, -1))
        values = ", ".join("-" if entry is None else _text(entry) for entry in entries)
        return f"{up} with {more} of {len(entries)} encoders and {down} with {less} ({values})"

    before = ", ".join(f"{_mean(own['before'][0]):.1f} ({encoder})" for encoder, own in found.items())
    real, gains = controls.REAL, ("gain", "gains", "loses")
    less = ("real less", "beats it", "is beaten")
    lines = (
        f"With no graph mIoU is {before}. Gains below are in this order, ± half of the 95 % interval.",
        f"DINOv2's graph, K 8 and equal weights: {told(FEW, real, *gains)}.",
        f"The same against distance alone: {told(FEW, controls.DISTANCE, *less)}. Against colour and position: "
        f"{told(FEW, controls.COLOUR, *less)}.",
        f"DINOv2's graph, K 75 as a training begins: {told(PAPER, real, *gains)}. With weights exp(cos / 0.1): "
        f"{told(SHARP, real, *gains)}.",
        f"The true classes as prior, K 75 and exp(cos / 0.1): {told(SHARP, controls.ORACLE, *gains)}.",
    )
    return "\n".join(f"{place}. {line}" for place, line in enumerate(lines, 1)) + "\n"


def _draw(content: Mapping[str, Any], path: Path) -> None:
    """The gain of every prior with its interval, a panel for each encoder."""
    plt = figures.pyplot()
    if plt is None:
        return
    found = content["found"]
    shown = [prior for prior in CONTROLS if prior != controls.NONE]
    figure, axes = plt.subplots(1, len(found), figsize=(2.2 + 2.4 * len(found), 3.0), sharey=True, squeeze=False)
    for axis, (encoder, own) in zip(axes[0], found.items(), strict=True):
        for shift, color, (title, rows) in zip(
            (-0.2, 0.0, 0.2), (figures.ACCENT, figures.PAPER, figures.INK), own["heads"].items(), strict=True
        ):
            there = [place for place, prior in enumerate(shown) if prior in rows]
            gains = [rows[shown[place]][0]["gain"] for place in there]
            axis.errorbar(
                [gain[0] for gain in gains],
                [place + shift for place in there],
                xerr=[0.0 if gain[1] != gain[1] else gain[1] for gain in gains],
                fmt="o",
                color=color,
                ecolor=color,
                markersize=4,
                label=title,
            )
        axis.axvline(0, color=figures.INK, linewidth=0.8)
        name = encoder if not content["quick"] else _OF_A_TRIAL.get(encoder, encoder)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("mIoU less that of no graph, points", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    names = [prior if not content["quick"] else _OF_A_TRIAL.get(prior, prior) for prior in shown]
    axes[0, 0].set_yticks(range(len(shown)), names)
    axes[0, 0].invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), ncols=len(HEADS), loc="lower center", frameon=False, fontsize=8
    )
    if content["quick"]:
        figure.suptitle(TRIAL, fontsize=9)
    # the legend stands below
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figures.save(figure, path)
