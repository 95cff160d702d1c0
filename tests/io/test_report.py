"""Reports of a made-up but complete output folder: self-contained, escaped, showing the values; summaries checked."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage

from monai_vslp.io.cohort_report import write_index
from monai_vslp.io.report import disagreement, write_report
from monai_vslp.io.summary import build_summary, read_summary, validate_summary
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.variational import refine

CLASSES = ["stroma", "tumour <b>&\"'", "fat"]
COLORS = [[0, 158, 115], [213, 94, 0], [240, 228, 66]]


def make_output(folder, *, shape=(96, 128), given=(0.5, 0.5, 0.0), spread=True, seed=0, **changes):
    """A folder as segmentation leaves it, from smooth random confidences that are refined for real."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 6, 6))
    q = torch.softmax(torch.from_numpy(noise / noise.std() * 1.5), dim=0)
    mass = np.ones(shape)
    mass[:12] = 0
    result = refine(q, given, torch.from_numpy(mass), alpha=0.5)
    u, labels, first = result.u.numpy(), result.labels.numpy().astype(np.uint8), q.numpy().argmax(0).astype(np.uint8)
    labels[mass == 0] = first[mass == 0] = 255
    folder.mkdir(parents=True)
    pink = np.array([225, 150, 190]) + 25 * np.moveaxis(noise / noise.std(), 0, -1)
    Image.fromarray(np.where(mass[..., None] > 0, pink, 240).clip(0, 255).astype(np.uint8)).save(folder / "thumbnail.jpg")
    tifffile.imwrite(folder / "labels.tif", labels)
    tifffile.imwrite(folder / "labels_argmax.tif", first)
    energies = {"fidelity": result.fidelity_energy.numpy(), "regularization": result.regularization_energy.numpy()}
    np.savez_compressed(folder / "energies.npz", **{name: values.astype(np.float16) for name, values in energies.items()})
    if spread:
        tifffile.imwrite(folder / "spread.tif", (255 * 0.2 * rng.random(shape)).astype(np.uint8))
    tissue = mass > 0
    fields = {
        "name": folder.name,
        "kind": "image",
        "source": f"/data/{folder.name}.png",
        "classes": CLASSES,
        "colors": COLORS,
        "shape": shape,
        "confidence": q.numpy()[:, tissue].mean(1),
        "refined": u[:, tissue].mean(1),
        "labels": np.bincount(labels[tissue], minlength=3) / tissue.sum(),
        "given": given,
        "given_spread": None if given is None else [0.05, 0.04, 0.0],
        "psi": None if given is None else result.psi.tolist(),
        "energies": result.energies,
        "residual": result.residual,
        "converged": result.converged,
        "reason": result.reason,
        "tissue_fraction": tissue.mean(),
        "mpp": 0.5,
        "options": {"alpha": 0.5, "trust": 3.0, "views": ["identity", "<flip>"]},
        "seconds": {"network": 1.25, "refinement": 0.4},
    }
    summary = build_summary(**(fields | changes))
    write_json(folder / "summary.json", summary)
    return summary


class _Page(HTMLParser):
    VOID = {"meta", "img", "br", "line", "circle", "polyline", "link", "path", "input"}

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.words, self.attributes = path.read_text(encoding="utf-8"), [], [], []
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def pictures(self):
        """All pictures, decoded."""
        found = []
        for tag, name, value in self.attributes:
            if tag == "img" and name == "src":
                head, data = value.split(",", 1)
                assert re.fullmatch(r"data:image/(jpeg|png);base64", head)
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                found.append(image)
        return found


def check_self_contained(page):
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert "//" not in value or value.startswith("data:"), (tag, name, value)
    assert not re.search(r"url\(|@import|<script[^>]*src|<link|https?://", page.source)
    for _, name, value in page.attributes:
        if name == "alt":
            assert value.strip()
    images = [a for a in page.attributes if a[0] == "img"]
    assert len([a for a in images if a[1] == "alt"]) == len([a for a in images if a[1] == "src"])


