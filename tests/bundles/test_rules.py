"""Both bundles by the rules of the model zoo and of platforms that evaluate no Python."""

import configparser
import hashlib
import json
import re
import socket

import numpy as np
import pytest
import torch
from bundle_rules import BUNDLES, ROOT, SCHEMA, allowed, configs, problems
from cases import SMALL_BACKBONE, noisy_confidence, write_two_class_cohort
from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

import monai_vslp

LARGEST = 25 * 2**20  # bytes of a file in the zoo
KEYS = {  # what the zoo's tools look for
    "train.json": ("bundle_root", "device", "dataset_dir", "network_def", "train", "validate", "initialize", "run"),
    "inference.json": (
        *("bundle_root", "device", "dataset_dir", "dataset", "evaluator", "network_def", "inferer", "preprocessing"),
        *("postprocessing", "output_dir", "initialize", "run"),
    ),
}
FILES = [
    *("train.json", "multi_gpu_train.json", "finetune.json", "inference.json", "slide_inference.json", "evaluate.json"),
    *("tracking.json", "metadata.json", "logging.conf"),
]


def metadata(bundle):
    return json.loads((ROOT / bundle / "configs" / "metadata.json").read_text())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_config_needs_more_than_paths_and_devices(bundle):
    found = {name: problems(config) for name, config in configs(bundle).items()}
    assert len(found) >= 7
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "expression",
    [
        "$len(@classes)",
        "$@network.to(@device)",
        "$__import__('os').system('true')",
        "$lambda x: x",
        "$@bundle_root + open('/etc/passwd').read()",
        "$@bundle_root * 2",
        "$'/a' + @bundle_root",
        "$@bundle_root + '/../x y'",
        "$torch.device('cuda' if torch.cuda.is_available() else open('x'))",
        "$[x for x in @a]",
    ],
)
def test_the_list_refuses_everything_else(expression):
    assert not allowed(expression)
    assert problems({"a": [{"b": expression}]}) == [f"a#0#b: {expression}"]


