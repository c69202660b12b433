"""``dask resilience ...``, also installed as ``dask-resilience``.

Dask imports every plugin of its command line for ``dask --help``: what a command needs is imported when it runs.

Exit codes: 0 all is well, 1 the journal is damaged, 2 the command could not look.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

import click

from dask_resilience.errors import JournalCorrupt, ResilienceError, StoreError

if TYPE_CHECKING:
    from dask_resilience.journal.records import Record
    from dask_resilience.journal.verify import Report
    from dask_resilience.storage.object_store import ConditionalStore


class _Damaged(click.ClickException):
    exit_code = 1


class _CouldNotLook(click.ClickException):
    exit_code = 2


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except ResilienceError as error:
        kind = _Damaged if isinstance(error, JournalCorrupt) else _CouldNotLook
        raise kind(" ".join(str(error).split())) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def resilience() -> None:
    """Look after a cluster that outlives its scheduler."""


@resilience.command()
@click.argument("store")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_context
def verify(context: click.Context, store: str, output: str) -> None:
    """Check every byte of the journal in STORE, a directory or URL, and of the objects beside it.

    Nothing in the store is changed, and the scheduler may be running. Exits with 0 when all is sound, with 1 when an
    object is not what was written or a recovery would refuse the journal, with 2 when it could not be looked at.
    """
    from dask_resilience.storage.store_check import check_store

    with _errors_in_one_line():
        opened = _open_journal(store)
        report = check_store(opened)
        if output == "json":
            summary = {"store": opened.url, "sound": not report.damaged, **asdict(report)}
            click.echo(json.dumps(summary, indent=2))
        else:
            _print_report(report, url=opened.url)
    context.exit(_Damaged.exit_code if report.damaged else 0)


@resilience.command()
@click.argument("store")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N records.")
@click.option("--type", "wanted", metavar="T", help="Only records of this type, such as GraphSubmitted.")
def inspect(store: str, limit: int | None, wanted: str | None) -> None:
    """List the records of the journal in STORE, oldest first: LSN, epoch, and what the record says.

    Where a snapshot stands for what was before, its records come first, with the LSN up to which they stand.
    """
    from dask_resilience.journal.records import REGISTRY
    from dask_resilience.journal.render import render_record
    from dask_resilience.storage.snapshots import open_journal, read_snapshot

    types = {cls.__name__.lower(): cls for cls in REGISTRY.values()}
    if wanted is not None and wanted.lower() not in types:
        known = ", ".join(sorted(cls.__name__ for cls in types.values()))
        raise click.BadParameter(f"there are no records of type {wanted!r}; there are {known}", param_hint="--type")

    def lines(opened: ConditionalStore) -> Iterator[tuple[str, Record]]:
        snapshot, reader = open_journal(opened)
        if snapshot is not None:
            for record in read_snapshot(opened, snapshot):
                yield f"{snapshot.taken.lsn:>8}  snapshot", record
        for logged in reader.read():
            yield f"{logged.lsn:>8}  epoch {logged.epoch}", logged.record

    with _errors_in_one_line():
        of_type = (
            (place, record)
            for place, record in lines(_open_journal(store))
            if wanted is None or isinstance(record, types[wanted.lower()])
        )
        for place, record in islice(of_type, limit):
            click.echo(f"{place}  {render_record(record)}")


def _open_journal(url: str) -> ConditionalStore:
    from dask_resilience.settings import Settings
    from dask_resilience.storage import names, open_store

    store = open_store(url, existing=True, storage_options=Settings.load().storage_options)
    # A mistyped path must not pass for a sound journal.
    if not store.exists(names.CLUSTER) and not store.list(names.LOG):
        raise StoreError(store.url, "there is no journal here; give the directory or URL that resilience.store names")
    return store


def _print_report(report: Report, *, url: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    if report.findings:
        # A name must be whole to be of use; the problem may take several lines.
        table = Table("level", Column("object", no_wrap=True, overflow="fold"), "byte", "problem")
        for finding in report.findings:
            style = "bold red" if finding.level == "damage" else ""
            # As Text: a name or a problem may hold brackets, which would be read as markup.
            table.add_row(
                Text(finding.level, style=style), Text(finding.name), f"{finding.offset}", Text(finding.problem)
            )
        console.print(table)
    last = "no record" if report.last_lsn is None else f"last LSN {report.last_lsn}"
    counts = f"{report.segments} segments, {report.epochs} epochs, {report.records} records, {last}"
    if report.snapshots:
        counts = f"{report.snapshots} snapshots, {counts}"
    verdict = Text("damaged", style="bold red") if report.damaged else Text("sound", style="bold green")
    console.print(Text.assemble(f"{url}: ", verdict, f"; {counts}"), soft_wrap=True)
