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

from torch import nn

from ..errors import ConfigError

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
