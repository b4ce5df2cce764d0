#!/usr/bin/env bash
# After flickr8k_frozen.sh or flickr8k_finetuned.sh: self-critical training of the decoder.
DATA=${DATA:-data/flickr8k} RUNS=${RUNS:-runs/flickr8k}
source "$(dirname "$0")/common.sh"
stage scst --epochs 10
evaluate "$SEED"
