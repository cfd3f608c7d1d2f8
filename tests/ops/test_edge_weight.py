# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import oracle
import pytest
import torch
from contract import OpContract, run
from halves import RawHalves
from subjects import EDGE_WEIGHT
from torch.library import opcheck

from drseg_core import ops
from drseg_core.ops.edge_weight.reference import at_neighbour
from drseg_core.testing import CASES


class TestEdgeWeight(RawHalves, OpContract):
    subject = EDGE_WEIGHT

    @pytest.mark.promise("C1")
    def test_equals_the_mlp_on_concatenated_features(self, call):
        random = torch.Generator().manual_seed(5)
        prior = torch.randn(2, 12, 8, generator=random, dtype=torch.float64)
        first = torch.randn(6, 16, generator=random, dtype=torch.float64)
        first_bias, vector = torch.randn(2, 6, generator=random, dtype=torch.float64)
        bias = torch.tensor(0.3, dtype=torch.float64)
        pairs = oracle.literal_edge_weight(prior, first, first_bias, vector, bias)
        index = torch.arange(12).expand(2, 12, 12)
        got = call(
            source=prior @ first[:, :8].T + first_bias,
            target=prior @ first[:, 8:].T,
            index=index,
            vector=vector,
            bias=bias,
        )
        torch.testing.assert_close(got, pairs, rtol=1e-9, atol=1e-12)

    @pytest.mark.promise("C9")
    def test_padding_has_weight_zero_and_no_gradient(self, call):
        prior = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
        index = ops.knn_graph(prior, (2, 3), 9, pad=True)
        mask = ops.padding_mask(index)
        source = torch.randn(1, 6, 5).requires_grad_()
        vector = torch.ones(5, requires_grad=True)
        inputs = {"source": source, "target": source.detach() + 0.3, "vector": vector, "bias": torch.zeros(())}
        weight = call(**inputs, index=index, mask=mask)
        assert (weight[~mask] == 0).all() and (weight[mask] > 0).all() and mask.sum() == 36
        (full,) = torch.autograd.grad(weight.sum(), vector)
        short = call(**inputs, index=index[..., :6])
        (plain,) = torch.autograd.grad(short.sum(), vector)
        torch.testing.assert_close(full, plain)

    def test_scores_are_a_mask(self, variant, call):
        inputs = self.inputs(variant)
        mask = inputs.pop("mask")
        score = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, -torch.inf)
        score[..., 0] = torch.where(mask[..., 0], torch.nan, score[..., 0])
        expected = run(self.subject, {**inputs, "mask": mask}, call)
        got = run(self.subject, {**inputs, "score": score}, call, expected["given"])
        for name, value in expected.items():
            assert torch.equal(got[name], value)

    @pytest.mark.promise("C11")
    @pytest.mark.parametrize("width", [3, 48])
    def test_a_masked_row_that_is_not_finite_stays_visible(self, width, call):
        source = torch.ones(1, 2, width)
        source[0, 1, 0] = torch.nan
        index = torch.tensor([[[0], [1]]])
        mask = torch.zeros(1, 2, 1, dtype=torch.bool)
        weight = call(
            source=source,
            target=torch.ones(1, 2, width),
            index=index,
            vector=torch.ones(width),
            bias=torch.zeros(()),
            mask=mask,
        )
        assert weight[0, 0, 0] == 0 and weight[0, 1, 0].isnan()

    @pytest.mark.promise("C3")
    @pytest.mark.parametrize("width", [3, 48])
    def test_a_hidden_unit_at_zero_has_no_slope(self, width, call):
        inputs = self.inputs({})
        inputs["source"] = torch.ones(*inputs["source"].shape[:2], width)
        inputs["target"], inputs["vector"] = -inputs["source"], torch.ones(width)
        grads = run(self.subject, inputs, call)
        assert (
            not any(grads[f"grad_{name}"].any() for name in ("source", "target", "vector")) and grads["grad_bias"] != 0
        )

    @pytest.mark.promise("C1")
    def test_slopes_of_small_weights_keep_their_digits(self, call):
        logit = torch.linspace(0.1, 80, 40)
        source = logit.view(1, -1, 1).requires_grad_()
        nodes = logit.numel()
        weight = call(
            source=source,
            target=torch.zeros(1, nodes, 1),
            index=torch.arange(nodes).view(1, nodes, 1),
            vector=-torch.ones(1),
            bias=torch.zeros(()),
        )
        (grad,) = torch.autograd.grad(weight.sum(), source)
        exact = -torch.sigmoid(-logit.double())
        torch.testing.assert_close(grad.flatten().double(), exact, rtol=16 * 2**-24, atol=0)

    @pytest.mark.promise("C5")
    def test_large_logits_do_not_overflow(self, call):
        logit = torch.tensor([-1e4, -88.0, -87.0, -20.0, 0.0, 19.9, 20.1, 1e4])
        source = logit.abs()[None, :, None].requires_grad_()
        vector = torch.ones(1)
        for sign in (1, -1):
            weight = call(
                source=source,
                target=torch.zeros(1, 8, 1),
                index=torch.arange(8).view(1, 8, 1),
                vector=sign * vector,
                bias=torch.zeros(()),
            )
            exact = torch.logaddexp(sign * source.detach().double(), torch.zeros((), dtype=torch.float64))
            torch.testing.assert_close(weight.detach().double(), exact, rtol=8 * 2**-24, atol=2e-38)
            (grad,) = torch.autograd.grad(weight.sum(), source)
            assert grad.isfinite().all()


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype, masked):
    for case in CASES[:3]:
        inputs = EDGE_WEIGHT.make_inputs(case, dtype)
        source = inputs["source"]
        forms = (source, source.mT.contiguous().mT, source.repeat(1, 1, 2)[..., ::2])
        for form in forms[: 3 if case is CASES[0] else 1]:
            args = [form, inputs["target"], inputs["index"], inputs["vector"], inputs["bias"]]
            args = [value.detach().requires_grad_() if value.is_floating_point() else value for value in args]
            mask = inputs["mask"] if masked else None
            opcheck(torch.ops.drseg.edge_weight.default, (*args, None, None, mask, "auto"))
        both = torch.cat([source, inputs["target"]], -1).requires_grad_()
        raw = (source[..., 0].to(torch.float64 if dtype == torch.float64 else torch.float32), source[0, 0].clone())
        args = (both, None, inputs["index"], inputs["vector"], inputs["bias"], *raw, mask, "auto")
        opcheck(torch.ops.drseg.edge_weight.default, args)


def test_rows_at_neighbours_are_those_of_clamped_indices():
    value, index = torch.arange(24.0).view(2, 4, 3), torch.tensor([[[-5, 0], [3, 4], [9, 1], [2, 3]]]).repeat(2, 1, 1)
    expected = torch.stack([rows[near] for rows, near in zip(value, index.clamp(0, 3), strict=True)])
    assert torch.equal(at_neighbour(value, index), expected)
