#!/usr/bin/env bash
# Installs into a virtual environment, made if needed: install.sh VENV ARGUMENT... (those of "pip install"). Through uv, which takes a
# tenth of the time, where it can be had; else, or where uv fails, through pip. Versions are the same: lists are pinned.
set -euo pipefail
venv="$1"
shift
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
if "${pip[@]}" install --quiet uv==0.13.9 2>/dev/null; then
    # uv does not read pip's settings: where wheels lie, and which index stands in for PyPI.
    settings="$("${pip[@]}" config list 2>/dev/null || true)"
    links="$(sed -n "s/^global\.find-links='\(.*\)'$/\1/p" <<<"$settings")"
    index="$(sed -n "s/^\(global\|:env:\)\.index-url='\(.*\)'$/\2/p" <<<"$settings" | tail -n 1)"
    if [ -n "$links" ]; then export UV_FIND_LINKS="$links"; fi
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    # Compiled as pip does: where nobody may write there later, or PYTHONDONTWRITEBYTECODE is set, each start would take seconds more.
    if "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; then
        exit 0
    fi
    echo "uv could not install this; pip tries." >&2
fi
exec "${pip[@]}" install --quiet "$@"
