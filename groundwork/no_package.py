"""A build backend that builds nothing: a flat repository is no package.

Its modules would be installed as `utils`, `models` and `datasets`, over those of other projects.
"""


def refuse(*_, **__):
    raise SystemExit(
        "error: this repository is not installed: clone it, pip install -r requirements.txt, and "
        "put the clone on the path, or load it with torch.hub (docs/library.md)"
    )


build_wheel = build_sdist = build_editable = refuse
get_requires_for_build_wheel = get_requires_for_build_editable = refuse
