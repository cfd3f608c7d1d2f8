# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drseg_core.data.palette import Image8, colorize, with_legend
from drseg_core.extras import require

__all__ = ["SheetRow", "heat", "markdown_table", "overlay_sheet"]


class SheetRow(NamedTuple):
    """One scene of an overlay sheet.

    ``image`` is (3, H, W) uint8. The others are (H, W): ids with 255 = ignore, and ``uncertainty`` in [0, 1]. None
    stays blank. Tensors are taken too.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.evaluation.report import SheetRow
        >>> sample = open_dataset("folder:data")[0]
        >>> row = SheetRow(sample.image, truth=sample.mask)
        >>> row.drseg is None
        True
    """

    image: Any
    truth: Any = None
    dual_encoder: Any = None
    drseg: Any = None
    uncertainty: Any = None


COLUMNS = ("image", "truth", "dual encoder", "DR-Seg", "uncertainty")


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A Markdown table; numbers with one decimal, None as a dash.

    Args:
        rows: one mapping per row.
        columns: which keys, in order; those of the first row by default.

    Examples:
        >>> from drseg_core.evaluation.report import markdown_table
        >>> print(markdown_table([{"model": "DR-Seg", "mIoU": 40.33}, {"model": "other", "mIoU": None}]), end="")
        | model | mIoU |
        |---|---:|
        | DR-Seg | 40.3 |
        | other | - |
    """
    columns = list(columns or (rows[0] if rows else ()))
    text = [[_cell(row.get(c)) for c in columns] for row in rows]
    numeric = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    lines = ["| " + " | ".join(_cell(c) for c in columns) + " |"]
    lines.append("|" + "|".join("---:" if n else "---" for n in numeric) + "|")
    lines += ["| " + " | ".join(cells) + " |" for cells in text]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float) and np.isnan(value):
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def heat(value: Any) -> Image8:
    """(H, W) in [0, 1] -> (H, W, 3): dark blue over red to light yellow.

    Examples:
        >>> import numpy as np
        >>> from drseg_core.evaluation.report import heat
        >>> heat(np.array([[0.0, 1.0]])).tolist()
        [[[12, 8, 60], [255, 250, 190]]]
    """
    stop = np.array([[12, 8, 60], [120, 28, 110], [220, 70, 60], [250, 160, 40], [255, 250, 190]], np.float32)
    clean = np.clip(np.nan_to_num(np.asarray(value, np.float32)), 0, 1)
    at = np.linspace(0, 1, len(stop))
    return np.stack([np.interp(clean, at, stop[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def overlay_sheet(rows: Sequence[SheetRow], class_names: Sequence[str], *, cell: int = 160) -> Image8:
    """A sheet of scenes: image, truth, dual encoder, DR-Seg and uncertainty side by side, with a legend.

    The uncertainty is stretched to its own range in each scene. So it shows the pattern, not the level.

    Args:
        rows: the scenes; columns that are None in all of them are left out.
        class_names: names in id order.
        cell: side of a cell in pixels.

    Returns:
        (H, W, 3) uint8.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.evaluation.report import SheetRow, overlay_sheet
        >>> data = open_dataset("folder:data")
        >>> sheet = overlay_sheet([SheetRow(data[i].image, data[i].mask) for i in range(2)], data.class_names, cell=64)
        >>> sheet.shape[2], sheet.dtype.name
        (3, 'uint8')
    """
    require("overlay_sheet", "pillow")
    from PIL import Image, ImageDraw, ImageFont

    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows)]
    header, gap = 24, 4
    size = (gap + len(used) * (cell + gap), header + len(rows) * (cell + gap))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for place, column in enumerate(used):
        draw.text((gap + place * (cell + gap), 4), COLUMNS[column], fill="black", font=font)
    present: set[int] = set()
    for number, row in enumerate(rows):
        for place, column in enumerate(used):
            if row[column] is None:
                continue
            value = np.asarray(row[column])
            if column == 0:
                picture = value.transpose(1, 2, 0)
            elif column == 4:
                low, high = float(np.nanmin(value)), float(np.nanmax(value))
                picture = heat((value - low) / max(high - low, 1e-6))
            else:
                picture = colorize(value, len(class_names))
                present |= {int(i) for i in np.unique(value) if i < len(class_names)}
            resample = Image.Resampling.BILINEAR if column in (0, 4) else Image.Resampling.NEAREST
            tile = Image.fromarray(picture).resize((cell, cell), resample)
            sheet.paste(tile, (gap + place * (cell + gap), header + number * (cell + gap)))
    return with_legend(np.array(sheet), class_names, sorted(present))
