"""What a rank needs beyond what it holds: no tensor is ever gathered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.rank_fleet import in_ranks
from benchmarks.rank_tools import Ckptman
from benchmarks.ranks import BEHIND, MARGIN_NBYTES, take_memory

WHOLE_MIB = 280


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the peak")
def test_a_save_takes_the_shard_and_a_restore_takes_nothing_but_the_margin(tmp_path: Path) -> None:
    """Two asynchronous saves and a restore by four ranks, of a state that is far larger than shard and margin."""
    for one in in_ranks(take_memory, str(tmp_path), WHOLE_MIB, BEHIND.index(Ckptman)):
        assert one["nbytes"] + MARGIN_NBYTES < WHOLE_MIB << 19
        assert one["behind_nbytes"] <= one["nbytes"] + MARGIN_NBYTES
        assert one["restore_nbytes"] <= MARGIN_NBYTES
