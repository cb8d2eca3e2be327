#!/usr/bin/env bash
# All tests: scripts/test.sh [arguments of pytest, paths relative to the repository]
# Makes .venv on first use. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment
cd "$ROOT"
exec "$VENV_PYTHON" -m pytest "$@"
