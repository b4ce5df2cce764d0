"""What the scripts' command lines have in common. Imports nothing that takes time."""

import argparse
import math
import shlex

from groundwork import __version__

# Pixels and places along a side, at most, of options and of files: memory grows with the square.
MAX_IMAGE_SIZE, MAX_GRID = 2048, 64

FITS = "squeeze", "crop", "pad"  # how a picture is made a square


class Parser(argparse.ArgumentParser):
    """Shows the defaults, and answers a wrong option with one line."""

    def __init__(self, **options):
        # an option cut short might become another than was meant
        usual = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
        super().__init__(**usual | options)
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def typed(self, arguments=None):
        """Name -> value of the options that a command line has, without the defaults.

        Args:
            arguments: list of text, None for those of this process.
        """
        unset = object()
        names = vars(self.parse_args([]))
        found = self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, unset)))
        return {name: value for name, value in vars(found).items() if value is not unset}


SUPPRESS = argparse.SUPPRESS  # a default: the namespace has nothing where it is not typed
SWITCH = argparse.BooleanOptionalAction  # a run that goes on may switch off what it had on


class Joined(argparse.Action):
    """Of an option with several values: keeps them as one text, with blanks between."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, " ".join(values))


class Gathered(argparse.Action):
    """Of an option with several values, which may be typed several times: keeps all as one list."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)  # no list where none has been typed yet
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


SEVERAL = {"nargs": "+", "action": Gathered}  # of `--model A B` and `--model A --model B` alike


def number(kind, above=None, least=None, below=None, most=None):
    """An argparse type: an int or float within bounds."""

    def parse(text):
        value = kind(text)
        if kind is int and abs(value) >= (below or 2**31):
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"{text} is not below {below}")
        if most is not None and not value <= most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def checked(check):
    """An argparse type: the text itself, of which a function raises ValueError where it cannot
    be."""

    def parse(text):
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def interval(text):
    """An argparse type: ("minutes", n) of "10m", ("steps", n) of "500"."""
    unit, count = ("minutes", text[:-1]) if text.endswith("m") else ("steps", text)
    try:
        return unit, number(int, above=0)(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give minutes as 10m or steps as 500") from None


def as_arguments(options):
    """A dict of options as a list of arguments; those that are None are left out."""
    return [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}"
        for name, value in options.items()
        if value is not None
    ]


def as_flags(options):
    """The same as they are typed: `--name value …`."""
    pairs = (argument.partition("=") for argument in as_arguments(options))
    return " ".join(
        f"{name} {shlex.quote(value)}" if equals else name for name, equals, value in pairs
    )


def add_model_option(add_to, otherwise, **options):
    """Which trained model, for every script: `--checkpoint` is its older name.

    Args:
        add_to: a parser, or a group of one.
        otherwise: what is done without it, for --help.
        options: further ones of the argument: `SEVERAL`, where it may name several.
    """
    add_to.add_argument(
        "--model",
        "--checkpoint",
        help=f"a checkpoint, or a folder, for the BEST checkpoint in it, {otherwise}",
        **options,
    )


def add_device_options(parser):
    """Where and how precisely to compute, for every script."""
    add = parser.add_argument
    add("--device", help="cuda, cuda:1, cpu; None: CUDA when present, else the CPU")
    add("--amp", choices=["auto", "off"], default="auto", help="bfloat16 where it is faster")


def add_workers_option(parser):
    """Who reads the data, for training and evaluation."""
    parser.add_argument(
        "--workers",
        type=number(int, least=0),
        help="processes that read batches ahead; None: 4 for a GPU, else none",
    )


def add_region_options(add_to):
    """Where the attention should be, for training and evaluation.

    Args:
        add_to: a parser, or a group of one.
    """
    add = add_to.add_argument
    add(
        "--regions",
        help="where the attention should be: JSON of image -> word -> boxes or mask, or the folder "
        "of Flickr30k Entities; it measures, and never trains",
    )
    add(
        "--region_words",
        nargs="+",
        action=Joined,
        default="",
        metavar="WORD",
        help="the words that the regions stand for, where the file has no words of its own",
    )


def add_decoding_options(parser):
    """How captions are searched for, beside --beam_size: `--max_len` is --max_words' older name."""
    add = parser.add_argument
    add(
        "--max_words",
        "--max_len",
        type=number(int, above=0, below=1001),
        default=50,
        help="of a caption, at most",
    )
    add(
        "--length_penalty",
        type=number(float, least=0, below=10),
        default=0.0,
        help="α: captions are compared by log p / length^α",
    )
    add(
        "--look",
        choices=["soft", "argmax", "sample"],
        help="of hard attention: at the expected context, as it does without, at the likeliest "
        "place, or at one drawn at random",
    )


def add_choosing_options(parser):
    """How captions are chosen among those that there are: fields of `choosing.Search`, and the
    seed. Returns their names."""
    names, positive = [], number(int, above=0)

    def add(flag, **options):
        names.append(parser.add_argument(flag, **options).dest)

    add(
        "--temperature",
        type=number(float, least=0, below=1e6),
        help="above 0: captions are drawn at random by p^(1 / temperature), not searched for; "
        "None: 0, and 1 with --top_k or --top_p",
    )
    add("--top_k", type=positive, help="draw from so many likeliest words")
    add(
        "--top_p",
        type=number(float, above=0, most=1),
        help="draw from the nucleus, the fewest words that have this share of the probability",
    )
    add("--seed", type=number(int, least=0, below=2**63), help="of what is drawn")
    add(
        "--beam_groups",
        type=positive,
        default=1,
        help="share the beam out among so many, which keep away from each other's words",
    )
    add(
        "--diversity_penalty",
        type=number(float, least=0, below=1e6),
        help="λ of --beam_groups: what a word costs for each beam of the groups before that has it "
        "at the same step; None: 0.5",
    )
    few = number(int, above=0, below=1001)
    add("--min_words", type=few, default=1, help="of a caption, at least")
    add("--no_repeat_ngram", type=few, metavar="N", help="no N words in a row come twice")
    add(
        "--must_include",
        nargs="+",
        default=(),
        metavar="WORD",
        help="words that captions must have, four at most; of 'dog|dogs' one",
    )
    add(
        "--rerank",
        choices=["consensus"],
        help="of several candidates take the one that is most like the others, by CIDEr-D",
    )
    add(
        "--candidates",
        type=number(int, least=2),
        help="of --rerank, of the beam or drawn; None: as many as --beam_size",
    )
    return names


def check_seed(parser, options):
    """Refuses a --seed where nothing is drawn."""
    drawn = options.temperature, options.top_k, options.top_p, options.look == "sample"
    if options.seed is not None and not any(drawn):
        parser.error("--seed is for what is drawn: give a --temperature, --top_k or --top_p")
