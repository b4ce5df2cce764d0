# What the recipes share. Each takes up an interrupted one where it was: what is done is not done
# again. Paths are those of the project's folder, wherever a recipe is called.
#
# To be set beforehand, where the recipe's own values are not wanted:
#   JSON, IMAGES  Karpathy's JSON and the folder of the images; without them they are downloaded
#   DATA, RUNS    folders of the input files and of the trained models
#   SPLIT         which is scored: val, or test
#   SEED          of the training, and by which its model is called
#   PYTHON        that runs the scripts; LAUNCH  that runs train.py, as torchrun --nproc_per_node=8
#   OPTIONS       further options of train.py, in every stage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} SPLIT=${SPLIT:-val} SEED=${SEED:-0} OPTIONS=${OPTIONS:-}
LAUNCH=${LAUNCH:-$PYTHON}

# prepare NAME: input files in $DATA, where there are none.
prepare() {
    if ! compgen -G "$DATA/WORDMAP_$1_*.json" > /dev/null; then
        if [ -n "${JSON:-}" ]; then
            set -- "$1" --karpathy_json "$JSON" --image_folder "$IMAGES"
        else
            set -- "$1" --download "$1"
        fi
        $PYTHON create_input_files.py --dataset "$@" --output_folder "$DATA"
    fi
}

# stage STAGE OPTION...: that stage of the run of $SEED, begun or gone on with.
stage() {
    local run="$RUNS/seed$SEED"
    mkdir -p "$run"
    if [ ! -e "$run/$1.done" ]; then
        # shellcheck disable=SC2086 -- several words each
        $LAUNCH train.py --data_folder "$DATA" --output_folder "$run" --stage "$1" --resume "${@:2}" \
            $OPTIONS
        touch "$run/$1.done"
    fi
}

# evaluate SEED...: scores of the best checkpoint of the run of a seed, or of several together.
evaluate() {
    $PYTHON eval.py --data_folder "$DATA" --split "$SPLIT" --model "${@/#/$RUNS/seed}" \
        --output_folder "$RUNS" --beam_size 3 5
}
