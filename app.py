"""A web page on this machine: drop a photograph, see its caption and where the model looked."""

import html
import json
import os
import socket
import sys
from pathlib import Path

from groundwork.errors import UserError, run
from groundwork.files import names
from groundwork.options import (
    SEVERAL,
    Parser,
    add_decoding_options,
    add_device_options,
    add_model_option,
    number,
)

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would tell its makers of each start
PHOTOGRAPH = 640  # pixels along the longer side, as shown


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    otherwise = "or several, which caption side by side; None: the newest under data/"
    add_model_option(parser, otherwise, **SEVERAL)
    add("--word_map", help="WORDMAP file, for checkpoints that hold no word map")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    port = number(int, above=0, below=2**16)
    add("--port", type=port, help="None: the first that is free from 7860 on")
    add_decoding_options(parser)
    add_device_options(parser)
    return parser.parse_args()


def main():
    options = parse_arguments()
    check_address(options.host, options.port)

    # what follows takes seconds to import
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("the web demo needs Gradio: pip install -r requirements-dev.txt") from error
    import checkpoints
    import report
    from captioner import Captioner

    named = list(map(checkpoints.find_checkpoint, options.model or []))
    paths = distinct(named or [checkpoints.newest_best_checkpoint("data")])
    models = {
        name: Captioner.load(path, options.device, options.amp, options.word_map, options.look)
        for name, path in zip(names(paths), paths, strict=True)
    }
    page = build_page(models, options.max_words, options.length_penalty)
    try:
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size="64mb",
            head=f"<script>{report.VIEWER.read_text(encoding='utf-8')}</script>",
            theme=make_theme(),
            css=STYLE,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"no free port: name one with --port ({error})") from error
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


def make_theme():
    """Gradio's own, which is light or dark as the system is, with the system's fonts, and small
    print that is legible."""
    import gradio as gr

    small = {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
    small |= {f"{name}_dark": "*neutral_300" for name in small}
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    return gr.themes.Default(**fonts).set(**small)


def check_address(host, port):
    """Raises UserError where no page can be served; Gradio would try a hundred ports first."""
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise UserError(f"cannot serve at {where}: {error.strerror or error}") from error


def distinct(paths):
    """The paths, each file once, whatever the ways to name it; says which are left out."""
    found = {}
    for path in paths:
        file = Path(path).resolve()
        if file in found:
            line = f"--model {path} is the same file as {found[file]}: it is shown once"
            print(line, file=sys.stderr)
        else:
            found[file] = path
    return list(found.values())


def build_page(models, max_words, length_penalty):
    """The page, as gr.Blocks.

    Args:
        models: name -> `Captioner`.
        max_words, length_penalty: as in `Captioner.caption`.
    """
    import gradio as gr

    from constraints import sayable

    words = min(len(sayable(model.word_map)) for model in models.values())
    hour = 3600  # seconds, after which uploaded photographs are deleted
    with gr.Blocks(
        title="Show, Attend and Tell", fill_width=True, delete_cache=(hour, hour)
    ) as page:
        gr.Markdown("# Show, Attend and Tell")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                photograph = gr.File(label="photograph", file_types=["image"], height=150)
                beam_size = make_slider(
                    1, min(20, max(words, 2)), min(5, words), step=1, label="beam size",
                    info="partial captions kept at each step; an empty field is 1",
                )  # fmt: skip
                temperature = make_slider(
                    0, 2, 0, step=0.1, label="temperature",
                    info="0: beam search; above: as many captions drawn at random; empty: 0",
                )  # fmt: skip
                chosen = gr.CheckboxGroup(
                    list(models), value=list(models), label="models", visible=len(models) > 1
                )
                again = gr.Button("caption")
            with gr.Column(scale=4, min_width=300):
                found = gr.HTML(PROMPT, min_height=260)

        def show(path, beam_size, temperature, chosen):
            if path is None or not chosen:
                return PROMPT
            try:
                return render(
                    path,
                    {name: models[name] for name in chosen},
                    round(beam_size),  # the field takes fractions, too
                    temperature,
                    max_words,
                    length_penalty,
                )
            except UserError as error:
                message = str(error).replace(f"{Path(path).parent}{os.sep}", "")  # Gradio's folder
                raise gr.Error(message, print_exception=False) from error

        gr.on(  # a slider's change, not its release alone: keys move it, too
            [photograph.change, beam_size.change, temperature.change, chosen.change, again.click],
            show,
            [photograph, beam_size, temperature, chosen],
            found,
            trigger_mode="always_last",
        )
    return page


def make_slider(*bounds, **options):
    """A gr.Slider whose empty field counts as the minimum, and of which a number out of bounds is
    a line on the page, without Gradio's traceback in the terminal."""
    import gradio as gr

    slider = gr.Slider(*bounds, **options)
    preprocess = slider.preprocess

    def checked(value):
        value = slider.minimum if value is None else value
        if not slider.minimum <= value <= slider.maximum:
            message = f"{slider.label} {value} is not from {slider.minimum} to {slider.maximum}"
            raise gr.Error(message, print_exception=False)
        return preprocess(value)

    slider.preprocess = checked  # for a class of our own Gradio would write an app.pyi
    return slider


STYLE = """
.models { display: grid; gap: 28px;
          grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.models h3, label span { overflow-wrap: anywhere; }
"""
PROMPT = "<p>Drop a photograph into the field: its captions come here.</p>"


def render(path, models, beam_size, temperature, max_words, length_penalty):
    """HTML: an <attention-view> for each model, side by side under the models' names where there
    are several; in it the captions of a beam, or, at a temperature above 0, as many drawn."""
    import report
    from captioner import to_picture
    from groundwork.images import framed

    image, parts = to_picture(path), []
    for name, model in models.items():
        [captions] = model.caption(
            image, beam_size, beam_size, temperature, max_words, length_penalty
        )
        seen = framed(image, model.fit)
        view = json.dumps(report.attention_view(seen, captions, PHOTOGRAPH))
        heading = f"<h3>{html.escape(name)}</h3>" if len(models) > 1 else ""
        view = f'<attention-view data="{html.escape(view)}"></attention-view>'
        parts.append(f"<div>{heading}{view}</div>")
    return f'<div class="models">{"".join(parts)}</div>'


if __name__ == "__main__":
    run(main)
