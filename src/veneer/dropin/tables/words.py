"""Errors in PEFT's words: PEFT's sentence, which programs match on, comes first, and veneer's own follows in brackets.

There is one row per sentence; `dropin/wording.py` applies them. Rows of `AT_ONCE` are for what PEFT refuses when a
config is made, those of `LATER` for what it refuses when the config is used.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """An error message of veneer's, and its form in PEFT."""

    ours: str
    """A regular expression that matches the beginning of veneer's message."""
    peft: str
    """PEFT's message, with references to the groups of the regular expression."""
    also: type[Exception] | None = None
    """The class that PEFT raises, if it is not ValueError."""


AT_ONCE = (
    Row(
        r"target_modules_bd_a and target_modules_bd_b both name (.*)",
        r"Found overlapping modules in target_modules_bd lists: \1",
    ),
    Row(r"\w+\.target_parameters must be ", "`target_parameters` must be a list of strings or None.", TypeError),
    Row(r"kasa_config must be a KasaConfig", "`KasaConfig` must be a `KasaConfig`, a dict, or None.", TypeError),
    Row(
        r"wavelet_family '(.*)': use one of (.*)",
        r"Wavelet family \1 not supported. Supported wavelet families are: \2",
    ),
    Row(r"(beta|gamma) must be at least 0, not (.*)", r"`\1` must be non-negative, got \2."),
    Row(r"rho must be at least 1, not", "`rho` must be >= 1.0"),
    Row(r"tau must be at least 0 and below 1, not", "`tau` must be between 0.0 and 1.0."),
    Row(r"num_groups must be at least 1, not (.*)", r"`num_groups` should be positive, got \1."),
    Row(r"scale must be at least \S+, not (.*)", r"`scale` should be positive, got \1."),
    Row(
        r"VeloraConfig\.init_type must be .*, not (.*)",
        r"Unsupported `init_type` \1. Supported values are 'batch_average_once', 'batch_average', and 'random'.",
    ),
)

