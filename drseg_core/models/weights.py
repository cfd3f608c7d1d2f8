# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: safetensors with a checksum and metadata, and careful reading of other people's files.

Nothing here unpickles objects: our own files are safetensors, and foreign ``.pt`` files are read by torch's
weights-only reader without a second try. Options of a training (``argparse.Namespace``) are dropped unread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from drseg_core.errors import CheckpointError, ResourceError
from drseg_core.extras import require
from drseg_core.files import atomic_path

FORMAT_VERSION = 1
METADATA_KEY = "drseg"
# safetensors' own bound on its header
HEADER_LIMIT = 100_000_000
LISTED = 10
# how deep files of other projects nest what holds a model
_NESTED = 8
# names of what only wraps a model
_WRAPPERS = ("state_dict", "model", "teacher", "module", "backbone")
# names of what is only a part of a model, or a list of parts
_PART = re.compile(r"-\d{5}-of-(?P<parts>\d{5})\.|\.index\.json$")

_log = logging.getLogger(__name__)


class ForeignState(NamedTuple):
    """Tensors that fit a model, and the ``place`` in the file where they were, such as ``teacher.backbone``."""

    state: dict[str, Tensor]
    place: str


def save_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors, complete or not at all.

    Args:
        path: file to write; what it held before stays until the new file is whole.
        state: tensors by name, on any device.
        metadata: JSON-serialisable; comes back from :func:`load_weights`.

    Raises:
        ResourceError: the file cannot be written (disk full, read-only).
        TypeError: metadata is not JSON.
    """
    # clones: safetensors refuses tensors that share memory
    held = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in sorted(state.items())}
    record = {"format_version": FORMAT_VERSION, "sha256": payload_hash(held), "metadata": dict(metadata)}
    write_tensors(path, held, {METADATA_KEY: json.dumps(record, sort_keys=True)}, "save_weights")


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str], caller: str
) -> None:
    """A safetensors file, complete or not at all.

    Raises:
        ResourceError: the file cannot be written; the message begins with ``caller``.
    """
    require(caller, "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{caller}: {path} cannot be written; {error}") from error


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_weights` wrote, on the CPU, verified against its checksum.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, not ours, of a newer format, or not finite.
    """
    file = _readable(path, "load_weights")
    header = _header(file)
    record = _record(header, file)
    state = _tensors(file)
    found = payload_hash(state)
    if found != record["sha256"]:
        raise CheckpointError(
            f"load_weights: {path} is damaged (checksum mismatch); expected {record['sha256'][:12]}, got {found[:12]}"
        )
    check_finite(state, f"load_weights: {path}")
    # copied out of the file's mapping: a file replaced later must not change loaded weights
    return {name: _as_now(name, value).clone() for name, value in state.items()}, record["metadata"]


def _was_a_number(name: str) -> bool:
    """Whether a tensor of one element was a single number in older versions: PDGR's edge bias."""
    return name.rpartition(".")[2] == "edge_bias"


def _as_now(name: str, value: Tensor) -> Tensor:
    """A tensor of an older version in today's shape."""
    return value.view(1) if value.dim() == 0 and _was_a_number(name) else value


