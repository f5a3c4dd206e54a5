"""transformers' `Trainer` takes a veneer model for an adapter model: it saves and resumes as it should.

`Trainer` asks through module globals that it looks up at each call; adding our class to them is all that is needed.
A module that is not imported yet is amended when it is (importing it now would cost most of a second).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..maths.positions import prompts

MODULES = ("transformers.trainer_utils", "transformers.trainer")


def recognise(ours: type) -> None:
    """Make both modules know our model class, now or when they are imported."""
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _amend(module, ours)
        elif not any(isinstance(finder, _Watcher) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher(name, ours))


def _amend(module: ModuleType, ours: type) -> None:
    if getattr(module, "_veneer_known", False):
        return
    theirs: Any = getattr(module, "PeftModel", ())
    module.PeftModel = (*theirs, ours) if isinstance(theirs, tuple) else (theirs, ours)  # type: ignore[attr-defined]
    module.PeftMixedModel = getattr(module, "PeftMixedModel", ())  # type: ignore[attr-defined]
    module.is_peft_available = _yes  # type: ignore[attr-defined]
    module._veneer_known = True  # type: ignore[attr-defined]


def _yes() -> bool:
    return True


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, once, and amends it after it has run."""

    def __init__(self, name: str, ours: type) -> None:
        self.name, self.ours = name, ours

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Amending(spec.loader, self.ours)
        return spec


class _Amending(importlib.abc.Loader):
    def __init__(self, loader: Any, ours: type) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _amend(module, self.ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def note_untied(model: nn.Module) -> None:
    """A model whose embeddings were tied and no longer are says so in its config, or a reload would tie them again."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is embedding.weight:
        return
    config.tie_word_embeddings = text.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def task_of(model: nn.Module) -> str:
    """The task type that a transformers class is for, by its name: PEFT ignores a saved prompt that states none."""
    for ending, task in TASKS.items():
        if type(model).__name__.endswith(ending):
            return task
    raise ConfigError(f"cannot tell the task of {type(model).__name__}; set task_type in the config")


def prompts_of(model: Any, kwargs: dict[str, Any], lengths: Any = None) -> Tensor | None:
    """Where the prompts of a model call stand, as `maths.positions.prompts` says it; nowhere if a cache goes before.

    None for a call without tokens. Only the labels of a causal model end a prompt: those of others are not its tokens.
    """
    tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if tokens is None:
        return None
    cache, shape = kwargs.get("past_key_values"), tokens.shape[:2]
    if cache is not None and cache.get_seq_length() > 0:
        return torch.zeros(shape[0], 2, dtype=torch.long, device=tokens.device)
    fitting = {n: t for n, t in kwargs.items() if n in ("attention_mask", "labels") and getattr(t, "shape", 0) == shape}
    mask = fitting.get("attention_mask", torch.ones(shape, device=tokens.device))
    known = None if lengths is None else torch.as_tensor(lengths, device=tokens.device)
    return prompts(mask, fitting.get("labels") if _is_causal(model) else None, known)


def places_of(kwargs: dict[str, Any]) -> Tensor | None:
    """(rows, length): each token's index in its row, padding in front not counted, what is in the cache counted.

    None for a call without tokens.
    """
    tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if tokens is None:
        return None
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    (rows, n), past = tokens.shape[:2], cache.get_seq_length() if cache is not None else 0
    fits = getattr(mask, "shape", None) == (rows, past + n)
    start = (mask != 0).long().argmax(1, keepdim=True) if fits else 0  # type: ignore[union-attr]
    return (past + torch.arange(n, device=tokens.device)).expand(rows, n) - start


def _is_causal(model: Any) -> bool:
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and not getattr(model.config, "is_encoder_decoder", False)
