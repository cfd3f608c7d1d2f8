# SPDX-License-Identifier: Apache-2.0
"""``drseg study``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import DATA_HELP, Parser
from drseg_core.errors import ConfigError, DatasetError, DRSegError

USAGE = "drseg study NAME --out DIR [options]; drseg study list; drseg study table1 --train ... --test-all ROOT"
EPILOG = """\
examples:
  drseg study list
  drseg study table2 --out studies --quick
  drseg study table2 --out studies --jobs 2
  drseg study table1 --config vitl --data dlrsd:datasets --protocol rskt --out studies \\
      --prior-v1 RSIB.pth --remote-clip RemoteCLIP-ViT-B-32.pt \\
      --test potsdam:datasets --test vdd:datasets --test uavid:datasets --test udd5:datasets
  drseg study table1 --config vitb,vitl --train dlrsd:datasets,isaid:datasets --test-all datasets --out paper --check
  drseg study table1 --config vitb,vitl --train dlrsd:datasets,isaid:datasets --test-all datasets --out paper \\
      --seeds 0 --devices 0,1 --prior-v1 RSIB.pth --remote-clip RemoteCLIP-ViT-B-32.pt

Without --data a study trains and scores the tiny preset on synthetic landscapes. It writes NAME.json, NAME.md and
NAME.png into --out, goes on where it stopped, and shares trained variants with the other studies there; index.md has a
line for each of them. With --train and --test-all table1 is the whole of it, of every training set and backbone: it
says first how long it will take, and table1.md has all published rows beside those scored here.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    listing = "list" in argv
    parser.add_argument("name", type=str, metavar="NAME", help="study, or list")
    parser.add_argument("--out", required=not listing, type=str | None, metavar="DIR", help="folder of the studies")
    parser.add_argument(
        "--config",
        type=str,
        default="tiny",
        metavar="PRESET|FILE",
        help="configuration to study; for the whole of table1 several, with commas",
    )
    parser.add_argument("--data", type=str | None, metavar="DATA", help=f"training data: {DATA_HELP}")
    parser.add_argument(
        "--test", action="append", type=str, metavar="[NAME=]DATA", help="data to score; may be given several times"
    )
    parser.add_argument(
        "--train", type=str | None, metavar="SET:ROOT,SET:ROOT", help="training sets, for the whole of table1"
    )
    parser.add_argument(
        "--test-all", type=str | None, metavar="ROOT", help="folder of all eight test sets, with --train"
    )
    parser.add_argument(
        "--check", action="store_true", help="with --train: only say which data and weights are missing"
    )
    parser.add_argument("--protocol", type=str | None, metavar="NAME", help="rskt, clean, ovrs or segearth")
    parser.add_argument(
        "--seeds",
        type=str | None,
        metavar="N,N",
        help="seeds of the trainings of every variant; 0,1,2 by default",
    )
    parser.add_argument("--steps", type=int | None, metavar="N", help="training steps of a variant")
    parser.add_argument(
        "--seconds", type=float | None, metavar="S", help="seconds of training of a variant, in place of steps"
    )
    parser.add_argument(
        "--start",
        type=str,
        default="dense",
        metavar="dense|contrast",
        help="what stands for CLIP if it has random weights: a dual encoder trained on pixel labels, or on captions "
        "alone; files of the latter are named NAME-contrast",
    )
    parser.add_argument(
        "--start-steps", type=int | None, metavar="N", help="steps of the dual encoder, if CLIP has random weights"
    )
    parser.add_argument(
        "--prior-v1", type=str | None, metavar="FILE", help="weights of RS-DINOv1, for table1 and table3"
    )
    parser.add_argument("--remote-clip", type=str | None, metavar="FILE", help="weights of RemoteCLIP, for table1")
    parser.add_argument(
        "--matched",
        action="store_true",
        help="table1: give all methods the configuration's prior, layers, heads and MLPs, not their own; the files are "
        "named table1-matched",
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="table1: give RSKT-Seg the layers of its released weights (5 on DLRSD), not those of its files; the "
        "study's files are named table1-released",
    )
    parser.add_argument(
        "--prior-steps",
        type=int,
        default=0,
        metavar="N",
        help="teach the random prior for N steps on labelled scenes of its own; the files are named NAME-taught",
    )
    parser.add_argument(
        "--pieces",
        type=str | None,
        metavar="DIR",
        help="folder of real labelled pieces, for propagation; DRSEG_PIECES in the environment by default",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants trained at a time on each device")
    parser.add_argument(
        "--devices",
        type=str | None,
        metavar="N,N",
        help="devices that share the variants: 0,1 or cuda:0,cuda:1, or cpu",
    )
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--quick", action="store_true", help="a few scenes and steps, only to see that it runs")


def run(args: Any) -> None:
    from drseg_core.studies.index import write_index
    from drseg_core.studies.registry import find_study, studies
    from drseg_core.studies.setting import make_setting
    from drseg_core.studies.tables import training_study_names

    if args.name == "list":
        width = max(map(len, studies()))
        for name, study in studies().items():
            print(f"{name:<{width}}  {study.title}")
        return
    study = find_study(args.name)
    if args.jobs < 1:
        raise ConfigError(f"study: jobs is out of range; expected at least 1, got {args.jobs}")
    if args.prior_steps < 0:
        raise ConfigError(f"study: prior-steps is out of range; expected at least 0, got {args.prior_steps}")
    if args.matched and study.name != "table1":
        raise ConfigError(f"study: matched does not belong to {study.name}; expected --matched with table1 alone")
    if args.released and (study.name != "table1" or args.matched):
        got = f"{study.name}{' --matched' if args.matched else ''}"
        raise ConfigError(f"study: released does not belong to {got}; expected --released with table1 alone")
    for name in ("steps", "start_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ConfigError(f"study: {option} is out of range; expected at least 1, got {getattr(args, name)}")
    if args.seconds is not None and args.seconds <= 0:
        raise ConfigError(f"study: seconds is out of range; expected a number above 0, got {args.seconds}")
    options: dict[str, Any] = {
        "seeds": None if args.seeds is None else _seeds(args.seeds),
        "steps": args.steps,
        "seconds": args.seconds,
        "start": args.start,
        "start_steps": args.start_steps,
        "protocol": args.protocol,
        "prior_v1": args.prior_v1,
        "prior_steps": args.prior_steps,
        "device": args.device,
        "pieces": args.pieces or os.environ.get("DRSEG_PIECES"),
        "quick": args.quick,
        "remote_clip": args.remote_clip,
        "matched": args.matched,
        "released": args.released,
    }
    devices = _devices(args)
    if args.train is not None or args.test_all is not None or args.check:
        _whole_table(args, options, devices, study.name)
        return
    setting = make_setting(args.config, data=args.data, tests=args.test or (), **options)
    for test in setting.tests:
        # before hours of training, not after
        setting.open_test(test)
    if devices and study.name not in training_study_names():
        raise ConfigError(f"study: devices do not belong to {study.name}; expected --device with it")
    out = _folder(args.out)
    more = {"devices": devices} if devices else {}
    problems = study.run(setting, out, jobs=args.jobs, command=_command(), **more)
    write_index(out)
    _report(out, study.name + setting.suffix, problems)


def _whole_table(args: Any, options: dict[str, Any], devices: tuple[str, ...], name: str) -> None:
    from drseg_core.studies import needs
    from drseg_core.studies.index import write_index
    from drseg_core.studies.whole_table import run_whole_table, whole_table

    if name != "table1" or args.data is not None or args.test or args.train is None or args.test_all is None:
        raise ConfigError(
            "study: --train, --test-all and --check are for the whole of table1; expected table1 with --train and "
            "--test-all, and without --data and --test"
        )
    settings = whole_table(args.config, args.train, args.test_all, **{**options, "protocol": args.protocol or "rskt"})
    wanted = needs.needs(settings)
    missing = [need.what for need in wanted if not need.found]
    if args.check:
        print(needs.text(wanted))
        if missing:
            raise DatasetError(
                f"study: {len(missing)} of {len(wanted)} needs are missing; expected none, got no {missing[0]} first"
            )
        return
    for setting in settings:
        setting.open_train()
        for test in setting.tests:
            setting.open_test(test)
    out = _folder(args.out)
    problems = run_whole_table(settings, out, jobs=args.jobs, devices=devices, command=_command())
    write_index(out)
    _report(out, name, problems)


def _devices(args: Any) -> tuple[str, ...]:
    """The devices that were asked for; a number is that of a CUDA device."""
    from drseg_core.device import select_device

    if args.devices is None:
        return ()
    if args.device is not None:
        raise ConfigError("study: --device and --devices exclude each other; expected one of them")
    found = tuple(f"cuda:{one}" if one.isdigit() else one for one in map(str.strip, args.devices.split(",")))
    for one in found:
        select_device(one)
    return found


def _folder(path: str) -> Path:
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"study: --out cannot be made; expected a folder, got {out} ({problem.strerror})") from None
    return out


def _command() -> str:
    return "drseg " + shlex.join(sys.argv[1:])


def _report(out: Path, name: str, problems: Mapping[str, str]) -> None:
    print((out / f"{name}.md").read_text(encoding="utf-8"))
    print(f"written to {out}: {', '.join(path.name for path in sorted(out.glob(f'{name}.*')))}")
    if problems:
        error = DRSegError(
            f"study: {len(problems)} variants failed: {', '.join(problems)}; {next(iter(problems.values()))}"
        )
        error.exit_code = 8
        raise error


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"study: seeds are not numbers; expected for example 0,1,2, got {text!r}") from None
