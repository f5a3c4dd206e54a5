"""PEFT's names for what has another one here. A task needs no model class of its own: `PeftModel` serves them all."""

from ..core.config import Config as PeftConfig
from ..core.model import PeftModel

PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel

__all__ = [
    "PeftConfig",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]
