# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from drseg_core.config.load import config_from_dict, load_config, override, parse_config, preset_names, to_yaml
from drseg_core.config.methods import apply_method
from drseg_core.config.schema import Config, GraphConfig, ModelConfig
from drseg_core.config.validate import validate
from drseg_core.errors import ConfigError


def test_presets() -> None:
    assert preset_names() == ("paper", "tiny", "vitb", "vitl")
    assert load_config("vitl") == load_config("paper") == Config()
    vitb = load_config("vitb").model
    assert vitb.clip.name == "ViT-B-16-quickgelu" and vitb.clip.image_size == 384
    assert vitb.clip.guidance_blocks == (3, 7) and vitb.graph == Config().model.graph
    tiny = load_config("tiny")
    assert tiny.model.clip.weights is None and tiny.model.dino.weights is None
    assert tiny.train.batch_size == 4 and tiny.train.workers == 0 and tiny.train.gradient_clip == 1.0


@pytest.mark.parametrize("name", ["tiny", "vitb", "vitl"])
def test_presets_give_nothing_that_is_the_default(name: str) -> None:
    import yaml

    import drseg_core.config

    text = (Path(drseg_core.config.__file__).parent / "presets" / f"{name}.yaml").read_text()

    def compare(given: dict, default: object) -> None:
        for key, value in given.items():
            own = getattr(default, key)
            if dataclasses.is_dataclass(own):
                compare(value, own)
            else:
                assert (tuple(value) if isinstance(value, list) else value) != own, key

    compare(yaml.safe_load(text), Config())


def test_the_paper_s_graph_is_written_out() -> None:
    """A default that changes leaves it as it is."""
    import yaml

    import drseg_core.config

    text = (Path(drseg_core.config.__file__).parent / "presets" / "paper.yaml").read_text()
    given = yaml.safe_load(text)["model"]["graph"]
    # which kernel computes it is no matter of the paper
    assert {*given} == {field.name for field in dataclasses.fields(GraphConfig)} - {"backend"}
    stated = {"k": 75, "layers": 2, "residual": False, "norm_scale": 1.0, "edge_temperature": None, "edge_decay": None}
    assert given | stated == given
    assert parse_config(text).model.graph == dataclasses.replace(GraphConfig(), **given)


@pytest.mark.parametrize(("value", "fits"), [(0.13, True), (0, True), (75, True), (1.0, False), (-1, False)])
def test_neighbours_are_a_count_or_a_share(value: float, fits: bool) -> None:
    config = parse_config(f"model: {{graph: {{k: {value}}}}}")
    assert config.model.graph.k == value and type(config.model.graph.k) is type(value)
    assert parse_config(to_yaml(config)) == config
    if fits:
        validate(config)
        return
    with pytest.raises(ConfigError, match="model.graph.k is out of range; expected at least 0, or a share above 0"):
        validate(config)


@pytest.mark.parametrize("name", ["paper", "tiny", "vitb", "vitl"])
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config))), Config) == config
    assert config_from_dict(dataclasses.asdict(config.model), ModelConfig) == config.model


