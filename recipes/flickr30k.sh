#!/usr/bin/env bash
# Flickr30k with ResNet-101, on a GPU: the decoder, then both together, then self-critical training.
DATA=${DATA:-data/flickr30k} RUNS=${RUNS:-runs/flickr30k}
source "$(dirname "$0")/common.sh"
prepare flickr30k
stage decoder --recipe attending --batch_size 320 --decoder_lr 1e-3 --schedule cosine --epochs 10 \
    --embed_dropout 0.3 --label_smoothing 0.1 --seed "$SEED"
stage finetune --augment crop mirror colour --finetune_batch_size 160 --epochs 5 --encoder_lr 5e-5 \
    --decoder_lr 1e-4 --warmup 200 --weight_decay 0.01
stage scst --warmup 0 --weight_decay 0 --scst_batch_size 250 --epochs 10
evaluate "$SEED"
