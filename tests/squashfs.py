"""A squash file as far as its superblock goes, for stand-ins of enroot: what it holds is no file system."""

from __future__ import annotations

import struct

PAYLOAD = b"the layers of an image"


def squashfs(payload: bytes = PAYLOAD) -> bytes:
    """The superblock of squashfs 4.0, then `payload`, then what mksquashfs pads with."""
    used_bytes = 96 + len(payload)
    # 0 inodes of 1970, blocks of 2^17 bytes, gzip, one id; the tables' places are "none".
    head = struct.pack("<4s4I6H2Q", b"hsqs", 0, 0, 1 << 17, 0, 1, 17, 0, 1, 4, 0, 0, used_bytes)
    data = head + b"\xff" * 48 + payload
    return data + b"\0" * (-len(data) % 4096)
