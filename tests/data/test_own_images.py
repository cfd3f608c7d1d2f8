# SPDX-License-Identifier: Apache-2.0
"""A user's own images are read as scenes are: the same types, bands, nodata and scale."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drseg_core.config.reading import Reading, choose_reading, parse_bands, parse_reading, parse_scale, scale_text
from drseg_core.config.schema import ReadingConfig
from drseg_core.data import open_dataset
from drseg_core.data.check import check_data
from drseg_core.data.folder import FolderDataset
from drseg_core.data.images import read_image
from drseg_core.data.own_images import read_rgb
from drseg_core.data.prepare.strips import open_strips
from drseg_core.data.values import extreme_value
from drseg_core.errors import ConfigError, DatasetError, RasterError
from drseg_core.scenes.reader import describe, open_scene
from tests.data.test_images import write_png

rasterio = pytest.importorskip("rasterio")
from rasterio import shutil  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(1, 256, size=(3, 20, 30)).astype(np.uint8)


def write(path: Path, data: np.ndarray, colors=None, descriptions=None, **profile) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(data), "height": data.shape[1], "width": data.shape[2], **profile}
    with rasterio.open(path, "w", dtype=data.dtype, **profile) as file:
        if colors:
            file.colorinterp = [ColorInterp[color] for color in colors]
        file.write(data)
        for band, text in enumerate(descriptions or (), 1):
            file.set_band_description(band, text)
    return path


def folder(root: Path, images: list[np.ndarray], **options) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("field\nroad\n")
    for number, data in enumerate(images):
        write(root / f"train/images/{number}.tif", data, **options)
        (root / "train/masks").mkdir(exist_ok=True)
        halves = np.indices(data.shape[1:])[1] >= data.shape[2] // 2
        Image.fromarray(halves.astype(np.uint8)).save(root / f"train/masks/{number}.png")
    return root


KINDS = {
    "uint8": (PIXELS, {}),
    "uint16": (PIXELS.astype(np.uint16) * 40 + 300, {}),
    "int16_nodata": (np.where(PIXELS < 60, -9999, PIXELS).astype(np.int16), {"nodata": -9999}),
    "float32": (PIXELS / np.float32(255), {}),
    "one_band": (PIXELS[:1].astype(np.uint16), {}),
    "bgr": (PIXELS[::-1].copy(), {"colors": ["blue", "green", "red"]}),
    "sentinel": (
        np.concatenate([PIXELS[::-1], PIXELS[:1]]).astype(np.uint16),
        {"descriptions": ["B02", "B03", "B04", "B08"]},
    ),
    "five": (np.concatenate([PIXELS, PIXELS[:2]]), {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reading", [Reading(), Reading(scale=((10.0, 200.0),)), Reading(measure=True)])
def test_a_set_and_a_scene_give_the_same_pixels(tmp_path, kind, reading):
    data, options = KINDS[kind]
    path = write(tmp_path / "in.tif", data, **options)
    found = read_rgb(path, reading, max_pixels=10_000)
    with open_scene(path, reading=reading) as scene:
        image, valid = scene.rows(0, scene.height)
    assert np.array_equal(found.image.transpose(2, 0, 1), image.numpy())
    assert np.array_equal(valid, np.ones_like(valid) if found.valid is None else found.valid)


@pytest.mark.parametrize("kind", ["bgr", "sentinel"])
def test_red_green_and_blue_are_where_the_file_says(tmp_path, kind):
    data, options = KINDS[kind]
    with open_scene(write(tmp_path / "in.tif", data, **options), reading=Reading(scale=((0.0, 255.0),))) as scene:
        assert scene.bands == (3, 2, 1) and scene.band_warning() is None
        assert np.array_equal(scene.rows(0, 20)[0].numpy(), PIXELS)


@pytest.mark.parametrize(
    "descriptions, bands",
    [
        (["blue", "green", "red", "nir"], (3, 2, 1)),
        (["Red Edge 1", "Red", "Green", "Blue"], (2, 3, 4)),
        (["B4", "B3", "B2", "B8"], (1, 2, 3)),
        (["SR_B2", "SR_B3", "SR_B4", "SR_B5"], (3, 2, 1)),
        (["B04, central wavelength 665 nm", "B03, 560 nm", "B02, 490 nm", "B08"], (1, 2, 3)),
    ],
)
def test_bands_by_their_descriptions(tmp_path, descriptions, bands):
    path = write(tmp_path / "in.tif", np.ones((4, 5, 6), np.uint16), descriptions=descriptions)
    with open_scene(path) as scene:
        assert scene.bands == bands


@pytest.mark.promise("C49")
def test_bands_without_a_hint_are_named(tmp_path, caplog):
    path = write(tmp_path / "in.tif", np.ones((4, 5, 6), np.uint16))
    with open_scene(path) as scene:
        assert scene.bands == (1, 2, 3)
        assert scene.band_warning() == (
            "in.tif: nothing says which of the 4 bands are red, green and blue; --bands R,G,B does"
        )
    with open_scene(path, bands=(4, 3, 2)) as scene:
        assert scene.band_warning() is None and scene.band_source == "as given"
    wrong = write(tmp_path / "wrong.tif", np.ones((3, 5, 6), np.uint8), descriptions=["B02", "B03", "B04"])
    with open_scene(wrong) as scene:
        assert scene.bands == (1, 2, 3) and "--bands 3,2,1 takes them" in (scene.band_warning() or "")


@pytest.mark.promise("C36")
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_two_percent_at_either_end_are_left_out(tmp_path, kind):
    # of the values 0 to 200 the second and the 98th percentile are 4 and 196
    data = np.tile(RNG.permutation(201).reshape(1, 3, 67), (3, 1, 1)).astype(kind)
    path = write(tmp_path / "in.tif", data)
    expected = np.rint(np.clip((data.astype(float) - 4) / 192, 0, 1) * 255)
    with open_scene(path, reading=Reading(measure=True)) as scene:
        assert scene.pairs() == [(4.0, 196.0)] * 3
        assert np.array_equal(scene.rows(0, 3)[0].numpy(), expected)
    assert np.array_equal(read_rgb(path, Reading(measure=True), max_pixels=1000).image.transpose(2, 0, 1), expected)


def test_the_scale_of_a_set_is_measured_once(tmp_path, caplog):
    dark, bright = (RNG.integers(low, low + 500, size=(3, 40, 40)).astype(np.uint16) for low in (100, 2000))
    with caplog.at_level(logging.INFO, "drseg_core"):
        data = FolderDataset(folder(tmp_path / "set", [dark, bright]))
    both = np.concatenate([dark.reshape(3, -1), bright.reshape(3, -1)], 1).astype(np.float32)
    expected = np.percentile(both, (2, 98), axis=1).T
    assert np.allclose(parse_scale(data.reading.scale), expected, rtol=1e-6) and data.reading.depth == "uint16"
    assert "uint16 scaled by" in caplog.text and "2 images" in caplog.text
    # a dark image stays dark
    assert data[0].image.float().mean() < 60 and data[1].image.float().mean() > 180
    again = FolderDataset(tmp_path / "set", reading=data.reading)
    assert again.reading == data.reading and bool((again[0].image == data[0].image).all())


def test_eight_bits_stay_what_they_are(tmp_path):
    data = FolderDataset(folder(tmp_path / "set", [PIXELS]))
    assert data.reading == ReadingConfig() and np.array_equal(data[0].image.numpy(), PIXELS)
    # the scale of a run of other images is not for these
    other = ReadingConfig(scale="300,9000", depth="uint16")
    data = FolderDataset(tmp_path / "set", reading=other)
    assert data.reading.scale is None and np.array_equal(data[0].image.numpy(), PIXELS)
    # unless it is given
    given = choose_reading(other, ReadingConfig(scale="0,510"))
    assert FolderDataset(tmp_path / "set", reading=given)[0].image.max() == 128


def test_pixels_without_data_are_not_trained_on(tmp_path):
    data, options = KINDS["int16_nodata"]
    data = data.copy()
    data[:, :7] = -9999
    mask = FolderDataset(folder(tmp_path / "a", [data], **options))[0].mask
    assert bool((mask[:7] == 255).all()) and int((mask != 255).sum()) == int((data != -9999).any(0).sum())
    mask = FolderDataset(folder(tmp_path / "b", [data]), reading=ReadingConfig(nodata=-9999))[0].mask
    assert int((mask != 255).sum()) == int((data != -9999).any(0).sum())
    clear = np.concatenate([PIXELS, np.full((1, 20, 30), 255, np.uint8)]).transpose(1, 2, 0)
    clear[:3, :, 3] = 0
    clear[5:7, :, :3] = 0
    (tmp_path / "c/train/masks").mkdir(parents=True)
    (tmp_path / "c/train/images").mkdir()
    (tmp_path / "c/classes.txt").write_text("field\n")
    Image.fromarray(clear).save(tmp_path / "c/train/images/0.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "c/train/masks/0.png")
    mask = FolderDataset(tmp_path / "c")[0].mask
    assert bool((mask[:3] == 255).all()) and not bool((mask[3:] == 255).any())
    # neither what is clear nor what has the value
    rows = (FolderDataset(tmp_path / "c", reading=ReadingConfig(nodata=0))[0].mask == 255).all(1)
    assert rows.nonzero().flatten().tolist() == [0, 1, 2, 5, 6]


@pytest.mark.promise("C49")
@pytest.mark.parametrize("value, kind", [(0, np.uint16), (65535, np.uint16), (-9999, np.int16), (-9999, np.float32)])
def test_nodata_that_nobody_declared_is_named(tmp_path, caplog, value, kind):
    data = RNG.integers(300, 4000, size=(3, 50, 50)).astype(kind)
    few, many = data.copy(), data.copy()
    # a percentile of the stretch is not yet hit
    few[:, :1, :49], many[:, :20] = value, value
    with open_scene(write(tmp_path / "few.tif", few)) as scene:
        assert scene.extreme_value() is None
    with open_scene(write(tmp_path / "many.tif", many)) as scene:
        assert scene.extreme_value() == (value, 0.4)
    with open_scene(tmp_path / "many.tif", reading=Reading(nodata=value)) as scene:
        assert scene.extreme_value() is None
        assert np.array_equal(scene.rows(0, 50)[1], (many != value).any(0))
        low, high = np.percentile(data[:, 20:].astype(np.float32).reshape(3, -1), (2, 98), axis=1)
        assert np.allclose(scene.pairs(), np.stack([low, high], 1), rtol=1e-6)
    caplog.clear()
    FolderDataset(folder(tmp_path / "set", [many]))
    said = [record.message for record in caplog.records if "nodata" in record.message]
    assert said == [
        f"0.tif: 40 % of the pixels have the value {value} in all bands, and nothing in the file takes "
        f"them out; --nodata {value} does"
    ]


@pytest.mark.parametrize(
    "value, kind, top",
    [(-9999, np.int16, 12_000), (65535, np.uint16, 40_000), (-9999, np.float32, 1), (0, np.uint16, 900)],
)
@pytest.mark.parametrize("share", [2, 3, 4])
def test_few_pixels_of_nodata_that_would_spoil_the_stretch_are_named(tmp_path, value, kind, top, share):
    data = (RNG.uniform(0.5, 1, (3, 50, 50)) * top).astype(kind)
    # a dead pixel does not hide it
    data[:, 49, 49] = 2 * min(top, 15_000)
    data.reshape(3, -1)[:, : 25 * share] = value
    with open_scene(write(tmp_path / "scene.tif", data)) as scene:
        assert scene.extreme_value() == (value, share / 100)


@pytest.mark.parametrize("kind", ["clouds", "water", "deep", "bytes", "some bands"])
def test_few_saturated_or_dark_pixels_are_no_nodata(kind):
    value = RNG.normal(3000, 700, (3, 100, 100)).clip(0, 65535).astype(np.uint16)
    ramp = np.linspace(0, 1, 1000).reshape(20, 50)
    if kind == "clouds":
        # from white to saturated, 4 % of the pixels
        value[:, :20, :50] = 3000 + 62_535 * ramp
        value[:, :8, 50:] = 65535
    elif kind == "water":
        value[:, :20, :50] = 3000 * ramp
        value[:, :8, 50:] = 0
    elif kind == "deep":
        # the noise of dark pixels beside bright land
        value[:, :8, :50], value[:, 8:12, :50] = 0, 200
    elif kind == "bytes":
        value = (value // 40).clip(50, 90).astype(np.uint8)
        value[:, :8, :50] = 255
    else:
        value[:2, :8, :50] = 65535
    assert extreme_value(value, np.ones(value.shape[1:], bool)) is None


def test_a_flat_picture_has_no_extreme():
    value = np.full((3, 4, 4), 7)
    assert extreme_value(value, np.ones((4, 4), bool)) is None
    assert extreme_value(value, np.zeros((4, 4), bool)) is None


@pytest.mark.parametrize(
    "kind, bits",
    [
        (kind, bits)
        for kind in ("png", "tif", "three bands", "vrt")
        for bits in (1, 2, 4, 7)
        if (kind, bits) != ("png", 7)
    ],
)
def test_values_of_few_bits_fill_eight(tmp_path, caplog, kind, bits):
    value = RNG.integers(0, 2**bits, (3 if kind == "three bands" else 1, 20, 30)).astype(np.uint8)
    expected = np.broadcast_to(np.rint(value * (255 / (2**bits - 1))).astype(np.uint8), (3, 20, 30))
    path = tmp_path / f"scene.{'png' if kind == 'png' else 'tif'}"
    if kind == "png":
        write_png(path, value[0], bits)
    else:
        place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500_000, 5_600_000, 1, 1)}
        write(path, value, nbits=bits, **place)
    if kind == "vrt":
        shutil.copy(path, tmp_path / "scene.vrt", driver="VRT")
    with open_scene(tmp_path / "scene.vrt" if kind == "vrt" else path) as scene:
        assert np.array_equal(scene.rows(0, 20)[0].numpy(), expected)
        assert np.array_equal(scene.window(3, 9, 4, 20)[0].numpy(), expected[:, 3:9, 4:20])
        describe(scene)
    assert "nodata" not in caplog.text
    assert np.array_equal(read_rgb(path, Reading(), max_pixels=10**6).image, expected.transpose(1, 2, 0))
    assert np.array_equal(read_image(path), expected.transpose(1, 2, 0))
    # the value of an option is the stored one
    with open_scene(path, reading=Reading(nodata=1)) as scene:
        assert np.array_equal(scene.rows(0, 20)[1], (value != 1).any(0))
    if kind == "three bands":
        with open_scene(path, gsd=2.0) as scene:
            mean = expected.reshape(3, 10, 2, 15, 2).mean((2, 4))
            assert np.abs(scene.rows(0, scene.height)[0].numpy() - mean).max() <= 0.5


@pytest.mark.parametrize(
    "mode, suffix, said",
    [("CMYK", "tif", "has inks [(]CMYK[)]"), ("CMYK", "jpg", "has inks [(]CMYK[)]"), ("LAB", "tif", "is Lab")],
)
def test_colours_that_are_not_red_green_and_blue_are_refused(tmp_path, mode, suffix, said):
    path = tmp_path / f"scene.{suffix}"
    Image.new(mode, (30, 20)).save(path)
    with pytest.raises(RasterError, match=f"read_scene: .*scene.{suffix} {said}; expected red, green and blue$"):
        with open_scene(path):
            pass


def test_a_table_of_colours_is_read_and_said(tmp_path, caplog):
    path, value = tmp_path / "scene.png", RNG.integers(0, 3, (20, 30)).astype(np.uint8)
    colors = np.array([(255, 0, 0), (0, 128, 255), (9, 8, 7)], np.uint8)
    image = Image.fromarray(value)
    image.putpalette(colors.tobytes())
    image.save(path)
    with caplog.at_level(logging.INFO, "drseg_core"), open_scene(path) as scene:
        assert np.array_equal(scene.rows(0, 20)[0].numpy(), colors[value].transpose(2, 0, 1))
        describe(scene)
    assert "scene.png: colours are those of the table of band 1 (the only one)" in caplog.text


def test_a_colour_table_of_16_bits_is_refused(tmp_path):
    root = folder(tmp_path / "set", [PIXELS[:1].astype(np.uint16)], photometric="PALETTE")
    image = root / "train/images/0.tif"
    with rasterio.open(image, "r+") as file:
        file.write_colormap(1, {i: (i % 256, 0, 0, 255) for i in range(65536)})
    said = "0.tif has a colour table for uint16; expected one for uint8$"
    with pytest.raises(RasterError, match=f"read_scene: .*{said}"), open_scene(image):
        pass
    with pytest.raises(DatasetError, match=f"read_image: .*{said}"):
        FolderDataset(root)


def test_several_types_in_one_set_are_refused(tmp_path):
    root = folder(tmp_path / "set", [PIXELS.astype(np.uint16), PIXELS])
    with pytest.raises(
        DatasetError, match=r"images are of several types; expected one, got uint8 in .*1\.tif and uint16"
    ):
        FolderDataset(root)
    assert [finding.kind for finding in check_data("folder", root).problems] == ["type"]


def test_a_check_takes_what_a_training_takes(tmp_path):
    root = folder(tmp_path / "set", [KINDS["sentinel"][0]], descriptions=KINDS["sentinel"][1]["descriptions"])
    report = check_data("folder", root)
    assert report.problems == [] and len(report.splits["train"].readable) == 1
    assert len(open_dataset(f"folder:{root}")) == 1


@pytest.mark.parametrize("suffix, internal", [(".tif", True), (".tif", False), (".png", False), (".jpg", False)])
def test_the_mask_of_an_image_is_read(tmp_path, suffix, internal):
    valid = np.indices((20, 30))[1] > 5
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS.transpose(1, 2, 0)).save(path)
    if internal:
        write(path, PIXELS, photometric="rgb")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+" if suffix == ".tif" else "r") as file:
        if suffix == ".tif":
            file.write_mask(valid)
    if suffix != ".tif":
        with rasterio.open(f"{path}.msk", "w", driver="GTiff", height=20, width=30, count=1, dtype="uint8") as mask:
            mask.write((valid * 255).astype(np.uint8), 1)
            mask.update_tags(INTERNAL_MASK_FLAGS_1="2", INTERNAL_MASK_FLAGS_2="2", INTERNAL_MASK_FLAGS_3="2")
    found = read_rgb(path, Reading(), max_pixels=10**6)
    assert np.array_equal(found.valid, valid)
    with open_scene(path) as scene:
        image, inside = scene.window(0, 20, 0, 30)
    assert np.array_equal(inside, valid) and np.array_equal(image.numpy().transpose(1, 2, 0), found.image)


def test_a_png_of_16_bits(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(RNG.integers(0, 60_000, (20, 30)).astype(np.uint16)).save(path)
    found = read_rgb(path, Reading(scale=((0.0, 60_000.0),)), max_pixels=1000)
    stored = np.array(Image.open(path)).astype(np.float32) / 60_000 * 255
    assert np.abs(found.image[..., 0] - stored).max() <= 0.51
    with pytest.raises(DatasetError, match="deep.png is too large; expected at most 99 pixels"):
        read_rgb(path, Reading(), max_pixels=99)


def test_options_as_text():
    assert parse_bands("4,3,2") == (4, 3, 2) and parse_bands("1") == (1,)
    assert parse_scale("0,3000") == ((0, 3000),) and len(parse_scale("0,1;0,2;0,3")) == 3
    pairs = [(0.1, 3000.25), (-9.5, 1e6), (0.0, 1.0)]
    assert np.allclose(parse_scale(scale_text(pairs)), pairs, rtol=1e-7)
    assert parse_reading(ReadingConfig(scale="auto")).measure and parse_reading(ReadingConfig()).plain
    for wrong in ("red", "0", "1,2", "1,2,3,4", ""):
        with pytest.raises(ConfigError, match="--bands is not a list of band numbers; expected for example 4,3,2"):
            parse_bands(wrong)
    for wrong in ("", "5", "9,1", "1,1", "0,1;0,2", "nan,1", "a,b"):
        with pytest.raises(ConfigError, match="--scale is not usable; expected auto, LOW,HIGH"):
            parse_scale(wrong)


def test_a_block_is_decoded_once(tmp_path):
    """GDAL's cache holds a row of blocks, or each line that is read decodes all of them."""
    noise = RNG.integers(1, 256, size=(3, 1024, 1024)).astype(np.uint8)
    path = write(tmp_path / "scene.tif", noise, tiled=True, blockxsize=256, blockysize=256, compress="deflate")

    def seconds(read) -> float:
        begin = time.process_time()
        read()
        return time.process_time() - begin

    with rasterio.open(path) as file:
        plain = min(seconds(lambda: file.read(out_shape=(3, 500, 500))) for _ in range(3))
    with open_scene(path) as scene:
        ours = min(seconds(lambda: scene.source.read(out_shape=(3, 500, 500))) for _ in range(3))
    with open_strips(path, max_pixels=2**21) as strips:
        rows = min(seconds(lambda: [strips.read(top, top + 4) for top in range(0, 256, 4)]) for _ in range(3))
    # hundreds of times as long with no cache
    assert ours < 20 * plain + 0.05 and rows < 20 * plain + 0.05
