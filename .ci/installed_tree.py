"""Lay out the packages as an installation has them, for tools that read folders and not wheels.

``python .ci/installed_tree.py TREE`` fills TREE with links that follow ``[tool.setuptools.package-dir]``. mypy and
import-linter then see ``dashboards/`` where it is imported from, and their messages name files that can be opened.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def lay_out(tree: Path) -> None:
    """Replace `tree` by links to the packages in the working copy."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
    places: dict[str, str] = project["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    # Outer packages first: an inner one is linked into the folder that the outer one made.
    for package, place in sorted(places.items()):
        folder = tree.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        for source in sorted((TOP / place).iterdir()):
            if source.name != "__pycache__" and (source.suffix in {".py", ".typed", ".yaml"} or source.is_dir()):
                (folder / source.name).symlink_to(source)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]).resolve())
