# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig
from drseg_core.errors import CheckpointError, ResourceError
from drseg_core.models.build import build_model
from drseg_core.models.weights import (
    WithoutInitialWeights,
    check_finite,
    load_into,
    load_weights,
    model_state,
    read_foreign_state,
    save_weights,
    weights_hash,
)

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.index": torch.tensor([3, 1, 2]),
    "b": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, dtype=torch.int64),
    "flag": torch.tensor([True, False]),
}


@pytest.fixture
def seen_memory() -> Iterator[None]:
    """What nobody has written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_weights(path, STATE, {"step": 7, "class_names": ["a", "b"]})
    return path


def rewrite(path: Path, change) -> None:
    """Change the JSON header of a safetensors file and fix its length."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(json.loads(data[8 : 8 + length]))
    text = text if isinstance(text, str) else json.dumps(text)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def test_round_trip(saved: Path) -> None:
    state, metadata = load_weights(saved)
    assert metadata == {"step": 7, "class_names": ["a", "b"]}
    assert state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def test_headers_of_every_length_are_read(tmp_path: Path) -> None:
    """The first byte of a file is the lowest of its header's length, which may be that of a pickle."""
    path = tmp_path / "model.safetensors"
    first = set()
    for more in range(0, 256, 8):
        save_weights(path, {"a": torch.ones(1)}, {"text": "x" * more})
        first.add(path.read_bytes()[:1])
        assert load_weights(path)[1] == {"text": "x" * more}
        assert torch.equal(read_foreign_state(path)["a"], torch.ones(1))
    assert b"\x80" in first and len(first) == 32


def test_shared_strided_and_device_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    save_weights(tmp_path / "x.safetensors", {"x": base, "same": base, "t": base.T, "part": base[:, 1:3]}, {})
    state, _ = load_weights(tmp_path / "x.safetensors")
    assert torch.equal(state["t"], base.T) and torch.equal(state["part"], base[:, 1:3])
    assert torch.equal(state["x"], state["same"]) and state["x"].data_ptr() != state["same"].data_ptr()


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    save_weights(tmp_path / "1.safetensors", STATE, {"b": 1, "a": 2})
    save_weights(tmp_path / "2.safetensors", dict(reversed(STATE.items())), {"a": 2, "b": 1})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_loaded_tensors_do_not_follow_the_file(saved: Path) -> None:
    state, _ = load_weights(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert torch.equal(state["a.weight"], STATE["a.weight"])


def test_missing_and_directory_and_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not found"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a directory"):
        load_weights(tmp_path)
    (tmp_path / "zero").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        load_weights(tmp_path / "zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="not readable|not found"):
        load_weights(tmp_path / "loop")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(saved: Path) -> None:
    saved.chmod(0)
    with pytest.raises(CheckpointError, match="not readable"):
        load_weights(saved)


@pytest.mark.promise("C29")
def test_truncated_anywhere(saved: Path) -> None:
    data = saved.read_bytes()
    for offset in [1, 7, 8, 9, *range(10, len(data), max(1, len(data) // 50)), len(data) - 1]:
        saved.write_bytes(data[:offset])
        with pytest.raises(CheckpointError):
            load_weights(saved)


@pytest.mark.promise("C29")
def test_any_flipped_bit(saved: Path) -> None:
    data = saved.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (150,), generator=generator).tolist() + list(range(8 + length, len(data)))
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        saved.write_bytes(damaged)
        try:
            state, metadata = load_weights(saved)
        except CheckpointError:
            continue
        # only a flip in the metadata's own text escapes the checksum of the tensors
        assert place < 8 + length and all(torch.equal(state[key], STATE[key]) for key in STATE), place


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.promise("C31")
@pytest.mark.parametrize("reader", [load_weights, read_foreign_state])
@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy", "disguised"])
def test_pickles_are_refused_and_never_run(reader, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / ("x.safetensors" if kind == "disguised" else "x.pt")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"state_dict": Payload(target)}, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError, match="unsafe|refused"):
        reader(path)
    assert not target.exists()


@pytest.mark.promise("C32")
@pytest.mark.parametrize(
    "content", [b"garbage" * 100, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 200_000_000) + b"{}" * 50]
)
def test_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_weights(path)
    with pytest.raises(CheckpointError):
        read_foreign_state(path)


@pytest.mark.promise("C32")
@pytest.mark.parametrize(
    "change",
    [
        lambda h: "{" + json.dumps(h)[1:-1] + ',"b":' + json.dumps(h["b"]) + "}",
        lambda h: {**h, "": h["b"]},
        lambda h: {**h, "b": {**h["b"], "data_offsets": [0, 1 << 40]}},
        lambda h: {**h, "b": {**h["b"], "data_offsets": h["a.weight"]["data_offsets"]}},
        lambda h: {**h, "b": {**h["b"], "shape": [3]}},
        lambda h: {**h, "b": {**h["b"], "dtype": "F1"}},
        lambda h: json.dumps(h)[:-2],
        lambda h: "[1, 2]" + " " * 10,
        lambda h: "{" + '"a":' * 5000,
        lambda h: {key: value for key, value in h.items() if key != "__metadata__"},
        lambda h: {**h, "__metadata__": {"drseg": "{"}},
        lambda h: {**h, "__metadata__": {"drseg": "{}"}},
        lambda h: {**h, "__metadata__": {"drseg": '{"format_version": "1", "sha256": 2, "metadata": []}'}},
    ],
)
def test_broken_headers_are_refused(change, saved: Path) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError):
        load_weights(saved)


