"""Tiles checked against the arrays that they come from; the viewer used with mouse and keyboard in a real browser."""

import base64
import json
import math
import re
import shutil

import numpy as np
import pytest
from browser import browser, needs_browser
from PIL import Image

from monai_vslp.io import viewer as viewer_module
from monai_vslp.io.report import write_report
from monai_vslp.io.summary import build_summary
from monai_vslp.io.viewer import read_viewer, write_viewer
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import ImageReadError, InputError

CLASSES, COLORS = ["stroma", "tumour </script>"], [[0, 160, 110], [210, 90, 0]]
TILE = 64


def make_layers(height=300, width=420):
    """Left half stroma, right half tumour; a band of 70 px at the top and a column of 128 px at the right without tissue."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[:, width // 2 - 20 :] = 1
    labels[:70] = labels[:, 256:] = 255
    rng = np.random.default_rng(0)
    image = np.where(labels == 255, 240, np.where(labels == 0, 200, 120))[None].repeat(3, 0).astype(np.uint8)
    fidelity = rng.random((height, width)).astype(np.float16)
    regularization = (0.5 * rng.random((height, width))).astype(np.float16)
    confidence = rng.dirichlet([1, 1], (height, width)).transpose(2, 0, 1).astype(np.float32)
    return {
        "image": image,
        "labels": labels,
        "network": np.where(labels == 255, 255, 1 - np.minimum(labels, 1)).astype(np.uint8),
        "confidence": confidence,
        "spread": (255 * 0.3 * rng.random((height, width))).astype(np.uint8),
        "fidelity": fidelity,
        "regularization": regularization,
    }


def write(folder, layers=None, **options):
    options = {"classes": CLASSES, "colors": COLORS, "tile": TILE} | options
    return write_viewer(folder, make_layers() if layers is None else layers, **options)


def read_labels(path, shape):
    """What a label tile says, decoded as the page does."""
    key, text = re.fullmatch(r'vslpTile\("(.*)","(.*)"\)\n', path.read_text()).groups()
    assert str(path).endswith(f"{key}.js")
    runs = np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(-1, 2)
    return np.repeat(runs[:, 0], runs[:, 1]).reshape(shape)


def assemble(folder, key, index=0):
    """A whole level: labels ``[h, w]``, image ``[h, w, 3]``, or palette indices of values; 255, 0 or 0 where no tile is."""
    manifest = read_viewer(folder)
    layer = next(layer for layer in manifest["layers"] if layer["key"] == key)
    level, tile = layer["levels"][index], manifest["tile"]
    height, width = level["shape"]
    whole = np.full((height, width), 255 if layer["kind"] == "labels" else 0, dtype=np.uint8)
    whole = np.repeat(whole[..., None], 3, axis=2) if layer["kind"] == "image" else whole
    columns = math.ceil(width / tile)
    for number, present in enumerate(level["tiles"]):
        row, column = divmod(number, columns)
        path = folder / key / str(index) / f"{row}_{column}.{layer['format']}"
        assert path.exists() == (present == "1"), path
        if present == "1":
            part = whole[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            part[...] = read_labels(path, part.shape) if layer["kind"] == "labels" else np.asarray(Image.open(path))
    return whole


def test_finest_tiles_give_the_layers_back(tmp_path):
    layers = make_layers()
    write(tmp_path / "viewer", layers, mpp=0.5)
    manifest = read_viewer(tmp_path / "viewer")
    assert [layer["key"] for layer in manifest["layers"]] == [*layers, "total"]
    for key in ("labels", "network"):
        np.testing.assert_array_equal(assemble(tmp_path / "viewer", key), layers[key])
    tissue = layers["labels"] != 255
    image = np.moveaxis(layers["image"], 0, -1)
    assert np.abs(assemble(tmp_path / "viewer", "image")[tissue].astype(int) - image[tissue]).mean() < 2  # JPEG
    low, high = (manifest["layers"][-1][key] for key in ("low", "high"))
    total = layers["fidelity"].astype(np.float32) + layers["regularization"].astype(np.float32)
    assert low == 0 and high == pytest.approx(np.quantile(total[tissue], 0.995), rel=0.02)
    for key, values, top in (("total", total, high), ("fidelity", layers["fidelity"], high),
                             ("confidence", layers["confidence"].max(axis=0), 1.0)):  # fmt: skip
        index = assemble(tmp_path / "viewer", key)
        np.testing.assert_array_equal(index > 0, tissue)  # 0 is clear
        shade = np.clip(values.astype(np.float32) / top, 0, 1)
        assert np.abs((index[tissue] - 1.0) / 62 - shade[tissue]).max() <= 0.5 / 62 + 1e-3


def test_coarser_levels_are_halves_of_finer_ones(tmp_path):
    layers = make_layers()
    write(tmp_path / "viewer", layers)
    manifest = read_viewer(tmp_path / "viewer")
    shapes = [level["shape"] for level in manifest["layers"][1]["levels"]]
    assert shapes == [[300, 420], [150, 210], [75, 105], [38, 53]]
    labels, coarse = layers["labels"], assemble(tmp_path / "viewer", "labels", 2)
    inside = np.ones((75, 104), dtype=bool)
    blocks = labels[:300, :416].reshape(75, 4, 104, 4).transpose(0, 2, 1, 3).reshape(75, 104, 16)
    uniform = (blocks == blocks[..., :1]).all(axis=-1) & inside
    assert uniform.mean() > 0.9
    np.testing.assert_array_equal(coarse[:, :104][uniform], blocks[..., 0][uniform])
    # Means leave pixels without tissue out: half of a block without it changes nothing.
    constant = {"labels": labels, "fidelity": np.where(labels == 255, np.nan, 0.5), "regularization": np.zeros(labels.shape)}
    write(tmp_path / "constant", constant)
    index = assemble(tmp_path / "constant", "fidelity", 3)
    assert len(np.unique(index[index > 0])) == 1


def test_tiles_without_tissue_are_left_out_and_glass_has_its_colour(tmp_path):
    layers = make_layers()
    layers["image"][:, :70] = 0  # nobody read what has no tissue
    write(tmp_path / "viewer", layers)
    manifest = read_viewer(tmp_path / "viewer")
    for layer in manifest["layers"]:
        grid = np.array(list(layer["levels"][0]["tiles"])).reshape(5, 7) == "1"
        assert not grid[0].any() and not grid[:, 4:].any() and grid[1:, :4].all(), layer["key"]
    assert manifest["backdrop"] == [240, 240, 240]
    coarsest = np.asarray(Image.open(tmp_path / "viewer" / "image" / "3" / "0_0.jpg"))
    assert coarsest[:6].min() > 200


def test_large_layers_are_halved_until_they_fit(tmp_path):
    layers = make_layers()
    write(tmp_path / "viewer", layers, max_pixels=40000, level0_shape=(1200, 1680), mpp=0.25)
    manifest = read_viewer(tmp_path / "viewer")
    by_key = {layer["key"]: layer for layer in manifest["layers"]}
    assert (by_key["image"]["reduced"], by_key["labels"]["levels"][0]["shape"]) == (2, [150, 210])
    assert (by_key["total"]["reduced"], by_key["total"]["levels"][0]["shape"]) == (4, [75, 105])
    assert by_key["labels"]["levels"][0]["scale"] == 8 and by_key["total"]["levels"][0]["scale"] == 16
    np.testing.assert_array_equal(assemble(tmp_path / "viewer", "labels")[40:, :90], np.zeros((110, 90), dtype=np.uint8))


class Watched:
    """An array that can only be read by blocks."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.largest = array, array.shape, array.dtype, 0

    def __getitem__(self, key):
        block = self.array[key]
        self.largest = max(self.largest, block.shape[-2] * block.shape[-1])
        return block


