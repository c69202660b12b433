"""Say what is wrong with a wheel: ``python .ci/wheel_contents.py dist/dask_resilience-*.whl``."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def expected_files(top: Path = TOP) -> set[str]:
    """Every tracked or new file of the two source folders, under the name that the wheel gives it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "dask_resilience", "dashboards"]
    names = subprocess.run(listed, cwd=top, check=True, capture_output=True, text=True).stdout.split("\n")
    sources = {name for name in names if name and (top / name).exists()}
    return {f"dask_resilience/{name}" if name.startswith("dashboards/") else name for name in sources}


def complaints(wheel: Path, expected: set[str]) -> list[str]:
    """One line for each file that is missing or does not belong, none for a good wheel."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.rpartition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
        points = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entry_points = archive.read(points).decode()
    found = [f"missing: {name}" for name in sorted(expected - packed)]
    found += [f"does not belong: {name}" for name in sorted(packed - expected)]
    if "licenses/LICENSE" not in metadata:
        found.append("missing: the licence")
    command = "dask_resilience.cli:resilience"
    for line in ("[dask_cli]", f"resilience = {command}", f"dask-resilience = {command}"):
        if line not in entry_points.splitlines():
            found.append(f"missing entry point: {line}")
    return found


if __name__ == "__main__":
    problems = complaints(Path(sys.argv[1]), expected_files())
    print("\n".join(problems) or f"{Path(sys.argv[1]).name}: all files and entry points are there")
    sys.exit(bool(problems))
