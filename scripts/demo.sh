#!/usr/bin/env bash
# A ready tokenizer on a real mesh, then from meshes to a trained VQ-VAE with scores and pictures: sets up what is missing,
# then runs demo.py.
#   bash scripts/demo.sh [--meshes DIR [--up_axis auto|y|z|keep]] [--output_dir DIR] [--device auto|cpu|cuda] [--from_scratch]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
exec "$PYTHON" "$ROOT/scripts/demo.py" "$@"