def test_layers_are_read_by_blocks_and_zarr_gives_the_same(tmp_path):
    layers = make_layers()
    write(tmp_path / "a", layers, max_pixels=40000)
    watched = {name: Watched(array) for name, array in layers.items()}
    write(tmp_path / "b", watched, max_pixels=40000)
    assert max(array.largest for array in watched.values()) <= (4 * TILE) ** 2
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "layers.zarr", mode="w")
    stored = {name: group.create_array(name, data=array, chunks=(*array.shape[:-2], 50, 90)) for name, array in layers.items()}
    write(tmp_path / "c", stored, max_pixels=40000)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 40
    for other in ("b", "c"):
        found = sorted(path.relative_to(tmp_path / other) for path in (tmp_path / other).rglob("*") if path.is_file())
        assert found == files
        assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / other / name).read_bytes() for name in files)


def test_layers_of_other_sizes_cover_the_same_area(tmp_path):
    layers = make_layers()
    small = layers["fidelity"][::3, ::3]
    write(tmp_path / "viewer", {"labels": layers["labels"], "fidelity": small, "regularization": small})
    by_key = {layer["key"]: layer for layer in read_viewer(tmp_path / "viewer")["layers"]}
    assert by_key["fidelity"]["levels"][0]["scale"] == pytest.approx(3, rel=0.01)
    index = assemble(tmp_path / "viewer", "fidelity")
    np.testing.assert_array_equal(index > 0, layers["labels"][1::3, 1::3] != 255)


