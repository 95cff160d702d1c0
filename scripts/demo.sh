#!/usr/bin/env bash
# Installs the package into .venv and runs the demo; arguments go to 'monai-vslp demo'.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all
exec "${VENV:-.venv}/bin/monai-vslp" demo "$@"
