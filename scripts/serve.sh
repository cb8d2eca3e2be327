#!/usr/bin/env bash
# An OpenAI-compatible server: scripts/serve.sh [arguments of python -m models.server]
# Makes .venv on first use. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

prepare_environment
exec "$VENV_PYTHON" -m models.server "$@"