def payload_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        # as older versions counted it, or what they scored would be of another model
        shape = () if _was_a_number(name) else tuple(value.shape)
        digest.update(f"{name} {value.dtype} {shape}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors a checkpoint of ``model`` holds.

    Everything but the parts that are frozen and can be had again: a prior or an untrained CLIP with published or local
    weights. Random initial weights are always kept.
    """
    left_out = _left_out(model)
    return {name: value for name, value in model.state_dict().items() if not name.startswith(left_out)}


def left_out_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each part that :func:`model_state` leaves out, by name (``clip``, ``dino``, ``remote``).

    Position tables are not counted: they may be resampled when they are read, which rounds otherwise on other machines.
    """
    hashes = {}
    for prefix in _left_out(model):
        part = model.get_submodule(prefix[:-1])
        held = {
            name: value.detach().cpu()
            for name, value in part.named_parameters()
            if not name.endswith(("pos_embed", "positional_embedding"))
        }
        hashes[prefix[:-1]] = payload_hash(held)
    return hashes


def check_left_out(model: nn.Module, expected: Mapping[str, str], *, name: str) -> None:
    """Refuse frozen weights, read from elsewhere, that are not those a checkpoint was trained with.

    Args:
        model: built from the checkpoint's configuration.
        expected: :func:`left_out_hashes` of the model that was saved; empty where it was not recorded.
        name: what to call the checkpoint in errors.

    Raises:
        CheckpointError: names the part.
    """
    if not expected:
        return
    found = left_out_hashes(model)
    for part, digest in expected.items():
        if part in found and found[part] != digest:
            raise CheckpointError(
                f"check_left_out: weights in model.{part}.weights are not those that {name} was trained with; "
                f"expected SHA-256 {digest[:12]}, got {found[part][:12]}"
            )


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, name: str, complete: bool = False) -> None:
    """Copy a checkpoint's tensors into ``model``, or refuse without having changed anything.

    Args:
        model: built from the same configuration.
        state: what :func:`model_state` gave when it was saved.
        name: what to call the checkpoint in errors.
        complete: the state is that of the whole model, with the parts that :func:`model_state` leaves out.

    Raises:
        CheckpointError: missing, unexpected, misshapen or non-finite tensors; a channel split that is no partition. No
            dtype is cast.
    """
    expected = model.state_dict() if complete else model_state(model)
    if any(key.startswith("aggregator.") and key.endswith(".reduce_guidance.weight") for key in state):
        raise CheckpointError(
            f"load_into: {name} has an efficient aggregator from before keys were reduced with their guidance; "
            "expected RSKT-Seg's tensors, got those of an earlier version: train anew, or from it with --init"
        )
    problem = difference(expected, state)
    if problem:
        raise CheckpointError(f"load_into: {name} does not fit the model; {problem}")
    check_finite(state, f"load_into: {name}")
    spsd = getattr(model, "spsd", None)
    if spsd is not None:
        from drseg_core.nn.spsd import check_partition

        check_partition(state["spsd.semantic_index"], state["spsd.structural_index"], spsd.channels)
    model.load_state_dict(dict(state), strict=False)


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What keeps ``found`` from being loaded as ``expected``, in one line; empty if nothing does."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing: {_some(missing)}")
        if extra:
            parts.append(f"{len(extra)} unexpected: {_some(extra)}")
        return f"{'; '.join(parts)} (is it a checkpoint of another architecture or configuration?)"
    wrong = [
        f"{key} expected {_kind(value)}, got {_kind(found[key])}"
        for key, value in expected.items()
        if value.shape != found[key].shape or value.dtype != found[key].dtype
    ]
    return f"{len(wrong)} of another shape or dtype: {_some(wrong, '; ')}" if wrong else ""


