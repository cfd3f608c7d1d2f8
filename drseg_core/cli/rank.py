# SPDX-License-Identifier: Apache-2.0
"""``drseg rank``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import (
    DATA_HELP,
    Parser,
    add_config_arguments,
    add_reading_arguments,
    check_output,
    chosen_config,
)
from drseg_core.config.load import to_yaml

USAGE = "drseg rank RUN_OR_WEIGHTS --data DATA --out channels.safetensors [options]"
EPILOG = """\
examples:
  drseg rank run --data folder:tiles --out channels.safetensors
  drseg rank clip.safetensors --config vitb --data folder:tiles --out channels.safetensors
  drseg train --config tiny --data folder:tiles --out run --model.spsd.channels channels.safetensors

For a run the configuration is the run's; for a weight file, or an open_clip tag such as openai, it is that of
--config. Options of --model.spsd are those of the command line in both cases.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument(
        "source", type=str, metavar="RUN_OR_WEIGHTS", help="run folder, CLIP weight file, or open_clip tag"
    )
    parser.add_argument("--data", required=True, type=str, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--split", type=str, default="train", metavar="SPLIT", help="part of the data")
    parser.add_argument("--out", required=True, type=str, metavar="FILE", help="channel ranking to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_reading_arguments(parser, default="by default measured on all images, unless they are 8-bit")
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")
    run_folder = _first_positional(parser, argv)
    add_config_arguments(parser, argv, fallback=Path(run_folder) / "config.yaml" if run_folder else None)


def run(args: Any) -> None:
    config = chosen_config(args)
    if args.print_config:
        print(to_yaml(config), end="")
        return
    out, source = Path(args.out), Path(args.source)
    check_output(out, overwrite=args.overwrite, inputs=[source])
    import torch
    from tqdm import tqdm

    from drseg_core.checkpoints.channels import save_channels
    from drseg_core.checkpoints.run import check_class_names, load_run, model_of
    from drseg_core.config.reading import choose_reading
    from drseg_core.data import open_dataset
    from drseg_core.device import select_device
    from drseg_core.models.weights import weights_hash
    from drseg_core.training.rank_channels import rank_channels

    device = select_device(args.device)
    reading, loaded = config.reading, None
    if source.is_dir():
        loaded = load_run(source)
        reading = choose_reading(loaded.config.reading, reading)
    dataset = open_dataset(args.data, args.split, reading=reading)
    if loaded is not None:
        model, backbone = loaded.model, loaded.config.model.clip.name
    else:
        backbone = config.model.clip.name
        clip = dataclasses.replace(config.model.clip, weights=args.source)
        # the prior has no part in the ranking
        fusion = dataclasses.replace(config.model.fusion, kind="none")
        torch.manual_seed(config.seed)
        bare = dataclasses.replace(config.model, clip=clip, fusion=fusion)
        model = model_of(dataclasses.replace(config, model=bare))
    check_class_names(model, dataset.class_names)
    model = model.to(device).eval()
    with tqdm(total=len(dataset), desc="rank", unit="image", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        channels = rank_channels(
            model,
            dataset,
            config.model.spsd,
            backbone=backbone,
            weights_hash=weights_hash(model.clip),
            seed=config.seed,
            device=device,
            progress=show,
        )
    save_channels(out, channels)
    print(
        f"{out}: {len(channels.score)} channels of {backbone}, {len(channels.semantic_index)} semantic and "
        f"{len(channels.structural_index)} structural, from {channels.metadata['prototypes']} pixels of "
        f"{len(dataset)} images"
    )
    plain = len(channels.structural_index) ** 0.5
    print(
        f"norm of the structural channels: {channels.structural_norm:.2f} in CLIP, "
        f"{100 * channels.structural_share():.0f} % of its square; {plain:.2f} after a LayerNorm of weight 1, "
        f"{100 * channels.structural_share(plain):.0f} %; model.graph.norm_scale match sets "
        f"{channels.norm_scale:.4f}"
    )


def _first_positional(parser: Parser, argv: Sequence[str]) -> str | None:
    # before the parser is complete; the options it does not have yet all take a value, but for this one
    flags = {"--print_config", "--debug"}
    flags |= {option for action in parser._actions if action.nargs == 0 for option in action.option_strings}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            return word
        if "=" not in word and word not in flags:
            next(words, None)
    return None
