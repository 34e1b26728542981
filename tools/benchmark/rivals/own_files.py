"""Files of a process's own, for those who overwrite blocks in place.

ext4 lets one process at a time write to a file (its inode's lock). LightMem has four shard files,
so whoever is compared with it has as many: with one, its processes would wait for each other.
"""

from __future__ import annotations

import os

from benchmark.rivals.base import Setup

SHARDS = 4  # files of LightMem and of the C++ LightMem


class OwnFiles:
    """Preallocated; the blocks of this process lie in them in turn. With more than SHARDS processes
    each has one."""

    def __init__(self, setup: Setup) -> None:
        self._shares = setup.shares
        self.count = max(1, SHARDS // setup.shares)
        self.block = setup.plan.shape.block_bytes
        mine = len(range(setup.share, setup.plan.blocks, setup.shares))
        self.slots = max(1, -(-mine // self.count))  # in each file
        self.nbytes = self.slots * self.block
        self.paths = [setup.directory / f"file-{setup.share}-{n}" for n in range(self.count)]
        self.descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in self.paths]
        for descriptor in self.descriptors:
            os.posix_fallocate(descriptor, 0, self.nbytes)

    def place(self, name: str) -> tuple[int, int]:
        """Which file, and which slot of it, by a hash of `Rival.hashes`."""
        slot, file = divmod(int(name[16:], 16) // self._shares, self.count)
        return file, slot

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
