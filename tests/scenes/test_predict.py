# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.data.palette import palette
from drseg_core.errors import ConfigError, RasterError, ResourceError
from drseg_core.evaluation.inference import Predictor
from drseg_core.scenes.files import SceneFiles, check_outputs, scene_files
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.scenes.synthetic import write_synthetic_scene
from tests.evaluation.fake import COLORS, ColorModel, color_image

rasterio = pytest.importorskip("rasterio")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.transform import Affine, from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
torch.set_num_threads(1)
# in whatever language the system speaks
TOO_LONG = re.escape(os.strerror(errno.ENAMETOOLONG))
NAMES = list(COLORS)
NORTH_UP = from_origin(356000.25, 5645000.5, 0.5, 0.25)
WRITTEN = ["map.qml", "map.tif", "map.tif.aux.xml", "map_areas.csv", "map_overlay.png", "map_uncertainty.tif"]
# centred where no EPSG code is, on a sphere of no one else
ODD_CRS = "+proj=laea +lat_0=47.123 +lon_0=8.321 +x_0=1234.5 +y_0=-99 +R=6370123 +units=m +no_defs"


def predictor(mode: str = "tile", **options) -> Predictor:
    return Predictor(ColorModel(), NAMES, mode=mode, **{"tile_size": 32, "overlap": 8, **options})  # type: ignore[arg-type]


def truth(height: int = 50, width: int = 70) -> torch.Tensor:
    return torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(0))


def write(path: Path, data: np.ndarray, **profile) -> Path:
    gcps, tags = profile.pop("gcps", None), profile.pop("tags", {})
    profile |= {"driver": "GTiff", "count": len(data), "height": data.shape[1], "width": data.shape[2]}
    with rasterio.open(path, "w", dtype=data.dtype, **profile) as file:
        file.write(data)
        file.update_tags(**tags)
        if gcps:
            file.gcps = gcps
    return path


def read(path: Path):
    with rasterio.open(path) as file:
        return file.read(), file


def scaled(path: Path):
    """What the steps of a raster stand for; NaN where there is nothing."""
    with rasterio.open(path) as file:
        data = file.read()
        return np.where(data == file.nodata, np.nan, data * file.scales[0] + file.offsets[0]), file


def run(image: Path, out: Path, mode: str = "tile", **options) -> SceneFiles:
    return predict_scene(predictor(mode), image, out, progress=False, **options)


@pytest.mark.promise("C36")
@pytest.mark.parametrize("mode", ["whole", "tile"])
@pytest.mark.parametrize(
    "georeference",
    [
        {"crs": "EPSG:32632", "transform": NORTH_UP},
        {"crs": ODD_CRS, "transform": NORTH_UP},
        {"crs": "EPSG:25832", "transform": NORTH_UP @ Affine.rotation(30)},
        {"crs": "EPSG:32632", "transform": Affine(0.5, 0, 356000, 0, 0.5, 5645000)},
        {"crs": "EPSG:4326", "transform": from_origin(6.9, 50.9, 1 / 3e5, 1 / 3e5), "tags": {"AREA_OR_POINT": "Point"}},
        {"transform": NORTH_UP},
        {"crs": "EPSG:32632"},
        {},
    ],
    ids=["utm", "non_epsg", "rotated", "south_up", "point", "no_crs", "no_transform", "nothing"],
)
def test_grid_is_kept_exactly(tmp_path, georeference, mode):
    image = write(tmp_path / "in.tif", color_image(truth()).numpy(), **georeference)
    files = run(image, tmp_path / "out" / "map.tif", mode)
    assert files == scene_files(tmp_path / "out" / "map.tif")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == WRITTEN
    _, source = read(image)
    for path, dtype in ((files.classes, "uint8"), (files.uncertainty, "uint8")):
        data, result = read(path)
        assert result.crs == source.crs and (result.crs is None) == (source.crs is None)
        assert result.transform == source.transform and result.shape == source.shape
        assert result.dtypes == (dtype,) and result.tags().get("AREA_OR_POINT") == source.tags().get("AREA_OR_POINT")
    data, result = read(files.classes)
    assert np.array_equal(data[0], truth().numpy()) and result.nodata == 255
    uncertainty, result = scaled(files.uncertainty)
    # half a step of the range that it has
    assert np.allclose(uncertainty[0], color_image(truth())[0] / 255, atol=0.8 / 500 + 1e-6) and result.nodata == 255


