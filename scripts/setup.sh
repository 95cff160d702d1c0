#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) with exactly the versions of configs/constraints.txt; does nothing when it is
# up to date. Usage: bash scripts/setup.sh [extra ...]
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
extras="$(IFS=,; echo "${*:-all}")"
stamp="$venv/.installed-$extras"
wanted="$(cat setup.py pyproject.toml configs/constraints.txt | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    # torch and torchvision are pinned through the constraints: unpinned, timm would pull in another, larger build.
    bash scripts/install.sh "$venv" --constraint configs/constraints.txt --editable ".[$extras]"
    echo "$wanted" >"$stamp"
fi
