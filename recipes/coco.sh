#!/usr/bin/env bash
# COCO with ResNet-101, on GPUs: the decoder, then both together, then self-critical training.
DATA=${DATA:-data/coco} RUNS=${RUNS:-runs/coco}
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
if [ "$gpus" = 0 ] && [ -z "${LAUNCH:-}" ]; then
    echo "error: coco.sh trains on GPUs, and there are none here: LAUNCH=python does without" >&2
    exit 1
fi
LAUNCH=${LAUNCH:-torchrun --nproc_per_node=$gpus}
source "$(dirname "$0")/common.sh"
prepare coco
stage decoder --recipe attending --batch_size 640 --decoder_lr 1e-3 --warmup 1000 \
    --schedule cosine --epochs 15 --label_smoothing 0.1 --seed "$SEED"
stage finetune --augment crop mirror colour --finetune_batch_size 320 --epochs 5 --encoder_lr 5e-5 \
    --decoder_lr 2e-4 --warmup 500 --weight_decay 0.01
stage scst --warmup 0 --weight_decay 0 --scst_batch_size 500 --epochs 15
evaluate "$SEED"