def test_newer_format_names_both_versions(saved: Path) -> None:
    def newer(header):
        record = json.loads(header["__metadata__"]["drseg"]) | {"format_version": 99}
        return {**header, "__metadata__": {"drseg": json.dumps(record)}}

    rewrite(saved, newer)
    with pytest.raises(CheckpointError, match="expected format_version up to 1, got 99"):
        load_weights(saved)


@pytest.mark.promise("C32")
def test_infinite_and_missing_values_are_counted() -> None:
    inf, nan = torch.inf, torch.nan
    for values, count in ([1, -inf], 1), ([inf, 0, -inf], 2), ([nan, inf, 3, nan], 3), ([nan], 1):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(CheckpointError, match=f"^x is not finite; w has {count} non-finite values$"):
                check_finite({"v": torch.ones(2), "w": torch.tensor(values, dtype=dtype)}, "x")
    largest = torch.finfo(torch.float32).max
    check_finite({"none": torch.zeros(0), "all": torch.tensor([largest, -largest, 0]), "index": torch.tensor([1])}, "x")


def test_what_is_read_next_has_no_initial_weights(tiny_config: ModelConfig, seen_memory: None) -> None:
    with WithoutInitialWeights():
        left = nn.Linear(40, 30)
    assert left.weight.isnan().all() and left.bias.isnan().all()
    clip = build_model(tiny_config, read_clip=False).clip
    assert clip.text.token_embedding.weight.isnan().all()
    assert all(value.isfinite().all() for value in build_model(tiny_config).state_dict().values())


@pytest.mark.parametrize("before", [1e30, -1e30, math.nan, 0.0])
def test_draws_within_bounds_end_whatever_memory_holds(before: float) -> None:
    value = torch.full((40, 30), before)
    with WithoutInitialWeights():
        for a, b, mean in ((-2.0, 2.0, 0.0), (3.0, 4.0, 3.5), (5.0, 9.0, 0.0)):
            nn.init.trunc_normal_(value, mean, 1.0, a, b)
            timm.layers.trunc_normal_(value, mean, 1.0, a, b)
        nn.init.xavier_uniform_(value)
        nn.init.kaiming_normal_(value)
        assert torch.rand(3).unique().numel() == 3


def test_the_same_is_read_with_and_without_initial_weights(
    tiny_config: ModelConfig, tmp_path: Path, seen_memory: None
) -> None:
    model = build_model(tiny_config)
    model.dino.encoder.norm.weight.data.fill_(0.5)
    path = tmp_path / "prior.safetensors"
    safetensors.torch.save_file(model.dino.encoder.state_dict(), path)
    read = dataclasses.replace(tiny_config, dino=dataclasses.replace(tiny_config.dino, weights=str(path)))
    found = build_model(read, read_clip=False)
    for name, value in model.dino.state_dict().items():
        assert torch.equal(found.dino.state_dict()[name], value)
    # the prior is left out of what is saved where it is read from a file
    held = {name: value for name, value in model_state(model).items() if not name.startswith("dino.")}
    load_into(found, held, name="of a model")
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_non_finite_weights_are_counted(tmp_path: Path) -> None:
    value = torch.zeros(20)
    value[:12] = float("nan")
    save_weights(tmp_path / "x.safetensors", {"encoder.0.weight": value}, {})
    with pytest.raises(CheckpointError, match="encoder.0.weight has 12 non-finite values"):
        load_weights(tmp_path / "x.safetensors")


@pytest.mark.promise("C28")
def test_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_weights(saved, STATE, {})
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


def perturbed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    result = dict(state)
    for key, value in changes.items():
        if value is None:
            result.pop(key.replace("__", "."))
        else:
            result[key.replace("__", ".")] = value
    return result


