"""On which file systems a folder's times tell of everything that comes and goes in it."""

import os
import re
from pathlib import Path

_OWN = "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "tmpfs", "xfs", "zfs"
_SHARED = "beegfs", "ceph", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"

TRUE = frozenset((*_OWN, *_SHARED))
"""Kinds of file systems that change a folder's times with its content.

Not among them: FAT, whose root has no times; object stores shown as folders (fuse), whose folders' times are made up;
packed images (squashfs, iso9660), which can be made with the same times for other content.
"""

_MOUNTS = Path("/proc/self/mountinfo")


def folder_times_are_true(folder: bytes) -> bool:
    """Whether a folder lies on such a file system; False where the system (other than Linux) does not tell."""
    path = os.path.realpath(folder)
    kinds = _kinds()
    while path not in kinds and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return kinds.get(path) in TRUE


def _kinds() -> dict[bytes, str]:
    """The kind of file system at each place where one is mounted; of several at one place, the last."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return {}
    kinds: dict[bytes, str] = {}
    for line in lines:  # NUMBER PARENT DEVICE ROOT PLACE OPTIONS... - KIND SOURCE OPTIONS, blanks in octal
        mount, _, rest = line.partition(b" - ")
        place = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), mount.split(b" ")[4])
        kinds[place] = rest.split(b" ")[0].decode()
    return kinds