LATER = (
    Row(r"Arrow on ", "Cannot merge an active Arrow router adapter. Remove it first.", RuntimeError),
    Row(r"sparsity (\S+) on (.*?) leaves none of its", r"sparsity=\1 leaves no trainable entries on \2."),
    Row(r"init_lora_weights 'lora_ga' is for linear layers, not", "No supported layers found for LoRA-GA."),
    Row(r".* has no bias that BEFT could be merged into", "Base layer has no bias, cannot merge bias adapter."),
    Row(
        r"no LoRA layer trains both A and B",
        "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model.",
    ),
    Row(r"(\w+) recomputes the gradients inside its step", r"\1 requires a closure."),
    Row(r"a closure would recompute the gradients", "The optimizer does not support closures."),
    Row(
        r"an orthogonal start halves the rank, so it must be even, not (\d+)",
        r"Orthogonal initialization requires the LoRA rank to be even, got \1 instead.",
    ),
    Row(
        r"use_bdlora: '(.*)' is named by neither target_modules_bd_a nor",
        r"Module \1 matches neither A nor B block-diagonal patterns",
    ),
    Row(
        r"nblocks (\d+) does not divide (\d+), a size of (\w+)",
        r"The size \2 of \3 is not divisible by \1",
    ),
    Row(
        r"(?s)Target module MultiheadAttention\(.*conv, embedding, linear\.$",
        "MultiheadAttention does not support DoRA (yet), please set use_dora to False",
    ),
    Row(
        r"(?s)Target module MultiheadAttention\(.*conv, embedding, linear, param\.$",
        "Only same embed for query/key/value is supported as of now for MultiheadAttention",
    ),
    Row(
        r"Target module Embedding\(.*modules are supported: conv, linear\.$",
        "lora_bias=True is not supported for Embedding",
    ),
    Row(
        r"(Target module .* is not supported\. Currently, only the following modules are supported: )linear\.$",
        r"\1`torch.nn.Linear`.",
    ),
    Row(
        r"rank (\d+) on '.*' must be a multiple of the (\d+) groups of this (\w+)",
        r"Targeting a \3 with groups=\2 and rank \1. Currently, support is limited to conv layers where the rank "
        r"is divisible by groups. Either choose a different rank or do not target this specific layer.",
    ),
    Row(
        r"'.*' is a (\w+) with \d+ groups, for which (\w+) has no form",
        r"\2 does not support \1 layers with groups > 1",
        NotImplementedError,
    ),
    Row(
        r"bias must be \"none\", \"all\" or", "bias must be one of none, all and the method's own", NotImplementedError
    ),
    Row(
        r"KaSA drops r = (\d+) singular values and leaves none of a weight (\(.*\))",
        r"KaSA requires `r` (\1) to be smaller than min(in_features, out_features), got \2",
    ),
    Row(
        r"MiCA of rank (\d+) needs a weight of at least that rank, not (\(.*\))",
        r"MiCA requires `r` <= min(in_features, out_features), but got r=\1 and \2",
    ),
    Row(
        r"vector_length (\d+) on '.*' must divide in = (\d+) and out = (\d+)",
        r"`in_features` \2 must be divisible by `vector_length` \1, and so must `out_features` \3 must be divisible by "
        r"`vector_length` \1",
    ),
    Row(
        r"block_size (\d+) on '.*' must divide its in = (\d+)",
        r"The block size should be a factor of the input size. However, the input size is \2 and the block size is \1",
    ),
    Row(
        r"block_size (\d+) on '.*' must divide its out = (\d+)",
        r"The block size should be a factor of the output size. However, the output size is \2 and the block size is "
        r"\1",
    ),
    Row(
        r"n_frequency on '.*' must lie between 1 and in x out = (\d+), not (0|-\d+)$",
        r"`n_frequency` should be a positive integer value but the value passed is \2",
    ),
    Row(
        r"n_frequency on '.*' must lie between 1 and in x out = (\d+), not (\d+)",
        r"`n_frequency` should be less than or equal to the product of the input and output dimensions but the value "
        r"passed is \2 and the product is \1",
    ),
    Row(
        r"group_size (\d+) on '.*' must divide its out = \d+",
        r"The out_features of the base layer must be divisible by group_size (\1) when using RoadLayer.",
    ),
    Row(
        r"gralora_k = (\d+) on '.*' must divide its in = (\d+) and out = (\d+)",
        r"in_features should be divisible by gralora_k, but got \2 and \1; out_features should be divisible by "
        r"gralora_k, but got \3 and \1",
    ),
    Row(
        r"r = (\d+) on '.*' must be at most the smaller of (\(.*\))",
        r"`r` (\1) must be less than or equal to min(in_features, out_features) \2",
    ),
    Row(
        r"r = (\d+) on '.*' must (?:be at most its in = (\d+)|divide its in = (\d+) and out)",
        r"`r` (\1) must be less than or equal to in_features (\2\3)",
    ),
    Row(
        r"'.*' has no bias that BEFT could be merged into",
        "Base layer has no bias, cannot merge bias adapter",
    ),
    Row(
        r"target_parameters: the weight of '(.*)' is already adapted by target_modules",
        r"Trying to wrap an `nn.Parameter` of layer '\1', which is not a valid target.",
    ),
    Row(
        r"target_parameters: '.*' is a \w+; put the module into target_modules",
        "all adapters must target the same set of parameters",
    ),
    Row(
        r"(?s)target_rank = (\d+) cannot be given to adapter .*r=(\d+)",
        r"Trying to pad the adapter to the target rank \1, but the original rank is larger (\2).",
    ),
    Row(
        r"call prepare_model_for_compiled_hotswap before compiling the model",
        "Call prepare_model_for_compiled_hotswap *before* compiling the model",
    ),
    Row(
        r"check_compiled must be 'error', 'warn' or 'ignore', not (.*)",
        r"check_compiles should be one of 'error', 'warn', or 'ignore', got \1 instead.",
    ),
    Row(
        r"the model has no LoRA adapter; load the first one before preparing to swap it",
        "No adapter layers found on the model, make sure that the adapter is loaded first.",
    ),
    Row(
        r"'.*' is \S+; intruder dimensions are defined for LoRA only",
        "The provided model is not using LoRA and is therefore not supported.",
    ),
    Row(
        r"adapter '.*' is PeftType\.(\w+), but the file is (\w+)",
        r"Incompatible PEFT types found: \1 and \2",
    ),
)