def test_what_is_left_out_keeps_its_default() -> None:
    assert parse_config("") == Config()
    assert parse_config("seed: 3") == dataclasses.replace(Config(), seed=3)


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2", 2.0), ("5E2", 500.0), ("-1e+2", -100.0)]
)
def test_numbers(text: str, value: float) -> None:
    found = parse_config(f"train:\n  learning_rate: {text}").train.learning_rate
    assert found == value and isinstance(found, float)


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  iteration: 5",
            "x.yaml:2: train.iteration is unknown; expected one of alignment_weight, batch_size",
        ),
        ("modell: {}", "x.yaml:1: modell is unknown"),
        ("train:\n  iterations: many", "x.yaml:2: train.iterations has a wrong type; expected int, got str 'many'"),
        ("train:\n  iterations: 1.5", "expected int, got float"),
        ("train:\n  iterations: true", "expected int, got bool"),
        ("train:\n  color_jitter: 1", "expected bool, got int"),
        ("train:\n  learning_rate: .nan", "not finite"),
        ("train:\n  learning_rate: .inf", "not finite"),
        ("train:\n  learning_rate: null", "expected float, got NoneType"),
        ("train:\n  seconds: soon", "train.seconds has a wrong type"),
        ("model:\n  clip:\n    weights: 3", "x.yaml:3: model.clip.weights has a wrong type; expected str"),
        ("model:\n  clip:\n    guidance_blocks: [1]", "expected 2 values"),
        ("model:\n  clip:\n    guidance_blocks: [1, a]", "expected int, got str"),
        ("model:\n  clip:\n    guidance_blocks: 3", "expected 2 values"),
        ("model:\n  rotations: 2", "not a choice; expected 1, 4, got 2"),
        ("model:\n  rotations: true", "not a choice"),
        ("model:\n  graph:\n    norm_scale: other", "norm_scale is not a choice; expected match, got 'other'"),
        ("model:\n  fusion:\n    kind: product", "x.yaml:3: model.fusion.kind is not a choice; expected ugaf, mean"),
        ("model: tiny", "x.yaml:1: model has a wrong type; expected a mapping"),
        ("- 1\n- 2", "x.yaml:1: file has a wrong type; expected a mapping"),
        ("seed: 1\ntrain: {}\nseed: 2", "x.yaml:3: seed is given twice"),
        ("train:\n  workers: 1\n  workers: 1", "x.yaml:3: train.workers is given twice"),
        ("seed: !!python/object/apply:os.system ['true']", "x.yaml:1: seed has a YAML tag"),
        ("seed: !secret 1", "seed has a YAML tag"),
        ("seed: 2026-01-01", "seed has a YAML tag"),
        ("seed: [1", "x.yaml:1: not valid YAML"),
        ("a: &a\n  <<: *a", "has a YAML alias"),
        ("a: &a [1, 1]\nb: *a", "x.yaml:1: b has a YAML alias"),
        ("seed: 1\n\tx: 2", "x.yaml:2: not valid YAML"),
        ("? [a]\n: 1", "key is not a name"),
        ("seed: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (": ".join("abcdefghijklmnopqrstuvwxyz").replace(": ", ": {") + "}" * 25, "nested too deeply"),
        ("---\nseed: 1\n---\nseed: 2", "not valid YAML"),
    ],
)
def test_refusals_name_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "x.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.promise("C51")
def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="huge not found; expected a YAML file or one of paper, tiny, vitb, vitl"):
        load_config("huge")
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text(" " * 1_000_001)
    with pytest.raises(ConfigError, match="too large"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("seed: 7\n" + " " * (1_000_000 - 8))
    assert load_config(tmp_path / "d.yaml").seed == 7


def test_overrides() -> None:
    config = override(Config(), {"train.iterations": 5, "model.clip.guidance_blocks": (1, 2), "seed": 9})
    assert config.train.iterations == 5 and config.model.clip.guidance_blocks == (1, 2) and config.seed == 9
    assert config.train.batch_size == Config().train.batch_size
    for key in ("train.iteration", "train.iterations.x", "x"):
        with pytest.raises(ConfigError, match="is unknown"):
            override(Config(), {key: 1})
    with pytest.raises(ConfigError, match="expected int"):
        override(Config(), {"train.iterations": "5"})


def test_dictionaries_are_read_as_strictly() -> None:
    with pytest.raises(ConfigError, match="run.json: graph.k has a wrong type"):
        config_from_dict({"graph": {"k": "75"}}, ModelConfig, "run.json")
    with pytest.raises(ConfigError, match="run.json: graf is unknown"):
        config_from_dict({"graf": {}}, ModelConfig, "run.json")


def test_a_mean_has_no_canonical_map_to_replace():
    options = {"model.fusion.kind": "replace", "model.fusion.original": "mean"}
    with pytest.raises(ConfigError, match="expected model.fusion.original stack, got mean"):
        validate(override(load_config("tiny"), options))
    validate(override(load_config("tiny"), {**options, "model.rotations": 1}))
    validate(override(load_config("tiny"), {"model.fusion.kind": "replace"}))


@pytest.mark.parametrize("guide", ["dino_guidance", "remote_clip"])
def test_mask_proposals_have_no_decoder_to_guide(guide):
    options = {"model.proposals.kind": "side_adapter", f"model.decoder.{guide}": True}
    with pytest.raises(ConfigError, match="model.decoder guides nothing; expected dino_guidance and remote_clip false"):
        validate(override(load_config("tiny"), {"model.decoder.dino_guidance": False, **options}))
    # the methods that are so take the options back
    guided = override(load_config("tiny"), {f"model.decoder.{guide}": True})
    for method in ("san", "scan"):
        assert not getattr(apply_method(guided, method).model.decoder, guide)


@pytest.mark.parametrize(("value", "fits"), [(0.5, True), ("match", True), (0.0, True), (-1.0, False)])
def test_the_weight_of_the_layer_norm(value, fits):
    config = override(Config(), {"model.graph.norm_scale": value})
    if fits:
        validate(config)
        return
    with pytest.raises(ConfigError, match="norm_scale is out of range; expected at least 0, or match"):
        validate(config)