def test_report_is_self_contained_and_shows_the_values(tmp_path):
    folder = tmp_path / "case & <1>"
    summary = make_output(folder)
    path = write_report(folder)
    page = _Page(path)
    check_self_contained(page)
    assert path == folder / "report.html"
    assert len(page.pictures()) == 8  # input, overlay, before, after, three energies, spread
    assert "case & <1>" in page.text and "<flip>" in page.text
    for name in CLASSES:
        assert page.text.count(name) >= 3  # legend, bars, offsets
    proportions = summary["proportions"]
    for key in ("given", "confidence", "refined"):
        for value in proportions[key].values():
            assert f"{100 * value:.1f}" in page.text
    assert "50.0 ± 5.0 %" in page.text and "0.5 µm/px" in page.text and "0.06 × 0.05 mm" in page.text
    assert f"{summary['psi']['stroma']:+.3f}".replace("-", "−") in page.text
    assert "Left out: it was given as 0 %." in page.text
    assert f"{summary['energies'][0]:.4g}" in page.text and f"{summary['residual']:.2e}" in page.text
    assert "alpha = 0.5" in page.text and "refinement 0.4 s" in page.text and "monai_vslp 0." in page.text
    assert "Solver converged" in page.text and summary["reason"] in page.text
    assert 'lang="en"' in page.source and "viewport" in page.source


def test_energies_have_one_scale_with_numbers(tmp_path):
    make_output(tmp_path / "a")
    with np.load(tmp_path / "a" / "energies.npz") as file:
        total = (file["fidelity"].astype(np.float32) + file["regularization"].astype(np.float32))[12:]
    text = _Page(write_report(tmp_path / "a")).text
    assert text.count(f"{np.quantile(total, 0.995):.3g} nats") == 3


def test_report_without_what_may_be_absent(tmp_path):
    folder = tmp_path / "plain"
    make_output(folder, given=None, spread=False, mpp=None, energies=[0.25], converged=False, reason="step limit <200>")
    for name in ("labels_argmax.tif", "energies.npz", "thumbnail.jpg", "labels.tif"):
        page = _Page(write_report(folder))
        check_self_contained(page)
        (folder / name).unlink()
    page = _Page(write_report(folder))
    assert not page.pictures()
    assert "No proportions were given" in page.text and "did not converge" in page.text and "step limit <200>" in page.text
    assert "Given" not in page.text.split("Proportions")[1].split("Why")[0] and "labels.tif" in page.text
    assert "Spread between views" not in page.text


def test_maps_of_a_slide_are_reduced(tmp_path):
    folder = tmp_path / "slide"
    make_output(folder, kind="slide", shape=(64, 96), level0_shape=[28000, 48000], downsample=8.0)
    labels = np.repeat(np.repeat(tifffile.imread(folder / "labels.tif"), 50, axis=0), 40, axis=1)
    for name in ("labels.tif", "labels_argmax.tif"):
        tifffile.imwrite(folder / name, labels, compression="zlib")
    Image.open(folder / "thumbnail.jpg").resize((3000, 2000)).save(folder / "thumbnail.jpg")
    page = _Page(write_report(folder))
    assert max(max(picture.size) for picture in page.pictures()) == 1600
    assert "48000 × 28000 px" in page.text


def test_overlay_shows_the_label_where_it_is(tmp_path):
    folder = tmp_path / "halves"
    make_output(folder, shape=(64, 64))
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:, 32:] = 1
    labels[:10] = 255
    tifffile.imwrite(folder / "labels.tif", labels)
    after = np.asarray(_Page(write_report(folder)).pictures()[3])
    assert after[40, 10].tolist() == COLORS[0] and after[40, 50].tolist() == COLORS[1] and after[5, 5].tolist() == [225] * 3


@pytest.mark.parametrize("name", ["labels.tif", "energies.npz", "thumbnail.jpg", "spread.tif"])
def test_damaged_files_are_named(tmp_path, name):
    make_output(tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageReadError, match=re.escape(name)):
        write_report(tmp_path / "a")