def test_a_failure_in_the_middle_leaves_the_old_viewer(tmp_path, monkeypatch):
    path = write(tmp_path / "viewer")
    before = {p: p.read_bytes() for p in (tmp_path / "viewer").rglob("*") if p.is_file()}
    left = tmp_path / ".viewer-killed"  # of a process that was killed
    (left / "new").mkdir(parents=True)
    saved = viewer_module._Writer._save

    def full(self, level, row, column, block):
        if self.source.name == "network":
            raise OSError(28, "No space left on device")
        saved(self, level, row, column, block)

    monkeypatch.setattr(viewer_module._Writer, "_save", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "viewer", make_layers(200, 300))
    assert {p: p.read_bytes() for p in (tmp_path / "viewer").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["viewer"]
    monkeypatch.undo()
    write(tmp_path / "viewer", make_layers(200, 300))
    assert json.loads(path.read_text())["extent"] == [200, 300] and [p.name for p in tmp_path.iterdir()] == ["viewer"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"heat": np.zeros((4, 4))}, {}, "got heat"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, {}, r"uint8 \[3, H, W\]"),
        ({"labels": np.zeros((4, 4), np.int64)}, {}, r"uint8 \[H, W\], got int64"),
        ({"labels": np.full((300, 420), 7, np.uint8)}, {}, "label 7"),
        ({"fidelity": np.zeros((4, 4))}, {}, "one size"),
        ({"spread": np.zeros((2, 4, 4))}, {}, "float or uint8"),
        ({}, {"colors": COLORS[:1]}, "1 for 2 classes"),
        ({}, {"tile": 63}, "even"),
    ],
)
def test_wrong_layers_are_explained(tmp_path, change, options, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / "viewer", make_layers() | change, **options)
    assert not (tmp_path / "viewer").exists()


def test_a_damaged_manifest_is_named(tmp_path):
    assert read_viewer(tmp_path) is None
    (tmp_path / "viewer.json").write_text('{"form": 99}')
    with pytest.raises(ImageReadError, match=r"viewer\.json.*99"):
        read_viewer(tmp_path)


