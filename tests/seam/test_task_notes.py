"""A note goes with its task, also where another one has the same key."""

from __future__ import annotations

from distributed.scheduler import TaskGroup, TaskPrefix, TaskState

from dask_resilience._distributed.task_notes import TaskNotes


def test_a_key_that_is_used_again_begins_without_a_note():
    notes = TaskNotes()
    old = TaskState("x", None, "released", TaskGroup("x", TaskPrefix("x")), validate=False)
    notes[old] = 7
    new = TaskState("x", None, "released", TaskGroup("x", TaskPrefix("x")), validate=False)
    assert old == new
    assert (notes.get(old, -1), notes.get(new, -1)) == (7, -1)
    notes[new] = 8
    # The end of the old one takes nothing from the new one.
    del old
    assert (notes.get(new, -1), list(notes.items())) == (8, [(new, 8)])


def test_a_note_ends_with_its_task():
    notes = TaskNotes()
    ts = TaskState("x", None, "released", TaskGroup("x", TaskPrefix("x")), validate=False)
    notes[ts] = 7
    del ts
    assert (len(notes), list(notes.items())) == (0, [])
