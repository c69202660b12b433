"""No thread of a test writes on in the next one."""

from __future__ import annotations

import pytest

from tests.storage.acting import Ruler
from tests.storage.servers import fake_gcs, moto, seaweedfs

__all__ = ["fake_gcs", "moto", "seaweedfs"]


@pytest.fixture(autouse=True)
def no_writer_left_behind():
    yield
    while Ruler.made:
        Ruler.made.pop().writer.close(timeout_seconds=0)