def test_model_round_trip(tiny_config, tiny, tmp_path: Path) -> None:
    tiny.spsd.set_ranking(torch.rand(64))
    path = tmp_path / "model.safetensors"
    save_weights(path, model_state(tiny), {"model": dataclasses.asdict(tiny_config)})
    other = build_model(tiny_config)
    state, _ = load_weights(path)
    load_into(other, state, name=str(path))
    for key, value in tiny.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    x = torch.rand(1, 64, 2, 2)
    assert torch.equal(other.spsd.split(x)[0], tiny.spsd.split(x)[0])
    assert torch.equal(other.spsd.merge(*other.spsd.split(x)), x)


@pytest.mark.promise("C32")
def test_refused_states_leave_the_model_as_it_was(tiny) -> None:
    state = {key: value.clone() for key, value in model_state(tiny).items()}
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    state["decoder.head.bias"] += 1
    nan = torch.full_like(state["decoder.head.weight"], float("nan"))
    cases = {
        r"1 missing: decoder.head.weight": perturbed(state, decoder__head__weight=None),
        r"1 unexpected: decoder.head.extra": perturbed(state, decoder__head__extra=torch.ones(1)),
        r"decoder.head.bias expected \(1,\) float32, got \(2,\) float32": perturbed(
            state, decoder__head__bias=torch.ones(2)
        ),
        r"expected \(1,\) float32, got \(1,\) float64": perturbed(
            state, decoder__head__bias=torch.ones(1, dtype=torch.float64)
        ),
        r"decoder.head.weight has 72 non-finite values": perturbed(state, decoder__head__weight=nan),
        r"no partition": perturbed(state, spsd__semantic_index=torch.zeros(32, dtype=torch.int64)),
    }
    for text, broken in cases.items():
        with pytest.raises(CheckpointError, match=text):
            load_into(tiny, broken, name="x")
        assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items()), text


@pytest.mark.promise("C32")
def test_ten_keys_of_each_kind_are_listed(tiny) -> None:
    state = model_state(tiny)
    renamed = {f"module.{key}": value for key, value in state.items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(tiny, renamed, name="x")
    message = str(caught.value)
    assert f"{len(state)} missing: " in message and f"{len(state)} unexpected: module." in message
    assert message.count(f"and {len(state) - 10} more") == 2 and "\n" not in message


def test_an_aggregator_of_an_earlier_version_is_refused_in_a_line(tiny) -> None:
    """Its keys were reduced without their guidance, so its tensors have no place here."""
    state = {key: value for key, value in model_state(tiny).items() if ".reduce_key" not in key}
    state["aggregator.spatial.0.reduce_guidance.weight"] = torch.zeros(24, 24, 2, 2)
    with pytest.raises(
        CheckpointError, match="from before keys were reduced with their guidance; expected.*--init"
    ) as caught:
        load_into(tiny, state, name="x")
    assert "\n" not in str(caught.value)


def test_what_can_be_had_again_is_left_out(variant, tmp_path: Path) -> None:
    plain = build_model(variant("clip", trainable="none"))
    assert any(key.startswith("dino.") for key in model_state(plain))
    assert any(key.startswith("clip.") for key in model_state(plain))
    path = tmp_path / "prior.pt"
    torch.save(plain.dino.encoder.state_dict(), path)
    model = build_model(variant("dino", weights=str(path)))
    state = model_state(model)
    assert not any(key.startswith("dino.") for key in state) and any(key.startswith("clip.") for key in state)
    load_into(model, state, name="x")
    with pytest.raises(CheckpointError, match="unexpected: dino."):
        load_into(model, model.state_dict(), name="x")


@pytest.mark.filterwarnings("ignore")
def test_foreign_states(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"module.w": torch.ones(2), "module.v": torch.zeros(1)}, path)
    assert sorted(read_foreign_state(path)) == ["v", "w"]
    torch.save({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_foreign_state(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_foreign_state(path)
    torch.save({"w": torch.tensor([float("inf")])}, path)
    with pytest.raises(CheckpointError, match="w has 1 non-finite values"):
        read_foreign_state(path)
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, str(path))
    with pytest.raises(CheckpointError, match="refused"):
        read_foreign_state(path)


def test_the_hash_knows_every_weight():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = weights_hash(model)
    assert before == weights_hash(model)
    with torch.no_grad():
        model[1].bias[1] += 1e-6
    assert weights_hash(model) != before


def test_the_hash_of_a_model_is_that_of_before_its_edge_bias_had_a_dimension():
    older, now = torch.nn.Module(), torch.nn.Module()
    older.edge_bias, now.edge_bias = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor([0.5]))
    assert weights_hash(older) == weights_hash(now)
    now.edge_bias.data += 1
    assert weights_hash(older) != weights_hash(now)
