# SPDX-License-Identifier: Apache-2.0
"""The page in a browser: what is drawn, what a click says, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from drseg_core.evaluation.inference import Predictor
from drseg_core.nn.resample import resample
from drseg_core.ops import knn_graph
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.view.of_run import beneath_run
from drseg_core.view.page import write_page
from tests.view.conftest import HEIGHT, NAMES, OVERLAP, SIDE, WIDTH, Mapped

rasterio = pytest.importorskip("rasterio")


@pytest.fixture(scope="module")
def page_file(mapped: Mapped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return write_page(
        mapped.map,
        out,
        image=mapped.scene,
        beneath=lambda scene, names, room: beneath_run(mapped.predictor, scene, room=room),
    ).path


class Opened:
    """An open page, with whatever it complained of or asked for."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.page = browser.new_page(viewport={"width": 1100, "height": 700})
        self.page.set_default_timeout(120_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.wait()

    def wait(self) -> None:
        # the page forbids what wait_for_function does
        ready = self.page.locator("body[data-busy='0']")
        ready.wait_for(state="attached")
        # what was asked to be drawn is, and what that asked for
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        ready.wait_for(state="attached")
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def tick(self, key: str, on: bool) -> None:
        self.page.set_checked(f"#layer-{key}", on)
        self.wait()

    def slide(self, key: str, value: int) -> None:
        self.page.locator(f"#{key}").fill(str(value))
        self.wait()

    def press(self, key: str) -> None:
        self.page.locator("#map").press(key)
        self.wait()

    def pixels(self, x: int, y: int, width: int = 1, height: int = 1) -> np.ndarray:
        """(height, width, 4) of the canvas, without the cross of the keyboard."""
        self.page.evaluate("document.activeElement.blur()")
        self.wait()
        address = self.page.evaluate("document.getElementById('map').toDataURL()")
        drawn = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        return np.array(drawn.convert("RGBA"))[y : y + height, x : x + width]

    def size(self) -> tuple[int, int]:
        return tuple(
            self.page.evaluate("[document.getElementById('map').width, document.getElementById('map').height]")
        )

    def look(self, column: int, row: int) -> list[dict[str, float]]:
        """The neighbours that the page names for a pixel."""
        self.page.fill("#column", str(column))
        self.page.fill("#row", str(row))
        self.page.click("text=Look")
        self.wait()
        return self.neighbours()

    def neighbours(self) -> list[dict[str, float]]:
        rows = self.page.eval_on_selector_all("#neighbours tbody tr", "rows => rows.map((row) => ({...row.dataset}))")
        return sorted(({k: float(v) for k, v in row.items()} for row in rows), key=lambda row: row["node"])


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Any:
    found = Opened(browser, page_file)
    yield found
    assert found.said == [] and {url.partition(":")[0] for url in found.asked} <= {"file", "data"}
    found.page.close()


@pytest.mark.promise("C52")
def test_it_opens_and_names_are_text(opened):
    assert (
        opened.page.locator("#classes tbody label").all_inner_texts() == [f" {name}" for name in NAMES]
        or [text.strip() for text in opened.page.locator("#classes tbody label").all_inner_texts()] == NAMES
    )
    assert NAMES[1] in opened.page.title()
    # the data and the script of the page
    assert opened.page.locator("script").count() == 2
    layers = [text.strip() for text in opened.page.locator("#layers label").all_inner_texts()]
    assert layers == [
        "Image",
        "Classes",
        "Uncertainty",
        "Score",
        "Original correlation",
        "Refined correlation",
    ]
    assert opened.page.locator("#notes li").count() == 0


def test_native_pixels_are_those_of_the_map(opened, mapped):
    """Over the borders of tiles, bit for bit."""
    opened.tick("image", False)
    opened.slide("opacity", 100)
    opened.press("1")
    width, height = opened.size()
    shown = opened.pixels(0, 0, width, height)
    with rasterio.open(mapped.map) as file:
        label, table = file.read(1), file.colormap(1)
    top, left = (HEIGHT - height) // 2, (WIDTH - width) // 2
    assert height > 512 and top < 0 < 512 < WIDTH and left < 0
    colors = np.array([table[i] for i in range(256)], np.uint8)[label]
    inside = shown[-top : -top + HEIGHT, -left : -left + WIDTH]
    assert len(np.unique(label)) == 4 and np.array_equal(inside, colors)


@pytest.mark.parametrize("key", ["+", "-"])
def test_no_seam_and_no_class_between_two(opened, mapped, key):
    """Also where a pixel of the map is no whole number of the screen's."""
    opened.tick("image", False)
    opened.slide("opacity", 100)
    opened.press("1")
    opened.press(key)
    drawn = np.unique(opened.pixels(0, 0, *opened.size()).reshape(-1, 4), axis=0)
    with rasterio.open(mapped.map) as file:
        table = file.colormap(1)
    # farther away the collar is in view
    wanted = {table[0], table[1], table[2]} | ({(0, 0, 0, 0)} if key == "-" else set())
    assert {tuple(color) for color in drawn.tolist()} == wanted


def test_layers_toggle(opened, mapped):
    with rasterio.open(mapped.scene) as file:
        image = file.read()
    opened.press("1")
    width, height = opened.size()
    top, left = (HEIGHT - height) // 2, (WIDTH - width) // 2
    # in the middle of the collar's inside
    x, y = 100 - left, 100 - top
    both = opened.pixels(x, y)
    opened.tick("classes", False)
    alone = opened.pixels(x, y)
    assert not np.array_equal(both, alone)
    assert np.abs(alone[0, 0, :3].astype(int) - image[:, 100, 100]).max() < 30
    opened.tick("image", False)
    assert opened.pixels(x, y)[0, 0, 3] == 0
    for key in ("uncertainty", "scores", "original", "refined"):
        opened.tick(key, True)
        assert opened.pixels(x, y)[0, 0, 3] > 0 and opened.page.locator("#range").is_visible()
        opened.tick(key, False)
    # nodata stays empty
    opened.tick("uncertainty", True)
    assert opened.pixels(5 - left, 300 - top)[0, 0, 3] == 0


def test_a_class_can_be_hidden(opened, mapped):
    opened.tick("image", False)
    opened.slide("opacity", 100)
    opened.press("1")
    width, height = opened.size()
    top, left = (HEIGHT - height) // 2, (WIDTH - width) // 2
    with rasterio.open(mapped.map) as file:
        label = file.read(1)
    opened.page.locator("#classes tbody input").nth(1).set_checked(False)
    opened.wait()
    alpha = opened.pixels(0, 0, width, height)[-top : -top + HEIGHT, -left : -left + WIDTH, 3]
    assert np.array_equal(alpha > 0, (label == 0) | (label == 2))


def test_swipe_shows_the_top_layer_right_of_it(opened):
    opened.tick("image", False)
    width, height = opened.size()
    opened.slide("swipe", 50)
    alpha = opened.pixels(0, height // 2, width, 1)[0, :, 3]
    line = width // 2
    assert not alpha[: line - 3].any() and alpha[line + 3 : line + 200].all()


def most_central(length: int, place: int, starts: list[int]) -> int:
    return max(starts, key=lambda start: min(place - start, start + SIDE - place))


def expected(mapped: Mapped, column: int, row: int) -> tuple[torch.Tensor, ...]:
    """Node of a pixel, its neighbours by ``knn_graph``, and Eq. 8 and 9 written down."""
    starts = [[*range(0, n - SIDE, SIDE - OVERLAP), n - SIDE] for n in (HEIGHT, WIDTH)]
    top, left = most_central(HEIGHT, row, starts[0]), most_central(WIDTH, column, starts[1])
    with open_scene(mapped.scene) as scene:
        image = scene.window(top, top + SIDE, left, left + SIDE)[0]
    model = mapped.predictor.model
    pdgr = model.pdgr
    with torch.no_grad():
        prior = resample(model.dino.maps(image[None].float() / 255).features, model.clip.grid)
        h, w = prior.shape[2:]
        nodes = prior[0].flatten(1).T
        index = knn_graph(nodes, (h, w), pdgr.k, decay=pdgr.decay / pdgr.gamma).long()
        unit = F.normalize(nodes, dim=1)
        hidden = pdgr.edge_source(unit)[:, None] + pdgr.edge_target(unit)[index]
        weight = F.softplus(hidden.relu() @ pdgr.edge_vector + pdgr.edge_bias)
    degree = weight.sum(1) + 1e-6
    coefficient = weight / (degree[:, None] * degree[index]).sqrt()
    node = (row - top) * h // SIDE * w + (column - left) * w // SIDE
    dense = torch.zeros(h * w, h * w).scatter_(1, index, coefficient)
    return node, index[node], weight[node], coefficient[node], dense[index[node], node], degree[index[node]]


@pytest.mark.parametrize(("column", "row"), [(350, 300), (33, 41), (560, 570)])
def test_neighbours_are_those_of_knn_graph(opened, mapped, column, row):
    found = opened.look(column, row)
    node, *wanted = expected(mapped, column, row)
    assert f"of node {node}," in opened.page.inner_text("#neighbours-title")
    assert f"Node {node} has {mapped.predictor.model.pdgr.k} neighbours" in opened.page.inner_text("#said")
    for name, value in zip(("node", "weight", "forth", "back", "degree"), wanted, strict=True):
        assert [each[name] for each in found] == pytest.approx(value.tolist(), rel=1e-4), name
    # some neighbours look back, and some do not
    assert 0 < sum(each["back"] > 0 for each in found)


def test_a_click_and_the_keys_choose_the_same_pixel(opened):
    opened.press("1")
    width, height = opened.size()
    box = opened.page.locator("#map").bounding_box()
    opened.page.mouse.click(box["x"] + width // 2, box["y"] + height // 2)
    opened.wait()
    clicked = opened.page.inner_text("#said"), opened.neighbours()
    drawn = opened.pixels(0, 0, width, height)
    assert clicked[0].startswith("Column 350, row 300.") and len(clicked[1]) == 5
    opened.press("Escape")
    assert not opened.page.locator("#graph").is_visible()
    assert not np.array_equal(drawn, opened.pixels(0, 0, width, height))
    opened.press("Enter")
    assert (opened.page.inner_text("#said"), opened.neighbours()) == clicked
    opened.press("Shift+ArrowRight")
    opened.press("Enter")
    assert opened.page.inner_text("#said").startswith("Column 351, row 300.")
    before = opened.page.inner_text("#where")
    opened.press("+")
    assert opened.page.inner_text("#where") != before
    opened.press("0")
    assert opened.page.inner_text("#where").endswith(f"of {WIDTH} x {HEIGHT} pixels")


def test_a_pixel_that_is_looked_up_comes_into_view(opened):
    opened.press("1")
    for _ in range(6):
        opened.press("+")
    before = opened.pixels(0, 0, *opened.size())
    opened.look(350, 301)
    opened.press("Escape")
    assert np.array_equal(before, opened.pixels(0, 0, *opened.size()))
    opened.look(60, 70)
    opened.press("Enter")
    assert opened.page.inner_text("#said").startswith("Column 60, row 70.")


def test_what_is_drawn_can_be_chosen(opened):
    opened.look(350, 300)
    before = opened.pixels(0, 0, *opened.size())
    opened.page.select_option("#quantity", "back")
    opened.wait()
    assert not np.array_equal(before, opened.pixels(0, 0, *opened.size()))
    rows = opened.page.eval_on_selector_all("#neighbours tbody tr", "rows => rows.map((row) => +row.dataset.back)")
    assert rows == sorted(rows, reverse=True)


def test_values_of_a_pixel(opened, mapped):
    opened.page.select_option("#chosen", "2")
    opened.look(350, 300)
    texts = opened.page.locator("#values dd").all_inner_texts()
    titles = opened.page.locator("#values dt").all_inner_texts()
    with rasterio.open(mapped.map) as file:
        label = file.read(1)[300, 350]
    assert texts[0] == NAMES[label] and titles[-1] == "Refined correlation, pond"
    for word, text in zip(("uncertainty", "scores"), texts[1:3], strict=True):
        with rasterio.open(mapped.map.with_name(f"map_{word}.tif")) as file:
            value = file.read(1)[300, 350] * file.scales[0] + file.offsets[0]
            # tiles of these lose a little
            assert abs(float(text) - value) < 10 * file.scales[0]
    with open_scene(mapped.scene) as scene:
        below = beneath_run(mapped.predictor, scene)
    for name, text in zip(("original", "refined"), texts[3:], strict=True):
        cells = getattr(below, name)
        value = cells[2, 300 // below.step, 350 // below.step]
        step = (np.nanmax(cells) - np.nanmin(cells)) / 250
        assert abs(float(text) - value) < step
    opened.look(5, 5)
    assert opened.page.locator("#values dd").all_inner_texts()[0] == "no data"


def test_everything_has_a_name(opened):
    bare = opened.page.evaluate(
        "Array.from(document.querySelectorAll('input, select, button, canvas')).filter((item) =>"
        " !item.getAttribute('aria-label') && !item.textContent.trim() && !(item.labels && item.labels.length)).length"
    )
    assert bare == 0 and opened.page.locator("[aria-live=polite]").count() == 1


def test_without_a_graph_it_says_so(browser: Any, mapped: Mapped, tmp_path: Path):
    opened = Opened(browser, write_page(mapped.map, tmp_path / "bare.html").path)
    assert opened.look(350, 300) == []
    assert opened.page.inner_text("#said").endswith("No graph: no run was given.")
    assert [text.strip() for text in opened.page.locator("#layers label").all_inner_texts()] == [
        "Classes",
        "Uncertainty",
        "Score",
    ]
    assert opened.said == []
    opened.page.close()


def test_a_class_of_a_threshold_has_no_correlation(browser: Any, mapped: Mapped, tmp_path: Path):
    """Also beside one class alone."""
    own = Predictor(mapped.predictor.model, ["pond"], mode="tile", tile_size=SIDE, overlap=OVERLAP)
    predict_scene(own, mapped.scene, tmp_path / "map.tif", threshold=0.5, progress=False)
    page = write_page(
        tmp_path / "map.tif",
        image=mapped.scene,
        beneath=lambda scene, found, room: beneath_run(own, scene, room=room),
    )
    opened = Opened(browser, page.path)
    opened.tick("refined", True)
    assert opened.page.locator("#chosen option").all_inner_texts() == ["pond", "other"]
    none = "none, as it is for scores below 0.5"
    for name, said in {"pond": "", "other": f": {none}"}.items():
        opened.page.select_option("#chosen", label=name)
        opened.look(350, 300)
        assert opened.page.inner_text("#ranged") == f"Refined correlation, {name}{said}"
        assert opened.page.locator("#range .ramp").is_visible() == (not said)
        titles, texts = (opened.page.locator(f"#values {kind}").all_inner_texts() for kind in ("dt", "dd"))
        assert titles[-2:] == [f"Original correlation, {name}", f"Refined correlation, {name}"]
        assert all((text == none) == bool(said) for text in texts[-2:])
    assert opened.said == []
    opened.page.close()


def test_sampled_nodes_and_scales_are_said(browser: Any, mapped: Mapped, tmp_path: Path):
    def beneath(scene: Any, names: Any, room: int) -> Any:
        return beneath_run(mapped.predictor, scene, room=2500)

    page = write_page(mapped.map, tmp_path / "less.html", image=mapped.scene, beneath=beneath, max_mb=0.12)
    assert page.size <= 120_000 and len(page.notes) > 1
    opened = Opened(browser, page.path)
    assert opened.page.locator("#notes li").all_inner_texts() == page.notes
    assert any(note.startswith("Graph: edges of the nodes of one row and column in ") for note in page.notes)
    found = opened.look(350, 300)
    assert len(found) == 5 and "the nearest of those kept" in opened.page.inner_text("#neighbours-title")
    assert opened.said == []
    opened.page.close()