class WithoutInitialWeights(TorchFunctionMode):
    """Parameters made in this context hold no draws, but what memory has or one number: for a module of which all are
    then read.

    To draw those of a CLIP ViT-L takes seconds. Inside, torch's generator advances by less.
    """

    _skipped = frozenset({Tensor.erfinv_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_})
    # some draw until all values lie within bounds: these do
    _filled = {Tensor.normal_: "mean", Tensor.uniform_: "from"}

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function in self._skipped:
            return arguments[0] if arguments else named["tensor"]
        if function in self._filled:
            value = arguments[1] if len(arguments) > 1 else named.get(self._filled[function], 0.0)
            return arguments[0].fill_(value)
        return function(*arguments, **named)


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: names the tensors and how many values are non-finite.
    """
    bad = []
    for key, value in state.items():
        if not value.is_floating_point() or value.is_meta or value.numel() == 0:
            continue
        # both are NaN where one value is; no tensor of bools is made for the usual case
        if not torch.stack(torch.aminmax(value.detach())).isfinite().all():
            bad.append(f"{key} has {int((~torch.isfinite(value)).sum())} non-finite values")
    if bad:
        raise CheckpointError(f"{name} is not finite; {_some(bad, '; ')}")


def read_foreign_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A published checkpoint as a flat state dict on the CPU, for a model that is not known here.

    The usual wrappers (``state_dict``, ``model``, ``teacher``, ``module``, ``backbone``) are taken off where they hold
    all tensors.

    Raises:
        CheckpointError: see :func:`foreign_tensors`; values that are not finite.
    """
    state = foreign_tensors(path)
    while (first := {key.partition(".")[0] for key in state}) and len(first) == 1 and first.issubset(_WRAPPERS):
        if any("." not in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    check_finite(state, f"read_foreign_state: {path}")
    return state


def foreign_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a published checkpoint (safetensors, or a ``.pt`` file of tensors), on the CPU.

    What lies in a mapping inside the file has its names in front: ``teacher.backbone.norm.weight``. States of
    optimizers are left out.

    Raises:
        CheckpointError: missing, unreadable or damaged, or holding anything but tensors and plain values.
    """
    file = _readable(path, "read_foreign_state")
    part = _PART.search(file.name)
    if part is not None and int(part["parts"] or 0) != 1:
        raise CheckpointError(
            f"read_foreign_state: {path} is {'one part of' if part['parts'] else 'a list of the parts of'} a model; "
            "expected one file with all tensors: join the parts first"
        )
    with open(file, "rb") as stream:
        start = stream.read(9)
    if file.suffix == ".safetensors" or start[8:9] == b"{":
        _header(file)
        content: Any = _tensors(file)
    else:
        try:
            # options of a training, as DINO keeps them beside its weights
            with torch.serialization.safe_globals([(_Dropped, "argparse.Namespace")]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"read_foreign_state: {path} refused (unsafe or damaged content); expected safetensors, or a state "
                "dict that torch.load(weights_only=True) reads (convert TorchScript and pickled models first), "
                f"got {type(error).__name__}"
            ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"read_foreign_state: {path} has no state dict; expected tensors by name, got {type(content).__name__}"
        )
    state: dict[str, Tensor] = {}
    # a mapping may hold itself, or one many times
    seen: set[int] = set()

    def collect(part: Mapping[Any, Any], place: str, depth: int) -> None:
        seen.add(id(part))
        for key, value in part.items():
            name = f"{place}{key}"
            if isinstance(value, Tensor):
                if name in state:
                    raise CheckpointError(f"read_foreign_state: {path} holds {name} twice; expected one tensor a name")
                state[name] = value
            elif isinstance(value, Mapping) and depth < _NESTED and id(value) not in seen:
                # moments of an optimizer have the names and shapes of the weights
                if not str(key).startswith("optim"):
                    collect(value, f"{name}.", depth + 1)

    collect(content, "", 1)
    if not state:
        raise CheckpointError(f"read_foreign_state: {path} holds no tensors; expected a state dict")
    return state


def fitting_state(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    caller: str,
    name: str,
    target: str,
    ignored: Callable[[str], bool] = lambda key: False,
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> ForeignState:
    """The tensors of a foreign file that are a whole model, wherever they lie in it.

    A file may hold a model under leading names (``module.``, ``teacher.backbone.``), and beside other modules such as
    the heads of its training. The model must be whole under one of them, with nothing there that it does not have. Of
    several that fit, a teacher or a moving average (EMA) goes before others, and a student after them.

    Args:
        tensors: what :func:`foreign_tensors` gives.
        expected: the model's own state dict.
        caller: what errors begin with.
        name: what to call the file in errors.
        target: what to call the model in errors.
        ignored: whether a tensor, by its name below the leading ones, is no weight of the model.
        translate: to the model's own names, where the file has others.

    Raises:
        CheckpointError: nothing fits as a whole, two things that differ fit equally well, or values are not finite.
    """
    best: tuple[int, int, str, dict[str, Tensor]] = (0, 0, "", {})
    places = _places(tensors, len(expected) // 2)
    for order in sorted({_order(place) for place in places}):
        found: list[tuple[ForeignState, dict[str, Tensor]]] = []
        for place in (place for place in places if _order(place) == order):
            held = {key.removeprefix(place): value for key, value in tensors.items() if key.startswith(place)}
            held = {key: value for key, value in held.items() if not ignored(key)}
            try:
                state = translate(dict(held))
            except Exception:
                # made for files of the architecture: what is no such file is compared as it is
                state = held
            if difference(expected, state):
                # what the translation took from the model itself was not found
                common = sum(key in expected and value is not expected[key] for key, value in state.items())
                best = max(best, (common, -len(state), place, state), key=lambda found: found[:2])
            elif not any(_same(state, other.state) for other, _ in found):
                found.append((ForeignState(state, place.removesuffix(".")), held))
        if len(found) > 1:
            raise CheckpointError(
                f"{caller}: {name} holds several models that fit {target}; expected one, "
                f"got {_some([repr(other.place) for other, _ in found])}: keep one of them in the file"
            )
        if found:
            (fitting, held) = found[0]
            twice = _beside(tensors, held, fitting.place)
            if twice:
                raise CheckpointError(
                    f"{caller}: {name} holds parts of {target} twice; expected them under {fitting.place!r} alone, "
                    f"got also {_some(twice)}"
                )
            check_finite(fitting.state, f"{caller}: {name}")
            if fitting.place:
                _log.info("%s: %s: taken from %s", caller, name, fitting.place)
            return fitting
    common, _, place, state = best
    if common:
        problem = difference(expected, state) + (f"; looked under {place.removesuffix('.')!r}" if place else "")
    else:
        problem = (
            f"no name of its tensors fits; expected {len(expected)} such as {', '.join(sorted(expected)[:3])}, "
            f"got {len(tensors)} such as {', '.join(sorted(tensors)[:3])}"
        )
    raise CheckpointError(f"{caller}: {name} does not fit {target}; {problem}")


class _Dropped:
    """Stands for a class whose objects are of no use here: holds nothing, whatever a file wants to put there."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def _places(names: Mapping[str, Tensor], least: int) -> list[str]:
    """Leading parts of names, with their dot, under which enough tensors lie; the shortest, which is empty, first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".", _NESTED)
        counts.update("".join(f"{part}." for part in parts[:depth]) for depth in range(1, len(parts)))
    return ["", *sorted((place for place, count in counts.items() if count >= least), key=len)]


def _order(place: str) -> int:
    """Which of several models that fit goes first: 0 before 1 before 2."""
    words = re.split(r"[._]", place.lower())
    if "teacher" in words or "ema" in words:
        return 0
    return 2 if "student" in words else 1


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(value is other[key] or torch.equal(value, other[key]) for key, value in one.items())


def _beside(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor], place: str) -> list[str]:
    """Tensors above ``place`` that have the name of one below it: which of them is the model's cannot be told."""
    parts = place.split(".") if place else []
    above = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts))]
    names = {f"{start}{key}" for start in above for key in held} & tensors.keys()
    # below it, names in front may be the same again: CLIP under visual. has a visual.visual.
    return sorted(key for key in names if not key.startswith(f"{place}."))


