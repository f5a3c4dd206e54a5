"""PEFT's dict of buffers: tensors that move and are saved with a module but are not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from .slots import TensorSlot


class BufferDict(MutableMapping[str, Tensor], nn.Module):
    """Buffers by name; `persistent` puts them into state dicts."""

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False) -> None:
        nn.Module.__init__(self)
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def update(self, buffers: Any) -> None:  # type: ignore[override]
        for key, buffer in dict(buffers).items():
            self[key] = buffer

    def extra_repr(self) -> str:
        lines = []
        for name, buffer in self.items():
            shape = tuple(buffer.shape)
            lines.append(f"  ({name}): Buffer of {shape} ({buffer.dtype})")
        return "\n".join(lines)


BufferDict.register(TensorSlot)
