#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) with exactly the versions of configs/constraints.txt; does nothing when it is
# up to date. Usage: bash scripts/setup.sh [extra ...]
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
extras="$(IFS=,; echo "${*:-all}")"
stamp="$venv/.installed-$extras"
wanted="$(cat setup.py pyproject.toml configs/constraints.txt | sha256sum)"
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    # torch and torchvision are pinned through the constraints: unpinned, timm would pull in another, larger build.
    "$venv/bin/python" -m pip install --quiet --constraint configs/constraints.txt --editable ".[$extras]"
    echo "$wanted" >"$stamp"
fi
