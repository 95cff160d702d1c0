#!/usr/bin/env bash
# Makes the virtual environment .venv-label (or $VENV_LABEL) for MONAI Label with exactly the versions of
# configs/constraints_label.txt; does nothing when it is up to date. Usage: bash scripts/setup_label.sh [option of pip ...]
# Without a network: bash scripts/setup_label.sh --no-index --find-links WHEELHOUSE
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV_LABEL:-.venv-label}"
stamp="$venv/.installed"
wanted="$(cat scripts/setup_label.sh configs/constraints_label.txt | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    # MONAI Label names packages that this app never loads (SAM 2, its own MLflow, all of ITK), so nothing is resolved and
    # "pip check" would complain; what is missing shows when the server and the app are imported.
    bash scripts/install.sh "$venv" --no-deps "$@" --requirement configs/constraints_label.txt
    bash scripts/install.sh "$venv" --no-deps "$@" --no-build-isolation --editable .
    # Written as bytecode too, whatever the environment says: the server then starts in a third of the time.
    PYTHONDONTWRITEBYTECODE= "$venv/bin/python" -c "import monai_vslp.apps.label.main, monailabel.app, monailabel.client" >/dev/null
    echo "$wanted" >"$stamp"
fi
