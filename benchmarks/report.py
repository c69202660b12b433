"""Write ``docs/reference/benchmarks.md`` and its figures from the files in ``benchmarks/results``.

Every figure in that page comes from there; none is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import snapshots
from benchmarks._common import RESULTS
from benchmarks.failover import GOAL_ADDED_SECONDS, GOAL_TASKS
from benchmarks.figures import Bar, bars
from benchmarks.scheduler_cost import GOAL_ADDED_MICROSECONDS, GOAL_THROUGHPUT_RATIO

_DOCS = Path(__file__).parents[1] / "docs"
_GOAL_WORKERS = 2
_NAMES = ("scheduler_cost", "failover", "journal_bytes", "commit_latency", "snapshots", "stores")
_KINDS = {"stock": "stock start", "cold": "cold restart", "warm": "warm replacement"}
_SUBMISSIONS = {
    "map": "`client.map`: one message, all results wanted",
    "tree": "tree of `delayed`: one message, one result wanted",
    "submit": "`client.submit` for each task: a message each",
}


def main() -> None:
    """Write the page and the figures."""
    paths = {name: RESULTS / f"{name}.json" for name in _NAMES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    parts = {
        "scheduler_cost": _scheduler_cost,
        "failover": _failover,
        "journal_bytes": _journal_bytes,
        "commit_latency": _commit_latency,
        "snapshots": _snapshots,
        "stores": _stores,
    }
    missing = [f"`benchmarks/{name}.py`" for name in _NAMES if name not in found]
    sections = [
        _HEAD,
        *([f"Without a result that was kept so far: {', '.join(missing)}.\n"] if missing else []),
        *(["## Goals\n", _table(("goal", "measured", ""), _goals(found)), _WHY] if not missing else []),
        *(part(found[name]) for name, part in parts.items() if name in found),
        "## Where and when\n",
        _table(
            ("benchmark", "date", "machine", "load", "versions"), (_where(name, each) for name, each in found.items())
        ),
        _FOOT,
    ]
    page = _DOCS / "reference" / "benchmarks.md"
    page.write_text("\n".join(sections))
    figures = _DOCS / "figures"
    figures.mkdir(exist_ok=True)
    drawn = {
        "scheduler_cost": ("scheduler-cost.svg", _cost_figure),
        "failover": ("failover-tasks.svg", _failover_figure),
    }
    for name, (file, draw) in drawn.items():
        if name in found:
            (figures / file).write_text(draw(found[name]["results"]))
    print(f"wrote {page} and {figures}")


_HEAD = """\
# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/results. Edit that, not this. -->

Each benchmark runs stock Dask and this package in turns, in one run on one machine, so that whatever else the machine
does meets both. Figures are medians, with the least and the greatest in parentheses.
"""

_WHY = """
A goal is *met* or *missed* when the standard error of the median leaves no doubt, and otherwise *not decided* by this
run. Where throughput falls short of its goal while CPU time does not, the machine had fewer free cores than processes:
the journal's thread and the members then take turns with the scheduler.

The cost of a submission is that of its one record. It is spread over the tasks of the graph, so tasks that are
submitted one by one pay for a record each: encoding, a checksum, waking the writer and an ack.

