"""Small networks that run beside a model: made in its image, or read from a directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CheckpointError, ConfigError

OTHER_NAMES = {"intermediate_size": ("n_inner", "ffn_dim")}
PROJECTED = "causal_lm_with_hidden_projection"


def config_of(block: nn.Module) -> Any:
    """The config of the transformers model that a block is of, None where no module keeps one."""
    return next((m.config for m in block.modules() if hasattr(m, "config")), None)


def mirror(config: Any, sizes: Mapping[str, int | None]) -> Any:
    """A new network of an architecture in other sizes: one layer, and the rest as it is, where they say nothing."""
    from transformers import AutoModel

    config = copy.deepcopy(config)
    config.dtype = torch.float32
    for name, size in {**sizes, "num_hidden_layers": sizes["num_hidden_layers"] or 1}.items():
        if size is not None:
            _resize(config, name, size)
    if getattr(config, "layer_types", None):
        n, types = config.num_hidden_layers, list(config.layer_types)
        config.layer_types = types[:n] + types[-1:] * (n - len(types))
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, config.num_hidden_layers)
    with torch.device("cpu"):  # whole even where adapters are built without memory: tables of positions are in no file
        return AutoModel.from_config(config)


def _resize(config: Any, name: str, size: int) -> None:
    found = next((n for n in (name, *OTHER_NAMES.get(name, ())) if hasattr(config, n)), None)
    if found is None:
        raise ConfigError(f"{type(config).__name__} has no {name} to set to {size}")
    setattr(config, found, size)


def saved(directory: str) -> tuple[Any, nn.Module | None]:
    """A network from a directory; with it its projection to the width of a larger model, if it has one."""
    from transformers import AutoConfig, AutoModel

    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{directory!r} is no directory of a transformers model; download one first")
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    with torch.device("cpu"):
        if content.get("model_type") != PROJECTED:
            return AutoModel.from_pretrained(path, dtype=torch.float32), None
        inner = dict(content["shadow_model_config"])
        return _projected(path, AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner)))


def _projected(path: Path, network: Any) -> tuple[Any, nn.Module]:
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    W = tensors.get("shadow_hidden_projection.weight")
    if W is None:
        raise CheckpointError(f"{str(path)!r} holds no shadow_hidden_projection.weight")
    own = {key.removeprefix("shadow_model."): t for key, t in tensors.items() if key.startswith("shadow_model.")}
    network.load_state_dict(own)
    projection = nn.Linear(W.shape[1], W.shape[0], bias=False)
    projection.load_state_dict({"weight": W})
    return network, projection


def freeze_(module: nn.Module) -> nn.Module:
    """Make buffers of the parameters: they stay in the file, and nothing trains them."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
    return module


def last_position(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state of each row's last token that is no padding: (batch, length, width) -> (batch, width)."""
    if mask is None:
        return states[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device) * mask.ne(0)
    return states[torch.arange(len(states), device=states.device), places.argmax(-1)]


def language_loss(head: Any, states: Tensor, labels: Tensor) -> Tensor:
    """What a language model's head says to states (batch, length, width) about the tokens that follow."""
    logits = head(states[:, :-1].to(head.weight.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' loss of a sequence classifier: a regression, a choice of one, or of several."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.view(-1).to(logits))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
    return F.cross_entropy(logits, labels.view(-1))
