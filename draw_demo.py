"""Draws the demo data set: captioned pictures of coloured shapes, as many as wanted."""

from pathlib import Path

from groundwork.errors import UserError, run
from groundwork.options import Parser, number


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("data/demo"), help="where to write")
    for split, count in {"train": 1200, "val": 100, "test": 200}.items():
        add(f"--{split}", type=number(int, least=0), default=count, help=f"{split} images")
    add("--image_size", type=number(int, least=16), default=256, help="side in pixels")
    add(
        "--seed",
        type=number(int, least=0, below=2**63),
        default=0,
        help="another seed, another data set",
    )
    return parser.parse_args()


def main():
    options = parse_arguments()

    import demo

    images = {split: getattr(options, split) for split in demo.SPLITS}
    if not any(images.values()):
        raise UserError("--train 0, --val 0 and --test 0 leave nothing to draw")
    print(demo.make_demo(options.folder, images, options.image_size, options.seed))


if __name__ == "__main__":
    run(main)
