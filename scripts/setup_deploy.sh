#!/usr/bin/env bash
# Makes the virtual environment .venv-deploy (or $VENV_DEPLOY) for MONAI Deploy with exactly the versions of
# configs/constraints_deploy.txt; does nothing when it is up to date. Usage: bash scripts/setup_deploy.sh [option of pip ...]
# Without a network: bash scripts/setup_deploy.sh --no-index --find-links WHEELHOUSE
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV_DEPLOY:-.venv-deploy}"
stamp="$venv/.installed"
wanted="$(cat scripts/setup_deploy.sh configs/constraints_deploy.txt | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    # The list is whole, so nothing is resolved; what it forgets is found by the check.
    bash scripts/install.sh "$venv" --no-deps "$@" --requirement configs/constraints_deploy.txt
    bash scripts/install.sh "$venv" --no-deps "$@" --no-build-isolation --editable .
    "$venv/bin/python" -m pip check
    echo "$wanted" >"$stamp"
fi
