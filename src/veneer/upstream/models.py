"""transformers' model classes: the task of a class, untied embeddings, and recognising modules by class."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError

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
    """The task type of a transformers class, from its name. Saved prompts need one, or PEFT ignores them."""
    for ending, task in TASKS.items():
        if type(model).__name__.endswith(ending):
            return task
    raise ConfigError(f"the task of {type(model).__name__} is unknown; set task_type in the config")


POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""What model configs call the length of a sequence that the model was made for."""
AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "ibert", "esm", "mpnet")
"""Model types that count positions from the padding token's id, so that the first positions are not used."""


def positions_of(config: Any) -> int | None:
    """How many tokens a sequence may have, by a model's config; None if it sets no limit."""
    text = config.get_text_config()
    for name in POSITIONS:
        positions = getattr(text, name, None)
        if isinstance(positions, int) and positions > 0:
            if text.model_type in AFTER_PADDING:
                positions -= (text.pad_token_id or 0) + 1
            return positions
    return None


def note_untied(model: Any) -> None:
    """Record in the config that embeddings are untied, if they were tied before; else a reload would tie them again."""
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


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is stored as (in, out).

    It is recognised by its name, to avoid importing transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_from(module: nn.Module, place: str) -> bool:
    """Whether a module's class is defined in the module `place` of transformers, such as "activations"."""
    return type(module).__module__ == f"transformers.{place}"
