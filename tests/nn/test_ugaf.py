# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from drseg_core.nn.ugaf import UGAF, FusionOutput, MultiScaleBlock, build_fusion, group_norm, uncertainty

KINDS = ("ugaf", "mean", "concat", "separate", "replace", "sum", "none")
GATES = ("sigmoid_proj", "residual", "direct", "feature", "proj_on_map", "none")


def maps(classes: int = 5, rotations: int = 4, grid: tuple[int, int] = (6, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    shape = (classes, *grid)
    original = torch.rand(2, rotations, *shape, generator=generator) * 0.2
    return original, torch.rand(2, 1, *shape, generator=generator) * 0.2


@pytest.mark.promise("C1")
def test_uncertainty_is_the_normalised_entropy() -> None:
    m = torch.randn(2, 7, 3, 4, dtype=torch.float64) * 0.05
    q = torch.softmax(m / 0.02, dim=1)
    expected = -(q * q.log()).sum(1, keepdim=True) / math.log(7)
    torch.testing.assert_close(uncertainty(m, 0.02), expected)


@pytest.mark.parametrize("classes", [2, 3, 17, 255])
def test_uncertainty_is_one_when_uniform_and_zero_when_certain(classes: int) -> None:
    uniform = torch.full((1, classes, 2, 2), 0.3)
    certain = torch.zeros(1, classes, 2, 2)
    certain[:, 0] = 1.0
    torch.testing.assert_close(uncertainty(uniform, 0.01), torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(uncertainty(certain, 0.001), torch.zeros(1, 1, 2, 2))


def test_uncertainty_of_one_class_is_zero() -> None:
    assert torch.equal(uncertainty(torch.randn(2, 1, 3, 3), 0.01), torch.zeros(2, 1, 3, 3))


@pytest.mark.promise("C5")
@pytest.mark.parametrize("tau", [1e-30, 1e-6, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uncertainty_stays_finite_with_finite_gradients(tau: float, dtype: torch.dtype) -> None:
    m = torch.tensor([1.0, -1.0, 0.999, 0.5], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    u = uncertainty(m, tau)
    u.sum().backward()
    assert 0 <= float(u.detach()) <= 1 and torch.isfinite(m.grad).all()


def test_uncertainty_depends_on_temperature_as_specified() -> None:
    # model.md 2.4: cosines of deviation 0.04 and 17 classes
    m = torch.randn(1, 17, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.04
    for tau, expected in {1.0: 0.9997, 0.1: 0.974, 0.07: 0.948, 0.02: 0.595, 0.01: 0.311}.items():
        assert float(uncertainty(m, tau).mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fusion_has_one_call_and_any_number_of_classes(kind: str) -> None:
    torch.manual_seed(0)
    fusion = build_fusion(kind, 4, 16)
    for classes in (1, 3, 9):
        original, refined = maps(classes)
        result = fusion(original, None if kind == "none" else refined)
        assert isinstance(result, FusionOutput)
        assert result.embedding.shape == (2, 16, classes, 6, 4)
        assert result.uncertainty.shape == (2, 1, 6, 4)
        torch.testing.assert_close(result.uncertainty, uncertainty(original.mean(1), 0.01))


@pytest.mark.parametrize(("kind", "gate"), [(kind, "sigmoid_proj") for kind in KINDS] + [("ugaf", "feature")])
def test_classes_are_treated_alike_and_apart(kind: str, gate: str) -> None:
    torch.manual_seed(0)
    fusion = build_fusion(kind, 4, 8, gate=gate).eval()
    original, refined = maps(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = fusion(original, refined).embedding
    permuted = fusion(original[:, :, order], refined[:, :, order]).embedding
    torch.testing.assert_close(permuted, whole[:, :, order], rtol=1e-4, atol=1e-5)


@pytest.mark.promise("C22")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.01, None])
@pytest.mark.parametrize("classes", [1, 4])
def test_every_parameter_gets_a_gradient(kind: str, tau: float | None, classes: int) -> None:
    variants = (
        [{"gate": g, "head": h, "detach_gate": d} for g in GATES for h in ("conv1x1", "conv7x7") for d in (True, False)]
        if kind == "ugaf"
        else [{}]
    )
    original, refined = maps(classes)
    for variant in variants:
        fusion = build_fusion(kind, 4, 8, tau=tau, **variant)
        fusion(original, refined).embedding.square().mean().backward()
        for name, parameter in fusion.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), (variant, name)


def test_detached_uncertainty_sends_no_gradient_into_the_original_maps() -> None:
    torch.manual_seed(0)
    original, refined = maps()
    gradients = []
    for detach in (True, False):
        fusion = UGAF(4, 8, detach_gate=detach, tau=0.05)
        nn.init.zeros_(fusion.embed_original.weight)
        leaf = original.clone().requires_grad_()
        fusion(leaf, refined).embedding.square().mean().backward()
        gradients.append(float(leaf.grad.abs().sum()))
    assert gradients[0] == 0 and gradients[1] > 0


def test_gate_forms() -> None:
    original, refined = maps()
    u = uncertainty(original.mean(1), 0.05)[:, None]
    expected = {
        "sigmoid_proj": torch.sigmoid(4 * u - 2) * refined,
        "residual": (1 + torch.sigmoid(4 * u - 2)) * refined,
        "direct": u * refined,
        "proj_on_map": u * torch.sigmoid(4 * refined),
        "feature": refined,
        "none": refined,
    }
    for gate, value in expected.items():
        fusion = UGAF(4, 8, gate=gate, tau=0.05)
        torch.testing.assert_close(fusion._modulate(refined, u[:, 0]), value)


def test_feature_gate_weighs_the_embedding() -> None:
    torch.manual_seed(0)
    original, refined = maps()
    fusion = UGAF(4, 8, gate="feature", tau=0.05)
    seen: list[Tensor] = []
    fusion.multi_scale.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fusion(original, refined)
    gate = torch.sigmoid(4 * uncertainty(original.mean(1), 0.05) - 2)
    embedded = fusion.embed_refined(refined.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)) * gate[:, None]
    torch.testing.assert_close(seen[0].unflatten(0, (2, 5)), embedded)


def test_simple_fusions_are_those_of_table_4() -> None:
    torch.manual_seed(0)
    original, refined = maps(3)
    stack = torch.cat((original, refined), dim=1).transpose(1, 2).flatten(0, 1)

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, 3)).transpose(1, 2)

    mean = build_fusion("mean", 4, 8)
    torch.testing.assert_close(mean(original, refined).embedding, unfold(mean.embed(stack.mean(1, keepdim=True))))
    concat = build_fusion("concat", 4, 8)
    torch.testing.assert_close(concat(original, refined).embedding, unfold(concat.embed(stack)))
    none = build_fusion("none", 4, 8)
    torch.testing.assert_close(none(original, None).embedding, unfold(none.embed(stack[:, :4])))
    separate = build_fusion("separate", 4, 8)
    first = separate.embed_original(stack[:, :4]).sigmoid()
    second = separate.embed_refined(stack[:, 4:]).sigmoid()
    joined = separate.head(torch.cat((first, second), 1)).sigmoid() + first
    torch.testing.assert_close(separate(original, refined).embedding, unfold(joined))


def test_readings_of_table_2_without_ugaf() -> None:
    torch.manual_seed(0)
    original, refined = maps(3)
    replace, added = build_fusion("replace", 4, 8), build_fusion("sum", 4, 8)
    replaced = original.clone()
    # the canonical map is the first one
    replaced[:, 0] = refined[:, 0]
    for fusion, seen in ((replace, replaced), (added, original + refined)):
        found = fusion(original, refined)
        baseline = build_fusion("none", 4, 8)
        baseline.load_state_dict(fusion.state_dict())
        torch.testing.assert_close(found.embedding, baseline(seen).embedding)
        assert torch.equal(found.uncertainty, baseline(original).uncertainty)
        with pytest.raises(ValueError, match="refined is missing"):
            fusion(original)


def test_without_a_gate_the_uncertainty_decides_nothing() -> None:
    torch.manual_seed(0)
    original, refined = maps()
    gated, ungated = UGAF(4, 8), UGAF(4, 8, gate="none")
    ungated.load_state_dict({name: value for name, value in gated.state_dict().items() if "project" not in name})
    assert not torch.allclose(gated(original, refined).embedding, ungated(original, refined).embedding)
    # the gate wide open
    nn.init.constant_(gated.project.bias, 100.0)
    torch.testing.assert_close(gated(original, refined).embedding, ungated(original, refined).embedding)


@pytest.mark.parametrize("kind", ["dilation", "kernel"])
def test_multi_scale_block(kind: str) -> None:
    block = MultiScaleBlock(8, kind)
    x = torch.randn(3, 8, 7, 5)
    assert block(x).shape == x.shape
    nn.init.zeros_(block.join.weight)
    torch.testing.assert_close(block(x), x)


def test_group_norm_adapts_to_the_width() -> None:
    assert [group_norm(width).num_groups for width in (1, 8, 24, 32, 48, 96, 128)] == [1, 1, 1, 2, 3, 6, 8]
    for width in range(1, 130):
        assert width % group_norm(width).num_groups == 0


def test_learned_temperature_is_positive_and_starts_at_one_hundredth() -> None:
    fusion = UGAF(4, 8, tau=None)
    assert float(fusion.log_tau.detach().exp()) == pytest.approx(0.01)
    assert "log_tau" not in UGAF(4, 8).state_dict()


def test_runs_under_autocast() -> None:
    original, refined = maps()
    with torch.autocast("cpu", torch.bfloat16):
        result = UGAF(4, 8)(original, refined)
    assert result.uncertainty.dtype == torch.float32 and torch.isfinite(result.embedding).all()


@pytest.mark.parametrize("head", ["conv1x1", "conv7x7"])
@pytest.mark.parametrize("gate", GATES)
def test_transforms_see_what_calls_see(gate: str, head: str) -> None:
    torch.manual_seed(0)
    fusion = UGAF(4, 8, gate=gate, head=head).double()  # type: ignore[arg-type]
    original, refined = torch.rand(3, 4, 2, 5, 5).double(), torch.rand(3, 1, 2, 5, 5).double()
    weights = {name: value.detach() for name, value in fusion.named_parameters()}

    def loss(weights: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
        return torch.func.functional_call(fusion, weights, (first[None], second[None])).embedding.square().sum()

    found = torch.func.vmap(lambda *pair: fusion(*(value[None] for value in pair)).embedding[0])(original, refined)
    torch.testing.assert_close(found, fusion(original, refined).embedding)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, original, refined)
    for n in range(3):
        expected = torch.func.grad(loss)(weights, original[n], refined[n])
        fusion.zero_grad()
        fusion(original[n : n + 1], refined[n : n + 1]).embedding.square().sum().backward()
        for name, parameter in fusion.named_parameters():
            torch.testing.assert_close(grads[name][n], expected[name])
            torch.testing.assert_close(expected[name], parameter.grad)


# a list of layers is never called
@pytest.mark.parametrize("name", sorted(dict(UGAF(4, 8).named_modules()).keys() - {"", "multi_scale.reach"}))
def test_every_layer_takes_a_backward_hook(name: str) -> None:
    fusion, seen = UGAF(4, 8), []
    fusion.get_submodule(name).register_full_backward_hook(lambda *given: seen.append(given))
    original, refined = (value.requires_grad_() for value in maps())
    fusion(original, refined).embedding.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("gate", GATES)
def test_memory_without_values_gets_its_start_by_a_reset(gate: str) -> None:
    given = {"tau": None, "gate": gate}
    torch.manual_seed(0)
    expected = UGAF(4, 8, **given)  # type: ignore[arg-type]
    for module_by_module in (False, True):
        with torch.device("meta"):
            fusion = UGAF(4, 8, **given)  # type: ignore[arg-type]
        fusion.to_empty(device="cpu")
        for parameter in fusion.parameters():
            nn.init.constant_(parameter, float("nan"))
        for module in list(fusion.modules()) if module_by_module else [fusion]:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, value in expected.state_dict().items():
            found = fusion.get_parameter(name)
            assert found.isfinite().all()
            if name.startswith(("log_tau", "project", "multi_scale.norm", "head.1")):
                assert torch.equal(found, value), name


def test_bad_input() -> None:
    original, refined = maps()
    with pytest.raises(ValueError, match="kind is unknown"):
        build_fusion("product", 4, 8)
    with pytest.raises(ValueError, match="tau is out of range"):
        build_fusion("ugaf", 4, 8, tau=0.0)
    with pytest.raises(ValueError, match="gate is unknown"):
        UGAF(4, 8, gate="x")
    with pytest.raises(ValueError, match="head is unknown"):
        UGAF(4, 8, head="x")
    with pytest.raises(ValueError, match="refined is missing"):
        UGAF(4, 8)(original, None)
    with pytest.raises(ValueError, match="refined has a wrong shape"):
        UGAF(4, 8)(original, refined[:, :, :2])
    with pytest.raises(ValueError, match="original has a wrong shape"):
        UGAF(4, 8)(original[0], refined)
    with pytest.raises(ValueError, match="correlation has a wrong shape"):
        uncertainty(original)
