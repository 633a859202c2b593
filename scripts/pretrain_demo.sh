#!/usr/bin/env bash
# How pretrained/demo_vae was made, from 4200 built-in shapes of another seed than the demo's. The first run took 8 minutes
# on a GPU, the second 38 on two CPU cores.
#   bash scripts/pretrain_demo.sh OUTPUT_DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
out="$(mkdir -p "${1:?give an output folder}" && cd "$1" && pwd)"
cd "$ROOT"
"$PYTHON" dataset_toolkits/shapes/make_shapes.py --output_dir "$out/shapes" --num 4200 --num_val 200 --seed 20
for split in train val; do
    "$PYTHON" dataset_toolkits/voxelize.py --input "$out/shapes/$split" --output_dir "$out/voxels" --up_axis z --split "$split"
done
[ -f "$out/packed/shapes.npz" ] || { mkdir -p "$out/packed"; "$PYTHON" dataset_toolkits/pack.py --input "$out/voxels" --output "$out/packed/shapes.npz"; }
"$PYTHON" train.py --config configs/vae/demo_vae_pretrain.json --data_dir "$out/packed" --output_dir "$out/pretrain"
"$PYTHON" scripts/export_pretrained.py --run "$out/pretrain" --output_dir "$out/pretrained" --dtype float16
"$PYTHON" train.py --config configs/vae/demo_vae_finetune.json --data_dir "$out/packed" --output_dir "$out/finetune" \
    --set "trainer.args.finetune_ckpt={\"encoder\": \"$out/pretrained/encoder\", \"decoder\": \"$out/pretrained/decoder\"}"
"$PYTHON" scripts/export_pretrained.py --run "$out/finetune" --output_dir "$out/demo_vae" --dtype float16
