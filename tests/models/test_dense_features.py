# SPDX-License-Identifier: Apache-2.0
"""Every variant against its formula: head by head, token by token, on open_clip's own weights in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.models.clip import VisionTower
from drseg_core.models.dense_features import (
    VARIANTS,
    DenseOptions,
    dense_features,
    neighbourhood,
    prior_attention,
)

WIDTH, HEAD, PATCH = 32, 8, 8
HEADS = WIDTH // HEAD
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 40, "layers": 3, "width": WIDTH, "patch_size": PATCH, "head_width": HEAD},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
GRIDS = [(5, 5), (4, 6), (1, 3)]


@pytest.fixture(scope="module")
def visual() -> Any:
    """open_clip's image tower with weights all of which matter."""
    from open_clip.model import CLIP

    torch.manual_seed(3)
    found = CLIP(**copy.deepcopy(ARCHITECTURE)).visual.double().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            # attention that is far from uniform
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def tower(visual: Any) -> VisionTower:
    return VisionTower(copy.deepcopy(visual)).double().eval().requires_grad_(False)


def pixels(grid: tuple[int, int] = (5, 5), batch: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    size = (batch, 3, grid[0] * PATCH, grid[1] * PATCH)
    return torch.randn(size, generator=random, dtype=torch.float64)


def prior_of(grid: tuple[int, int], batch: int = 2, channels: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(9)
    return torch.randn(batch, channels, *grid, generator=random, dtype=torch.float64) + 0.2


# the literal restatement


@torch.no_grad()
def entering(visual: Any, image: Tensor) -> NDArray:
    """Tokens (B, 1 + N, width) that enter the last block, by open_clip's own modules."""
    patches = visual.conv1(image)
    grid = patches.shape[2:]
    table = visual.positional_embedding[1:].reshape(*visual.grid_size, WIDTH).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    place = torch.cat([visual.positional_embedding[:1], table])
    start = visual.class_embedding.expand(len(image), 1, WIDTH)
    x = visual.ln_pre(torch.cat([start, patches.flatten(2).transpose(1, 2)], dim=1) + place)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x.numpy()


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    power = [math.exp(value - top) for value in row]
    return [value / sum(power) for value in power]


def attended(score: NDArray, value: NDArray) -> NDArray:
    """Each row's softmax of scores, -inf included, over the values."""
    return np.array([sum(w * v for w, v in zip(softmax(list(row)), value, strict=True)) for row in score])


def gaussian(grid: tuple[int, int], sigma: float) -> NDArray:
    """NACLIP's addition: nothing to or from the class token."""
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    found = np.zeros((len(cells) + 1, len(cells) + 1))
    for i, (a, b) in enumerate(cells):
        for j, (c, d) in enumerate(cells):
            found[i + 1, j + 1] = math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * sigma**2))
    return found


def proxy_score(prior: NDArray, beta: float, gamma: float) -> NDArray:
    """ProxyCLIP's masked scores of one image's features (D, N)."""
    count = prior.shape[1]
    cosine = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            length = np.linalg.norm(prior[:, i]) * np.linalg.norm(prior[:, j])
            cosine[i, j] = prior[:, i] @ prior[:, j] / length
    score = (cosine - beta * sum(cosine.ravel()) / count**2) * gamma
    score[score < 0] = -np.inf
    return score


def resized(value: NDArray, grid: tuple[int, int], size: tuple[int, int]) -> NDArray:
    """Tokens (N, width) of a grid to another, bilinear between the centres of cells."""
    found = []
    for y in range(size[0]):
        for x in range(size[1]):
            place = []
            for p, old, new in ((y, grid[0], size[0]), (x, grid[1], size[1])):
                at = max((p + 0.5) * old / new - 0.5, 0.0)
                low = min(int(at), old - 1)
                place.append((low, min(low + 1, old - 1), at - low))
            (y0, y1, fy), (x0, x1, fx) = place
            at = [value[r * grid[1] + c] for r, c in ((y0, x0), (y0, x1), (y1, x0), (y1, x1))]
            found.append((1 - fy) * ((1 - fx) * at[0] + fx * at[1]) + fy * ((1 - fx) * at[2] + fx * at[3]))
    return np.array(found)


