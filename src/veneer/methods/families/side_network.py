"""Small networks that run in parallel to a model: built from its config, or read from a directory."""

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
"""Other names of a config field in some architectures."""
PROJECTED = "causal_lm_with_hidden_projection"
"""The model type of a network that is saved with a projection."""


def config_of(block: nn.Module) -> Any:
    """The config of the transformers model that a block belongs to; None if no module holds one."""
    for module in block.modules():
        if hasattr(module, "config"):
            return module.config
    return None


def mirror(config: Any, sizes: Mapping[str, int | None]) -> Any:
    """Build a new network of the same architecture in other sizes.

    A size of None keeps the config's value, except that the number of layers becomes one.

    Raises:
        ConfigError: the config has no such size, or no network can be built from it alone.
    """
    from transformers import AutoModel

    new_sizes = dict(sizes)
    new_sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
    try:
        small = _small(config, new_sizes)
        # On the CPU even when adapters are built on the meta device: buffers such as position tables are in no file.
        with torch.device("cpu"):
            return AutoModel.from_config(small)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"no small copy of a model can be built from its {type(config).__name__} ({type(error).__name__}: "
            f"{reason}); give the directory of a model to be the shadow, shadow_model"
        ) from error


def _small(config: Any, sizes: Mapping[str, int | None]) -> Any:
    """A copy of a config in other sizes; None keeps its own."""
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    for name, size in sizes.items():
        if size is not None:
            _resize(config, name, size)
    if getattr(config, "layer_types", None):
        n = config.num_hidden_layers
        types = list(config.layer_types)
        config.layer_types = types[:n] + types[-1:] * (n - len(types))
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, config.num_hidden_layers)
    return config


def _resize(config: Any, name: str, size: int) -> None:
    """Set a size under the name that this config uses for it."""
    for known in (name, *OTHER_NAMES.get(name, ())):
        if hasattr(config, known):
            setattr(config, known, size)
            return
    raise ConfigError(f"{type(config).__name__} has no {name} to set to {size}")


def saved(directory: str) -> tuple[Any, nn.Module | None]:
    """Load a network from a directory, with its projection to the width of a larger model, if it has one."""
    from transformers import AutoConfig, AutoModel

    path = Path(directory)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"there is no directory {directory!r} with a transformers model; download one first")
    content = json.loads(config_file.read_text(encoding="utf-8"))
    with torch.device("cpu"):
        if content.get("model_type") != PROJECTED:
            return AutoModel.from_pretrained(path, dtype=torch.float32), None
        inner = dict(content["shadow_model_config"])
        inner_config = AutoConfig.for_model(inner.pop("model_type"), **inner)
        return _projected(path, AutoModel.from_config(inner_config))


def _projected(path: Path, network: Any) -> tuple[Any, nn.Module]:
    """Load the weights of a network and its projection."""
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    W = tensors.get("shadow_hidden_projection.weight")
    if W is None:
        raise CheckpointError(f"{str(path)!r} holds no shadow_hidden_projection.weight")
    prefix = "shadow_model."
    weights = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            weights[key.removeprefix(prefix)] = tensor
    network.load_state_dict(weights)
    projection = nn.Linear(W.shape[1], W.shape[0], bias=False)
    projection.load_state_dict({"weight": W})
    return network, projection


def freeze_(module: nn.Module) -> nn.Module:
    """Turn parameters into buffers, which are still saved but not trained."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
    return module


def last_position(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state of each row's last token that is not padding: (batch, length, width) -> (batch, width)."""
    if mask is None:
        return states[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device) * mask.ne(0)
    rows = torch.arange(len(states), device=states.device)
    return states[rows, places.argmax(-1)]


def language_loss(head: Any, states: Tensor, labels: Tensor) -> Tensor:
    """The next-token loss of hidden states (batch, length, width) under a language model's head."""
    states = states[:, :-1].to(head.weight.dtype)
    next_tokens = labels[:, 1:]
    logits = head(states).float()
    return F.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), ignore_index=-100)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a transformers sequence classifier: regression, single-label or multi-label."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.view(-1).to(logits))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
    return F.cross_entropy(logits, labels.view(-1))
