# SPDX-License-Identifier: Apache-2.0
"""Configuration files: strict reading of YAML into the dataclasses of ``schema``, and back.

Only plain YAML is read (mappings, sequences, scalars). Every refusal names the file, the line and the key.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from drseg_core.config.schema import Config
from drseg_core.errors import ConfigError
from drseg_core.extras import require

if TYPE_CHECKING:
    import yaml

__all__ = ["load_config", "override", "to_yaml"]

T = TypeVar("T")
# a configuration is a page of text; a far larger file was given by mistake
SIZE_LIMIT = 1_000_000
DEPTH_LIMIT = 20


def preset_names() -> tuple[str, ...]:
    """Names that :func:`load_config` takes, besides paths."""
    folder = resources.files("drseg_core.config") / "presets"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_config(source: str | os.PathLike[str]) -> Config:
    """Read a preset by name (``paper``, ``tiny``, ``vitb``, ``vitl``) or a YAML file by path.

    What a file leaves out keeps its default.

    Raises:
        ConfigError: no such preset or file, unknown or repeated key, wrong type, YAML tag.

    Examples:
        >>> from drseg_core.config.load import load_config
        >>> load_config("tiny").model.graph.k
        33
    """
    name = os.fspath(source)
    if name in preset_names():
        text = (resources.files("drseg_core.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
        return parse_config(text, f"{name}.yaml")
    path = Path(name)
    try:
        found = path.is_file()
    except OSError as error:
        raise ConfigError(f"load_config: path is not usable; {error.strerror}") from error
    if not found:
        raise ConfigError(f"load_config: {name} not found; expected a YAML file or one of {', '.join(preset_names())}")
    return parse_config(read_text(path), name)


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises as :func:`load_config`."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ConfigError(f"load_config: {path} is too large; expected at most {SIZE_LIMIT} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"load_config: {path} is not readable; {error}") from error


@overload
def parse_config(text: str, name: str = ...) -> Config: ...


@overload
def parse_config(text: str, name: str, kind: type[T]) -> T: ...


def parse_config(text: str, name: str = "configuration", kind: type[Any] = Config) -> Any:
    """YAML text to a configuration; ``name`` stands for the file in errors. Raises as :func:`load_config`."""
    require("load_config", "pyyaml")
    import yaml

    try:
        root = yaml.compose(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"load_config: {place}: not valid YAML; {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"load_config: {name}: nested too deeply; expected at most {DEPTH_LIMIT} levels") from error
    lines: dict[str, int] = {}
    content = {} if root is None else _plain(root, name, "", lines, set())
    return _build(kind, content, name, "", lines)


def config_from_dict(content: Mapping[str, Any], kind: type[T], name: str = "configuration") -> T:
    """A dataclass of ``schema`` from nested mappings (JSON metadata, say), as strict as :func:`load_config`.

    Raises:
        ConfigError: unknown key or wrong type.
    """
    return _build(kind, content, name, "", {})


def to_yaml(config: Any) -> str:
    """A configuration as YAML text that :func:`parse_config` reads back to an equal one.

    Examples:
        >>> from drseg_core.config.load import load_config, to_yaml
        >>> print(to_yaml(load_config("tiny").evaluation), end="")
        mode: whole
        tile_size: 128
        overlap: 32
        batch_size: 4
    """
    require("to_yaml", "pyyaml")
    import yaml

    return yaml.safe_dump(_lists(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with dotted options replaced, e.g. ``{"train.iterations": 10}``.

    Raises:
        ConfigError: unknown option or wrong type.

    Examples:
        >>> from drseg_core.config.load import load_config, override
        >>> config = override(load_config("vitl"), {"model.graph.k": 50, "train.iterations": 1000})
        >>> config.model.graph.k, config.train.iterations, config.train.batch_size
        (50, 1000, 8)
    """
    content = _lists(dataclasses.asdict(config))
    for key, value in values.items():
        *path, last = key.split(".")
        place: Any = content
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise ConfigError(f"override: {key} is unknown; expected an option of the configuration")
        place[last] = _lists(value)
    return _build(Config, content, "override", "", {})


@functools.cache
def _loader() -> Any:
    """SafeLoader that reads ``1e-3`` as a number, as YAML 1.2 does."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {key: list(pairs) for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


def _plain(node: yaml.Node, name: str, key: str, lines: dict[str, int], seen: set[int]) -> Any:
    import yaml

    line = node.start_mark.line + 1
    lines.setdefault(key, line)
    # an alias is the same node again: a few of them can stand for more values than fit in memory
    if id(node) in seen:
        raise ConfigError(f"load_config: {name}:{line}: {key} has a YAML alias; expected plain values")
    seen.add(id(node))
    if key.count(".") > DEPTH_LIMIT:
        raise ConfigError(f"load_config: {name}:{line}: {key} is nested too deeply; expected at most {DEPTH_LIMIT}")
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"load_config: {name}:{line}: {key or 'file'} has a YAML tag; expected none, got {node.tag}")
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"load_config: {name}:{line}: key is not a name; expected text")
            child = f"{key}.{key_node.value}" if key else key_node.value
            if key_node.value in content:
                raise ConfigError(
                    f"load_config: {name}:{key_node.start_mark.line + 1}: {child} is given twice; expected it once"
                )
            lines[child] = key_node.start_mark.line + 1
            content[key_node.value] = _plain(value_node, name, child, lines, seen)
        return content
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name, key, lines, seen) for item in node.value]
    try:
        return _loader()("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"load_config: {name}:{line}: {key} is not readable; got {node.value!r}") from error


def _build(kind: type[T], content: Any, name: str, prefix: str, lines: Mapping[str, int]) -> T:
    if not isinstance(content, Mapping):
        raise ConfigError(f"load_config: {_place(name, prefix, lines)} has a wrong type; expected a mapping of options")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise ConfigError(
                f"load_config: {_place(name, dotted, lines)} is unknown; expected one of {', '.join(sorted(hints))}"
            )
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(Any, hints[key]), value, name, dotted, lines)
        else:
            values[key] = _convert(hints[key], value, f"load_config: {_place(name, dotted, lines)}")
    return kind(**values)


def _place(name: str, key: str, lines: Mapping[str, int]) -> str:
    return f"{name}:{lines[key]}: {key or 'file'}" if key in lines else f"{name}: {key or 'file'}"


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        rest = [part for part in parameters if part is not type(None)]
        words = [word for part in rest if typing.get_origin(part) is typing.Literal for word in typing.get_args(part)]
        if isinstance(value, str) and words:
            return _convert(typing.Literal[tuple(words)], value, place)
        # of two kinds of numbers the one that it is
        return _convert(next((part for part in rest if type(value) is part), rest[0]), value, place)
    if origin is typing.Literal:
        # True == 1, so the type has to agree too
        if any(value == choice and type(value) is type(choice) for choice in parameters):
            return value
        raise ConfigError(f"{place} is not a choice; expected {', '.join(map(str, parameters))}, got {value!r}")
    if origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(parameters):
            return tuple(_convert(part, item, place) for part, item in zip(parameters, value, strict=True))
        raise ConfigError(f"{place} has a wrong type; expected {len(parameters)} values, got {value!r}")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise ConfigError(f"{place} is not finite; expected a number, got {value!r}")
    if type(value) is hint:
        return value
    raise ConfigError(f"{place} has a wrong type; expected {hint.__name__}, got {type(value).__name__} {value!r}")


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return value
