"""Run many seeds: ``python -m dask_resilience.sim --seeds 1000``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from dask_resilience.sim.cluster import Cluster


def main(arguments: list[str] | None = None) -> int:
    """Run seeds, print what was reached, and each broken promise with the seed that repeats it.

    Parameters
    ----------
    arguments
        Of the command line.

    Returns
    -------
    int
        1 if a promise was broken.
    """
    parser = argparse.ArgumentParser(prog="python -m dask_resilience.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--trace", action="store_true", help="print the trace of each seed that breaks a promise")
    chosen = parser.parse_args(arguments)
    reached: Counter[str] = Counter()
    failed = 0
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        outcome = Cluster(seed).run()
        reached += outcome.reached
        if outcome.broken:
            failed += 1
            sys.stdout.write(f"seed {seed}:\n" + "".join(f"  {line}\n" for line in outcome.broken))
            if chosen.trace:
                sys.stdout.write("".join(f"    {line}\n" for line in outcome.trace))
    sys.stdout.write("".join(f"{count:8d} {name}\n" for name, count in sorted(reached.items())))
    sys.stdout.write(f"{chosen.seeds} seeds, {failed} broke a promise\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
