"""Packaging of monai_vslp; the bundle templates in ``bundles/`` travel inside the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "monai_vslp" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "slides": [
        "cucim>=23.10; platform_system == 'Linux' and python_version < '3.12'",
        "openslide-python",
        "openslide-bin",
        "zarr>=3",
        "wsidicom>=0.36",
    ],
    "dicom": ["highdicom>=0.26", "pydicom>=3"],
    "tracking": ["mlflow>=3.1", "matplotlib", "psutil"],
    "transport": ["POT>=0.9.5"],
    "stores": ["zarr>=3"],
    "label": ["monailabel>=0.8.5"],
    "deploy": ["monai-deploy-app-sdk>=4.0"],
    "distributed": ["dask[distributed]>=2025.1"],
    "tables": ["pandas", "openpyxl"],
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "dev": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff", "jsonschema"],
}
# MONAI Label and MONAI Deploy need environments of their own; "all" is what one machine uses.
ALL = ("slides", "dicom", "tracking", "transport", "stores", "distributed", "tables", "export")
EXTRAS["all"] = sum((EXTRAS[name] for name in ALL), [])

setup(
    name="monai_vslp",
    version=VERSION,
    description="Variational segmentation from label proportions: a MONAI plugin for histopathology",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["monai_vslp", "monai_vslp.*"]), "monai_vslp._bundles"],
    package_dir={"monai_vslp": "monai_vslp", "monai_vslp._bundles": "bundles"},
    package_data={
        "monai_vslp._bundles": ["**/*"],
        "monai_vslp.apps.deploy": ["app.yaml", "requirements.txt"],
        "monai_vslp.apps.label": ["qupath/*"],
        "monai_vslp.io": ["assets/*"],
        "monai_vslp.recipes": ["*.json"],
    },
    install_requires=[
        "torch>=2.4",
        "monai>=1.5",
        "numpy>=1.26",
        "timm>=1.0.15",
        "pytorch-ignite>=0.5",
        "fire>=0.6",
        "safetensors",
        "scipy",
        "scikit-image>=0.24",
        "pillow",
        "tifffile>=2024.8",
        "imagecodecs",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["monai-vslp = monai_vslp.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
