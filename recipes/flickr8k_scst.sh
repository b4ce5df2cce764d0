#!/usr/bin/env bash
# After flickr8k_frozen.sh or flickr8k_finetuned.sh: self-critical training of the decoder.
DATA=${DATA:-data/flickr8k} RUNS=${RUNS:-runs/flickr8k}
source "$(dirname "$0")/common.sh"
stage scst --epochs 4 --schedule cosine --warmup 0 --weight_decay 0 --ema 0.99 \
    --embed_dropout 0.3 --scst_batch_size 250 --scst_lr 4e-4 --cross_entropy_share 0.1
evaluate "$SEED"
