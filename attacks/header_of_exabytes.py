"""A tensor file whose first eight bytes state a header far larger than the file."""

import struct

from _common import WEIGHTS, adapter, limit_memory, load, refused

home = adapter()
content = (home / WEIGHTS).read_bytes()
(home / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + content[8:])
limit_memory(1 << 28)
refused(lambda: load(home))
