"""The contracts of layers hold, and each of them bites when it is broken on purpose."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
DECIDING = {"detection", "journal", "failover", "durability", "placement", "topology"}


def lint(tree):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(TOP / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """The packages as an installation has them."""
    tree = tmp_path_factory.mktemp("links") / "tree"
    subprocess.run([sys.executable, TOP / ".ci" / "installed_tree.py", tree], check=True)
    return tree


@pytest.fixture
def tree(links, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(links, tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__")))


def test_the_contracts_hold(links):
    done = lint(links)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("journal/records.py", "import time", "dask_resilience.journal is not allowed to import time"),
        ("failover/__init__.py", "from os import environ", "dask_resilience.failover is not allowed to import os"),
        # By a detour, too: the settings import Dask.
        (
            "failover/__init__.py",
            "import dask_resilience.settings",
            "dask_resilience.failover is not allowed to import",
        ),
        ("storage/__init__.py", "import distributed", "dask_resilience.storage is not allowed to import distributed"),
        ("errors.py", "import dask_resilience.views", "dask_resilience.errors is not allowed to import"),
        ("dashboards/routes.py", "import dask_resilience.cli", "dask_resilience.dashboards is not allowed to import"),
        ("helpers.py", "", "dask_resilience.helpers"),
    ],
)
def test_a_broken_rule_is_told(tree, file, line, says):
    with (tree / "dask_resilience" / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1
    assert says in done.stdout


def test_every_deciding_package_is_under_the_contract():
    contracts = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (deciding,) = (contract for contract in contracts if contract["id"] == "deciding")
    present = {name for name in DECIDING if list((TOP / "dask_resilience" / name).glob("*.py"))}
    assert {f"dask_resilience.{name}" for name in present} == set(deciding["source_modules"])
