#!/usr/bin/env bash
# Flickr8k on a frozen encoder that needs no download: the decoder alone, by cross-entropy.
DATA=${DATA:-data/flickr8k} RUNS=${RUNS:-runs/flickr8k}
source "$(dirname "$0")/common.sh"
prepare flickr8k
stage decoder --encoder timm:tf_efficientnet_lite2 --recipe attending --views 2 --batch_size 160 \
    --decoder_lr 1e-3 --schedule cosine --epochs 10 --ema 0.995 --embed_dropout 0.5 \
    --label_smoothing 0.1 --seed "$SEED"
evaluate "$SEED"