@torch.no_grad()
def literal(
    visual: Any, image: Tensor, variant: str, prior: Tensor | None = None, options: DenseOptions | None = None
) -> Tensor:
    options = options or DenseOptions()
    grid = (image.shape[2] // PATCH, image.shape[3] // PATCH)
    size = grid if prior is None else (prior.shape[2], prior.shape[3])
    block = visual.transformer.resblocks[-1]
    weight, bias = block.attn.in_proj_weight.numpy(), block.attn.in_proj_bias.numpy()
    scale = HEAD**-0.5
    images = []
    for number, x in enumerate(entering(visual, image)):
        y = block.ln_1(torch.from_numpy(x)).numpy()
        q, k, v = (y @ weight[p * WIDTH : (p + 1) * WIDTH].T + bias[p * WIDTH : (p + 1) * WIDTH] for p in range(3))
        heads = []
        for head in range(HEADS):
            own = slice(head * HEAD, (head + 1) * HEAD)
            qh, kh, vh = q[:, own], k[:, own], v[:, own]
            if variant in ("value", "maskclip", "value_residual"):
                mixed = vh
            elif variant == "sclip":
                mixed = attended(scale * qh @ qh.T, vh) + attended(scale * kh @ kh.T, vh)
            elif variant == "clearclip":
                mixed = attended(scale * qh @ qh.T, vh)
            elif variant == "naclip":
                mixed = attended(scale * kh @ kh.T + gaussian(grid, options.sigma), vh)
            elif variant == "segearth":
                mixed = sum(attended(scale * part @ part.T, vh) for part in (qh, kh, vh))
            else:
                score = proxy_score(prior[number].flatten(1).numpy(), options.beta, options.gamma)
                mixed = attended(score, resized(vh[1:], grid, size))
            heads.append(mixed)
        out = torch.from_numpy(np.concatenate(heads, axis=1))
        token = out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        if variant in ("maskclip", "sclip"):
            token = torch.from_numpy(x) + token
            token = token + block.mlp(block.ln_2(token))
        if variant == "value_residual":
            token = torch.from_numpy(x[:1]) + token
            token = token + block.mlp(block.ln_2(token))
        joint = (visual.ln_post(token) @ visual.proj).numpy()
        joint = np.array([row / math.sqrt(sum(row**2)) for row in joint])
        if variant == "segearth":
            joint = joint[1:] - options.class_share * joint[0]
        elif variant != "proxyclip":
            joint = joint[1:]
        images.append(joint.T.reshape(-1, *size))
    return torch.from_numpy(np.stack(images))


def given(variant: str, grid: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    return {"prior": prior_of(grid, batch)} if variant == "proxyclip" else {}


# every variant is its formula


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_its_formula(visual: Any, tower: VisionTower, variant: str, grid: tuple[int, int]) -> None:
    image, prior = pixels(grid), given(variant, grid)
    found = dense_features(tower, image, variant, **prior)
    torch.testing.assert_close(found, literal(visual, image, variant, **prior), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("naclip", DenseOptions(sigma=0.8)),
        ("proxyclip", DenseOptions(beta=0.4, gamma=9.0)),
        ("proxyclip", DenseOptions(beta=0.0)),
        ("segearth", DenseOptions(class_share=0.0)),
        ("segearth", DenseOptions(class_share=1.7)),
    ],
)
def test_options_are_those_of_the_formula(visual: Any, tower: VisionTower, variant: str, options: DenseOptions) -> None:
    image, prior = pixels(), given(variant, (5, 5))
    found = dense_features(tower, image, variant, options=options, **prior)
    torch.testing.assert_close(found, literal(visual, image, variant, options=options, **prior), rtol=1e-9, atol=1e-11)
    default = dense_features(tower, image, variant, **prior)
    assert (found - default).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(10, 10), (7, 4), (3, 3)])
def test_proxyclip_lies_on_the_grid_of_its_prior(visual: Any, tower: VisionTower, size: tuple[int, int]) -> None:
    image, prior = pixels((4, 6)), prior_of(size)
    found = dense_features(tower, image, "proxyclip", prior=prior)
    assert found.shape == (2, 12, *size)
    torch.testing.assert_close(found, literal(visual, image, "proxyclip", prior), rtol=1e-9, atol=1e-11)


def test_variants_differ_from_each_other(tower: VisionTower) -> None:
    """What a restatement could not see: a table that gives two names one meaning."""
    image = pixels()
    found = {variant: dense_features(tower, image, variant, **given(variant, (5, 5))) for variant in VARIANTS}
    for one in VARIANTS:
        for other in VARIANTS:
            assert one == other or (found[one] - found[other]).abs().max() > 1e-2, (one, other)


def test_restatements_see_small_faults(visual: Any, tower: VisionTower) -> None:
    """The formulas with one thing wrong are far from what is computed."""
    image = pixels()
    scaled = copy.deepcopy(visual)
    with torch.no_grad():
        scaled.transformer.resblocks[-1].attn.in_proj_weight[:WIDTH] *= 2**-0.25
    assert (dense_features(tower, image, "clearclip") - literal(scaled, image, "clearclip")).abs().max() > 1e-3
    bare = copy.deepcopy(visual)
    with torch.no_grad():
        bare.transformer.resblocks[-1].mlp[-1].weight.zero_()
    assert (dense_features(tower, image, "sclip") - literal(bare, image, "sclip")).abs().max() > 1e-2


