from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.journal.checked_json import VERSION, NewerObject, decode_checked, encode_checked, is_checked
from tests.journal.stores import flip

VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=3)
FIELDS = st.dictionaries(
    st.text().filter(lambda name: name not in ("version", "crc32c")), VALUES, min_size=1, max_size=4
)


@given(FIELDS)
def test_fields_come_back(fields):
    data = encode_checked(fields)
    assert is_checked(data)
    assert decode_checked(data) == fields
    assert json.loads(data)["version"] == VERSION


@given(FIELDS, st.data())
def test_every_flipped_bit_is_found(fields, chance):
    data = encode_checked(fields)
    with pytest.raises(ValueError):  # noqa: PT011 - what breaks first depends on the bit
        decode_checked(flip(data, chance.draw(st.integers(0, 8 * len(data) - 1))))


def test_version_1_had_no_checksum():
    data = json.dumps({"version": 1, "epoch": 7}).encode()
    assert not is_checked(data)
    assert decode_checked(data) == {"epoch": 7}


def test_a_newer_version_is_told():
    with pytest.raises(NewerObject, match="install a newer release"):
        decode_checked(b'{"version": 3, "epoch": 7}')


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"\xff", b'{"version": 0}', b'{"version": "1"}', b'{"version": 2, "epoch": 7}'],
)
def test_what_was_never_written(data):
    with pytest.raises(ValueError, match=r"Expecting|no JSON|never written|decode|missing"):
        decode_checked(data)
