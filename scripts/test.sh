#!/usr/bin/env bash
# Installs the package with what its tests need into .venv, checks the style and runs the tests on all cores; arguments go to pytest,
# but for a first one "--slow", which runs the tests marked as slow too, and those of MONAI Deploy and MONAI Label, for which it
# makes their environments.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all dev
"${VENV:-.venv}/bin/ruff" check .
selection=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    selection=()
    shift
    bash scripts/setup_deploy.sh
    bash scripts/setup_label.sh
fi
# Many tests start processes; where PYTHONDONTWRITEBYTECODE is set each would compile the package anew.
"${VENV:-.venv}/bin/python" -m compileall -q monai_vslp tests
exec "${VENV:-.venv}/bin/python" -m pytest -n auto "${selection[@]}" "$@"
