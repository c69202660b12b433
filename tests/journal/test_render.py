from __future__ import annotations

import pytest
from hypothesis import given

from dask_resilience.journal.records import (
    DataScattered,
    EpochStarted,
    EventLogged,
    GraphSubmitted,
    KeysReleased,
    PluginRegistered,
    QueueChanged,
    SharedChanged,
    TaskErred,
)
from dask_resilience.journal.render import render_record
from tests.strategies import any_record


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            GraphSubmitted(
                client="c", seq=1, stimulus_id="s", keys=(b"x",), frames=(bytes(3 << 20), b"a"), rest=bytes(1000)
            ),
            "GraphSubmitted client='c' seq=1 stimulus_id='s' keys=[b'x'] frames=<2 buffers, 3.0 MiB> rest=<1000 B>",
        ),
        (TaskErred(key=b"k", blame=("b", 1), error=None), "TaskErred key=b'k' blame=('b', 1) error=None"),
        (
            PluginRegistered(kind="worker", name="p", plugin=bytes(2048)),
            "PluginRegistered kind='worker' name='p' plugin=<2.0 KiB>",
        ),
        (
            DataScattered(client="c", nbytes={"a": 1, ("b", 0): 2, 3: 3, 4: 4}),
            "DataScattered client='c' nbytes={'a': 1, ('b', 0): 2, 3: 3, 1 more}",
        ),
        (
            KeysReleased(client="c", keys=("x" * 100,)),
            f"KeysReleased client='c' keys=['{'x' * 22}…{'x' * 23}']",
        ),
        (
            QueueChanged(name="q", change="put", items=(b"a secret",), client="c", number=2, settled=2),
            "QueueChanged name='q' change='put' items=<1 buffers, 8 B> client='c' number=2 settled=2",
        ),
        (
            SharedChanged(kind="variable", name="token", value=b"a secret"),
            "SharedChanged kind='variable' name='token' value=<8 B>",
        ),
        (
            EventLogged(topics=("t",), event=b"a secret"),
            "EventLogged topics=['t'] event=<8 B>",
        ),
        (
            EpochStarted(epoch=2, cluster="c", holder="h", versions={}, sealed=(1, 0, 77, 5)),
            "EpochStarted epoch=2 cluster='c' holder='h' versions={} sealed=(1, 0, 77, 5)",
        ),
    ],
)
def test_a_record_is_rendered(record, line):
    assert render_record(record) == line


@given(record=any_record)
def test_every_record_is_one_line(record):
    line = render_record(record)
    assert line.startswith(type(record).__name__)
    assert len(line.splitlines()) == 1
    assert len(line) < 600


def test_gibibytes():
    class Huge(bytes):
        def __len__(self):
            return 5 << 30

    assert "<5.0 GiB>" in render_record(PluginRegistered(kind="worker", name="p", plugin=Huge()))
