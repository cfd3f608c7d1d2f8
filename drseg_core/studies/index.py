# SPDX-License-Identifier: Apache-2.0
"""One page over all studies in a folder: what each found, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drseg_core.evaluation.report import markdown_table
from drseg_core.files import parse_json, write_text_atomic
from drseg_core.studies.report import Scores, difference_text, spread, text_of

PAGE = "index.md"
_HEAD = """\
# Studies

What each study found, in a line: mIoU in percent, mean over the test sets, ± the deviation over seeds. *Apart*: the
highest row less the lowest, seed by seed; rows that do not differ at all are apart too, by chance. *Minutes*: of one
process after another, with the dual encoders, which studies share.
"""


def write_index(out: Path) -> None:
    """Write ``OUT/index.md`` from the JSON files of the studies in ``out``."""
    found = [content for content in map(_read, sorted(out.glob("*.json"))) if content is not None]
    trained = [_row(content) for content in found if "variants" in content]
    others = [f"* {_link(content)}: {content['title']}\n" for content in found if "variants" not in content]
    parts = [_HEAD, markdown_table(trained) if trained else "", "".join(others)]
    write_text_atomic(out / PAGE, "\n".join(part for part in parts if part))


def _read(path: Path) -> dict[str, Any] | None:
    """What a study wrote; None for another file that happens to be there."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not {"study", "title", "seeds"} <= content.keys():
        return None
    # as studies wrote it before
    return content | {"variants": content["cells"]} if "cells" in content else content


def _link(content: Mapping[str, Any]) -> str:
    return f"[{content['study']}]({content['study']}.md)"


def _row(content: Mapping[str, Any]) -> dict[str, Any]:
    scores: dict[str, Scores] = {variant["title"]: variant["scores"] for variant in content["variants"]}
    means = {title: found for title, own in scores.items() if (found := spread(own, "mIoU")) is not None}
    shown, apart = {title: f"{title}: {text_of(found)}" for title, found in means.items()}, None
    lowest, highest = (pick(means, key=lambda title: means[title].mean, default="") for pick in (min, max))
    if lowest != highest:
        apart = difference_text(scores[lowest], scores[highest])
    spent = content.get("seconds")
    # of rows that failed there are fewer
    seeds = sorted({found.seeds for found in means.values()})
    return {
        "study": _link(content),
        "what": content["title"],
        "rows": str(len(scores)),
        "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "0",
        "lowest": shown.get(lowest),
        "highest": shown.get(highest),
        "apart": apart,
        "minutes": f"{spent / 60:.0f}" if spent else None,
    }
