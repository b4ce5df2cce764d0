"""The floors of docs/design.md: what may import what, and how large a room may be."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("groundwork/*.py")])
LINES, CLASS, FUNCTION = 450, 250, 60


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Names of the project's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(name for name in names if name in MODULES)
    return found


def is_script(path):
    """Whether the module is run from the command line."""
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in tree(path).body
    )


SCRIPTS = {name for name, path in MODULES.items() if is_script(path)}
BELOW = sorted(MODULES.keys() - SCRIPTS)


def test_the_scripts_are_those_that_people_know():
    assert {
        "app", "benchmark", "caption", "create_input_files", "draw_demo", "eval", "export",
        "human_judgments", "train",
    } == SCRIPTS  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_script(name):
    assert not imports(MODULES[name]) & SCRIPTS


def test_the_import_graph_has_no_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a circle: {' → '.join([*open_, name])}"
        if name not in done:
            open_.append(name)
            for other in imports(MODULES[name]) - {"groundwork"}:
                visit(other)
            done.add(open_.pop())

    for name in MODULES:
        visit(name)
    assert done == MODULES.keys()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("groundwork")])
def test_the_groundwork_imports_nothing_above_it(name):
    assert all(other.startswith("groundwork") for other in imports(MODULES[name]))


@pytest.mark.parametrize("name", sorted(SCRIPTS))
@pytest.mark.parametrize("argument, code", [("--help", 0), ("--mistyped", 2)])
def test_the_command_line_is_read_before_anything_heavy_is_imported(name, argument, code):
    program = f"""
import runpy, sys
sys.argv = [{name + ".py"!r}, {argument!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    heavy = {{"torch", "torchvision", "timm", "matplotlib", "numpy", "h5py", "gradio"}}
    sys.exit(f"{{exit.code}} {{sorted(heavy & sys.modules.keys())}}")
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stderr.splitlines()[-1] == f"{code} []"


FLOORS = [  # from the lowest up, as docs/design.md draws them; the groundwork is below all
    "models annotations attentions recurrent transformer merge kernels fused fused_triton "
    "cuda_graphs objectives sampling stages encoders networks freezing depthwise "
    "efficientnet_lite contract decoding beams constraints choosing vocabulary rewards "
    "self_critical ensemble word_rules",
    "utils word_maps mirroring datasets views storage input_files embeddings features demo "
    "gathered "
    "captioned formats formats_archives formats_json formats_parquet formats_tables downloads",
    "pictures attention_pictures attention_metrics attention_probes attention_report metrics "
    "diversity parts_of_speech regions coco_results evaluation evaluation_data robustness report "
    "preview duplicates "
    "textbook",
    "config training_options engine checkpoints run_state optimization training_data "
    "training_report training continuation transfer choices listing",
    "captioner hubconf exported exporting quantizing benchmark_data benchmark_parts "
    "benchmark_report benchmark_profile benchmark_variants",
]


@pytest.mark.parametrize("name", [name for name in BELOW if "." not in name])
def test_modules_import_from_their_own_floor_and_below(name):
    if name == "groundwork":
        return
    floor = {module: i for i, modules in enumerate(FLOORS) for module in modules.split()}
    flat = {other for other in imports(MODULES[name]) if not other.startswith("groundwork")}
    assert [other for other in flat if floor[other] > floor[name]] == []


def reads_command_line(path):
    """Lines that parse arguments, read sys.argv, or look into a namespace of options."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = f"{node.value.id}.{node.attr}"
            if (
                place == "sys.argv"
                or node.attr in ("parse_args", "ArgumentParser")
                or (node.value.id in ("options", "args", "opt") and node.attr not in dir(dict))
            ):
                yield node.lineno


@pytest.mark.parametrize("name", [name for name in BELOW if name != "groundwork.options"])
def test_nothing_below_the_scripts_reads_the_command_line(name):
    assert list(reads_command_line(MODULES[name])) == []
    if "argparse" in MODULES[name].read_text(encoding="utf-8"):
        pytest.fail("argparse is for the scripts and groundwork.options")


def test_the_checks_find_what_they_look_for(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        """
import train
from groundwork import errors
def f(options):
    return options.epochs, options.keys()
"""
    )
    assert imports(path) == {"train", "groundwork", "groundwork.errors"}
    assert list(reads_command_line(path)) == [5]


@pytest.mark.parametrize("name", MODULES)
def test_a_room_is_no_larger_than_its_size(name):
    """Option parsers may be as long as there are options."""
    path = MODULES[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES
    for node in ast.walk(tree(path)):
        size = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert size <= CLASS, node.name
        elif isinstance(node, ast.FunctionDef) and "pars" not in node.name:
            assert size <= FUNCTION, node.name


def test_the_design_names_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for name in MODULES.keys() - {"groundwork"}:
        assert f"`{name.removeprefix('groundwork.')}`" in text, name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in page.read_text(encoding="utf-8").split("](")[1:]:
            target = link.partition(")")[0].partition("#")[0]
            if target and "://" not in target:
                assert (page.parent / Path(target)).exists(), f"{page.name}: {target}"