def _readable(path: str | os.PathLike[str], caller: str) -> Path:
    file = Path(path)
    try:
        if file.is_dir():
            raise CheckpointError(f"{caller}: {path} is a directory; expected a file of weights")
        size = file.stat().st_size
        with open(file, "rb"):
            pass
    except FileNotFoundError as error:
        raise CheckpointError(f"{caller}: {path} not found; expected a file of weights") from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{caller}: {path} is not readable; {error}") from error
    if size == 0:
        raise CheckpointError(f"{caller}: {path} is empty; expected a file of weights, got 0 bytes")
    return file


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(512)
        # one header of safetensors in 32 has a length that begins like a pickle
        pickled = start[:1] == b"\x80" and start[8:9] != b"{"
        if start[:4] == b"PK\x03\x04" or pickled or start[257:262] == b"ustar":
            raise CheckpointError(
                f"load_weights: {file} refused (unsafe content: a pickle or archive); expected safetensors"
            )
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"load_weights: {file} is no safetensors file or is truncated; expected a header of at most "
                f"{max(0, min(HEADER_LIMIT, size - 8))} bytes, got {length}"
            )
        stream.seek(8)
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"load_weights: {file} has a damaged header; {str(error).splitlines()[0]}") from error
    if not isinstance(header, dict) or "" in header:
        raise CheckpointError(f"load_weights: {file} has a damaged header; expected tensors by name")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _record(header: dict[str, Any], file: Path) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"load_weights: {file} was not written by drseg; expected its metadata in the header")
    try:
        record = json.loads(text)
        version, digest, content = record["format_version"], record["sha256"], record["metadata"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"load_weights: {file} has damaged metadata; {error}") from error
    if not isinstance(version, int) or not isinstance(digest, str) or not isinstance(content, dict):
        raise CheckpointError(f"load_weights: {file} has damaged metadata; expected version, checksum and fields")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"load_weights: {file} is of a newer version; expected format_version up to {FORMAT_VERSION}, got {version}"
        )
    return record


def _tensors(file: Path) -> dict[str, Tensor]:
    require("load_weights", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"load_weights: {file} is damaged; {str(error).splitlines()[0]}") from error


def _left_out(model: nn.Module) -> tuple[str, ...]:
    parts = []
    for name in ("clip", "dino", "remote"):
        part = getattr(model, name, None)
        if part is not None and getattr(getattr(part, "config", None), "weights", None) is not None:
            if not any(parameter.requires_grad for parameter in part.parameters()):
                parts.append(f"{name}.")
    return tuple(parts)


def _some(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(items[:LISTED])
    return shown if len(items) <= LISTED else f"{shown} and {len(items) - LISTED} more"


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
