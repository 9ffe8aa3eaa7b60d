"""Memory for prepared weights: aligned, shared by small ones, given back."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import pytest

from bitlm.ops.arena import CHUNK, HUGE_PAGE, Arena


def mapped(address: int) -> bool:
    """Tell whether an address belongs to the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return True
    return False


def test_pieces_are_aligned_and_apart():
    arena = Arena()
    pieces = [arena.allocate(size) for size in (1, 63, 64, 65, 1000, 1)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0 and not piece.any()
        piece.fill_(number + 1)
    assert [piece.unique().tolist() for piece in pieces] == [[n + 1] for n in range(6)]


def test_small_pieces_share_a_chunk_and_large_ones_begin_on_a_huge_page():
    arena = Arena()
    first, large, second = (arena.allocate(size) for size in (100, CHUNK, 100))
    assert second.data_ptr() - first.data_ptr() == 128
    assert first.data_ptr() % HUGE_PAGE == large.data_ptr() % HUGE_PAGE == 0
    many = [arena.allocate(CHUNK // 3) for _ in range(7)]
    assert len({piece.data_ptr() for piece in many}) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back_with_its_last_piece():
    arena = Arena()
    one, other = arena.allocate(1 << 20), arena.allocate(1 << 20)
    address, view = one.data_ptr(), one[10:20]
    del other
    gc.collect()
    assert mapped(address)
    del one
    assert mapped(address)
    del view
    gc.collect()
    assert not mapped(address)
    assert not arena.allocate(64).any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_huge_pages_are_asked_for():
    policy = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not policy.exists() or "[never]" in policy.read_text():
        pytest.skip("huge pages are off")
    piece = Arena().allocate(8 * HUGE_PAGE)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            start, _, end = word.partition("-")
            inside = int(start, 16) <= piece.data_ptr() < int(end, 16)
        elif inside and word == "VmFlags:":
            assert "hg" in line.split()
            return
    raise AssertionError("the piece is in no mapping")
