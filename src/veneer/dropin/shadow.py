"""Additional methods of ShadowPEFT's tuner: the parts of its shadow networks, and unloading a shadow."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.detached_shadow import DetachedShadowModel, head_of, unload_shadow


class WithShadow:
    """Methods of ShadowPEFT's tuner only."""

    @property
    def shadow_backbone(self) -> dict[str, nn.Module]:
        return self._parts("shadow_backbone")

    @property
    def shadow_projection(self) -> dict[str, nn.Module]:
        return self._parts("shadow_projection")

    @property
    def shadow_head(self) -> dict[str, nn.Module]:
        """The heads of classifiers; for a language model, the shadow uses the model's own head."""
        return self._parts("shadow_head")

    @property
    def _shadow_share_embeddings(self) -> dict[str, bool]:
        return {name: network.reads_embeddings for name, network in self._networks().items()}

    def _networks(self) -> dict[str, Any]:
        """The shadow networks by adapter name."""
        return dict(self.state.shared.items())  # type: ignore[attr-defined]

    def _parts(self, attribute: str) -> dict[str, nn.Module]:
        """One part of each shadow network that has it, by adapter name."""
        parts = {}
        for name, network in self._networks().items():
            part = getattr(network, attribute, None)
            if part is not None:
                parts[name] = part["default"]
        return parts

    def _resolve_shadow_head(self, adapter_name: str) -> nn.Module | None:
        return head_of(self._networks()[adapter_name], self.model)  # type: ignore[attr-defined]

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
        """Return the shadow of an adapter, by default the active one, as a separate model."""
        return unload_shadow(self, adapter_name, copy)  # type: ignore[arg-type]
