# SPDX-License-Identifier: Apache-2.0
"""Parsing shared by the commands."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from drseg_core.cli.front import refuse
from drseg_core.config.load import config_from_dict, load_config, preset_names
from drseg_core.config.methods import METHODS, apply_method
from drseg_core.config.reading import choose_reading, parse_reading
from drseg_core.config.schema import Config, ReadingConfig
from drseg_core.config.validate import validate
from drseg_core.errors import ConfigError

DATA_HELP = "folder:PATH, synthetic:seed=0,... or a benchmark set such as dlrsd:ROOT"
_not_a_number = re.compile(r'Parser key "([^"]+)": .* Expected a <class \'(int|float)\'> .*Given value: (.+)$')
_required = re.compile(r"arguments are required: (.+)$")


class _Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of the epilog, and shows the default of a plain option only if it has a useful one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = not any("." in option for option in action.option_strings)
        if not plain or isinstance(action, argparse._HelpAction):
            return super()._get_help_string(action)
        if action.required and action.option_strings:
            return f"{action.help} (required)"
        known = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help or "" if known else f"{action.help} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


class Parser(ArgumentParser):
    """A parser whose errors are one line, then the usage.

    ``chosen`` is the parser of the subcommand at hand, whose usage is the one to show.
    """

    chosen: Parser | None = None

    def __init__(self, **options: Any) -> None:
        # an abbreviation would mean another option once there are more
        plain = {"allow_abbrev": False, "default_env": False, "print_config": None}
        super().__init__(formatter_class=_Formatter, **plain, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        while parser.chosen is not None:
            parser = parser.chosen
        text = _required.sub(lambda match: parser.named(match.group(1)), " ".join(message.split()))
        refuse(parser, _not_a_number.sub(lambda match: parser.not_a_number(*match.groups()), text))

    def not_a_number(self, destination: str, kind: str, value: str) -> str:
        """The library's error about a type, said in terms of options."""
        expected = "a whole number" if kind == "int" else "a number"
        return f"{self.option(destination)} has a wrong value; expected {expected}, got {value}"

    def named(self, destinations: str) -> str:
        """``"train.data, train.out"`` of the library's message as it is typed: ``"--data, --out"``."""
        return f"arguments are required: {', '.join(map(self.option, destinations.split(', ')))}"

    def option(self, destination: str) -> str:
        """``"train.data"`` of the library's messages as it is typed: ``"--data"``."""
        name = destination.rpartition(".")[2]
        found = next((action for action in self._actions if action.dest in (destination, name)), None)
        return name if found is None else (found.option_strings or [str(found.metavar)])[0]


def add_config_arguments(parser: Parser, argv: Sequence[str], *, fallback: Path | None = None) -> None:
    """Add ``--config`` and every option of the configuration as ``--model.*``, ``--train.*``, ``--evaluation.*``.

    The defaults are those of the file that ``argv`` names. So an option on the command line wins wherever it stands.

    Args:
        parser: parser of a subcommand.
        argv: its arguments.
        fallback: file that is read if ``argv`` names none.
    """
    source = _argument(argv, "--config")
    if source is None and fallback is not None and fallback.is_file():
        source = str(fallback)
    config = Config() if source is None else load_config(source)
    method = _argument(argv, "--method")
    if method is not None:
        config = apply_method(config, method)
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        metavar="PRESET|FILE",
        help=f"preset ({', '.join(preset_names())}) or YAML file; every option below overrides it",
    )
    group.add_argument(
        "--method",
        type=str | None,
        metavar="NAME",
        help=f"set the options that turn the model into a comparison method: {', '.join(METHODS)}",
    )
    group.add_argument(
        "--print_config", action="store_true", help="print the configuration that results, as YAML, and exit"
    )
    parser.add_class_arguments(Config)
    for action in parser._actions:
        # the library also reads each group from its own file; --config is the only way offered
        if type(action).__name__ == "_ActionConfigLoad":
            action.help = argparse.SUPPRESS
        elif action.dest == "seed":
            action.help = "seed of the initial weights, the order of the images and their augmentation"
    parser.set_defaults({name: value for name, value in _flat(config)})


def chosen_config(args: Any) -> Config:
    """The configuration from the parsed options.

    Raises:
        ConfigError: an option is out of range.
    """
    content = {name: args[name] for name in ("model", "train", "evaluation", "reading", "seed")}
    content = {name: value.as_dict() if hasattr(value, "as_dict") else value for name, value in content.items()}
    config = config_from_dict(content, Config, "command line")
    given = given_reading(args, args["data"])
    config = dataclasses.replace(config, reading=choose_reading(config.reading, given))
    parse_reading(config.reading)
    validate(config)
    return config


def add_reading_arguments(parser: Any, *, default: str) -> Any:
    """Options for reading images, as a group; ``default`` says which scale holds without ``--scale``."""
    group = parser.add_argument_group("how images are read")
    group.add_argument(
        "--bands", type=str | None, metavar="R,G,B", help="band numbers from 1; by default as the file says"
    )
    group.add_argument(
        "--nodata", type=float | None, metavar="V", help="value of pixels without data, besides what the file declares"
    )
    group.add_argument(
        "--scale",
        type=str | None,
        metavar="LOW,HIGH|auto",
        help=f"values that become 0 and 255 (one pair, or three with ; between), or auto (2 and 98 percent); {default}",
    )
    return group


def given_reading(args: Any, data: str | None = None) -> ReadingConfig:
    """The reading options of the command line.

    Args:
        args: the parsed options.
        data: the data set that they are for.

    Raises:
        ConfigError: one of them cannot be understood, or ``data`` is not a set of the user's own.
    """
    names = ("bands", "nodata", "scale", "gsd")
    given = ReadingConfig(**{name: getattr(args, name, None) for name in names})
    used = [name for name in names if getattr(given, name) is not None]
    if used and data is not None and not data.startswith("folder:"):
        raise ConfigError(f"--{used[0]} is for a set of your own; expected --data folder:PATH, got {data}")
    parse_reading(given)
    return given


def check_output(path: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output file that must not or cannot be written, before any work is done.

    Raises:
        ConfigError: it exists, is one of the inputs, is a folder, or its folder cannot be written to.
    """
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise ConfigError(f"--out is an input of the command; expected another file, got {path}")
    if path.is_dir():
        raise ConfigError(f"--out is a folder; expected a file, got {path}")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out exists; expected a new file, or --overwrite, got {path}")
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--out is not writable; expected a file in a writable folder, got {path}")


def _argument(argv: Sequence[str], option: str) -> str | None:
    """The value of one option, before there is a parser for the others."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument(option, dest="value")
    try:
        return scan.parse_known_args(list(argv))[0].value
    except argparse.ArgumentError:
        return None


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{prefix}{field.name}"
        found += _flat(item, f"{name}.") if dataclasses.is_dataclass(item) else [(name, item)]
    return found
