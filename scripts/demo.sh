#!/usr/bin/env bash
# Speculative Llama beside its single-model baseline: scripts/demo.sh [arguments of demo/simple_text_demo.py]
# Makes .venv on first use. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
script="${BASH_SOURCE[0]}"
while [ -L "$script" ]; do # called through a link: its own place counts; no readlink -f on older macOS
    link="$(readlink "$script")"
    case $link in /*) script="$link" ;; *) script="$(dirname "$script")/$link" ;; esac
done
source "$(dirname "$script")/_environment.sh"

prepare_environment
exec "$VENV_PYTHON" "$ROOT/demo/simple_text_demo.py" "$@"
