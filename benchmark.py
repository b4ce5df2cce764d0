"""Times this code against the textbook formulation of the model, side by side.

The textbook formulation (`textbook.py`) is the one of the public PyTorch code for this model. Both
sides have the same weights and data, and before they are timed their results are compared. Runs
alternate; the figures are medians. With --variants the sides are training steps of every decoder
and attention, and of the LSTM with soft attention, in the sizes of --recipe attending. With
--profile the operations are printed that take the time of our side.
"""

import os

from groundwork.errors import run
from groundwork.options import Parser, add_device_options, number

GEOMETRIES = ["resnet101", "lite2"]  # benchmark_data.ENCODERS, which takes long to import


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="resnet101", help="of encoder and features")
    add("--rounds", type=positive, default=5, help="of which the median is taken")
    add("--slow_rounds", type=positive, default=3, help="likewise, where the encoder runs")
    add("--output_folder", default="benchmark", help="for table and picture")
    add(
        "--variants",
        action="store_true",
        help="time every decoder and attention beside the LSTM with soft attention instead; takes "
        "--rounds, --device and --amp",
    )
    add(
        "--profile",
        action="store_true",
        help="print which operations take the time of our side instead, and how much of it a GPU "
        "computes; takes --geometry, --device and --amp",
    )
    add_device_options(parser)
    options = parser.parse_args()
    for mode, takes in (
        ("variants", {"rounds", "device", "amp"}),
        ("profile", {"geometry", "device", "amp"}),
    ):
        idle = parser.typed().keys() - takes - {mode}
        if getattr(options, mode) and idle:
            parser.error(f"--{mode} makes no use of --{min(idle)}: leave it out")
    return options


def main():
    options = parse_arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler speaks of itself otherwise
    import fused
    from benchmark_data import Settings
    from benchmark_parts import SHARES, growth
    from benchmark_report import describe, draw
    from groundwork.devices import choose_device, has_fast_bfloat16
    from groundwork.files import atomic_write, check_writable, make_folder
    from groundwork.progress import progress
    from groundwork.timing import measure_speeds

    device = choose_device(options.device)
    fused.build(device)
    amp = options.amp == "auto" and has_fast_bfloat16(device)
    if options.variants:
        from benchmark_variants import print_table

        print_table(device, amp, options.rounds)
        return
    settings = Settings(options.geometry, device, amp, options.rounds, options.slow_rounds)
    if options.profile:
        from benchmark_profile import print_profiles

        print_profiles(settings)
        return
    folder = make_folder(options.output_folder)
    check_writable(folder / f"benchmark_{options.geometry}.md")  # better now than in an hour
    speeds = measure_speeds(device, {False, amp})
    rows = []
    # `smoothing=0`: what is left follows from all that has been, as the parts differ much
    with progress(total=100, desc="benchmark", unit="%", smoothing=0) as bar:
        for benchmark, share in SHARES.items():
            if benchmark is growth:
                grown = growth(settings)
            else:
                for row in benchmark(settings):
                    bar.write(f"{row.name}: {row.ratio:.1f}×")
                    rows.append(row)
            bar.update(share)
    report = describe(settings, speeds, rows, grown)
    print(report)
    with atomic_write(folder / f"benchmark_{settings.geometry}.md") as temporary:
        temporary.write_text(report + "\n", encoding="utf-8")
    with atomic_write(folder / f"benchmark_{settings.geometry}.png") as temporary:
        draw(rows, grown).savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
