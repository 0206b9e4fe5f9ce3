"""
torch's allocator on a GPU, without a GPU: what it reserves for tensors that come and go.

It keeps what is freed, and gives it to the next tensor that fits. Tensors of up to 1 MiB and larger
ones lie in pools of their own. With expandable segments, as train.py sets them, a pool is one range
of addresses that grows by pages at its end: what it wastes are holes that no tensor fits, and the
last page. Without them, as on Windows, a pool is many segments, and no hole spans two.

The rules are those of torch's c10/cuda/CUDACachingAllocator.cpp, versions 2.6 to 2.13.
"""

from bisect import bisect_left, insort

MIB = 2**20
UNIT = 512  # bytes: sizes are multiples of it
SMALL = MIB  # the largest tensor of the small pool
SMALL_PAGE = 2 * MIB  # of the small pool: a page, or a whole segment
LARGE_PAGE = 20 * MIB  # of the large pool: a page, or the segment of a tensor below MEDIUM
MEDIUM = 10 * MIB


class Allocator:
    """Allocates and frees by size: `allocated` and `reserved` bytes, and the peaks of both."""

    def __init__(self, expandable=True):
        self.small = Pool(SMALL_PAGE, expandable)
        self.large = Pool(LARGE_PAGE, expandable)
        self.allocated = self.peak = self.reserved = 0
        self.at = {}  # {key: (pool, address, size)}

    def allocate(self, key, size):
        size = max(1, -(-size // UNIT)) * UNIT
        pool = self.small if size <= SMALL else self.large
        address, taken = pool.allocate(size)
        self.at[key] = pool, address, taken
        self.allocated += taken
        self.peak = max(self.peak, self.allocated)
        self.reserved = self.small.reserved + self.large.reserved  # which never shrink

    def free(self, key):
        pool, address, size = self.at.pop(key)
        pool.free(address, size)
        self.allocated -= size


class Pool:
    """Free blocks by size, and where they begin and end: neighbours become one."""

    def __init__(self, page, expandable):
        self.page = page
        self.expandable = expandable
        self.reserved = 0
        self.end = 0  # of the addresses so far
        self.blocks = []  # free ones, sorted: (size, address)
        self.begins = {}  # {address: size}, of free blocks
        self.ends = {}  # {end: address}

    def allocate(self, size):
        """(address, size): a little larger where the rest would be too small for a block."""
        i = bisect_left(self.blocks, (size, -1))  # the smallest that is large enough
        if self.expandable and i + 1 < len(self.blocks) and self._is_last(*self.blocks[i]):
            i += 1  # the block that can grow comes last
        if i < len(self.blocks):
            block, address = self.blocks[i]
            self._take(address)
        elif self.expandable:
            block, address = self._grow(size)
        else:
            block, address = self._segment(size)
        rest = block - size
        least = UNIT if self.expandable or self.page == SMALL_PAGE else SMALL + 1
        if rest < least:
            return address, block
        self._put(address + size, rest)
        return address, size

    def free(self, address, size):
        if address in self.ends:
            before = self.ends[address]
            size += self._take(before)
            address = before
        if address + size in self.begins:
            size += self._take(address + size)
        self._put(address, size)

    def _grow(self, size):
        """A block at the end: what is free there, and as many pages as it lacks."""
        address = self.ends.get(self.end, self.end)
        if address < self.end:
            self._take(address)
        lacks = size - (self.end - address)
        grown = -(-lacks // self.page) * self.page
        self.end += grown
        self.reserved += grown
        return self.end - address, address

    def _segment(self, size):
        """A segment of its own, with a gap before it: no block reaches into another segment."""
        if self.page == SMALL_PAGE or size < MEDIUM:
            block = self.page
        else:
            block = -(-size // SMALL_PAGE) * SMALL_PAGE
        address = self.end + UNIT
        self.end = address + block
        self.reserved += block
        return block, address

    def _is_last(self, size, address):
        return address + size == self.end

    def _put(self, address, size):
        insort(self.blocks, (size, address))
        self.begins[address] = size
        self.ends[address + size] = address

    def _take(self, address):
        """Remove a free block; its size."""
        size = self.begins.pop(address)
        del self.ends[address + size]
        del self.blocks[bisect_left(self.blocks, (size, address))]
        return size