def test_ground_control_points(tmp_path, caplog):
    points = [GroundControlPoint(r, c, 7.0 + c / 1e4, 50 - r / 1e4, 0) for r, c in [(0, 0), (0, 70), (50, 0), (50, 70)]]
    crs = rasterio.crs.CRS.from_epsg(4326)
    image = write(tmp_path / "in.tif", color_image(truth()).numpy(), gcps=(points, crs))
    with rasterio.open(run(image, tmp_path / "map.tif").classes) as result:
        kept, kept_crs = result.gcps
    assert kept_crs == crs and [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert not [record for record in caplog.records if record.name.startswith("rasterio")]


def test_names_and_colours(tmp_path):
    image = write(tmp_path / "in.tif", color_image(truth()).numpy())
    names = ["asphalt & tar", "Dächer", 'a "quoted" <tag>', "water"]
    files = run(image, tmp_path / "map.tif", class_names=names)
    with rasterio.open(files.classes) as result:
        table, tags = result.colormap(1), result.tags()
        assert result.colorinterp[0].name == "palette"
    assert [table[i][:3] for i in range(4)] == [tuple(c) for c in palette(4).tolist()]
    assert [tags[f"class_{i}"] for i in range(4)] == names and json.loads(tags["class_names"]) == names
    picture = np.array(Image.open(files.overlay))
    assert picture.shape[1] > 70 and picture.shape[2] == 3
    with pytest.raises(ConfigError, match="class_names do not fit; expected 4 names, got 3"):
        run(image, tmp_path / "other.tif", class_names=names[:3])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_images(tmp_path, suffix):
    label = truth(6, 9).repeat_interleave(16, 0).repeat_interleave(16, 1)
    Image.fromarray(color_image(label).permute(1, 2, 0).numpy()).save(tmp_path / f"in.{suffix}", quality=95)
    data, result = read(run(tmp_path / f"in.{suffix}", tmp_path / "map.tif").classes)
    assert (data[0] == label.numpy()).mean() > 0.99 and result.crs is None
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".xml"] == ["map.tif.aux.xml"]


@pytest.mark.promise("C36")
@pytest.mark.parametrize("mode", ["whole", "tile"])
@pytest.mark.parametrize("size", [(5, 90), (33, 32), (1, 1), (64, 64), (40, 7)])
def test_any_size_every_pixel_once(tmp_path, size, mode):
    label = truth(*size)
    data, _ = read(run(write(tmp_path / "in.tif", color_image(label).numpy()), tmp_path / "map.tif", mode).classes)
    assert np.array_equal(data[0], label.numpy())


@pytest.mark.promise("C36")
def test_nodata_becomes_255(tmp_path):
    image = color_image(truth()).numpy()
    image[:, :7] = 0
    image[0, 20, 20] = 0
    files = run(write(tmp_path / "in.tif", image, nodata=0), tmp_path / "map.tif")
    data, _ = read(files.classes)
    uncertainty, _ = scaled(files.uncertainty)
    assert (data[0, :7] == 255).all() and not (data[0, 7:] == 255).any()
    assert np.isnan(uncertainty[0, :7]).all() and np.isfinite(uncertainty[0, 7:]).all()
    alpha = np.concatenate([color_image(truth()).numpy(), np.full((1, 50, 70), 255, np.uint8)])
    alpha[3, :, :5] = 0
    image_path = write(tmp_path / "alpha.tif", alpha, photometric="RGB", alpha="yes")
    data, _ = read(run(image_path, tmp_path / "map_alpha.tif").classes)
    assert (data[0, :, :5] == 255).all() and np.array_equal(data[0, :, 5:], truth().numpy()[:, 5:])


