"""What PEFT's shadow model has besides: the parts of its shadows by adapter, and a shadow on its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.detached_shadow import DetachedShadowModel, head_of, unload_shadow


class WithShadow:
    """Of the tuner of ShadowPEFT."""

    @property
    def shadow_backbone(self) -> dict[str, nn.Module]:
        return self._of("shadow_backbone")

    @property
    def shadow_projection(self) -> dict[str, nn.Module]:
        return self._of("shadow_projection")

    @property
    def shadow_head(self) -> dict[str, nn.Module]:
        """Of classifiers; a language model's own head is the shadow's too."""
        return self._of("shadow_head")

    @property
    def _shadow_share_embeddings(self) -> dict[str, bool]:
        return {name: network.reads_embeddings for name, network in self._networks().items()}

    def _networks(self) -> dict[str, Any]:
        return dict(self.state.shared.items())  # type: ignore[attr-defined]

    def _of(self, part: str) -> dict[str, nn.Module]:
        found = {name: getattr(network, part, None) for name, network in self._networks().items()}
        return {name: held["default"] for name, held in found.items() if held is not None}

    def _resolve_shadow_head(self, adapter_name: str) -> nn.Module | None:
        return head_of(self._networks()[adapter_name], self.model)  # type: ignore[attr-defined]

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
        """The shadow of an adapter, the active one's by default, as a model of its own."""
        return unload_shadow(self, adapter_name, copy)  # type: ignore[arg-type]
