"""What a bundle must be: expressions that platforms allow, metadata by the zoo's schema, files of the zoo."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2] / "bundles"
BUNDLES = ("pathology_tissue_proportion_segmentation", "pathology_segmentation_refinement")
IMPORTS = {"$import torch", "$import monai_vslp"}
DEVICE = ast.dump(ast.parse("torch.device('cuda' if torch.cuda.is_available() else 'cpu')", mode="eval"))
TARGETS = re.compile(r"(monai_vslp|monai|torch)(\.[A-Za-z]\w*)+|copy\.deepcopy|operator\.lt|[A-Z]\w*")
REFERENCE = re.compile(r"@(\w+(?:#\w+)*)")


def is_path(node):
    """A reference, or references and pieces of paths joined by ``+``; the first is a reference."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        piece = node.right
        whole = isinstance(piece, ast.Constant) and isinstance(piece.value, str) and re.fullmatch(r"(/[\w.-]+)+", piece.value)
        return is_path(node.left) and bool(whole or is_reference(piece))
    return is_reference(node)


def is_reference(node):
    return isinstance(node, ast.Name) and node.id.startswith("reference_")


def allowed(expression):
    """Whether an expression of a config names a path, chooses the device, or is a reference alone."""
    source = REFERENCE.sub(lambda found: "reference_" + found.group(1).replace("#", "_"), expression.removeprefix("$"))
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError:
        return False
    return ast.dump(tree) == DEVICE or is_path(tree.body)


def problems(config, where=""):
    """Everything in a config that a platform with an allow-list would refuse, with its place."""
    found = []
    if isinstance(config, dict):
        for key, value in config.items():
            place = f"{where}#{key}" if where else key
            if place in ("imports", "+imports"):
                found += [f"{place}: {one}" for one in value if one not in IMPORTS]
            elif key.split("#")[-1] == "_target_":
                found += [] if isinstance(value, str) and TARGETS.fullmatch(value) else [f"{place}: {value}"]
            elif key == "pretrained":
                found += [] if value is False else [f"{place}: {value}"]
            else:
                found += problems(value, place)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            found += problems(value, f"{where}#{index}")
    elif isinstance(config, str):
        refused = (config.startswith("$") and not allowed(config)) or "://" in config or "lambda" in config
        found += [f"{where}: {config}"] if refused else []
    return found


def configs(bundle):
    """Names and contents of the configs of a bundle, metadata left out."""
    paths = sorted((ROOT / bundle / "configs").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths if path.name != "metadata.json"}


TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "format", "modality", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
# The demands of meta_schema_20240725 in our own words: the file itself lies on the network.
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        **{
            name: {"type": "string"}
            for name in (
                *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors"),
                *("copyright", "data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use"),
            )
        },
        **{name: {"type": "object"} for name in ("changelog", "required_packages_version", "eval_metrics", "supported_apps")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {name: {"type": "object", "additionalProperties": TENSOR} for name in ("inputs", "outputs")},
        },
    },
}
