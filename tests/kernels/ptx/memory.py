"""Global memory, a range of addresses for each tensor, and shared memory with its checks."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_SHIFT = 40  # address bits within the range of one tensor
_START = 1 << 32  # of a tensor's storage in its range: no offset of 32 bits leaves the range
_MANY = 63  # in a stamp: several warps


class PtxError(Exception):
    """What a GPU would not do, or would do wrong."""


class _Range:
    """The addresses of one tensor."""

    def __init__(self, index: int, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        extent = (
            sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            + 1
        )
        self.name, self.base = name, (index << _SHIFT) + _START
        self.low = tensor.storage_offset() * tensor.itemsize
        self.high = self.low + (extent * tensor.itemsize if tensor.numel() else 0)
        if storage.data_ptr() % 16:
            raise PtxError(f"{name}: the storage begins at no multiple of 16 bytes")
        count = storage.nbytes()
        buffer = (ctypes.c_uint8 * count).from_address(storage.data_ptr()) if count else b""
        self.bytes = np.frombuffer(buffer, np.uint8)
        self.views: dict[tuple[int, int], np.ndarray] = {}

    def view(self, size: int, count: int) -> np.ndarray:
        """Return the storage as rows of ``count`` numbers of ``size`` bytes."""
        if (size, count) not in self.views:
            whole = len(self.bytes) // (size * count) * (size * count)
            self.views[size, count] = self.bytes[:whole].view(UINT[size]).reshape(-1, count)
        return self.views[size, count]


class GlobalMemory:
    """The tensors of a launch, each in a range of addresses of its own."""

    def __init__(self) -> None:
        self.ranges: dict[int, _Range] = {}

    def add(self, name: str, tensor: Tensor) -> int:
        """Return the address of a tensor's first element; alignments up to 16 bytes are kept."""
        index = len(self.ranges) + 1
        self.ranges[index] = _Range(index, name, tensor)
        return self.ranges[index].base + self.ranges[index].low

    def _find(self, addresses: np.ndarray, size: int) -> tuple[_Range, np.ndarray]:
        """Return the range that all addresses lie in, and the offsets in its storage."""
        found = self.ranges.get(int(addresses[0]) >> _SHIFT)
        if found is None:
            raise PtxError(f"address {int(addresses[0]):#x} is in no tensor")
        offsets = (addresses - np.uint64(found.base)).view(np.int64)
        outside = int(offsets.min()) < found.low or int(offsets.max()) + size > found.high
        if outside:
            wrong = offsets[(offsets < found.low) | (offsets + size > found.high)]
            raise PtxError(
                f"{len(wrong)} lanes access outside {found.name} (bytes 0 to "
                f"{found.high - found.low}), the first byte {int(wrong[0]) - found.low}"
            )
        if (offsets & (size - 1)).any():
            raise PtxError(f"misaligned access of {size} bytes in {found.name}")
        return found, offsets

    def _parts(self, addresses: np.ndarray):
        """Yield the lanes whose addresses lie in one range."""
        tags = addresses >> np.uint64(_SHIFT)
        if tags[0] == tags.min() == tags.max():
            yield slice(None)
        else:
            for tag in np.unique(tags):
                yield np.flatnonzero(tags == tag)

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """Return ``count`` numbers of ``size`` bytes for each address, ``[lanes, count]``."""
        out = np.empty((len(addresses), count), UINT[size])
        for lanes in self._parts(addresses):
            found, offsets = self._find(addresses[lanes], size * count)
            out[lanes] = found.view(size, count)[offsets // (size * count)]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store ``[lanes, count]``."""
        size, count = values.itemsize, values.shape[1]
        for lanes in self._parts(addresses):
            found, offsets = self._find(addresses[lanes], size * count)
            found.view(size, count)[offsets // (size * count)] = values[lanes]


class SharedMemory:
    """Shared memory of several blocks, with a check of reads before writes and of races.

    A race: two accesses of one granule by different warps of a block without a barrier in between,
    one of them a write. Each granule keeps the stamp of its last writer and its last reader: the
    number of barriers passed by the block, times 64, plus the warp, 63 for several readers.
    """

    def __init__(self, blocks: int, size: int, granule: int) -> None:
        self.size, self.granule = size, granule
        self.stride = max(1, -(-size // 1024)) * 1024  # patterns of wgmma repeat after 1024 bytes
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.written = np.zeros(blocks * self.stride, np.uint8)
        self.writer = np.full(blocks * self.stride // granule, -1, np.int64)
        self.reader = self.writer.copy()
        self.barriers = np.zeros(blocks, np.int64)
        # Of wgmma's reads: they see other writes only after a fence by the writing or reading warp.
        self.clock = 0  # number of fences
        self.write_clock = np.zeros_like(self.writer)
        self.fence_clock = np.zeros((blocks, _MANY + 1), np.int64)  # of each warp's last fence

    def locate(self, blocks: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the offsets of accesses of ``size`` bytes in ``data``."""
        addresses = addresses.astype(np.int64)
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.size:
            raise PtxError(
                f"address {int(addresses.min())} to {int(addresses.max()) + size} is outside the "
                f"{self.size} bytes of shared memory"
            )
        if (addresses & (size - 1)).any():
            raise PtxError(f"misaligned access of {size} bytes in shared memory")
        return addresses + blocks * self.stride

    def read(self, offsets: np.ndarray, size: int, count: int) -> np.ndarray:
        """Return ``count`` numbers of ``size`` bytes at each offset, ``[lanes, count]``."""
        rows = offsets // (size * count)
        if not (self.written.view(UINT[size]).reshape(-1, count)[rows] == _ones(size)).all():
            raise PtxError("read of shared memory that nobody wrote, or that a copy still writes")
        return self.data.view(UINT[size]).reshape(-1, count)[rows]

    def load(
        self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray, size: int, count: int
    ) -> np.ndarray:
        """``read`` by these warps."""
        self.note_read(offsets, blocks, warps, size * count)
        return self.read(offsets, size, count)

    def store(
        self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray, values: np.ndarray
    ) -> None:
        """Store ``[lanes, count]``; where several warps do, it must be the same.

        Lanes of one warp may differ (sums of a butterfly with a fused multiply-add do, in the last
        bit): the last one's value stays, on a GPU any.
        """
        size, count = values.itemsize, values.shape[1]
        rows, data = offsets // (size * count), self.data.view(UINT[size]).reshape(-1, count)
        self.note_write(offsets, blocks, warps, size * count, (data[rows] == values).all(axis=1))
        data[rows] = values
        lost = (data[rows] != values).any(axis=1)
        if lost.any():
            granules, stamps, _ = self._granules(
                offsets[lost], blocks[lost], warps[lost], size * count
            )
            if (self.writer[granules] != stamps).any():
                raise PtxError("race: several warps write one word of shared memory")
        self.written.view(UINT[size]).reshape(-1, count)[rows] = _ones(size)

    def invalidate(self, offsets: np.ndarray, size: int) -> None:
        """Mark as not written; ``size``: 4, 8 or 16 bytes."""
        self.written.view(np.uint32).reshape(-1, size // 4)[offsets // size] = 0

    def _granules(
        self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the granules of each access, its stamp, and the least stamp since the barrier."""
        steps = np.arange(max(1, size // self.granule))
        first = self.barriers[blocks] * 64
        granules = (offsets // self.granule)[:, None] + steps
        return granules, np.broadcast_to((first + warps)[:, None], granules.shape), first[:, None]

    def note_read(
        self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray, size: int
    ) -> None:
        """Check a read for races, and note it."""
        granules, stamps, first = self._granules(offsets, blocks, warps, size)
        writer = self.writer[granules]
        if ((writer >= first) & (writer != stamps)).any():
            raise PtxError("race: reads shared memory that another warp wrote, without a barrier")
        reader = self.reader[granules]
        several = (reader >= first) & (reader != stamps)
        self.reader[granules] = np.where(several, first + _MANY, stamps)
        late = self.reader[granules] != stamps  # several warps in this access
        if late.any():
            self.reader[granules[late]] = np.broadcast_to(first + _MANY, late.shape)[late]

    def fence(self, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Make the warps' writes visible to wgmma."""
        self.clock += 1
        self.fence_clock[blocks, warps] = self.clock

    def mark_fenced(
        self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray, size: int
    ) -> None:
        """Let wgmma see writes without a fence."""
        self.write_clock[self._granules(offsets, blocks, warps, size)[0]] = -1

    def check_fenced(self, offsets: np.ndarray, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Check that a fence lies between the writes of 16 bytes each and wgmma's reads."""
        granules, _, _ = self._granules(offsets, blocks, warps, 16)
        writers = self.writer[granules] & _MANY
        fenced = np.maximum(
            self.fence_clock[blocks[:, None], writers], self.fence_clock[blocks, warps][:, None]
        )
        if (fenced <= self.write_clock[granules]).any():
            raise PtxError("wgmma reads shared memory that was written without a proxy fence")

    def note_write(
        self,
        offsets: np.ndarray,
        blocks: np.ndarray,
        warps: np.ndarray,
        size: int,
        same: np.ndarray | bool,
    ) -> None:
        """Check a write for races, and note it; ``same``: whether it changes nothing."""
        granules, stamps, first = self._granules(offsets, blocks, warps, size)
        writer, reader = self.writer[granules], self.reader[granules]
        changes = np.logical_not(same).reshape(-1, 1)
        if ((writer >= first) & (writer != stamps) & changes).any():
            raise PtxError("race: writes shared memory that another warp wrote, without a barrier")
        if ((reader >= first) & (reader != stamps)).any():
            raise PtxError("race: writes shared memory that another warp read, without a barrier")
        self.writer[granules] = stamps
        self.write_clock[granules] = self.clock


def _ones(size: int) -> np.unsignedinteger:
    """Return the mark of a written number of that size: each byte is 1."""
    return UINT[size](int.from_bytes(b"\1" * size, "little"))
