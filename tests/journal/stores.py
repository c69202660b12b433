"""Small journals to read and to break."""

from __future__ import annotations

from dask_resilience.journal.codec import encode_frame
from dask_resilience.journal.records import ClientJoined, EpochStarted, GraphSubmitted, KeysReleased, TaskErred
from dask_resilience.journal.segment import SegmentHeader, encode_footer, encode_header

CLUSTER = bytes(range(16))
NONCE = bytes(16)


def name(epoch, seq):
    return f"log/{epoch:010d}/{seq:020d}"


class Writer:
    """Writes a store as the specification says, into `segments`: name to content."""

    def __init__(self, *, cluster=CLUSTER):
        self.cluster = cluster
        self.segments = {}
        self.lsn, self.chain = 1, 0
        self.epoch = self.seq = None
        self.places = []

    def open(self, epoch, seq):
        self.epoch, self.seq, self.frames = epoch, seq, 0
        self.segments[self.name] = encode_header(
            SegmentHeader(cluster=self.cluster, epoch=epoch, seq=seq, nonce=NONCE, first_lsn=self.lsn, chain=self.chain)
        )

    @property
    def name(self):
        return name(self.epoch, self.seq)

    @property
    def sealed_end(self):
        return (self.epoch, self.seq, len(self.segments[self.name]), self.lsn - 1)

    def start(self, epoch, sealed):
        self.open(epoch, 0)
        self.append(EpochStarted(epoch=epoch, cluster="c", holder="h", versions={"dask": "1"}, sealed=sealed))

    def append(self, record):
        self.places.append((self.name, len(self.segments[self.name]), self.lsn, self.chain))
        buffers, self.chain = encode_frame(record, lsn=self.lsn, chain=self.chain)
        self.segments[self.name] += b"".join(buffers)
        self.lsn += 1
        self.frames += 1

    def seal(self):
        self.segments[self.name] += encode_footer(
            frames=self.frames, nbytes=len(self.segments[self.name]), lsn=self.lsn, chain=self.chain
        )

    def roll(self):
        self.seal()
        self.open(self.epoch, self.seq + 1)

    def back_to(self, place):
        """Forget what was appended from `place` on, as a writer whose sync failed does."""
        _, _, self.lsn, self.chain = place


RECORDS = (
    ClientJoined(client="c", resilient=True),
    GraphSubmitted(client="c", seq=1, stimulus_id="s", keys=(("x", 0),), frames=(b"f\x00", b""), rest=b"r\x00"),
    KeysReleased(client="c", keys=("y", 0)),
    TaskErred(key=b"k", blame=1.5, error=None),
)


def small_store(*, sealed=True, cluster=CLUSTER):
    """Two epochs, three segments: every record but the last ends in bytes that are zero."""
    writer = Writer(cluster=cluster)
    writer.start(1, None)
    writer.append(RECORDS[0])
    writer.roll()
    writer.append(RECORDS[1])
    writer.start(4, writer.sealed_end)
    writer.append(RECORDS[3])
    writer.append(RECORDS[2])
    if sealed:
        writer.seal()
    return writer


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
