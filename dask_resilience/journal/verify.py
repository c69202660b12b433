"""Checks over everything that a store holds of a journal.

First each segment by itself: header, frames, chain from the header's own start. Then, from the newest epoch back, what
counts: each `EpochStarted` says where the log before it ends, and bytes behind that end are ignored for ever. Then
forward over what counts: nothing missing, repeated, moved or foreign, and a torn tail only where a crash can leave one.

A *damage* is something that a scheduler would refuse to recover from. A *note* is something that it passes over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from dask_resilience.journal.records import EpochStarted, SealedEnd, SnapshotTaken
from dask_resilience.journal.segment import (
    FIRST_CHAIN,
    FIRST_LSN,
    HEADER_BYTES,
    SegmentHeader,
    handover_problem,
    succession_problem,
)
from dask_resilience.journal.survey import Survey, survey_segment

Level: TypeAlias = Literal["damage", "note"]

_NAME: Final = re.compile(r"log/(\d{10})/(\d{20})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Parameters
    ----------
    level
        ``damage`` is what a recovery refuses, and a small object that is not what was written; ``note`` is what it
        passes over.
    name
        Of the object, mostly a segment.
    offset
        In bytes from the object's start.
    problem
        What is wrong there.
    """

    level: Level
    name: str
    offset: int
    problem: str

    def __str__(self) -> str:
        return f"{self.level}: {self.name} at byte {self.offset}: {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify_store` or a check of all objects found.

    Parameters
    ----------
    findings
        In the order of names.
    segments, epochs
        Counts of what the store holds, ignored ones included.
    records
        Count of the records that a recovery would replay.
    last_lsn
        Of the last of them, or None without any.
    snapshots
        Count of those that are sound.
    """

    findings: tuple[Finding, ...]
    segments: int
    records: int
    epochs: int
    last_lsn: int | None
    snapshots: int = 0

    @property
    def damaged(self) -> bool:
        """Whether something is damaged."""
        return any(finding.level == "damage" for finding in self.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """What counts of one epoch: its segments up to `seal`, or all of them without one."""

    surveys: list[Survey]
    seal: SealedEnd | None
    started: bool
    #: Whether the epoch that it goes on from is missing.
    after_gap: bool = False
    #: The snapshot that it goes on from, instead of an older epoch.
    base: SnapshotTaken | None = None


def verify_store(
    segments: Iterable[tuple[str, bytes]], *, cluster: bytes | None = None, base: SnapshotTaken | None = None
) -> Report:
    """Check a whole journal.

    Parameters
    ----------
    segments
        Name and content of every object below ``log/``, in any order. Each content is let go of before the next one
        is asked for.
    cluster
        Id that the segments must have. By default the one that most of them have.
    base
        A snapshot that is sound. What it stands for need not be there.

    Returns
    -------
    Report
        Never raises for what the store holds.

    Examples
    --------
    >>> verify_store([]).damaged
    False
    """
    walk = _Walk(base=base)
    surveys = walk.survey_all(segments)
    epochs = walk.by_epoch(surveys, cluster)
    for span in walk.spans(epochs):
        walk.check_span(span)
    return Report(
        findings=tuple(sorted(walk.findings, key=lambda finding: (finding.name, finding.offset))),
        segments=len(surveys),
        records=walk.records,
        epochs=len(epochs),
        last_lsn=walk.last_lsn,
    )


@dataclass(slots=True)
class _Walk:
    """The walk over a store, and what it found so far."""

    base: SnapshotTaken | None
    findings: list[Finding] = field(default_factory=list)
    records: int = 0
    last_lsn: int | None = None
    #: Next LSN and chain value, or None behind something that is damaged: one damage is told once.
    place: tuple[int, int] | None = None
    #: Whether the record that opens the epoch was passed, or lies in something damaged.
    opened: bool = False

    def tell(self, level: Level, name: str, offset: int, problem: str) -> None:
        self.findings.append(Finding(level=level, name=name, offset=offset, problem=problem))

    def survey_all(self, segments: Iterable[tuple[str, bytes]]) -> list[Survey]:
        surveys: dict[str, Survey] = {}
        for name, data in segments:
            match = _NAME.fullmatch(name)
            if match is None:
                self.tell("note", name, 0, "this is not the name of a segment; it is ignored")
            elif name in surveys:
                self.tell("damage", name, 0, "there are two segments of this name")
            else:
                surveys[name] = survey_segment(name, int(match[1]), int(match[2]), data)
        return [surveys[name] for name in sorted(surveys)]

    def by_epoch(self, surveys: Sequence[Survey], cluster: bytes | None) -> dict[int, list[Survey]]:
        """Group by epoch; a segment that is not what its name says stays as a gap that is already told."""
        counts = Counter(survey.header.cluster for survey in surveys if survey.header)
        if cluster is None:
            cluster = counts.most_common(1)[0][0] if counts else b""
        epochs: dict[int, list[Survey]] = {}
        for each in surveys:
            survey, header = each, each.header
            if header:
                problem = succession_problem(
                    header,
                    cluster=cluster,
                    epoch=survey.epoch,
                    seq=survey.seq,
                    lsn=header.first_lsn,
                    chain=header.chain,
                )
                if problem:
                    survey = replace(survey, header=None, opening=None, end=0, fault=problem)
            epochs.setdefault(survey.epoch, []).append(survey)
        return epochs

    def spans(self, epochs: dict[int, list[Survey]]) -> list[_Span]:
        """Find what counts, from the newest epoch back; return it oldest first."""
        spans: list[_Span] = []
        seal: SealedEnd | None = None
        nothing_before = False
        for epoch in sorted(epochs, reverse=True):
            surveys = epochs[epoch]
            if self.base is not None and epoch <= self.base.epoch:
                break
            if nothing_before or (seal and epoch > seal[0]):
                for survey in surveys:
                    self.tell("note", survey.name, 0, "a newer epoch sealed the log before this one; it is ignored")
                continue
            if seal and epoch < seal[0]:
                self.tell("damage", _name(seal[0], seal[1]), 0, "missing: a newer epoch says the log before ends here")
                seal, spans[-1] = None, replace(spans[-1], after_gap=True)
            started = _opening(surveys, seal)
            spans.append(_Span(surveys=surveys, seal=seal, started=started is not None))
            # Without a record to open it, an epoch holds nothing, and the log ends in the epoch before.
            seal = started.sealed if started else None
            nothing_before = started is not None and started.sealed is None
        if self.base is not None:
            return [*self.base_span(self.base, epochs, seal, first=not spans), *spans[::-1]]
        if seal:
            self.tell("damage", _name(seal[0], seal[1]), 0, "missing: a newer epoch says the log before ends here")
        if nothing_before:
            self.place = (FIRST_LSN, FIRST_CHAIN)
        return spans[::-1]

    def base_span(
        self, base: SnapshotTaken, epochs: dict[int, list[Survey]], seal: SealedEnd | None, *, first: bool
    ) -> list[_Span]:
        """Find what counts of the epoch in which a snapshot was taken; what is older is not needed."""
        for epoch, surveys in epochs.items():
            for survey in surveys:
                if (epoch, survey.seq) < (base.epoch, base.seq) and (problem := survey.fault or survey.torn):
                    self.tell(
                        "note", survey.name, survey.end, f"a snapshot stands for it, and it is damaged: {problem}"
                    )
        surveys = [survey for survey in epochs.get(base.epoch, ()) if survey.seq >= base.seq]
        if not surveys:
            self.tell("damage", _name(base.epoch, base.seq), 0, "missing: a snapshot goes on from here")
            return []
        if not first and (seal is None or seal[0] != base.epoch):
            problem = f"the log leaves out epoch {base.epoch}, of which a snapshot is"
            self.tell("damage", surveys[0].name, 0, problem)
            return []
        return [_Span(surveys=surveys, seal=seal, started=True, base=base)]

    def check_span(self, span: _Span) -> None:
        last = span.seal[1] if span.seal else span.surveys[-1].seq
        # An epoch begins with the record that opens it; from a snapshot on, that is passed.
        self.opened = span.base is not None and span.base.seq > 0
        if span.after_gap:
            self.place = None
        following = span.base.seq if span.base else 0
        if span.base:
            self.check_base(span.surveys[0], span.base)
        for survey, successor in zip(span.surveys, [*span.surveys[1:], None], strict=True):
            if survey.seq > last:
                self.tell("note", survey.name, 0, "it lies behind the sealed end of its epoch; it is ignored")
                continue
            self.check_gap(survey.epoch, following, survey.seq)
            following = survey.seq + 1
            if survey.header is None:
                # A segment appears with its header, so even a torn one is no crash's doing.
                self.tell("damage", survey.name, 0, survey.fault or survey.torn or "")
                self.place, self.opened = None, True
                continue
            self.check_start(survey, survey.header, span)
            if survey.seq < last:
                adjacent = successor is not None and successor.seq == survey.seq + 1
                self.check_inner_end(survey, survey.header, successor.header if successor and adjacent else None)
            elif span.seal:
                self.check_sealed_end(survey, span.seal)
            else:
                self.check_open_end(survey)
        self.check_gap(span.surveys[0].epoch, following, last + 1)

    def check_base(self, survey: Survey, base: SnapshotTaken) -> None:
        """The record that a snapshot is of must be where it says, or right before the segment."""
        if survey.header is None or survey.seq != base.seq:
            return
        index = base.lsn - survey.header.first_lsn + 1
        if not (0 <= index <= survey.records and survey.chains[index] == base.chain):
            self.tell("damage", survey.name, 0, f"LSN {base.lsn} is not here as a snapshot says, or it is another")

    def check_gap(self, epoch: int, first: int, behind: int) -> None:
        if first < behind:
            count = behind - first
            self.tell("damage", _name(epoch, first), 0, f"missing, {count} segment{'s' if count > 1 else ''} in a row")
            self.place, self.opened = None, True

    def check_start(self, survey: Survey, header: SegmentHeader, span: _Span) -> None:
        # An epoch that holds no record was never part of the log, wherever its header says that it starts.
        if self.place and span.started:
            lsn, chain = self.place
            problem = succession_problem(
                header, cluster=header.cluster, epoch=survey.epoch, seq=survey.seq, lsn=lsn, chain=chain
            )
            if problem:
                self.tell("damage", survey.name, 0, problem)

    def check_inner_end(self, survey: Survey, header: SegmentHeader, successor: SegmentHeader | None) -> None:
        """Only the records before the successor's first one count: behind them the writer may have given up."""
        broken = survey.fault or survey.torn
        if successor is None:
            if broken:
                self.tell("damage", survey.name, survey.end, broken)
            self.count(survey, len(survey.ends) - 1, known=False)
            return
        lsn = successor.first_lsn
        problem = handover_problem(header, successor, reached=survey.lsn(survey.records))
        if problem:
            self.tell("damage", survey.name, survey.end, broken or problem)
            self.count(survey, len(survey.ends) - 1, known=False)
            return
        index = lsn - header.first_lsn
        if broken or not survey.sealed or index < survey.records:
            what = broken or (
                "records are written again in the next segment" if index < survey.records else "no footer"
            )
            self.tell("note", survey.name, survey.ends[index], f"nothing counts from LSN {lsn} on: {what}")
        self.count(survey, index, known=True)

    def check_open_end(self, survey: Survey) -> None:
        if survey.fault:
            self.tell("damage", survey.name, survey.end, survey.fault)
        elif survey.torn:
            self.tell("note", survey.name, survey.end, f"torn tail, never acked: {survey.torn}")
        self.count(survey, len(survey.ends) - 1, known=not survey.fault)

    def check_sealed_end(self, survey: Survey, seal: SealedEnd) -> None:
        _, _, length, lsn = seal
        if length not in survey.ends:
            problem = survey.fault or survey.torn
            if problem is None or survey.end > length:
                what = "is longer than the segment" if survey.nbytes < length else "is not the end of a record"
                problem = f"the sealed length of {length} bytes {what}"
            self.tell("damage", survey.name, min(survey.end, length), problem)
            self.count(survey, len(survey.ends) - 1, known=False)
            return
        index = survey.ends.index(length)
        if survey.lsn(index) != lsn + 1:
            found = survey.lsn(index) - 1
            self.tell("damage", survey.name, length, f"the log was sealed behind LSN {lsn}, but LSN {found} is here")
        if survey.nbytes > length:
            ignored = survey.nbytes - length
            self.tell("note", survey.name, length, f"{ignored} bytes behind the sealed end of the epoch are ignored")
        self.count(survey, index, known=True)

    def count(self, survey: Survey, index: int, *, known: bool) -> None:
        """Take in the records before `ends[index]`, and go on from there if the place is `known`."""
        oddities = [each for each in survey.oddities if each[0] < survey.ends[index]]
        counted = min(index, survey.records)
        if counted and self.opened and survey.opening:
            oddities.append((HEADER_BYTES, "a record that opens an epoch stands inside of it"))
        elif counted and not self.opened and not survey.opening and not oddities:
            oddities.append((HEADER_BYTES, "the epoch does not begin with the record that opens it"))
        for offset, problem in oddities:
            self.tell("damage", survey.name, offset, problem)
        self.opened = self.opened or counted > 0 or not known
        self.records += counted
        if counted:
            self.last_lsn = survey.lsn(index) - 1
        self.place = (survey.lsn(index), survey.chains[index]) if known else None


def _opening(surveys: Sequence[Survey], seal: SealedEnd | None) -> EpochStarted | None:
    """Find the record that opens an epoch: the first that counts."""
    survey = surveys[0]
    for successor in surveys[1:]:
        if not (survey.header and successor.header and successor.header.first_lsn <= survey.header.first_lsn):
            break
        if seal and successor.seq > seal[1]:
            break
        # Given up before anything in it counted.
        survey = successor
    if survey.opening and seal and (survey.seq, survey.ends[1]) > seal[1:3]:
        return None
    return survey.opening


def _name(epoch: int, seq: int) -> str:
    return f"log/{epoch:010d}/{seq:020d}"
