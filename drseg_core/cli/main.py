# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``drseg`` command.

Exit codes:

* 0 done
* 1 internal error
* 2 usage or configuration
* 3 input data
* 4 checkpoint
* 5 environment or backend, also a library that is not installed
* 6 numerical failure
* 7 out of memory or disk
* 8 finished with listed failures
* 130 stopped by SIGINT, 143 by SIGTERM or SIGHUP
* 141 output closed
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from drseg_core import __version__
from drseg_core.cli.failures import Terminated, UsageError, failure, visible
from drseg_core.cli.front import PlainParser
from drseg_core.errors import ConfigError
from drseg_core.extras import installed, require
from drseg_core.files import is_text
from drseg_core.processor import prepare
from drseg_core.scenes.workers import local_workers

# for each command: what it does, and the extras that it needs
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": (
        "make scenes, train a small model, score it and map a GeoTIFF, in a few minutes on a CPU",
        ("cli", "model", "maps"),
    ),
    "train": ("train a model on your own images and masks", ("cli", "model")),
    "rank": ("rank CLIP's channels on a training set (SPSD, offline)", ("cli", "model")),
    "evaluate": ("score a trained model on images with masks", ("cli", "model")),
    "predict": ("map an image or GeoTIFF by class names you choose", ("cli", "model", "maps")),
    "view": ("make one HTML page of a map, to look at without a server", ("cli", "maps")),
    "study": ("run one of the paper's studies, or list them", ("cli", "model")),
    "data": ("prepare a benchmark set, look for faults in a data set, or cut a scene into one", ("cli", "maps")),
    "check-weights": ("say whether published weights are what they should be", ("cli", "model")),
    "doctor": ("say what is installed and which kernels run here", ()),
}
# these compute nothing that takes long; the doctor shows what is there
_IDLE = ("data", "doctor")
EPILOG = """\
begin with:
  drseg doctor
  drseg demo --out demo
  drseg train --config tiny --data folder:DATA --out RUN
  drseg predict RUN scene.tif --classes "building; field; pavement" --out map.tif
  drseg predict zero-shot scene.tif --classes "building; road; tree" --out map.tif

drseg COMMAND --help tells more about one command.

exit codes: 0 done, 1 internal error, 2 usage or configuration, 3 input data,
4 checkpoint, 5 environment (a library, a backend), 6 numerical failure,
7 out of memory or disk, 8 finished with listed failures, 130 and 143 stopped
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _set_up_logging()
    try:
        with _termination_raises():
            code = _run(arguments)
            sys.stdout.flush()
        return code
    except SystemExit as stop:
        # --help and --version
        return _flushed(stop.code if isinstance(stop.code, int) else 0)
    except BrokenPipeError:
        return _output_closed()
    except BaseException as error:
        if isinstance(error, UsageError):
            message, code = str(error), error.exit_code
        else:
            message, code = failure(error, arguments[0] if arguments else "")
        with contextlib.suppress(BrokenPipeError):
            print(message, file=sys.stderr)
            if debug and code not in (130, 143):
                traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
        return code


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        _front(arguments)
    for word in arguments:
        # such as those of a variable of the shell that is not set
        if not word or re.fullmatch("--[^=]+=", word):
            before = word or arguments[arguments.index(word) - 1]
            raise ConfigError(f"{name}: the word behind {before} is empty; expected something")
        if not is_text(word):
            raise ConfigError(f"{name}: {word!a} is no UTF-8; expected a file of another name, or other words")
    summary, extras = COMMANDS[name]
    # help and usage of a command need a library too
    if not installed("jsonargparse"):
        require(name, *extras)
    module = importlib.import_module(f"drseg_core.cli.{_module(name)}")
    parser = _parser(extras)(prog=f"drseg {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    module.add_arguments(parser, arguments[1:])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsed = parser.parse_args(arguments[1:])
    require(name, *extras)
    # what only prints has nothing to share out
    idle = name in _IDLE or getattr(parsed, "print_config", False) or getattr(parsed, "name", None) == "list"
    # before torch is imported, and said once by processes that torchrun starts together
    where = getattr(parsed, "cluster", None)
    workers = None if where is None else local_workers(where)
    words = None if idle else prepare(processes=workers or 1)
    if words is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger("drseg_core").info("%s", words)
    module.run(parsed)
    return 0


def _front(arguments: list[str]) -> NoReturn:
    """Help, the version, or an error."""
    parser = PlainParser(
        prog="drseg",
        description="Open-vocabulary segmentation of remote-sensing images.",
        usage="drseg COMMAND [options]",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"drseg {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.parse_args(arguments)
    parser.error(f"no command is given; expected one of {', '.join(COMMANDS)}")


def _parser(extras: tuple[str, ...]) -> Any:
    if "cli" not in extras:
        return PlainParser
    from drseg_core.cli.parsers import Parser

    return Parser


def _module(name: str) -> str:
    return "demo_command" if name == "demo" else name.replace("-", "_")


@contextlib.contextmanager
def _termination_raises():
    """SIGTERM and SIGHUP unwind the stack like Ctrl-C does, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # what nohup ignores stays ignored
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _Lines(logging.Formatter):
    """What is logged, as a terminal may show it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _set_up_logging() -> None:
    logger = logging.getLogger("drseg_core")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("drseg: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _output_closed()
    return code


def _output_closed() -> int:
    # the interpreter would complain once more when it flushes on exit
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
