"""What the MONAI Label app is made of, without MONAI Label: requests, strokes, sessions, ranking, tables, the command."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import tifffile
import torch
from cases import noisy_confidence
from label_models import make_bundle
from PIL import Image

from monai_vslp.apps.label import (
    NOT_PAINTED,
    Fit,
    FitStore,
    Session,
    SessionCache,
    View,
    label_command,
    move_proportion,
    paint_strokes,
    parse_request,
    rank_fits,
    unary_costs,
)
from monai_vslp.apps.label.service import LabelService
from monai_vslp.apps.label.session import adjusted
from monai_vslp.apps.label.training import items_to_table
from monai_vslp.cli import main
from monai_vslp.data.cohort import read_cohort
from monai_vslp.data.synthetic import CLASSES, write_slide
from monai_vslp.transforms import VariationalRefinement
from monai_vslp.utils.errors import InputError, ProportionError

NAMES = ("tumour", "stroma", "fat")
SIZE = (64, 80)


def feature(kind, coordinates, name="fat", **properties):
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"classification": {"name": name}} | properties,
    }


@pytest.fixture
def session():
    q, p = noisy_confidence(SIZE)
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(2))
    made = Session(View(NAMES, q, image), VariationalRefinement(alpha=1.0))
    made.true = p.tolist()
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slides") / "s.tif", shape=(1152, 512)).path


# ---- requests -----------------------------------------------------------------------------------------------------------


def test_proportions_are_read_as_people_write_them():
    asked = parse_request({"proportions": {"tumour": "60", "stroma": "20-30"}, "device": "cuda"}, NAMES)
    assert asked.proportions.mean == pytest.approx([0.6, 0.25, 0.15]) and asked.proportions.upper[1] == pytest.approx(0.3)
    assert parse_request({"proportions": [0.5, 0.25, 0.25]}, NAMES).proportions.mean == pytest.approx([0.5, 0.25, 0.25])
    assert parse_request({"proportions": "unknown"}, NAMES).unknown
    assert parse_request({"move": {"fat": "40%"}}, NAMES).move == ("fat", pytest.approx(0.4))
    assert parse_request({"move": {"fat": 0.4}}, NAMES).move == ("fat", pytest.approx(0.4))


def test_regions_come_as_rectangles_or_polygons():
    assert parse_request({}, NAMES).region is None
    assert parse_request({"location": [0, 0], "size": [0, 0]}, NAMES).region is None
    ((ring,),) = parse_request({"location": [5, 6], "size": [10, 20]}, NAMES).region
    assert ring == [[5, 6], [15, 6], [15, 26], [5, 26], [5, 6]]
    polygon = feature("Polygon", [[[0, 0], [9, 0], [9, 9], [0, 0]]])
    assert parse_request({"region": polygon, "size": [3, 3]}, NAMES).region == [polygon["geometry"]["coordinates"]]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"move": {"fat": 0.4, "tumour": 0.1}}, "one class with its new share"),
        ({"move": {"bone": 0.4}}, "unknown class 'bone'"),
        ({"move": {"fat": 0.4}, "proportions": [0.5, 0.5, 0]}, "proportions or a move, not both"),
        ({"proportions": 60}, "object of the classes tumour, stroma, fat"),
        ({"trust": "much"}, "trust .* is a number, got 'much'"),
        ({"alpha": -1}, "alpha must be at least 0"),
        ({"region": feature("Point", [1, 2])}, "expected a Polygon"),
        ({"region": {"type": "Polygon", "coordinates": [1]}}, "corners are level-0"),
        ({"size": [0, 10]}, "size must be above 0"),
        ({"label": "/tmp/scribbles.png"}, "corrections are sent as strokes"),
        ({"cold": "yes"}, "cold is true or false"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(request_, said):
    with pytest.raises(InputError, match=said):
        parse_request(request_, NAMES)


def test_a_moved_proportion_leaves_the_ratios_of_the_others():
    assert move_proportion([0.6, 0.3, 0.1], 2, 0.4) == pytest.approx([0.4, 0.2, 0.4])
    assert move_proportion([1.0, 0.0, 0.0], 0, 0.5) == pytest.approx([0.5, 0.25, 0.25])
    with pytest.raises(ProportionError, match="between 0 and 1"):
        move_proportion([0.6, 0.4], 0, 1.5)


# ---- strokes ------------------------------------------------------------------------------------------------------------


def test_strokes_are_painted_on_the_grid_of_the_view():
    """A disc, a line and a polygon with a hole in level-0 px; the last lies on top."""
    hole = [[[20, 20], [60, 20], [60, 60], [20, 60], [20, 20]], [[30, 30], [50, 30], [50, 50], [30, 50], [30, 30]]]
    strokes = [
        feature("Point", [110, 120], "tumour", radius=10),
        feature("LineString", [[104, 200], [180, 200]], "stroma", radius=4),
        feature("Polygon", [[[x + 100, y + 100] for x, y in ring] for ring in hole], "fat"),
        feature("MultiPoint", [[125, 125], [900, 900]], "tumour", radius=2),
    ]
    painted = paint_strokes(strokes, NAMES, (80, 60), origin=(100, 100), downsample=2.0)
    assert painted.shape == (80, 60) and painted[10, 5] == 0 and painted[50, 20] == 1
    assert painted[12, 28] == 2 and painted[20, 20] == NOT_PAINTED and painted[12, 12] == 0
    assert np.pi * 25 * 0.7 < (painted == 0).sum() < np.pi * 25 * 1.6
    costs = unary_costs(painted, 3, cost=7.0)
    assert costs.shape == (3, 80, 60) and costs[:, 10, 5].tolist() == [0, 7, 7] and not costs[:, 20, 20].any()


@pytest.mark.parametrize(
    ("strokes", "said"),
    [
        ("red", "must be GeoJSON"),
        ([{"type": "Feature"}], "feature 1: expected a geometry"),
        (feature("Point", [1, 2], "bone"), "unknown class 'bone'"),
        (feature("Point", [1, 2], radius=-1), "radius is a positive number"),
        (feature("LineString", [1, 2]), "coordinates of a LineString"),
        ({"type": "Point", "coordinates": [1, 2]}, "has no class"),
    ],
)
def test_strokes_that_cannot_be_meant_are_refused(strokes, said):
    with pytest.raises(InputError, match=said):
        paint_strokes(strokes, NAMES, SIZE)


# ---- sessions -----------------------------------------------------------------------------------------------------------


def test_answers_after_the_first_go_on_from_it(session):
    """Few steps, the new proportions are met, and the map is nearly that of solving anew."""
    first = session.solve(session.true)
    moved = move_proportion(session.true, 0, session.true[0] + 0.05)
    second = session.solve(moved)
    assert not first.warm and second.warm and len(second.result.energies) <= 5 < len(first.result.energies)
    assert second.result.proportions.tolist() == pytest.approx(moved, abs=1e-5)
    anew = session.solve(moved, cold=True)
    assert not anew.warm and float((second.result.labels != anew.result.labels).float().mean()) < 0.05
    again = session.solve(moved)
    assert again.result.energies[-1] <= anew.result.energies[-1] + 1e-6, "the same request again only goes on"


def test_strokes_are_kept_and_erased(session):
    before = session.solve(session.true)
    painted = np.full(SIZE, NOT_PAINTED, dtype=np.uint8)
    label = int((before.result.labels[10:20, 10:30].flatten().mode().values + 1) % 3)
    painted[10:20, 10:30] = label
    after = session.solve(session.true, painted=painted)
    assert (after.result.labels[10:20, 10:30] == label).all() and after.kept == 1 and after.warm
    assert after.result.proportions.tolist() == pytest.approx(session.true, abs=1e-5)
    erased = session.solve(session.true)
    assert erased.kept is None
    assert float((erased.result.labels != before.result.labels).float().mean()) < 0.02


def test_strokes_of_an_absent_class_are_refused_and_a_class_may_come_back(session):
    session.solve([0.6, 0.4, 0.0])
    painted = np.full(SIZE, NOT_PAINTED, dtype=np.uint8)
    painted[:4] = 2
    with pytest.raises(ProportionError, match="strokes paint fat, whose proportion is 0"):
        session.solve([0.6, 0.4, 0.0], painted=painted)
    back = session.solve([0.5, 0.3, 0.2])
    assert not back.warm and back.result.proportions.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-5)


def test_free_proportions_bounds_and_other_options(session):
    free = session.solve(None)
    assert free.given is None and free.result.residual is None and free.result.fidelity_energy is None
    held = session.solve(
        [0.4, 0.3, 0.3], bounds=[[0.35, 0.2, 0.2], [0.45, 0.4, 0.4]], refinement=adjusted(session.refinement, "bounds", None)
    )
    assert (held.result.proportions >= torch.tensor([0.35, 0.2, 0.2]) - 1e-4).all()
    without = adjusted(session.refinement, 1.0, 0.0)
    soft = session.solve([0.9, 0.05, 0.05], refinement=without, cold=True, energy_maps=True)
    assert float(soft.result.proportions[0]) < 0.89 and not soft.result.regularization_energy.any()


def test_sessions_are_dropped_when_they_are_too_many(session):
    cache = SessionCache(largest=2 * session.bytes)
    made = []

    def make():
        made.append(Session(session.view, session.refinement))
        return made[-1]

    first, found = cache.get("a", make)
    assert not found and cache.get("a", make) == (first, True)
    cache.get("b", make)
    cache.get("a", make)
    cache.get("c", make)
    assert len(cache) == 2 and cache.get("a", make)[1] and not cache.get("b", make)[1]


# ---- service ------------------------------------------------------------------------------------------------------------


def test_a_service_finds_proportions_and_serves_what_was_trained(bundle, tmp_path):
    """The request goes before the label, the label before the file beside the image."""
    pixels = np.random.default_rng(0).integers(120, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"proportions": dict.fromkeys(CLASSES, 20)}))
    (tmp_path / "label.csv").write_text(f"image,{','.join(CLASSES)}\na.png,60,10,10,10,10\n")
    service = LabelService({"tiny": bundle}, tmp_path / "work")
    image = tmp_path / "a.png"
    assert service.answer("tiny", image, {"result": "none"})[1]["source"] == "file"
    numbers = service.answer("tiny", image, {"result": "none"}, "a", tmp_path / "label.csv")[1]
    assert numbers["source"] == "label" and numbers["proportions"]["given"]["stroma"] == pytest.approx(0.6)
    numbers = service.answer("tiny", image, {"proportions": "unknown", "result": "none"}, "a", tmp_path / "label.csv")[1]
    assert numbers["source"] == "none" and numbers["proportions"]["given"] is None
    box = {"location": [0, 0], "size": [2048, 2048], "result": "none"}
    assert service.answer("tiny", image, box)[1]["source"] == "file", "a rectangle around all of an image is the image"
    part = service.answer("tiny", image, {"location": [8, 8], "size": [32, 16], "result": "none"})[1]
    assert part["source"] == "none" and part["location"] == [8, 8] and part["size"] == [32, 16]
    fit = service.fit("tiny", "a", image, None, compute=False)
    assert fit.given == pytest.approx([0.2] * 5) and sum(fit.network) == pytest.approx(1, abs=1e-4)
    other = make_bundle(tmp_path / "other", window=16)
    service.serve("tiny", other)
    assert service.model("tiny").folder == other and not service.answer("tiny", image, {"result": "none"})[1]["cached"]
    with pytest.raises(InputError, match="no model 'absent'; there are tiny"):
        service.model("absent")


def test_a_region_of_a_slide_has_its_tissue_and_its_scale(bundle, slide, tmp_path):
    service = LabelService({"tiny": bundle}, tmp_path / "work")
    view = service.model("tiny").view(slide, [[[[100, 300], [356, 300], [356, 556], [100, 556], [100, 300]]]])
    assert view.downsample == 2 and view.mpp == pytest.approx(1.0) and view.origin == (100, 300)
    assert view.confidence.shape == (5, 128, 128) and view.image.shape == (3, 128, 128) and 0 < view.mass.mean() <= 1
    with pytest.raises(InputError, match="outside s.tif.*up to"):
        service.model("tiny").view(slide, [[[[9000, 9000], [9100, 9000], [9100, 9100], [9000, 9000]]]])
    with pytest.raises(InputError, match="strokes correct a region"):
        service.answer("tiny", slide, {"strokes": feature("Point", [1, 2])})


def test_a_slide_with_other_proportions_is_only_refined_again(bundle, slide, tmp_path):
    """Tiles stay; energies come as a pyramid of two channels; a move starts from the proportions of the answer before."""
    service = LabelService({"tiny": bundle}, tmp_path / "work")
    with pytest.raises(InputError, match="ask for s.tif without it first"):
        service.answer("tiny", slide, {"move": {"fat": 0.3}})
    first = service.answer("tiny", slide, {"proportions": [20] * 5, "result": "none"})[1]
    file, second = service.answer("tiny", slide, {"move": {"fat": 0.4}, "result": "layers"})
    assert second["proportions"]["given"] == pytest.approx(dict(zip(CLASSES, [0.15] * 4 + [0.4])))
    assert second["proportions"]["refined"]["fat"] == pytest.approx(0.4, abs=1e-3)
    assert second["seconds"]["network"] == first["seconds"]["network"]
    energies = tifffile.imread(file)
    assert energies.shape == (2, 144, 64) and energies.dtype == np.float32 and np.isfinite(energies).all()
    file.unlink()


# ---- ranking and training -----------------------------------------------------------------------------------------------


def test_what_fits_worst_comes_first(tmp_path):
    fits = [
        Fit("b", [0.5, 0.4, 0.1], [0.45, 0.45, 0.1], NAMES),
        Fit("c", [0.9, 0.1, 0.0], [0.2, 0.6, 0.2], NAMES),
        Fit("a", [0.5, 0.4, 0.1], [0.5, 0.35, 0.15], NAMES),
    ]
    assert [fit.image for fit in rank_fits(fits)] == ["c", "a", "b"]
    assert fits[1].difference == pytest.approx(1.4 / 3) and fits[1].worst == "tumour"
    store = FitStore(tmp_path / "fits")
    store.put("x/y", "mark", [0.25, 0.75])
    assert store.get("x/y", "mark") == [0.25, 0.75] and store.get("x/y", "other") is None and store.get("z", "mark") is None


def test_labels_become_the_table_of_a_training(tmp_path):
    """Ranges, raters, patients and blanks are kept; a fifth of the patients is held out."""
    items = []
    for number in range(10):
        (tmp_path / f"i{number}.png").touch()
        label = tmp_path / f"{number}.csv"
        label.write_text(f"image,patient,mpp,tumour,stroma,fat\ni{number}.png,p{number // 2},0.5,{10 * number},,<5\n")
        items.append({"image": str(tmp_path / f"i{number}.png"), "label": str(label)})
    (tmp_path / "0.csv").write_text(
        "image,patient,mpp,rater,tumour,stroma,fat\ni0.png,p0,0.5,x,20,80,0\ni0.png,p0,0.5,y,30,70,0\n"
    )
    cohort = read_cohort(items_to_table(tmp_path / "t.csv", items, NAMES), tmp_path, NAMES)
    assert len(cohort) == 10 and len(cohort.split("val")) == 2 and len({r.patient for r in cohort.split("val").records}) == 1
    first, last = cohort.records[0], cohort.records[-1]
    assert first.proportions.raters == 2 and first.proportions.mean == pytest.approx([0.25, 0.75, 0])
    assert last.proportions.upper[2] == pytest.approx(0.05, abs=1e-3) and last.mpp == 0.5
    assert len(read_cohort(items_to_table(tmp_path / "t.csv", items, NAMES, 0.0), tmp_path, NAMES).split("val")) == 0


def test_labels_that_cannot_be_trained_from_are_refused(slide, tmp_path):
    with pytest.raises(InputError, match="no image has a label"):
        items_to_table(tmp_path / "t.csv", [], NAMES)
    (tmp_path / "s.csv").write_text("image,tumour,stroma,fat\ns.tif,60,30,10\n")
    with pytest.raises(InputError, match="training takes images, and s.tif is a slide"):
        items_to_table(tmp_path / "t.csv", [{"image": str(slide), "label": str(tmp_path / "s.csv")}], NAMES)


# ---- the command --------------------------------------------------------------------------------------------------------


def test_the_command_is_printed(bundle, tmp_path, capsys):
    code = main(["label", "--model", f"one={bundle}", "--studies", str(tmp_path / "studies"), "--port", "9000", "--print"])
    line = capsys.readouterr().out
    assert code == 0 and "monailabel.main start_server" in line and "--host 127.0.0.1 --port 9000" in line
    assert (tmp_path / "studies" / ".monai_vslp" / "app" / "main.py").is_file()
    command, environment = label_command([bundle], tmp_path / "studies", work=tmp_path / "work", views="none")
    assert json.loads(command[command.index("models") + 1]) == {"tiny": str(bundle)} and command[-1] == "none"
    assert {"*.png", "*.svs", "*.csv"} <= set(json.loads(environment["MONAI_LABEL_DATASTORE_FILE_EXT"]))


@pytest.mark.skipif(importlib.util.find_spec("monailabel") is not None, reason="MONAI Label is in this environment")
def test_without_monai_label_the_command_says_how_to_get_it(bundle, tmp_path, capsys):
    assert main(["label", "--model", str(bundle), "--studies", str(tmp_path)]) == 2
    assert "bash scripts/setup_label.sh" in capsys.readouterr().err


def test_models_that_cannot_be_served_are_refused(bundle, tmp_path, capsys):
    assert main(["label", "--model", str(tmp_path), "--studies", str(tmp_path), "--print"]) == 2
    assert "is no folder that 'monai-vslp train' wrote" in capsys.readouterr().err
    with pytest.raises(InputError, match="two models are named 'tiny'"):
        label_command([bundle, bundle], tmp_path)