The time of a failover beyond a process' start grows with the number of tasks, because the scheduler's own code creates
each again: it unpacks graphs, makes the tasks, orders them, and decides on each. Most of that is Dask's own work,
which a stock scheduler did once as well; ours is the look at each task and the adoption. A *standby* process follows
the journal and has done most of it when it takes over.
"""

_FOOT = """
Run them yourself: `python -m benchmarks.NAME --json FILE`, with `--quick` to see whether it works. Copy the files to
`benchmarks/results`, and `python -m benchmarks.report` writes this page.
"""


def _goals(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, result in found["scheduler_cost"]["results"].items():
        added, error = result["added_cpu_microseconds"]["median"], result["added_cpu_error_microseconds"]
        goal = f"at most {GOAL_ADDED_MICROSECONDS:g} µs of scheduler CPU more a task, {name}"
        yield goal, f"{added:+.1f} ± {error:.1f} µs", _verdict(GOAL_ADDED_MICROSECONDS - added, error)
        ratio, error = result["throughput_ratio"]["median"], result["throughput_ratio_error"]
        goal = f"at least {GOAL_THROUGHPUT_RATIO:g} of stock's tasks a second, {name}"
        yield goal, f"{ratio:.3f} ± {error:.3f}", _verdict(ratio - GOAL_THROUGHPUT_RATIO, error)
    for result in found["failover"]["results"]:
        if result["tasks"] == GOAL_TASKS and result["workers"] == _GOAL_WORKERS:
            goal = f"cold restart at {GOAL_TASKS:,} tasks within {GOAL_ADDED_SECONDS:g} s of a stock start"
            added, error = result["cold_added_seconds"], result["cold_added_error_seconds"]
            yield goal, f"{added:+.2f} ± {error:.2f} s", _verdict(GOAL_ADDED_SECONDS - added, error)
    largest = found["snapshots"]["results"]["sizes"][-1]
    tasks, pace = f"{largest['tasks']:,} tasks", largest["load_tasks_per_second"]
    goal = f"at least {snapshots.GOAL_LOAD_TASKS_PER_SECOND:,} tasks a second read from a snapshot"
    yield goal, f"{pace:,.0f}", _verdict(pace - snapshots.GOAL_LOAD_TASKS_PER_SECOND, 0)
    for goal, most, measured in (
        (f"{tasks}: snapshot written and read back within", snapshots.GOAL_SNAPSHOT_SECONDS, largest["write_seconds"]),
        (f"{tasks}: state read from a snapshot within", snapshots.GOAL_RECOVERY_SECONDS, largest["load_seconds"]),
    ):
        yield f"{goal} {most:g} s", f"{measured:.1f} s", _verdict(most - measured, 0)
    ratio, most = largest["snapshot_memory_ratio"], snapshots.GOAL_MEMORY_RATIO
    yield (
        f"{tasks}: memory of a snapshot's process at most {most:g} of the state",
        f"{ratio:.2f}",
        _verdict(most - ratio, 0),
    )
    late = found["snapshots"]["results"]["lag"]
    goal = f"the event loop never {1e3 * snapshots.GOAL_LAG_SECONDS:g} ms late while a snapshot is taken"
    worst = f"{1e3 * late['while_taking']['max']:.0f} ms; without one {1e3 * late['without']['max']:.0f} ms"
    yield goal, worst, _verdict(snapshots.GOAL_LAG_SECONDS - late["while_taking"]["max"], 0)


def _verdict(margin: float, error: float) -> str:
    if margin >= error:
        return "met"
    return "**missed**" if margin <= -error else "not decided"


def _scheduler_cost(content: dict[str, Any]) -> str:
    rows = []
    for name, result in content["results"].items():
        for side in ("stock", "ours"):
            cpu, pace = result[side]["cpu_microseconds"], result[side]["tasks_per_second"]
            rows.append((_SUBMISSIONS[name], side, _spread(cpu, 1), _spread(pace, 0)))
        added, ratio = result["added_cpu_microseconds"], result["throughput_ratio"]
        rows.append(("", "*difference, ratio*", _spread(added, 1), _spread(ratio, 3)))
    parameters = content["parameters"]
    about = (
        f"\n## What the journal costs a scheduler\n\n{parameters['tasks']:,} tasks on {parameters['workers']} workers, "
        f"{parameters['rounds']} rounds; a quarter of the tasks where each is submitted alone. CPU time is that of the "
        "whole process, the writer's thread included, from the submission to the release.\n"
    )
    figure = "\n![CPU time of the scheduler for a task](../figures/scheduler-cost.svg)\n"
    return about + "\n" + _table(("submission", "scheduler", "CPU µs a task", "tasks a second"), rows) + figure


def _failover(content: dict[str, Any]) -> str:
    rows = []
    for result in content["results"]:
        size = (f"{result['tasks']:,}", str(result["workers"]))
        stock = result["stock"]
        rows.append((*size, _KINDS["stock"], _spread(stock["health_seconds"], 2), "", "", "", ""))
        for kind in ("cold", "warm"):
            taken = result[kind]
            parts = (f"{taken[f'seconds_to_{part}']['median']:.3f}" for part in ("rule", "replay", "gather"))
            seconds = (_spread(taken[name], 2) for name in ("ready_seconds", "result_seconds"))
            rows.append((*size, _KINDS[kind], *seconds, *parts))
    about = (
        "\n## How long a failover takes\n\n"
        "Seconds from SIGKILL until the scheduler serves (`/resilience/ready` is 200), and until a task that was "
        "submitted right after the kill has its result at the client. *Warm* is a process that has everything "
        "imported. A stock start is from the start of the process to `/health` 200, and gets none of the old work "
        "back. The last three columns are what the scheduler says of itself.\n"
    )
    header = ("tasks", "workers", "", "serves after s", "new result after s", "rule s", "replay s", "gather s")
    return about + "\n" + _table(header, rows) + "\n![Seconds to failover](../figures/failover-tasks.svg)\n"


def _journal_bytes(content: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{result['tasks']:,}",
            f"{result['message_bytes_a_task']:,.0f}",
            f"{result['journal_bytes_a_task']:,.0f}",
            f"{result['journal_to_message_ratio']:.2f}",
        )
        for name, result in content["results"].items()
    ]
    about = (
        "\n## How large the journal grows\n\n"
        "*Message* is what a client sends to a stock scheduler as well; the journal keeps it as it came, and adds the "
        "release of what was wanted. Finished tasks add nothing.\n"
    )
    return about + "\n" + _table(("graph", "tasks", "message B a task", "journal B a task", "ratio"), rows)


def _commit_latency(content: dict[str, Any]) -> str:
    rows = []
    results = content["results"]
    for rate, writer in results["writer"].items():
        ack, disk = writer["milliseconds"], results["disk"][rate]["milliseconds"]
        append = f"{writer['append_microseconds']:.0f}"
        pace = "as fast as it goes" if rate == "burst" else f"{int(rate):,}"
        rows.append((pace, append, *(f"{each[part]:.1f}" for part in ("p50", "p99") for each in (ack, disk))))
    about = (
        "\n## How long until a record is acked\n\n"
        "Records of 1 kB through the group commit on a local disk; *disk* is one bare write with `fdatasync` of the "
        "same bytes, in the same minute. One sync commits all that came since the last, so the latency of a burst is "
        "that of its megabytes.\n"
    )
    header = ("records a second", "append µs", "ack p50 ms", "disk p50 ms", "ack p99 ms", "disk p99 ms")
    trips = results["client"]
    names = {"stock": "one task, stock", "ours": "one task, ours", "ack": "ack of its submission"}
    trip_rows = [(names[side], *(f"{trips[side][part]:.1f}" for part in ("p50", "p99"))) for side in names]
    told = "\nA client's round trips:\n\n" + _table(("from submission to", "p50 ms", "p99 ms"), trip_rows)
    return about + "\n" + _table(header, rows) + told


def _snapshots(content: dict[str, Any]) -> str:
    rows = [
        (
            f"{each['tasks']:,}",
            f"{each['journal_bytes'] / each['tasks']:.0f}",
            f"{each['snapshot_bytes'] / each['tasks']:.0f}",
            *(f"{each[name]:.2f}" for name in ("replay_seconds", "write_seconds", "load_seconds")),
            f"{each['load_tasks_per_second']:,.0f}",
            f"{each['snapshot_memory_ratio']:.2f}",
        )
        for each in content["results"]["sizes"]
    ]
    late = content["results"]["lag"]
    late_rows = [
        (name, *(f"{1e3 * late[kind][part]:.1f}" for part in ("p50", "p99", "max")))
        for kind, name in (("without", "without"), ("while_taking", "while one is taken"))
    ]
    about = (
        "\n## What snapshots take, and what they save\n\n"
        "Graphs of 10,000 small tasks that are all still wanted. *Replay* builds the scheduler's state from the "
        "journal, *load* from a snapshot of it; *write* is the snapshot itself, read back. The last column is the peak "
        "memory of the process that takes it, by that of one which only loads the same state.\n"
    )
    columns = "tasks", "journal B a task", "snapshot B a task", "replay s", "write s", "load s"
    header = (*columns, "loaded tasks a second", "memory")
    told = f"\nHow late the event loop of a scheduler with {late['tasks']:,} tasks is:\n\n"
    return about + "\n" + _table(header, rows) + told + _table(("snapshot", "median ms", "p99 ms", "max ms"), late_rows)


def _stores(content: dict[str, Any]) -> str:
    results = content["results"]
    commits = [
        (
            name,
            f"{1e3 * each['p50']:.1f}",
            f"{1e3 * each['p99']:.1f}",
            f"{sum(each['requests'].values()):.1f}" if each["requests"] else "",
            f"{each['bytes']:.0f}",
        )
        for name, each in results["commits"].items()
    ]
    days = [
        (
            f"`{day['scheme']}://`",
            f"{1e3 * day['interval']:.0f} ms",
            f"{day['requests']:,.0f}",
            f"{day['dollars']:.2f}",
            f"{day['quiet_dollars']:.2f}",
        )
        for day in results["days"]
    ]
    paces = [
        (name, f"{each['median']:,.0f} ± {each['error']:.0f}", f"{each['ratio']:.2f}")
        for name, each in results["throughput"].items()
    ]
    about = (
        "\n## The journal on other stores\n\nServers on the same host: this shows what the journal asks of a store, "
        "not how far a cloud is. Single commits of 1 kB, from append to ack:\n"
    )
    prices = (
        "\nA day with a commit each interval, at list prices, and one without submissions, which only renews the "
        "lease:\n\n"
    )
    pace = "\nTasks a second of `client.map`, where server, scheduler, worker and client share the cores:\n\n"
    return (
        about
        + "\n"
        + _table(("store", "p50 ms", "p99 ms", "requests", "bytes"), commits)
        + prices
        + _table(("store", "interval", "requests a day", "dollars a day", "quiet, dollars"), days)
        + pace
        + _table(("journal on", "tasks a second", "of stock"), paces)
    )


def _where(name: str, content: dict[str, Any]) -> Sequence[str]:
    machine, versions = content["machine"], content["versions"]
    about = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['kernel']}"
    shown = ", ".join(f"{each} {versions[each]}" for each in ("python", "distributed", "dask-resilience"))
    return name, content["date"], about, str(machine["load_average"]), shown


def _cost_figure(results: dict[str, Any]) -> str:
    series = {
        side: [_bar(result[side]["cpu_microseconds"]) for result in results.values()] for side in ("stock", "ours")
    }
    return bars("CPU time of the scheduler for a task", "µs", series, list(results))


def _failover_figure(results: list[dict[str, Any]]) -> str:
    chosen = [result for result in results if result["workers"] == _GOAL_WORKERS]
    names = {"stock": "health_seconds", "cold": "ready_seconds", "warm": "ready_seconds"}
    series = {_KINDS[kind]: [_bar(result[kind][name]) for result in chosen] for kind, name in names.items()}
    return bars("Until the scheduler serves", "s", series, [f"{result['tasks']:,} tasks" for result in chosen])


def _bar(found: dict[str, float]) -> Bar:
    return found["median"], found["min"], found["max"]


def _spread(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:,.{digits}f} ({found['min']:,.{digits}f} to {found['max']:,.{digits}f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