def test_the_list_sees_imports_targets_and_addresses():
    config = {"imports": ["$import os"], "a": {"_target_": "os.system"}, "b": "https://x", "c": {"pretrained": True}}
    assert len(problems(config)) == 4
    assert allowed("$@bundle_root + '/models/model.pt'") and allowed("$@a#b + @c")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_files_and_names_are_those_of_the_zoo(bundle):
    folder = ROOT / bundle
    present = {path.name for path in (folder / "configs").iterdir()}
    assert set(FILES) <= present
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt"):
        assert (folder / name).is_file(), name
    for path in folder.rglob("*"):
        assert path.suffix not in (".py", ".so", ".whl"), f"platforms forbid code in a bundle: {path}"
        assert not path.is_file() or path.stat().st_size < LARGEST, path
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", bundle)
    for name, config in configs(bundle).items():
        for key in KEYS.get(name, ()):
            assert key in config, f"{name} lacks {key}"
        text = (folder / "configs" / name).read_text()
        assert not re.search(r'"(/[\w.-]+/|~/|[A-Z]:\\)', text), f"{name} has a path of some machine"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_by_schema_version_and_changelog(bundle, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    path = ROOT / bundle / "configs" / "metadata.json"
    verify_metadata(meta_file=str(path), filepath=str(schema))
    values = metadata(bundle)
    assert values["version"] in values["changelog"]
    assert list(values["changelog"])[-1] == values["version"], "the newest entry is that of the version"
    assert values["schema"].endswith("meta_schema_20240725.json")
    assert values["required_packages_version"]["monai_vslp"] == monai_vslp.__version__
    broken = tmp_path / "metadata.json"
    for key in ("required_packages_version", "network_data_format"):
        broken.write_text(json.dumps({k: v for k, v in values.items() if k != key}))
        with pytest.raises(ValueError, match=key):
            verify_metadata(meta_file=str(broken), filepath=str(schema))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_shapes_types_and_classes_of_the_network(bundle):
    root = ROOT / bundle
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=str(root / "configs" / "inference.json"),
        bundle_root=str(root),
        device="cpu",
        n=4,
    )
    output = metadata(bundle)["network_data_format"]["outputs"]["pred"]
    classes = configs(bundle)["inference.json"]["classes"]
    assert list(output["channel_def"].values()) == classes and output["num_channels"] == len(classes)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Tiny data as each bundle expects it: a root folder and the overrides that a few seconds allow."""
    folder = tmp_path_factory.mktemp("bundles")
    table = write_two_class_cohort(folder / "data", train=4, val=2)
    (folder / "confidences").mkdir()
    for index in range(6):
        q, _ = noisy_confidence((48, 56), seed=index)
        np.save(folder / "confidences" / f"i{index}.npy", torch.stack([q[0] + q[2], q[1]]).numpy())
    common = {"table": str(table), "classes": ["pink", "purple"], "colors": None, "progress": False, "bundle_root": str(folder)}
    network = {"backbone_kwargs": SMALL_BACKBONE, "blocks": [0, 1], "window": 32, "mean": None, "std": None}
    steps = {"features": 4, "steps": 2, "cell": 2}
    return folder, {
        BUNDLES[0]: common | network | {"dataset_dir": str(folder / "data" / "images"), "cache_features": False},
        BUNDLES[1]: common | steps | {"dataset_dir": str(folder / "confidences"), "crop": 8, "batches": 2},
    }


def start(bundle, files, kind, overrides, **more):
    """A workflow of a bundle in the repository on other data; values that its configs do not have are left out."""
    root = ROOT / bundle / "configs"
    known = {key for name in files for key in json.loads((root / name).read_text())} | {"bundle_root"}
    return ConfigWorkflow(
        config_file=[str(root / name) for name in files],
        meta_file=str(root / "metadata.json"),
        logging_file=str(root / "logging.conf") if kind == "infer" else False,
        workflow_type=kind,
        **{key: value for key, value in overrides.items() if key in known} | more,
    )


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("files", [["train.json"], ["train.json", "finetune.json"], ["train.json", "multi_gpu_train.json"]])
def test_properties_of_a_training(bundle, files, workplace, monkeypatch):
    folder, overrides = workplace
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    more = {"initialize": [{"_target_": "monai.utils.set_determinism", "seed": 0}]} if "finetune.json" in files else {}
    workflow = start(bundle, files, "train", overrides[bundle], **more)
    try:
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.parser.get_parsed_content("train#trainer")
    finally:
        workflow.finalize()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_properties_of_an_inference(bundle, workplace):
    """With the shipped weights: their classes, and images or confidences of any content."""
    folder, overrides = workplace
    data = overrides[bundle]["dataset_dir"]
    if bundle == BUNDLES[1]:
        data = folder / "five"
        data.mkdir(exist_ok=True)
        np.save(data / "a.npy", np.random.default_rng(0).dirichlet(np.ones(5), (32, 32)).transpose(2, 0, 1))
    workflow = start(bundle, ["inference.json"], "infer", {}, dataset_dir=str(data), bundle_root=str(ROOT / bundle))
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_logging_is_one_that_monai_accepts(bundle):
    parser = configparser.RawConfigParser()
    parser.read(ROOT / bundle / "configs" / "logging.conf")
    assert parser["handler_consoleHandler"]["class"] == "StreamHandler"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_weights_are_those_that_metadata_and_card_name(bundle):
    values = metadata(bundle)["weights"]
    path = ROOT / bundle / values["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == values["sha256"]
    assert path.stat().st_size == values["bytes"] < 6 * 2**20
    assert values["sha256"] in (ROOT / bundle / "docs" / "README.md").read_text()


def test_a_run_says_nothing_of_the_shipped_weights(tmp_path):
    from monai_vslp.workflows.bundle import create_run, read_config

    create_run(tmp_path, {"classes": ["a", "b"], "mpp": 0.5}, ["a", "b"])
    values = read_config(tmp_path, "metadata.json")
    assert "weights" not in values and values["eval_metrics"] == {}
    inference = read_config(tmp_path, "inference.json")
    assert inference["backbone_kwargs"] == {} and inference["window"] == 224 and inference["colors"] is None
    assert "synthetic" not in (tmp_path / "docs" / "README.md").read_text()
    assert (tmp_path / "configs" / "logging.conf").is_file()


def test_short_names_resolve_after_one_import():
    """In any bundle with ``imports: ["$import monai_vslp"]``; a name that MONAI has too resolves to MONAI's."""
    locator = ComponentLocator()
    taken, count = [], 0
    for part in monai_vslp.__all__:
        module = getattr(monai_vslp, part)
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name)
            if (
                not callable(value)
                or not getattr(value, "__module__", "").startswith("monai_vslp")
                or not hasattr(value, "__name__")
            ):
                continue
            found = locator.get_component_module_name(name)
            count += 1
            if not (found[0] if isinstance(found, list) else found or "").startswith("monai_vslp"):
                taken.append(name)
    assert count > 200
    assert taken == ["ConfusionMatrix"], "which configs name by its module"
    config = {"imports": ["$import monai_vslp"], "views": "none", "a": {"_target_": "TTAInferer", "views": "@views"}}
    parser = ConfigParser(config)
    parser.parse()
    assert type(parser.get_parsed_content("a")) is monai_vslp.inferers.TTAInferer
