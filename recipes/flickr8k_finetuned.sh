#!/usr/bin/env bash
# After flickr8k_frozen.sh: encoder and decoder together, from photographs that change every epoch.
DATA=${DATA:-data/flickr8k} RUNS=${RUNS:-runs/flickr8k}
source "$(dirname "$0")/common.sh"
stage finetune --augment crop mirror colour --tune_from 16 --finetune_batch_size 80 --epochs 4 \
    --schedule cosine --warmup 100 --encoder_lr 5e-5 --decoder_lr 1e-4 --weight_decay 0.01 --ema 0.993
evaluate "$SEED"
