"""Run the tests kind by kind under coverage, over all processes, and tell what each kind covers.

Arguments go to pytest. The exit code is 0 when each kind passed. The data stay in ``.coverage`` for later reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "unit": ["-n", "2", "--dist", "worksteal"],
    # Clusters share nothing but the machine, and no test asks how fast it is; a file may keep one for all its tests.
    "integration": ["-n", "2", "--dist", "loadfile"],
    "chaos": ["-n", "2", "--dist", "worksteal"],
}
NO_TESTS = 5


def coverage(*arguments: str, data: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``coverage`` on data files named `data`; its output is shown as it comes."""
    command = [sys.executable, "-m", "coverage", *arguments]
    environment = {**os.environ, "COVERAGE_FILE": str(Path(data).absolute())}
    return subprocess.run(command, env=environment, check=False, text=True, **options)


def covered(kind: str) -> str:
    """Combine what the processes of one kind of tests left, and tell its share."""
    parts = [str(path) for path in Path().glob(f".coverage.{kind}.*")]
    coverage("combine", "--quiet", *parts, data=f".coverage-{kind}")
    share = coverage("report", "--format=total", data=f".coverage-{kind}", stdout=subprocess.PIPE)
    return f"{share.stdout.strip()}%" if share.returncode == 0 else "nothing"


def main(arguments: list[str]) -> int:
    """Run every kind, also when one fails, and report."""
    for stale in Path().glob(".coverage*"):
        stale.unlink()
    codes, lines = {}, []
    for kind, options in KINDS.items():
        print(f"== {kind} tests", flush=True)
        chosen = ["-m", f"{kind} and not long", *options, *arguments]
        run = coverage("run", "-m", "pytest", *chosen, data=f".coverage.{kind}")
        codes[kind] = 0 if run.returncode == NO_TESTS and arguments else run.returncode
        outcome = "passed" if codes[kind] == 0 else f"exit code {run.returncode}"
        lines.append(f"{kind} tests: {outcome}, cover {covered(kind)}")
    print("== coverage, all processes, every kind", flush=True)
    coverage("combine", "--quiet", "--keep", *map(str, Path().glob(".coverage-*")), data=".coverage")
    coverage("report", data=".coverage")
    print("\n".join(lines))
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
