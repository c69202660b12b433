"""The installed Dask is the one that the seam was written against, and a difference is told by name and signature."""

from __future__ import annotations

import ast
from pathlib import Path

import distributed
import pytest

import dask_resilience._distributed
from dask_resilience._distributed import pinned
from dask_resilience._distributed.pinned import PINNED, check_supported, differences
from dask_resilience.errors import UnsupportedDask


@pytest.mark.parametrize("name", PINNED)
def test_the_installed_dask_is_as_pinned(name):
    assert differences({name: PINNED[name]}) == []


def test_this_dask_is_supported():
    check_supported()


def test_an_internal_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr("distributed.scheduler._cull")
    assert differences() == ["distributed.scheduler:_cull is gone"]
    with pytest.raises(UnsupportedDask, match=r"distributed\.scheduler:_cull is gone") as refused:
        check_supported()
    assert refused.value.version == distributed.__version__
    assert "Install a supported distributed" in str(refused.value)


def test_a_module_that_is_gone_is_named():
    assert differences({"distributed.gone:Thing.method": "self"}) == ["distributed.gone:Thing.method is gone"]


def test_another_signature_is_told_with_both(monkeypatch):
    def _cull(dsk, keys, *, deeply=False):
        return dsk

    monkeypatch.setattr("distributed.scheduler._cull", _cull)
    [told] = differences()
    assert told == "distributed.scheduler:_cull has parameters (dsk, keys, *, deeply), expected (dsk, keys)"


def test_all_differences_are_told_at_once(monkeypatch):
    monkeypatch.delattr("distributed.scheduler._cull")
    monkeypatch.delattr("distributed.worker.Worker.get_metrics")
    with pytest.raises(UnsupportedDask) as refused:
        check_supported()
    assert len(refused.value.differences) == 2
    assert all(f"  - {line}\n" in str(refused.value) for line in refused.value.differences)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda a, b=1: None, "a, b"),
        (lambda *args, a, **kwargs: None, "*args, a, **kwargs"),
        (lambda a, *, b=1, c: None, "a, *, b, c"),
        (lambda: None, ""),
    ],
)
def test_a_signature_tells_names_and_kinds_and_no_defaults(function, told):
    assert pinned.signature(function) == told


def private_imports():
    """Every private name that the seam imports from Dask by a statement, and where."""
    for path in sorted(Path(dask_resilience._distributed.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("dask", "distributed"):
                for alias in node.names:
                    private = alias.name.startswith("_") or any(p.startswith("_") for p in node.module.split("."))
                    if private:
                        yield f"{node.module}:{alias.name}", path.name


@pytest.mark.parametrize(("name", "file"), list(private_imports()))
def test_what_the_seam_imports_and_is_private_is_pinned(name, file):
    assert any(pin == name or pin.startswith(f"{name}.") for pin in PINNED), f"{file} imports {name}"