def test_index_puts_disagreement_first_and_lists_what_failed(tmp_path):
    make_output(tmp_path / "agrees", given=(0.34, 0.33, 0.33))
    make_output(tmp_path / "differs #1", given=(0.05, 0.95, 0.0), seed=1)
    make_output(tmp_path / "unknown", given=None)
    make_output(tmp_path / "broken")
    (tmp_path / "broken" / "summary.json").write_text("{")
    write_report(tmp_path / "differs #1")
    page = _Page(write_index(tmp_path))
    check_self_contained(page)
    order = [page.text.index(f"{name} {words}") for name, words in
             [("differs #1", "Given and"), ("agrees", "Given and"), ("unknown", "No proportions")]]  # fmt: skip
    assert order == sorted(order)
    assert "broken" in page.text and "damaged" in page.text
    links = [value for tag, name, value in page.attributes if name == "href"]
    assert set(links) == {"differs%20%231/report.html"} and len(links) == 5  # three plots, table, card
    assert len(page.pictures()) == 6
    assert max(max(picture.size) for picture in page.pictures()) <= 280


def test_index_shows_the_evaluation(tmp_path):
    make_output(tmp_path / "a")
    row = {"miou": 0.731, "mdice": 0.845, "accuracy": 0.9, "proportion_error": 0.05, "iou": {"stroma": 0.8, "fat": None}}
    blocks = [{"name": "all <classes>", "classes": ["stroma", "fat"], "rows": [{"map": "refined", **row}]}]
    write_json(tmp_path / "evaluation.json", {"images": ["a"], "blocks": blocks})
    page = _Page(write_index(tmp_path))
    assert all(word in page.text for word in ("0.731", "0.845", "0.900", "5.0 %", "0.800", "all <classes>"))
    (tmp_path / "evaluation.json").write_text("[]")
    assert "evaluate again" in _Page(write_index(tmp_path)).text


def test_index_of_nothing_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match="monai-vslp segment"):
        write_index(tmp_path)


def test_disagreement_is_the_share_that_must_move():
    proportions = {"given": {"a": 0.7, "b": 0.3, "c": 0.0}, "confidence": {"a": 0.4, "b": 0.35, "c": 0.25}}
    assert disagreement({"proportions": proportions}) == pytest.approx(0.3)
    assert disagreement({"proportions": proportions | {"given": None}}) is None


def test_summary_survives_the_disk(tmp_path):
    summary = make_output(tmp_path / "a")
    assert read_summary(tmp_path / "a") == json.loads(json.dumps(summary))
    assert summary["psi"]["fat"] is None  # −inf has no place in JSON
    assert "NaN" not in (tmp_path / "a" / "summary.json").read_text()
    assert {"monai_vslp", "monai", "torch", "numpy"} <= set(summary["versions"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "video"}, "allowed are image and slide"),
        ({"colors": [[1, 2, 3]]}, "each of the 3 classes"),
        ({"shape": [3]}, "shape must be"),
        ({"classes": []}, "list of names"),
        ({"proportions": {"confidence": {}, "refined": {}, "labels": {}}}, "proportions.confidence"),
        ({"psi": {"stroma": 1.0}}, "psi must have"),
        ({"energies": "none"}, "energies must be"),
    ],
)
def test_wrong_summaries_are_explained(tmp_path, change, message):
    summary = make_output(tmp_path / "a")
    with pytest.raises(InputError, match=message):
        validate_summary(summary | change)


def test_unreadable_summaries_are_explained(tmp_path):
    with pytest.raises(InputError, match="monai-vslp segment"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"name": "a"}')
    with pytest.raises(InputError, match="kind, classes, colors, shape, proportions missing"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="damaged"):
        read_summary(tmp_path)


def test_summary_refuses_wrong_lengths(tmp_path):
    with pytest.raises(InputError, match="psi has 2 values for 3 classes"):
        make_output(tmp_path / "a", psi=[0.0, 1.0])
