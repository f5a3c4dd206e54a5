"""Eighty megabytes of header: parsed, it would take several times as much."""

import struct

from _common import WEIGHTS, adapter, load, refused

home = adapter()
entries = ",".join(f'"k{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_400_000))
head = ("{" + entries + "}").encode()
(home / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head)
refused(lambda: load(home), seconds=10)
