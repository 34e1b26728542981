"""A file system of some MiB, for what happens when it is full."""

from __future__ import annotations

from pathlib import Path


def small_disk(directory: Path) -> list[str]:
    """A command that runs another one with a tmpfs of 16 MiB in `directory`, for it alone."""
    mount = f"mount -t tmpfs -o size=16m,mode=700 none '{directory}' && exec \"$@\""
    return ["unshare", "-m", "sh", "-c", mount, "sh"]


# For scripts of `Child` that run on it: takes all the room that there is, or all but some.
FILL = """
def fill(directory, spare=0):
    with open(directory + "/filler", "wb", buffering=0) as filler:
        for size in (65536, 4096):
            try:
                while True: filler.write(bytes(size))
            except OSError:
                pass
        if spare: os.truncate(filler.fileno(), filler.seek(0, 2) - spare)
def unfill(directory):
    os.unlink(directory + "/filler")
def free(directory):
    return os.statvfs(directory).f_bavail * 4096
"""
