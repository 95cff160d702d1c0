#!/usr/bin/env bash
# Installs the package with what its tests need into .venv, checks the style and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all dev
"${VENV:-.venv}/bin/ruff" check .
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