@pytest.mark.promise("C36")
@pytest.mark.parametrize("kind", ["uint16", "float32", "int16"])
def test_other_types_are_stretched_once_per_scene(tmp_path, kind):
    label = truth()
    image = color_image(label).numpy().astype(np.float64) * 11 + 500
    image = np.concatenate([image, image[:1] * 3]).astype(kind)
    image[:, :6] = 0
    if kind == "float32":
        image[1, 10, 10] = np.nan
        image[2, 11, 11] = np.inf
    data, _ = read(run(write(tmp_path / "in.tif", image, nodata=0), tmp_path / "map.tif").classes)
    expected = label.numpy().copy()
    expected[:6] = 255
    if kind == "float32":
        expected[10, 10] = expected[11, 11] = 255
    assert np.array_equal(data[0], expected)


def test_bands(tmp_path):
    image = color_image(truth()).numpy()
    path = write(tmp_path / "in.tif", np.concatenate([image[:1] // 2, image[::-1]]))
    data, _ = read(run(path, tmp_path / "map.tif", bands=(4, 3, 2)).classes)
    assert np.array_equal(data[0], truth().numpy())
    for bands in ((0, 1, 2), (1, 2), (1, 2, 5)):
        with pytest.raises(ConfigError, match=r"bands do not fit .*; expected one or three numbers from 1 to 4"):
            run(path, tmp_path / "other.tif", bands=bands)
    two = write(tmp_path / "two.tif", image[:2])
    with pytest.raises(ConfigError, match="bands are not given"):
        run(two, tmp_path / "other.tif")
    assert not list(tmp_path.glob("*other*"))
    run(two, tmp_path / "other.tif", bands=[2])


def test_one_band_and_palette(tmp_path):
    gray = write(tmp_path / "gray.tif", np.full((1, 20, 20), 20, np.uint8))
    assert not read(run(gray, tmp_path / "map.tif").classes)[0].any()
    colored = Image.fromarray(truth(20, 20).numpy().astype(np.uint8), mode=None).convert("P")
    colored.putpalette([round(v * 255) for c in COLORS.values() for v in c])
    colored.save(tmp_path / "palette.png")
    data, _ = read(run(tmp_path / "palette.png", tmp_path / "map2.tif").classes)
    assert np.array_equal(data[0], truth(20, 20).numpy())
    # GDAL takes one transparent colour for nodata, of several it says nothing
    for alphas in ([0, 255], [0, 255, 0]):
        colored.save(tmp_path / "palette.png", transparency=bytes(alphas))
        data, _ = read(run(tmp_path / "palette.png", tmp_path / "map2.tif", overwrite=True).classes)
        hidden = np.isin(truth(20, 20).numpy(), np.flatnonzero(np.array(alphas) == 0))
        assert np.array_equal(data[0], np.where(hidden, 255, truth(20, 20).numpy())) and hidden.any()


def test_outputs_are_refused_before_reading(tmp_path):
    image = write(tmp_path / "map.tif", color_image(truth()).numpy())
    before = image.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="out is the scene itself") as caught:
            run(image, image, overwrite=overwrite)
        assert caught.value.exit_code == 2
    (tmp_path / "link.tif").symlink_to(image)
    with pytest.raises(ConfigError, match="out is the scene itself"):
        run(image, tmp_path / "link.tif", overwrite=True)
    uncertainty = write(tmp_path / "a_uncertainty.tif", color_image(truth()).numpy())
    with pytest.raises(ConfigError, match="out is the scene itself"):
        run(uncertainty, tmp_path / "a.tif", overwrite=True)
    assert image.read_bytes() == before
    with pytest.raises(ConfigError, match="wrong suffix; expected a path ending in .tif, got .*map.png"):
        run(image, tmp_path / "map.png")
    for taken in ("out.tif", "out_overlay.png", "out_uncertainty.tif"):
        (tmp_path / taken).write_text("mine")
        # the scene does not exist: the output is what is looked at first
        for call in (run, check_outputs):
            with pytest.raises(ConfigError, match=f"{taken} exists; expected a new path, or overwrite"):
                call(tmp_path / "nowhere.tif", tmp_path / "out.tif")
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(ConfigError, match="folder.tif exists"):
        run(image, tmp_path / "folder.tif", overwrite=True)
    with pytest.raises(ConfigError, match="cannot be written; expected a folder"):
        run(image, image / "below" / "out.tif")
    run(image, tmp_path / "out.tif")
    run(image, tmp_path / "out.tif", overwrite=True)


def failing(image: Path, out: Path, message: str, **options) -> None:
    """Refused in one line, and nothing is left."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(RasterError, match=message) as caught:
        run(image, out, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert sorted(out.parent.iterdir()) == before


def test_not_a_scene(tmp_path):
    failing(tmp_path / "nowhere.tif", tmp_path / "map.tif", "nowhere.tif is not a file")
    failing(tmp_path, tmp_path / "map.tif", "is not a file")
    for content, shown in ((b"", "empty file"), (b"<html>404</html>", "b'<html>404")):
        (tmp_path / "in.tif").write_bytes(content)
        failing(tmp_path / "in.tif", tmp_path / "map.tif", f"in.tif is not an image that GDAL.*first bytes.*{shown}")
    image = write(tmp_path / "complex.tif", np.ones((3, 20, 20), np.complex64))
    failing(image, tmp_path / "map.tif", "complex.tif has complex bands")


NOISE = np.random.default_rng(0).integers(0, 256, size=(3, 128, 160), dtype=np.uint8)


@pytest.mark.promise("C36")
@pytest.mark.parametrize(
    "profile", [{}, {"compress": "deflate"}, {"compress": "lzw", "tiled": True, "blockxsize": 32, "blockysize": 32}]
)
@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_truncated_tiff(tmp_path, profile, mode):
    image = write(tmp_path / "in.tif", NOISE, **profile)
    data = image.read_bytes()
    for share in (0.3, 0.9):
        image.write_bytes(data[: int(len(data) * share)])
        failing(image, tmp_path / "map.tif", r"in.tif is (damaged or incomplete|not an image)", mode=mode)
    image.write_bytes(data)
    run(image, tmp_path / "map.tif", mode)


@pytest.mark.promise("C36")
def test_corrupt_tile_in_the_middle(tmp_path):
    image = write(tmp_path / "in.tif", NOISE, compress="deflate", tiled=True, blockxsize=32, blockysize=32)
    data = bytearray(image.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    image.write_bytes(data)
    failing(image, tmp_path / "map.tif", r"in.tif is damaged or incomplete; expected to decode rows \d+ to \d+")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_plain_images(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(NOISE.transpose(1, 2, 0)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    failing(path, tmp_path / "map.tif", f"in.{suffix} is (damaged|not an image)")
    path.write_bytes(data)
    run(path, tmp_path / "map.tif")


@pytest.mark.promise("C36")
def test_mosaic_with_a_missing_member(tmp_path):
    member = write(tmp_path / "member.tif", NOISE, crs="EPSG:32632", transform=NORTH_UP)
    band = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource><SourceFilename relativeToVRT="1">member.tif'
        f"</SourceFilename><SourceBand>{i}</SourceBand></SimpleSource></VRTRasterBand>"
        for i in (1, 2, 3)
    )
    path = tmp_path / "scene.vrt"
    path.write_text(f'<VRTDataset rasterXSize="160" rasterYSize="128">{band}</VRTDataset>')
    whole, _ = read(run(path, tmp_path / "good.tif").classes)
    assert np.array_equal(whole, read(run(member, tmp_path / "same.tif").classes)[0])
    member.unlink()
    failing(path, tmp_path / "map.tif", "scene.vrt is (damaged|not an image).*member.tif")


@pytest.mark.promise("C36")
def test_full_disk(tmp_path, monkeypatch):
    # Python leaves what it compiled cut short there, for all that import it later
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    image = write(tmp_path / "in.tif", np.tile(NOISE, (1, 3, 3)))
    (tmp_path / "map.tif").write_text("before")
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for allowed in (1000, 30_000, 200_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
            with pytest.raises(ResourceError, match=r"map\S* cannot be written") as caught:
                run(image, tmp_path / "map.tif", overwrite=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "\n" not in str(caught.value) and caught.value.exit_code == 7
            assert sorted(tmp_path.iterdir()) == before and (tmp_path / "map.tif").read_text() == "before"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    run(image, tmp_path / "map.tif", overwrite=True)


@pytest.mark.promise("C36")
def test_model_that_fails_leaves_nothing(tmp_path):
    image = write(tmp_path / "in.tif", color_image(truth()).numpy())
    broken = predictor()
    calls = 0
    forward = broken.model.forward

    def stop(*args):
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return forward(*args)

    broken.model.forward = stop
    with pytest.raises(KeyboardInterrupt):
        predict_scene(broken, image, tmp_path / "map.tif", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in.tif"]


def test_large_scenes_get_a_reduced_overlay(tmp_path):
    image = write(tmp_path / "in.tif", color_image(truth(90, 70)).numpy())
    picture = np.array(Image.open(run(image, tmp_path / "map.tif", overlay_side=30).overlay))
    with open_scene(image) as scene:
        expected = scene.rows(0, 90)[0].numpy()[:, ::3, ::3]
    assert picture.shape[0] >= 30
    assert np.abs(picture[:30, :24].astype(int) - expected.transpose(1, 2, 0)).mean() < 100


@pytest.mark.parametrize("options", [{}, {"dtype": "uint16", "bands": 4, "collar": 12, "crs": ODD_CRS}])
def test_synthetic_scene(tmp_path, options):
    path = write_synthetic_scene(tmp_path / "s.tif", width=150, height=90, mask_path=tmp_path / "m.tif", **options)
    data, source = read(path)
    mask, target = read(tmp_path / "m.tif")
    assert source.shape == (90, 150) == target.shape and source.transform == target.transform
    assert source.crs == target.crs and source.crs and set(np.unique(mask)) <= {*range(37), 255}
    assert (mask[0] == 255).sum() == (90 * 150 - 66 * 126 if options else 0)
    result, file = read(run(path, tmp_path / "map.tif").classes)
    assert np.array_equal(result == 255, mask == 255) and file.crs == source.crs


def test_real_image(tmp_path):
    image = Path(__file__).parents[2].parent / "shared" / "data" / "oem_koeln_50.tif"
    if not image.exists():
        pytest.skip(f"{image.name} is not here: it is a real aerial image that is not part of this project")
    model = Predictor(ColorModel(bias=200.0), NAMES, mode="tile", tile_size=384, overlap=128)
    files = predict_scene(model, image, tmp_path / "map.tif", progress=False)
    with rasterio.open(image) as source, rasterio.open(files.classes) as result:
        assert result.crs == source.crs and result.transform == source.transform and result.shape == source.shape
        assert not result.read().any()
    with open_scene(image) as scene:
        for _, band in model.rows(lambda a, b: scene.rows(a, b)[0], scene.height, scene.width):
            assert torch.all(band.score == 1)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500])
def test_long_path(tmp_path, name):
    with pytest.raises(RasterError, match=f"cannot be opened: {TOO_LONG}") as caught:
        run(tmp_path / name, tmp_path / "map.tif")
    assert caught.value.exit_code == 3
    with pytest.raises(RasterError, match=f"cannot be opened: {TOO_LONG}"), open_scene(tmp_path / name):
        pass
    image = write(tmp_path / "in.tif", color_image(truth()).numpy())
    with pytest.raises(ConfigError, match=f"cannot be written: {TOO_LONG}"):
        check_outputs(image, tmp_path / name / "map.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["in.tif"]


def test_program_named_png_is_no_image(tmp_path):
    path = tmp_path / "in.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n")
    with pytest.raises(RasterError, match="in.png is not an image"):
        run(path, tmp_path / "map.tif")