# ---- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with a viewer: 300 × 420 px maps of an input of 1200 × 1680 px, 0.5 µm/px."""
    folder = tmp_path_factory.mktemp("out") / "slide #1 ä"
    summary = build_summary(
        name="slide", kind="slide", source="slide.svs", classes=CLASSES, colors=COLORS, shape=(300, 420),
        confidence=[0.5, 0.5], refined=[0.4, 0.6], labels=[0.4, 0.6], level0_shape=[1200, 1680], downsample=4.0, mpp=2.0,
    )  # fmt: skip
    write_json(folder / "summary.json", summary)
    write(folder / "viewer", level0_shape=(1200, 1680), mpp=0.5)
    return write_report(folder)


LOADED = "return document.getElementById('viewer')?.dataset.loading === '0'"
SETTLED = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"


def show(window, page, fragment=""):
    window.open(page, fragment)
    settle(window)


def settle(window):
    window.run(SETTLED)
    window.wait(LOADED)
    window.run(SETTLED)


def box(window):
    """Left, top, width and height of the canvas in the window."""
    script = "const b = document.querySelector('.stage canvas').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
    return window.run(script)


def view(window):
    """x, y and zoom of the link to this view."""
    link = window.run("return document.querySelector('.here').getAttribute('href')")
    return [float(re.search(rf"{key}=([\d.]+)", link).group(1)) for key in ("x", "y", "zoom")]


def blend(color, grey, opacity=0.5):
    return [grey + (value - grey) * opacity for value in color]