# invariances


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_its_images_one_by_one(tower: VisionTower, variant: str) -> None:
    image, prior = pixels((4, 6), batch=3), given(variant, (4, 6), batch=3)
    together = dense_features(tower, image, variant, **prior)
    for b in range(3):
        alone = dense_features(
            tower, image[b : b + 1], variant, **{name: part[b : b + 1] for name, part in prior.items()}
        )
        torch.testing.assert_close(together[b : b + 1], alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_have_length_one_but_for_the_class_tokens_share(tower: VisionTower, variant: str) -> None:
    found = dense_features(tower, pixels(), variant, options=DenseOptions(class_share=0.0), **given(variant, (5, 5)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 5, 5, dtype=torch.float64))


def test_a_constant_prior_gives_every_patch_the_mean(visual: Any, tower: VisionTower) -> None:
    image = pixels()
    prior = torch.tensor([0.3, -2.0, 0.1, 1.0], dtype=torch.float64).view(1, 4, 1, 1).expand(2, 4, 5, 5)
    for beta in (0.0, 0.9, 1.0, 1.2, 50.0):
        found = dense_features(tower, image, "proxyclip", prior=prior, options=DenseOptions(beta=beta))
        assert found.isfinite().all()
        block = visual.transformer.resblocks[-1]
        y = block.ln_1(torch.from_numpy(entering(visual, image)))[:, 1:].mean(dim=1)
        value = F.linear(y, block.attn.in_proj_weight[2 * WIDTH :], block.attn.in_proj_bias[2 * WIDTH :])
        expected = F.normalize(visual.ln_post(block.attn.out_proj(value)) @ visual.proj, dim=-1).detach()
        torch.testing.assert_close(found, expected[:, :, None, None].expand_as(found))


def test_a_prior_of_unlike_patches_leaves_each_its_own_value(tower: VisionTower) -> None:
    image = pixels()
    prior = torch.eye(25, dtype=torch.float64).view(1, 25, 5, 5).expand(2, 25, 5, 5)
    found = dense_features(tower, image, "proxyclip", prior=prior)
    torch.testing.assert_close(found, dense_features(tower, image, "value"))


def test_the_length_of_a_prior_does_not_matter(tower: VisionTower) -> None:
    image, prior = pixels(), prior_of((5, 5))
    found = dense_features(tower, image, "proxyclip", prior=prior)
    torch.testing.assert_close(dense_features(tower, image, "proxyclip", prior=7 * prior), found)
    # each image by its own mean
    mixed = torch.cat([prior[:1], prior[1:] + 5])
    torch.testing.assert_close(dense_features(tower, image, "proxyclip", prior=mixed)[:1], found[:1])


def test_patches_that_are_masked_are_not_seen() -> None:
    prior = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]).T.reshape(1, 2, 1, 3)
    found = prior_attention(prior)[0]
    assert (found[:2, 2] == 0).all() and (found[2, :2] == 0).all() and found[2, 2] == 1
    torch.testing.assert_close(found.sum(-1), torch.ones(3))


def test_the_neighbourhood_is_symmetric_and_leaves_the_class_token_out() -> None:
    found = neighbourhood((3, 4), 2.0)
    assert torch.equal(found, found.T)
    assert (found[0] == 0).all() and (found[1:, 1:].diagonal() == 1).all()
    np.testing.assert_allclose(found.numpy(), gaussian((3, 4), 2.0), rtol=1e-14)


def test_single_precision_is_near(tower: VisionTower) -> None:
    single = copy.deepcopy(tower).float()
    for variant in VARIANTS:
        prior = given(variant, (5, 5))
        wide = dense_features(tower, pixels(), variant, **prior)
        near = {name: part.float() for name, part in prior.items()}
        found = dense_features(single, pixels().float(), variant, **near)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tower: dense_features(tower, pixels(), "best"), "variant is unknown"),
        (lambda tower: dense_features(tower, pixels()[:, :, :-1], "sclip"), "pixels have a wrong shape"),
        (lambda tower: dense_features(tower, pixels()[0], "sclip"), "pixels have a wrong shape"),
        (lambda tower: dense_features(tower, pixels()[:, :, :0], "sclip"), "pixels have a wrong shape"),
        (lambda tower: dense_features(tower, pixels(), "proxyclip"), "prior does not fit proxyclip"),
        (lambda tower: dense_features(tower, pixels(), "sclip", prior=prior_of((5, 5))), "prior does not fit sclip"),
        (lambda tower: dense_features(tower, pixels(), "proxyclip", prior=prior_of((5, 5), 1)), "prior has a wrong"),
        (lambda tower: DenseOptions(sigma=0.0), "sigma is out of range"),
        (lambda tower: DenseOptions(beta=-1.0), "beta is out of range"),
        (lambda tower: DenseOptions(class_share=math.nan), "class_share is out of range"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(tower: VisionTower, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(tower)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value) and "got" in str(caught.value)
