# SPDX-License-Identifier: Apache-2.0
"""``drseg check-weights``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import Parser, check_output
from drseg_core.errors import CheckpointError, DRSegError

USAGE = "drseg check-weights PRESET [--clip FILE|NAME] [--prior FILE|NAME] [options]"
EPILOG = """\
examples:
  drseg check-weights b
  drseg check-weights l --offline --clip open_clip_model.safetensors --prior model.safetensors
  drseg check-weights b --clip ViT-B-32-quickgelu:openai --prior none --picture CLIP.png
  drseg check-weights b --out values.json
  drseg check-weights b --expected values.json

Each line is one value: same as what is known, DIFFERS from it, or unknown, where nothing is committed. Then what a
person should see: "seen" where a drawn picture is best described by its own words, with a probability of at least
0.5 more than the next of four prompts, else "ODD". CLIP.png is the picture of github.com/openai/CLIP, for whose scores
its README gives values. --out keeps what was found, so that another machine can be compared with it.

exit codes: 0 nothing differs, 4 a value differs or weights are missing, 8 nothing differs, but something is odd
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument(
        "preset", type=str, metavar="PRESET", help="b, l, or a YAML file, as in drseg predict zero-shot"
    )
    parser.add_argument("--clip", type=str | None, metavar="FILE|NAME", help="as in drseg predict zero-shot")
    parser.add_argument("--prior", type=str | None, metavar="FILE|NAME", help="as in drseg predict zero-shot")
    parser.add_argument("--prior-layer", type=int | None, metavar="N", help="block, from 0, whose features are taken")
    parser.add_argument("--offline", action="store_true", help="never connect to a network")
    parser.add_argument("--picture", type=str | None, metavar="CLIP.png", help="also score OpenAI's picture")
    parser.add_argument("--out", type=str | None, metavar="FILE.json", help="file to write with the values found")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument(
        "--expected",
        type=str | None,
        metavar="FILE.json",
        help="compare with the values in this file, not with the committed ones",
    )


def run(args: Any) -> None:
    from drseg_core.checkpoints.check_weights import check_weights, read_values, save_values
    from drseg_core.checkpoints.encoders import choose_clip, choose_prior
    from drseg_core.config.zero_shot import load_zero_shot

    if args.out:
        check_output(Path(args.out), overwrite=args.overwrite)
    expected = None if args.expected is None else read_values(args.expected)
    preset = load_zero_shot(args.preset.removeprefix("zero-shot:"))
    clip, prior = choose_clip(preset.clip, args.clip), choose_prior(preset.prior, args.prior)
    if args.prior_layer is not None:
        prior = dataclasses.replace(prior, layer=args.prior_layer)
    findings = check_weights(clip, prior, offline=args.offline, picture=args.picture, expected=expected)
    print(f"CLIP: {clip.name}, {clip.weights or 'random weights'}; prior: {prior.name}, {prior.weights or 'random'}")
    for finding in findings:
        print(finding.text())
    if args.out:
        save_values(findings, args.out)
        print(f"written: {args.out}")
    counts = {word: sum(item.verdict == word for item in findings) for word in ("same", "DIFFERS", "unknown", "ODD")}
    print(f"{counts['same']} the same, {counts['DIFFERS']} differ, {counts['unknown']} not known")
    wrong = [item.name for item in findings if item.verdict == "DIFFERS"]
    if wrong:
        raise CheckpointError(
            f"check-weights: {len(wrong)} values differ; expected those that are known, got others for "
            f"{', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"
        )
    if counts["ODD"]:
        error = DRSegError(
            f"check-weights: {counts['ODD']} pictures are not best described by their own words; expected that by "
            "far (0.5 more than the next) of any CLIP that was trained"
        )
        error.exit_code = 8
        raise error
