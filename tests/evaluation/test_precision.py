# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and compiled models: what a predictor asks of its model, how far the scores move, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drseg_core import device
from drseg_core.config.load import load_config
from drseg_core.device import select_precision
from drseg_core.errors import BackendUnavailableError, ConfigError
from drseg_core.evaluation import compiled as compiled_module
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.build import build_model
from drseg_core.models.prior_cache import prior_cache
from drseg_core.models.segmenter import Segmenter
from tests.evaluation.fake import COLORS, ColorModel, Output

torch.set_num_threads(1)
CPU = torch.device("cpu")
NAMES = ["green roof", "bare soil", "tennis court"]
IMAGES = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Segmenter:
    torch.manual_seed(0)
    return build_model(load_config("tiny").model).eval()


class Product(ColorModel):
    """Its scores come from a linear map, whose dtype is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 1)
        self.dtypes: list[torch.dtype] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.dtypes.append(self.map(super().encode_text(tokens)).dtype)
        return super().encode_text(tokens)

    def forward(self, image: Tensor, text: Tensor) -> Output:
        value = self.map(image.movedim(1, -1)).movedim(-1, 1)
        self.dtypes.append(value.dtype)
        return Output(value.expand(-1, len(text), -1, -1), image[:, :1])


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_products_of_images_have_the_precision_that_is_asked_for(asked: str, mode: Any) -> None:
    network = Product()
    predictor = Predictor(network, list(COLORS), mode=mode, tile_size=64, overlap=16, precision=asked)  # type: ignore[arg-type]
    found = predictor(IMAGES[0])
    images = {getattr(torch, asked)}
    # class names are encoded once, which costs nothing, and all scores hang on them
    assert network.dtypes[0] == torch.float32 and set(network.dtypes[1:]) == images
    assert found.score.dtype == found.uncertainty.dtype == torch.float32
    assert predictor.arithmetic == asked and not torch.is_autocast_enabled("cpu")


def test_autocast_around_a_float32_predictor_stays() -> None:
    network = Product()
    predictor = Predictor(network, list(COLORS))
    with torch.autocast("cpu", torch.bfloat16):
        predictor(IMAGES[0])
    assert network.dtypes[-1] == torch.bfloat16


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("flags\t\t: fpu avx512f amx_tile amx_bf16", torch.bfloat16),
        ("Features\t: fp asimd i8mm bf16", torch.bfloat16),
        # products that are computed in float32 are slower than those of float32
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", torch.float32),
        ("model name\t: of the bf16 family\nflags\t\t: fpu", torch.float32),
        ("", torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_processor_has_units_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, expected: torch.dtype
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    assert select_precision("auto", CPU) == expected
    assert select_precision("bfloat16", CPU) == torch.bfloat16 and select_precision("float32", CPU) == torch.float32
    assert Predictor(ColorModel(), list(COLORS), precision="auto").precision == expected


def test_what_is_no_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="precision: name is unknown; expected float32, bfloat16, auto, got 'half'"):
        Predictor(ColorModel(), list(COLORS), precision="half")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    with pytest.raises(BackendUnavailableError, match="bfloat16 is not available on cpu; expected float32"):
        Predictor(ColorModel(), list(COLORS), precision="bfloat16")


def test_scores_in_bfloat16_are_near_those_of_float32(model: Segmenter) -> None:
    plain, reduced = (Predictor(model, NAMES, precision=name) for name in ("float32", "bfloat16"))  # type: ignore[arg-type]
    (score, uncertain), (near, near_uncertain) = (predictor.forward(IMAGES) for predictor in (plain, reduced))
    # logits of a random model spread by 0.1; half a per cent of that is what eight bits leave after some dozen layers
    moved = (near.logit() - score.logit()).abs()
    assert 0 < moved.max() < 0.1 and moved.mean() < 0.2 * score.logit().std()
    assert (near_uncertain - uncertain).abs().max() < 0.05


class TestCompiled:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.fixture
    def traced(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """The options of torch.compile, which traces alone here: inductor would take half a minute."""
        asked: list[Any] = []
        real = torch.compile

        def compile(network: nn.Module, options: Any) -> Any:
            asked.append(options)
            return real(network, backend="aot_eager")

        monkeypatch.setattr(compiled_module.torch, "compile", compile)
        return asked

    def test_compiled_gives_what_the_model_gives(self, model: Segmenter, traced: list[Any], tmp_path: Path) -> None:
        """Another batch is compiled anew, and kept features are read beside compiled code."""
        plain, made = (Predictor(model, NAMES, compiled=compiled) for compiled in (False, True))
        assert made.arithmetic == "float32, compiled" and traced == [{"freezing": True}]
        expected = plain.forward(IMAGES)
        found = [(made.forward(IMAGES), expected), (made.forward(IMAGES[:1]), plain.forward(IMAGES[:1]))]
        with prior_cache(model, tmp_path) as cache:
            found += [(made.forward(IMAGES), expected) for _ in range(2)]
            assert (cache.found, cache.computed) == (1, 1)
        for one, other in found:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    def test_compiled_bfloat16_gives_what_the_model_gives(self, model: Segmenter, traced: list[Any]) -> None:
        plain, made = (Predictor(model, NAMES, precision="bfloat16", compiled=compiled) for compiled in (False, True))
        assert made.arithmetic == "bfloat16, compiled"
        torch.testing.assert_close(made.forward(IMAGES), plain.forward(IMAGES), rtol=0, atol=2e-2)

    def test_what_cannot_be_compiled_is_said_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(graph: Any, example: Any) -> Any:
            raise RuntimeError("no compiler of C++\nand more")

        real = torch.compile
        monkeypatch.setattr(compiled_module.torch, "compile", lambda network, options: real(network, backend=fails))
        predictor = Predictor(Product(), list(COLORS), compiled=True)
        with pytest.raises(
            BackendUnavailableError, match="model cannot be compiled on cpu; got .*no compiler of C"
        ) as e:
            predictor(IMAGES[0])
        assert "\n" not in str(e.value)

    def test_what_is_no_module_is_refused(self) -> None:
        class Plain:
            tokenize, encode_text = ColorModel.tokenize, ColorModel.encode_text

        with pytest.raises(ConfigError, match="expected a torch module, got Plain"):
            Predictor(Plain(), list(COLORS), compiled=True)
