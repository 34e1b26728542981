"""Which store a process has open, whatever lies at its path by now.

A store's directory may be moved away, or removed, while servers run, and another store, or a copy
of this one, come to lie at its path. Who has files open goes on with those; whatever is opened by
the path after that has to be of the same store, or keys and slots of one would be taken for those
of the other: bytes of another block where nobody verifies them, and records that are cleared in
somebody else's store.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from light_mem.errors import StoreFormatError
from light_mem.index.members import Place


class StoreIdentity(NamedTuple):
    """A store's own number, and the directory that holds it: a copy has the same number."""

    store_id: str
    place: Place

    @classmethod
    def in_table(cls, header: np.ndarray[Any, Any]) -> StoreIdentity:
        """That of the store which the server of a task table has open."""
        device, inode = int(header["store_device"][0]), int(header["store_inode"][0])
        return cls(bytes(header["store_id"][0]).decode(), Place(device, inode))

    def put_in(self, header: np.ndarray[Any, Any]) -> None:
        """Write it into the header of a task table."""
        header["store_id"] = self.store_id.encode()
        header["store_device"], header["store_inode"] = self.place

    def require_at(self, directory: Path, store_id: str) -> None:
        """Raise StoreFormatError where another store lies at a path, whose number was read there;
        OSError where nothing does. Any thread."""
        found = StoreIdentity(store_id, Place.of(os.stat(directory)))
        if found != self:
            raise StoreFormatError(
                f"{directory} is another store by now than the one that its server has open, which "
                "was moved away or made anew",
                path=str(directory),
                field="store_id" if found.store_id != self.store_id else "directory",
                found=found.store_id,
                expected=self.store_id,
            )
