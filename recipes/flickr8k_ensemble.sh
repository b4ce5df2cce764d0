#!/usr/bin/env bash
# Five models, by the three recipes one after the other, that differ by their seed, and what they say
# together. STAGES names other recipes, as STAGES="frozen scst".
DATA=${DATA:-data/flickr8k} RUNS=${RUNS:-runs/flickr8k}
source "$(dirname "$0")/common.sh"
for seed in 0 1 2 3 4; do
    for recipe in ${STAGES:-frozen finetuned scst}; do
        SEED=$seed bash "recipes/flickr8k_$recipe.sh"
    done
done
evaluate 0 1 2 3 4