def centre(window, across=0.5, down=0.5):
    """Mean colour of a few pixels of the canvas."""
    pixels = window.pixels(".stage canvas")
    y, x = int(down * pixels.shape[0]), int(across * pixels.shape[1])
    return pixels[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(axis=0)


@needs_browser
def test_a_link_shows_its_place_and_layer(window, page):
    stroma, tumour = (400, 800), (900, 800)  # level-0 px (x, y)
    for (x, y), color, grey in ((stroma, COLORS[0], 200), (tumour, COLORS[1], 120)):
        show(window, page, f"#x={x}&y={y}&zoom=2&layer=labels")
        assert view(window) == [x, y, 2]
        np.testing.assert_allclose(centre(window), blend(color, grey), atol=4)
        window.run("location.hash = location.hash.replace('labels', 'none')")
        settle(window)
        np.testing.assert_allclose(centre(window), [grey] * 3, atol=4)
    show(window, page, "#x=900&y=800&zoom=2&layer=network&opacity=1")
    np.testing.assert_allclose(centre(window), COLORS[0], atol=2)  # the network says the opposite
    show(window, page, "#x=1400&y=800&zoom=2&layer=total")  # no tissue
    np.testing.assert_allclose(centre(window), [240] * 3, atol=4)


@needs_browser
def test_the_whole_slide_is_shown_at_first_where_it_is(window, page):
    show(window, page)
    left, top, width, height = box(window)
    zoom = view(window)[2]
    assert zoom == pytest.approx(0.97 * min(width / 1680, height / 1200), rel=1e-3)
    pixels = window.pixels(".stage canvas").astype(float)
    for x, y, wanted in ((400, 800, blend(COLORS[0], 200)), (900, 800, blend(COLORS[1], 120)), (900, 100, [240] * 3)):
        across, down = width / 2 + (x - 840) * zoom, height / 2 + (y - 600) * zoom
        np.testing.assert_allclose(pixels[int(down), int(across)], wanted, atol=6)
    edge = width / 2 + (4 * 190 - 840) * zoom  # between the classes
    row = pixels[int(height / 2 + 200 * zoom), :, 0]
    assert (
        abs(int(edge) - np.flatnonzero(np.abs(np.diff(row[int(edge) - 30 : int(edge) + 30])) > 4).mean() - int(edge) + 30) < 3
    )


@needs_browser
def test_mouse_wheel_and_drag(window, page):
    show(window, page, "#x=600&y=700&zoom=1&layer=labels")
    window.run("window.scrollTo(0, document.querySelector('.stage').getBoundingClientRect().top + scrollY - 5)")
    left, top, width, height = box(window)
    across, down = round(left + 0.75 * width), round(top + 0.5 * height)
    place = 600 + (across - left - width / 2)  # level-0 x under the pointer, at zoom 1
    window.wheel(across, down, -240)
    settle(window)
    x, y, zoom = view(window)
    assert zoom == pytest.approx(math.exp(0.48), rel=0.02)
    assert x + (across - left - width / 2) / zoom == pytest.approx(place, abs=1.5)  # what was under the pointer stays there
    window.mouse(
        {"type": "pointerMove", "x": across, "y": down, "origin": "viewport", "duration": 0},
        {"type": "pointerDown", "button": 0},
        {"type": "pointerMove", "x": across - 80, "y": down + 40, "origin": "viewport", "duration": 50},
        {"type": "pointerUp", "button": 0},
    )
    settle(window)
    after = view(window)
    assert after[0] == pytest.approx(x + 80 / zoom, abs=0.2) and after[1] == pytest.approx(y - 40 / zoom, abs=0.2)
    words = window.run("return document.querySelector('.where').textContent")
    said_x, said_y = (int(re.search(rf"{axis} (\d+)", words).group(1)) for axis in "xy")
    assert abs(said_x - (after[0] + (across - 80 - left - width / 2) / zoom)) < 2
    assert f"{said_x * 0.5:.0f}"[:2] in words and "µm" in words and words.endswith(CLASSES[int(said_x >= 760)])
    assert abs(said_y - (after[1] + (down + 40 - top - height / 2) / zoom)) < 2


@needs_browser
def test_two_fingers_zoom(window, page):
    show(window, page, "#x=600&y=700&zoom=1&layer=labels")
    window.run("window.scrollTo(0, document.querySelector('.stage').getBoundingClientRect().top + scrollY - 5)")
    left, top, width, height = box(window)
    x, y = left + width / 2, top + height / 2

    def finger(name, sign):
        def at(offset, duration):
            place = {"x": round(x + sign * offset), "y": round(y), "origin": "viewport", "duration": duration}
            return {"type": "pointerMove"} | place

        steps = [at(50, 0), {"type": "pointerDown", "button": 0}, at(150, 100), {"type": "pointerUp", "button": 0}]
        return {"type": "pointer", "id": name, "parameters": {"pointerType": "touch"}, "actions": steps}

    window.call("POST", "/actions", {"actions": [finger("one", -1), finger("two", 1)]})
    settle(window)
    after = view(window)
    assert after[2] == pytest.approx(3, rel=0.05) and after[:2] == pytest.approx([600, 700], abs=8)


@needs_browser
def test_keyboard_alone_moves_zooms_and_says_the_class(window, page):
    show(window, page, "#x=400&y=700&zoom=1&layer=labels")
    width = box(window)[2]
    for _ in range(20):  # by Tab, as someone without a mouse comes there
        window.press(["\ue004"])
        if window.run("return document.activeElement.tagName") == "CANVAS":
            break
    settle(window)
    assert "stroma" in window.run("return document.querySelector('.where').textContent")
    window.press(["\ue014"] * 4)  # right, an eighth of the width each
    settle(window)
    assert view(window)[:2] == pytest.approx([400 + width / 2, 700], abs=0.2)
    assert "tumour" in window.run("return document.querySelector('.where').textContent")
    assert window.run("return getComputedStyle(document.querySelector('.cross')).display") == "block"
    window.press(["+", "+", "-", "\ue013"])
    settle(window)
    assert view(window)[2] == pytest.approx(1.5) and view(window)[1] < 700
    window.press(["0"])
    settle(window)
    assert view(window)[0] == pytest.approx(840, abs=0.1) and view(window)[2] < 1


@needs_browser
def test_buttons_layers_opacity_and_classes(window, page):
    show(window, page, "#x=900&y=800&zoom=2&layer=labels")
    window.click("[data-do=in]")
    settle(window)
    assert view(window)[2] == pytest.approx(3)
    window.run("const s = document.querySelector('.opacity input'); s.value = 100; s.dispatchEvent(new Event('input'))")
    settle(window)
    np.testing.assert_allclose(centre(window), COLORS[1], atol=2)
    window.click(".classes input[value='1']")  # tumour is hidden, the slide shows
    settle(window)
    np.testing.assert_allclose(centre(window), [120] * 3, atol=4)
    window.click("label:has([value=fidelity])")
    settle(window)
    assert window.run("return [...document.querySelectorAll('[data-for]')].filter(e => !e.hidden).map(e => e.dataset.for)") == [
        "fidelity"
    ]
    assert window.pixels(".stage canvas").reshape(-1, 3).std(axis=0).max() > 30  # noise in colours, not a plain grey
    window.click("[data-do=reset]")
    settle(window)
    assert view(window)[2] < 1
    # Every control says what it is.
    names = window.run(
        "return [...document.querySelectorAll('.viewer button, .viewer canvas, .viewer input')]"
        ".map(e => e.getAttribute('aria-label') || e.closest('label')?.textContent.trim() || '')"
    )
    assert len(names) > 12 and all(names)


@needs_browser
def test_the_scale_bar_is_as_long_as_it_says(window, page):
    for zoom in (0.3, 1, 5):
        show(window, page, f"#x=600&y=700&zoom={zoom}")
        words, length = window.run(
            "return [document.querySelector('.bar-of-scale').textContent,"
            " document.querySelector('.bar-of-scale i').getBoundingClientRect().width]"
        )
        micrometres = float(words.split()[0]) * (1000 if "mm" in words else 1)
        assert length == pytest.approx(micrometres / 0.5 * zoom, rel=0.02) and length <= 150


WATCH = """
window.asked = [];
for (const kind of [HTMLImageElement, HTMLScriptElement]) {
  const source = Object.getOwnPropertyDescriptor(kind.prototype, "src");
  const set = function (value) { window.asked.push(value); source.set.call(this, value); };
  Object.defineProperty(kind.prototype, "src", {...source, set});
}
for (const name of ["fetch", "XMLHttpRequest", "WebSocket"]) window[name] = () => { window.asked.push(name); };
"""


@needs_browser
def test_only_tiles_in_view_are_loaded(window, page):
    watch = window.call(
        "POST", "/goog/cdp/execute", {"cmd": "Page.addScriptToEvaluateOnNewDocument", "params": {"source": WATCH}}
    )
    try:
        show(window, page, "#x=400&y=700&zoom=5&layer=labels")
        asked = window.run("return window.asked")
        _, _, width, height = box(window)
        rows, columns = (
            range(int((at - side / 10) // (4 * TILE)), int((at + side / 10) // (4 * TILE)) + 1)
            for at, side in ((700, height), (400, width))
        )
        finest = {
            f"viewer/{key}/0/{r}_{c}.{form}"
            for key, form in (("image", "jpg"), ("labels", "js"))
            for r in rows
            for c in columns
        }
        assert {name for name in asked if "/0/" in name} == finest and len(finest) < 2 * 35
        assert len(asked) == len(set(asked))
        # Coarser ones only of the same layers, until the finest are there; no other layer and nothing from elsewhere.
        assert all(re.fullmatch(r"viewer/(image|labels)/\d+/\d+_\d+\.(jpg|js)", name) for name in asked)
        window.run("document.querySelector('[value=total]').click()")
        settle(window)
        assert {name.split("/")[1] for name in window.run("return window.asked")} == {"image", "labels", "total"}
    finally:
        window.call("POST", "/goog/cdp/execute", {"cmd": "Page.removeScriptToEvaluateOnNewDocument", "params": watch})


@needs_browser
def test_a_page_without_its_tiles_says_so(window, page, tmp_path):
    shutil.copy(page, tmp_path / "report.html")
    window.open(tmp_path / "report.html")
    window.wait("return !document.querySelector('.lost').hidden")
    assert "viewer" in window.run("return document.querySelector('.lost').innerText")
