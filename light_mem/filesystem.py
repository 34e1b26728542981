"""What lies below a store: a network file system makes its locks lie."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("light_mem")

# Locks there are advisory to one machine, emulated or absent, and mapped pages are not coherent
# between machines.
NETWORK_TYPES = frozenset(
    """nfs nfs4 cifs smb3 smbfs 9p afs ceph glusterfs lustre beegfs gpfs
    fuse.sshfs fuse.glusterfs fuse.s3fs fuse.gcsfuse""".split()
)


def file_system(path: Path) -> tuple[str, str]:
    """(mount point, type) of the file system that holds `path`; type "" when unknown."""
    import psutil

    best = ("", "")
    resolved = path.resolve()
    try:
        partitions = psutil.disk_partitions(all=True)
    except OSError:  # there is no /proc
        return best
    for partition in partitions:
        mount = Path(partition.mountpoint)
        if resolved.is_relative_to(mount) and len(partition.mountpoint) >= len(best[0]):
            best = (partition.mountpoint, partition.fstype)
    return best


def warn_of_network(path: Path) -> None:
    """Log a warning when the store lies on a network file system."""
    mount, kind = file_system(path)
    if kind in NETWORK_TYPES:
        log.warning(
            "%s lies on %s (%s): locks and mappings are not coherent there. Use a local disk; one "
            "server alone may work, several will damage each other's blocks",
            path,
            kind,
            mount,
        )
