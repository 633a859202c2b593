#!/usr/bin/env bash
# Sets up what is missing and runs linter, formatter, type checker and the whole test suite. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
check_open3d
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -q -n 2 --durations=10 "$@"  # tests take one thread each
