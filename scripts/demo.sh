#!/usr/bin/env bash
# Speculative Llama beside its single-model baseline: scripts/demo.sh [arguments of demo/simple_text_demo.py]
# Makes .venv on first use. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment
exec "$VENV_PYTHON" "$ROOT/demo/simple_text_demo.py" "$@"
