"""The MONAI Label app: a real server, driven by MONAI Label's own client and over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tifffile
from label_models import make_bundle
from PIL import Image

from monai_vslp.data.synthetic import CLASSES, write_cohort, write_slide

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("VENV_LABEL", REPOSITORY / ".venv-label"))
PYTHON = ENVIRONMENT / "bin" / "python"
REFINEMENT = REPOSITORY / "bundles" / "pathology_segmentation_refinement"

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / ".installed").is_file(),
    reason=f"needs the environment {ENVIRONMENT}; make it with: bash scripts/setup_label.sh",
)

SIDE = 96
SLIDE = (1152, 512)
PATIENCE = 180  # s
SHARES = dict(zip(CLASSES, (40, 30, 15, 10, 5)))
CLIENT = """
import json, sys
from monailabel.client import MONAILabelClient

client = MONAILabelClient(sys.argv[1], tmpdir=sys.argv[2])
for line in sys.stdin:
    name, arguments, options = json.loads(line)
    try:
        answer = {"found": getattr(client, name)(*arguments, **options)}
    except Exception as error:
        answer = {"error": getattr(error, "msg", repr(error))}
    print("ANSWER", json.dumps(answer, default=lambda value: value.decode()), flush=True)
"""


class Client:
    """MONAI Label's client, in its environment."""

    def __init__(self, url, folder):
        command = [PYTHON, "-c", CLIENT, url, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(word) for word in command], text=True, **pipes)

    def __call__(self, name, *arguments, **options):
        self.process.stdin.write(json.dumps([name, arguments, options]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                found = answer["found"]
                # Numbers without a file come as text.
                return (found[0], json.loads(found[1])) if name == "infer" and isinstance(found[1], str) else found
        raise RuntimeError("the client ended")

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def post(url, **fields):
    """``(status, content, type)`` of a form that is sent as QuPath's script sends it."""
    data = urllib.parse.urlencode({key: json.dumps(value) for key, value in fields.items()}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=PATIENCE) as answer:
            return answer.status, answer.read(), answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers["content-type"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Six images, a slide, and a file of confidences, with one table beside them."""
    folder = tmp_path_factory.mktemp("studies")
    write_cohort(folder / "made", train=5, val=1, size=SIDE)
    rows = []
    for path in sorted((folder / "made" / "images").glob("*.png")):
        path.rename(folder / path.name)
        rows.append(f"{path.name},test," + ",".join(map(str, SHARES.values())))
    slide = write_slide(folder / "s1.tif", shape=SLIDE)
    slide.mask.rename(folder / "made" / slide.mask.name)
    rows.append("s1.tif,test," + ",".join(f"{100 * share:.3f}" for share in slide.proportions))
    logits = np.random.default_rng(0).normal(size=(len(CLASSES), 64, 64)).astype(np.float32)
    np.save(folder / "other.npy", logits)
    rows.append("other.npy,test,,,,,")
    (folder / "proportions.csv").write_text("\n".join([f"image,split,{','.join(CLASSES)}", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def url(studies, tmp_path_factory):
    """A server as ``monai-vslp label`` starts it."""
    model = make_bundle(tmp_path_factory.mktemp("models") / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "monai_vslp", "label", "--model", model, "--model", f"refinement={REFINEMENT}"]
    command += ["--studies", studies, "--port", port]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "no_proxy": "*",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "",
    }
    with open(log, "w") as file:
        words = [str(word) for word in command]
        server = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | settings, cwd=log.parent)
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        assert server.poll() is None and time.monotonic() < started + PATIENCE, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/info/", timeout=PATIENCE):
            break
        time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    made = Client(url, tmp_path_factory.mktemp("client"))
    yield made
    made.close()


def fractions(percent):
    return [value / 100 for value in percent.values()]


def test_info_and_datastore(client):
    info = client("info")
    assert set(info["models"]) == {"tiny", "refinement"} and list(info["trainers"]) == ["tiny"]
    assert info["models"]["tiny"]["labels"] == {name: index + 1 for index, name in enumerate(CLASSES)}
    assert set(info["strategies"]) == {"proportions", "random"}
    images = set(client("datastore")["objects"])
    assert images == {*(f"train_{i:04d}" for i in range(5)), "val_0005", "s1", "other"}, "tables and results are no images"


def test_an_image_is_segmented_with_the_proportions_beside_it(client):
    file, numbers = client("infer", "tiny", "train_0000", {})
    labels = np.asarray(Image.open(file))
    assert labels.shape == (SIDE, SIDE) and set(np.unique(labels)) <= set(range(1, len(CLASSES) + 1))
    assert numbers["source"] == "file" and not numbers["cached"] and numbers["residual"] < 1e-5
    assert list(numbers["proportions"]["refined"].values()) == pytest.approx(fractions(SHARES), abs=1e-4)
    assert sum(numbers["proportions"]["labels"].values()) == pytest.approx(1, abs=1e-4)


def test_a_moved_proportion_and_strokes_redraw_what_is_cached(client):
    """The second answer only solves again; strokes become their class, and proportions still hold."""
    client("infer", "tiny", "train_0001", {})
    _, moved = client("infer", "tiny", "train_0001", {"move": {"tumour": 0.5}})
    assert moved["cached"] and moved["warm"] and moved["source"] == "request"
    expected = [0.5 if name == "tumour" else 0.5 * share / 70 for name, share in SHARES.items()]
    assert list(moved["proportions"]["given"].values()) == pytest.approx(expected, abs=1e-5)
    assert list(moved["proportions"]["refined"].values()) == pytest.approx(expected, abs=1e-4)
    stroke = {
        "type": "Feature",
        "geometry": {"type": "LineString", "coordinates": [[20, 20], [60, 40]]},
        "properties": {"classification": {"name": "fat"}, "radius": 2},
    }
    given = moved["proportions"]["given"]
    file, painted = client("infer", "tiny", "train_0001", {"proportions": given, "strokes": [stroke]})
    assert np.asarray(Image.open(file))[30, 40] == 1 + CLASSES.index("fat")
    assert painted["strokes"]["pixels"] > 150 and painted["strokes"]["kept"] == 1 and painted["warm"]
    assert list(painted["proportions"]["refined"].values()) == pytest.approx(expected, abs=1e-4)


def test_energies_come_as_layers(client):
    file, numbers = client("infer", "tiny", "train_0000", {"result": "layers"})
    with tifffile.TiffFile(file) as tiff:
        layers, described = tiff.asarray(), tiff.ome_metadata
    assert layers.shape == (2 * len(CLASSES) + 2, SIDE, SIDE) and layers.dtype == np.float32
    for name in ("confidence tumour", "fidelity energy", "regularization energy"):
        assert f'Name="{name}"' in described
    assert layers[: len(CLASSES)].sum(axis=0) == pytest.approx(1, abs=1e-4)
    assert layers[len(CLASSES) : -2].mean(axis=(1, 2)) == pytest.approx(fractions(SHARES), abs=1e-4)
    assert layers[-2:].sum(axis=0).mean() == pytest.approx(numbers["energy"], rel=1e-3)


def test_a_region_comes_back_as_an_annotation(client):
    """MONAI Label's slide request: location and size in level-0 px, an annotation of the Digital Slide Archive as answer."""
    _, text = client("wsi_infer", "tiny", "s1", {"location": [100, 300], "size": [256, 256]})
    annotation = json.loads(text)
    points = np.concatenate([np.array(element["points"]) for element in annotation["elements"]])
    assert points[:, 0].min() >= 100 and points[:, 0].max() <= 356
    assert points[:, 1].min() >= 300 and points[:, 1].max() <= 556
    assert {element["group"] for element in annotation["elements"]} <= set(CLASSES)


def test_a_whole_slide_is_one_problem_and_moves_too(client, url):
    file, numbers = client("infer", "tiny", "s1", {"result": "geojson"})
    refined = numbers["proportions"]["refined"]
    assert numbers["kind"] == "slide" and numbers["source"] == "file" and numbers["downsample"] == 8
    assert refined == pytest.approx(numbers["proportions"]["given"], abs=1e-3)
    polygons = json.loads(Path(file).read_text())["features"]
    assert max(y for one in polygons for _, y in one["geometry"]["coordinates"][0]) > SLIDE[0] / 2
    form = {"size": [0, 0], "params": {"move": {"tumour": 0.5}, "result": "layers"}}
    status, content, _ = post(f"{url}/infer/wsi_v2/tiny?image=s1", wsi=form)
    assert status == 200 and content[:2] in (b"II", b"MM")
    _, again = client("infer", "tiny", "s1", {"result": "none", "move": {"tumour": 0.5}})
    assert again["proportions"]["refined"]["tumour"] == pytest.approx(0.5, abs=1e-3)
    assert again["seconds"]["network"] == numbers["seconds"]["network"], "tiles are not computed again"


def test_the_script_for_qupath_is_answered(url):
    """What monai_vslp/apps/label/qupath/segment_region.groovy sends and takes: features as QuPath writes and reads them."""
    script = (REPOSITORY / "monai_vslp" / "apps" / "label" / "qupath" / "segment_region.groovy").read_text()
    for part in ("/infer/wsi_v2/", "?image=", "'wsi='", "'params'", "'region'", "'strokes'", "'proportions'"):
        assert part in script
    ring = [[50, 200], [450, 220], [400, 700], [80, 650], [50, 200]]
    region = {"type": "Feature", "id": "6d8f", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    region["properties"] = {"objectType": "annotation", "name": "area 1"}
    brush = [[200, 300], [260, 300], [260, 360], [200, 360], [200, 300]]
    stroke = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [brush]}}
    stroke["properties"] = {"objectType": "annotation", "name": "stroke", "classification": {"name": "fat", "color": [1, 2, 3]}}
    params = {"region": region, "strokes": [stroke], "proportions": {"tumour": 60, "stroma": "20-25", "fat": "10"}}
    status, content, _ = post(f"{url}/infer/wsi_v2/tiny?image=s1", wsi={"params": params})
    assert status == 200, content
    collection = json.loads(content)
    assert collection["type"] == "FeatureCollection" and collection["features"]
    for feature in collection["features"]:
        assert feature["properties"]["objectType"] == "annotation" and len(feature["id"]) == 36
        assert set(feature["properties"]["classification"]) == {"name", "color"}
        rings = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for ring in rings)
        corners = np.concatenate([np.array(ring) for ring in rings])
        assert corners.min(axis=0)[1] >= 198 and (corners.max(axis=0) <= (452, 702)).all()


def test_the_examples_of_the_guide_run(url):
    """The Python of docs/label.md, but for the training, which has a test of its own."""
    text = (REPOSITORY / "docs" / "label.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "train_start" not in block]
    assert len(blocks) == 2
    code = "".join(blocks).replace("http://127.0.0.1:8000", url).replace("case_1", "train_0002").replace('"run"', '"tiny"')
    words = [str(PYTHON), "-c", f"{code}\nprint(numbers['strokes']['kept'], numbers['warm'])"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "1.0 True", done.stderr[-2000:] + done.stdout


def test_the_other_bundle_refines_confidences(client):
    """Its image is a file of another network's logits; the learned regularizer is the bundle's."""
    _, numbers = client("infer", "refinement", "other", {"proportions": list(SHARES.values())})
    assert "learned" in numbers["reason"] and not numbers["warm"]
    assert list(numbers["proportions"]["refined"].values()) == pytest.approx(fractions(SHARES), abs=1e-3)
    _, numbers = client("infer", "refinement", "other", {"regularizer": "tv", "proportions": list(SHARES.values())})
    _, numbers = client("infer", "refinement", "other", {"regularizer": "tv", "move": {"fat": 0.1}})
    assert numbers["warm"] and numbers["proportions"]["refined"]["fat"] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "image", "params", "status", "said"),
    [
        ("tiny", "train_0000", {"proportions": {"tumour": 160}}, 400, "'tumour': 160 is more than 100 %"),
        ("tiny", "train_0000", {"proportions": {"tumor": 60}}, 400, "unknown class 'tumor'.*Did you mean 'tumour'"),
        ("tiny", "train_0000", {"proportions": [60, 40]}, 400, "expected 5 values"),
        ("tiny", "train_0000", {"proportion": {"tumour": 60}}, 400, "did you mean 'proportions'"),
        ("tiny", "train_0000", {"strokes": {"type": "Point", "coordinates": [3, 4]}}, 400, "has no class"),
        ("tiny", "train_0000", {"result": "png"}, 400, "result is one of labels, geojson"),
        ("tiny", "train_0000", {"size": [10, 10], "location": [500, 500]}, 400, "outside train_0000.png"),
        ("tiny", "train_0000", {"regularizer": "learned"}, 400, "no learned regularizer"),
        ("tiny", "other", {}, 400, "other.npy"),
        ("refinement", "s1", {}, 400, "."),
        ("tiny", "absent", {}, 404, "no image 'absent'; there are other, s1"),
        ("absent", "train_0000", {}, 404, "no model 'absent'; there are tiny, refinement"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(url, model, image, params, status, said):
    got, content, _ = post(f"{url}/infer/{model}?image={image}", params=params)
    assert got == status and re.search(said, json.loads(content)["detail"]), content


def test_active_learning_proposes_what_fits_worst(client):
    """Images that the network has not seen are computed; the slide counts once it was segmented."""
    client("infer", "tiny", "s1", {"result": "none"})
    sample = client("next_sample", "proportions", {"model": "tiny"})
    differences = [entry["difference"] for entry in sample["ranking"]]
    assert differences == sorted(differences, reverse=True) and sample["id"] == sample["ranking"][0]["id"]
    assert {entry["id"] for entry in sample["ranking"]} == {*(f"train_{i:04d}" for i in range(5)), "val_0005", "s1"}
    found = abs(sample["given"][sample["class"]] - sample["network"][sample["class"]])
    assert found == max(abs(sample["given"][name] - sample["network"][name]) for name in CLASSES)
    after = client("next_sample", "proportions", {"model": "tiny", "skip": [sample["id"]]})
    assert after["id"] == sample["ranking"][1]["id"]


def test_labels_that_are_not_understood_are_not_kept(client, tmp_path):
    (tmp_path / "bad.csv").write_text(f"image,{','.join(CLASSES)}\nval_0005.png,90,90,0,0,0\n")
    with pytest.raises(RuntimeError, match="(?s)400.*sum to 180.*was not kept"):
        client("save_label", "val_0005", str(tmp_path / "bad.csv"), "final")
    assert "final" not in client("datastore")["objects"]["val_0005"]["labels"]


def test_batches_of_images_are_segmented(url, studies):
    """What the model cannot read is left out; results become labels of the datastore."""
    request = urllib.request.Request(
        f"{url}/batch/infer/tiny?run_sync=true&images=unlabeled",
        json.dumps({"max_workers": 1, "max_batch_size": 2}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        done = json.loads(answer.read())
    assert set(done) == {"s1", "train_0000"} and done["s1"]["params"]["kind"] == "slide"
    assert (studies / "labels" / "original" / "train_0000.png").is_file()


@pytest.mark.slow
def test_training_from_files_of_proportions(client, studies, tmp_path):
    """Labels are handed in, a process of its own trains, and the server serves what it left."""
    before = client("info")["models"]["tiny"]
    for number, name in enumerate([*(f"train_{i:04d}" for i in range(5))]):
        if number % 2:
            (tmp_path / "label.json").write_text(json.dumps({"proportions": {"tumour": 60 + number, "stroma": "20-25"}}))
            client("save_label", name, str(tmp_path / "label.json"), "final")
        else:
            (tmp_path / "label.csv").write_text(f"image,{','.join(CLASSES)}\n{name}.png,50,{30 + number},,,\n")
            client("save_label", name, str(tmp_path / "label.csv"), "final")
    _, numbers = client("infer", "tiny", "train_0000", {})
    assert numbers["source"] == "label" and numbers["proportions"]["given"]["stroma"] == pytest.approx(0.5)
    network = numbers["proportions"]["network"]
    client("train_start", "tiny", {"epochs": 2, "batch_size": 2, "start": "model"})
    started = time.monotonic()
    while (status := client("train_status"))["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < started + PATIENCE, status
        time.sleep(0.5)
    assert status["status"] == "DONE", status["details"]
    stats = client("info")["train_stats"]["tiny"]
    assert stats["epochs"] == 2 and Path(stats["folder"]).name == "trained_1" and stats["best_proportion_error"] is not None
    _, numbers = client("infer", "tiny", "train_0000", {})
    assert not numbers["cached"] and numbers["proportions"]["network"] != network, "the new weights are served"
    assert client("info")["models"]["tiny"]["labels"] == before["labels"]
    table = (studies / ".monai_vslp" / "tiny" / "tables" / "1.csv").read_text().splitlines()
    assert len(table) == 6 and sum(",val," in row for row in table) == 1 and any("20.000000-25.000000%" in row for row in table)
