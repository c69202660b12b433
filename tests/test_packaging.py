"""What is installed is what was written, and importing it costs next to nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dask_resilience
import dask_resilience.dashboards

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())


def script(name):
    """A script of the checks, as a module."""
    spec = importlib.util.spec_from_file_location(name, TOP / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code, cwd):
    # Unmeasured: another copy of the package would count as files that no test covers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, because setuptools writes into its source tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, copy)
    for name in ("dask_resilience", "dashboards"):
        shutil.copytree(TOP / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file_and_no_other(wheel):
    check = script("wheel_contents")
    expected = check.expected_files()
    assert {"dask_resilience/dashboards/routes.py", "dask_resilience/resilience-schema.yaml"} <= expected
    assert check.complaints(wheel, expected) == []


def test_the_check_of_the_wheel_notices(wheel):
    check = script("wheel_contents")
    expected = check.expected_files() - {"dask_resilience/cli.py"} | {"dask_resilience/forgotten.yaml"}
    assert check.complaints(wheel, expected) == [
        "missing: dask_resilience/forgotten.yaml",
        "does not belong: dask_resilience/cli.py",
    ]


def test_the_wheel_can_be_imported_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.');"
        "import dask_resilience.dashboards.routes as r; from dask_resilience.settings import Settings;"
        "Settings.load(); print(r.__file__)"
    )
    place = Path(python(code, cwd=tmp_path).strip())
    assert tmp_path / place == tmp_path / "dask_resilience/dashboards/routes.py"


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(TOP).parts) for path in (TOP / "dask_resilience").rglob("*.py")}
    assert found | {"dask_resilience.dashboards"} == listed


def test_every_package_says_what_it_is():
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert importlib.import_module(package).__doc__, package


def test_the_installed_package_is_this_working_copy(tmp_path):
    files = python(
        "import dask_resilience, dask_resilience.dashboards as d; print(dask_resilience.__file__); print(d.__file__)",
        cwd=tmp_path,
    ).split()
    assert [Path(file).parent for file in files] == [TOP / "dask_resilience", TOP / "dashboards"]


def test_the_version_is_said_once():
    assert importlib.metadata.version("dask-resilience") == dask_resilience.__version__


def test_importing_the_package_imports_no_dask(tmp_path):
    heavy = "{'dask', 'distributed', 'rich', 'yaml', 'tornado'}"
    for module in ("dask_resilience", "dask_resilience.cli"):
        code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
        assert python(code, cwd=tmp_path).strip() == "[]", module


def test_public_names_arrive_when_they_are_used():
    assert dask_resilience.Client.__module__ == "dask_resilience.client"
    assert callable(dask_resilience.install)
    assert set(dask_resilience.__all__) <= set(dir(dask_resilience))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Cluster'"):
        _ = dask_resilience.Cluster
