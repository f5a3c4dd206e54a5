"""PEFT's errors and warnings about configs, in its words, which programs match on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

from ...core.config import default_of
from ...errors import ConfigError


class Rule(NamedTuple):
    """A message about configs."""

    kinds: str
    """The methods it applies to, separated by spaces; "" means all."""
    when: Callable[[Any], Any]
    """Whether it applies to a config. TypeError, from a value of another type than expected, means no."""
    words: str
    """The message, with the config's fields as placeholders."""


def restricts_pattern(config: Any, field: str) -> bool:
    """Whether a field that selects layers is set although the targets are a regular expression."""
    targets = getattr(config, "target_modules", None)
    is_pattern = isinstance(targets, str) and targets != "all-linear"
    return is_pattern and getattr(config, field, None) is not None


def has_untargeted_feedforward(config: Any) -> bool:
    """Whether `feedforward_modules` has entries that `target_modules` lacks."""
    targets = config.target_modules
    feedforward = config.feedforward_modules
    if not (isinstance(targets, (list, set, tuple)) and isinstance(feedforward, (list, set, tuple))):
        return False
    return bool(targets) and not set(feedforward) <= set(targets)


def is_changed(config: Any, name: str) -> bool:
    """Whether a field has a value other than its default."""
    field = next(field for field in fields(config) if field.name == name)
    return getattr(config, name) != default_of(field)


def is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


TEXT = "PROMPT_TUNING MULTITASK_PROMPT_TUNING"
"""The methods that can start from a text."""
MUTATING = ("pissa", "olora", "corda")
"""Initialisations that change the base weights in PEFT."""
SAVES_PROJECTION = (
    "Specified to not save {0} within the state dictionary, instead they will be restored using the PRNG key store in "
    "`config.projection_prng_key`. Consider setting `config.save_projection` to `True` to guarantee restoring the "
    "checkpoint correctly on all system configurations."
)

REFUSED = (
    Rule(
        "",
        lambda c: restricts_pattern(c, "layers_to_transform"),
        "`layers_to_transform` cannot be used when `target_modules` is a str.",
    ),
    Rule(
        "",
        lambda c: restricts_pattern(c, "layers_pattern"),
        "`layers_pattern` cannot be used when `target_modules` is a str.",
    ),
    Rule(
        "",
        lambda c: getattr(c, "layers_pattern", None) and c.layers_to_transform is None,
        "When `layers_pattern` is specified, `layers_to_transform` must also be specified. ",
    ),
    Rule("IA3", has_untargeted_feedforward, "`feedforward_modules` should be a subset of `target_modules`"),
    Rule("ADALORA", lambda c: c.use_dora, "PeftType.ADALORA does not support DoRA."),
    Rule("ADALORA", lambda c: c.loftq_config, "PeftType.ADALORA does not support LOFTQ."),
    Rule(
        "ADALORA",
        lambda c: not is_positive(c.total_step),
        "AdaLoRA does not work when `total_step` is None, supply a value > 0.",
    ),
    Rule(
        "ADALORA",
        lambda c: c.orth_reg_weight < 0,
        "`orth_reg_weight` should be greater than or equal to 0, but the value passed is {orth_reg_weight}",
    ),
    Rule(
        "ADALORA",
        lambda c: c.tinit >= c.total_step - c.tfinal,
        "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
        "`total_step`.",
    ),
    Rule(
        "ADAMSS",
        lambda c: c.use_asa and c.mask_interval <= 0,
        "`mask_interval` must be a positive integer when `use_asa=True`, got {mask_interval}.",
    ),
    Rule(
        "ADAMSS",
        lambda c: c.use_asa and c.init_warmup >= c.final_warmup,
        "`init_warmup` must be smaller than `final_warmup` when `use_asa=True` so that ASA has a non-empty pruning "
        "ramp, got init_warmup={init_warmup} and final_warmup={final_warmup}.",
    ),
    Rule(
        "ADAMSS",
        lambda c: c.use_asa and c.asa_target_subspaces <= 0,
        "`asa_target_subspaces` must be a positive integer when `use_asa=True`, got {asa_target_subspaces}.",
    ),
    Rule(
        "ADAMSS",
        lambda c: c.use_asa and c.asa_schedule_exponent <= 0,
        "`asa_schedule_exponent` must be a positive number when `use_asa=True`, got {asa_schedule_exponent}.",
    ),
    Rule("CPT", lambda c: c.task_type != "CAUSAL_LM", "CPTConfig only supports task_type = CAUSAL_LM."),
    Rule("DELORA PSOFT", lambda c: not is_positive(c.r), "`r` must be a positive integer; got {r}."),
    Rule(
        "GRALORA",
        lambda c: not is_positive(c.gralora_k),
        "`gralora_k` should be a positive integer value but the value passed is {gralora_k}",
    ),
    Rule("GRALORA", lambda c: c.r % c.gralora_k, "r should be divisible by gralora_k, but got {r} and {gralora_k}"),
    Rule("LILY", lambda c: c.stride_A < 1, "`stride_A` must be at least 1."),
    Rule("LILY", lambda c: c.num_B < 2, "`num_B` must be at least 2 for the router to be trained."),
    Rule(
        "LORA",
        lambda c: c.use_dora and c.megatron_config,
        "DoRA does not support megatron_core, please set `use_dora=False`.",
    ),
    Rule(
        "LORA",
        lambda c: c.init_lora_weights == "loftq" and not c.loftq_config,
        "`loftq_config` must be specified when `init_lora_weights` is 'loftq'.",
    ),
    Rule(
        "LORA",
        lambda c: c.lora_bias and c.init_lora_weights not in (True, False),
        "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
        "init_lora_weights={init_lora_weights} instead.",
    ),
    Rule(
        "LORA",
        lambda c: c.lora_bias and c.use_dora,
        "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False",
    ),
    Rule("PEANUT", lambda c: not is_positive(c.r), "`r` must be a positive integer."),
    Rule("PEANUT", lambda c: c.depth < 0, "`depth` can only be a non-negative integer."),
    Rule(
        TEXT,
        lambda c: c.prompt_tuning_init == "TEXT" and not c.tokenizer_name_or_path,
        "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {tokenizer_name_or_path}.",
    ),
    Rule(
        TEXT,
        lambda c: c.prompt_tuning_init == "TEXT" and c.prompt_tuning_init_text is None,
        "When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be {prompt_tuning_init_text}.",
    ),
    Rule(
        TEXT,
        lambda c: c.tokenizer_kwargs and c.prompt_tuning_init != "TEXT",
        "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.",
    ),
    Rule(
        "PSOFT",
        lambda c: c.use_cayley_neumann and not is_positive(c.num_cayley_neumann_terms),
        "`num_cayley_neumann_terms` must be a positive integer; got {num_cayley_neumann_terms}.",
    ),
    Rule(
        "PSOFT",
        lambda c: c.use_cayley_neumann and c.cayley_neumann_eps is not None and not 0 < c.cayley_neumann_eps < 1,
        "`cayley_neumann_eps` must be in (0, 1) when set; got {cayley_neumann_eps}.",
    ),
    Rule(
        "ROAD",
        lambda c: c.group_size % 2,
        "The group_size must be divisible by 2 when using RoadLayer, but got {group_size}.",
    ),
    Rule("SUPERTUNING", lambda c: not 0 <= c.sparsity < 1, "sparsity must be in [0.0, 1.0), got {sparsity}"),
    Rule(
        "SUPERTUNING",
        lambda c: c.r is not None and not is_positive(c.r),
        "r must be a positive integer or None, got {r!r}",
    ),
    Rule(
        "SUPERTUNING",
        lambda c: c.lora_alpha is not None and c.r is None,
        "lora_alpha is set but r is None — Supra mode requires an explicit r.",
    ),
    Rule(
        "TINYLORA", lambda c: not is_positive(c.r), "`r` should be a positive integer value but the value passed is {r}"
    ),
    Rule(
        "TINYLORA", lambda c: not is_positive(c.u), "`u` should be a positive integer value but the value passed is {u}"
    ),
    Rule("UNILORA", lambda c: not is_positive(c.r), "`r` should be a positive integer, got {r}."),
    Rule(
        "UNILORA",
        lambda c: not is_positive(c.theta_d_length),
        "`theta_d_length` should be a positive integer, got {theta_d_length}.",
    ),
)
"""What PEFT refuses, in PEFT's order: the first rule that applies is raised."""

WARNED = (
    Rule(
        "ADALORA",
        lambda c: c.r != 8,
        "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, use "
        "`init_r` instead.",
    ),
    Rule(
        "LORA",
        lambda c: c.alora_invocation_tokens is not None and c.task_type != "CAUSAL_LM",
        "aLoRA is currently only supported for CAUSAL_LM task.",
    ),
    Rule(
        "LORA",
        lambda c: (
            c.use_rslora and (c.rank_pattern or c.alpha_pattern) and str(c.init_lora_weights).startswith(MUTATING)
        ),
        "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified base "
        "weights PiSSA/CorDA/OLoRA to LoRA is not supported. Please ensure not to pass "
        "`path_initial_model_for_weight_conversion` when saving the model.",
    ),
    Rule(
        "LORA",
        lambda c: c.loftq_config and c.init_lora_weights != "loftq",
        "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.",
    ),
    Rule(
        "LORA",
        lambda c: c.init_lora_weights == "eva" and c.eva_config is None,
        "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.",
    ),
    Rule(
        "LORA",
        lambda c: c.init_lora_weights != "eva" and c.eva_config is not None,
        "`eva_config` specified but will be ignored when `init_lora_weights` is not 'eva'.",
    ),
    Rule(
        "LORA",
        lambda c: c.init_lora_weights == "corda" and c.corda_config is None,
        "`init_lora_weights` is 'corda' but `corda_config` is not specified. Using default CorDA config.",
    ),
    Rule(
        "LORA",
        lambda c: c.init_lora_weights != "corda" and c.corda_config is not None,
        "`corda_config` specified but will be ignored when `init_lora_weights` is not 'corda'.",
    ),
    Rule(
        "PSOFT",
        lambda c: c.psoft_svd != "lowrank" and is_changed(c, "psoft_svd_lowrank_niter"),
        "`psoft_svd_lowrank_niter` is only used when `psoft_svd='lowrank'`. Got psoft_svd={psoft_svd!r}, so "
        "psoft_svd_lowrank_niter={psoft_svd_lowrank_niter} will be ignored.",
    ),
    Rule(
        "PSOFT",
        lambda c: not c.use_cayley_neumann and is_changed(c, "num_cayley_neumann_terms"),
        "`num_cayley_neumann_terms` is only used when `use_cayley_neumann=True`. Since `use_cayley_neumann=False`, "
        "`num_cayley_neumann_terms={num_cayley_neumann_terms}` will be ignored.",
    ),
    Rule(
        "PSOFT",
        lambda c: not c.use_cayley_neumann and c.cayley_neumann_eps is not None,
        "`cayley_neumann_eps` is only used when `use_cayley_neumann=True`. Since `use_cayley_neumann=False`, "
        "`cayley_neumann_eps={cayley_neumann_eps}` will be ignored.",
    ),
    Rule("PVERA", lambda c: not c.save_projection, SAVES_PROJECTION.format("pvera_A and pvera_B")),
    Rule("RANDLORA", lambda c: not c.save_projection, SAVES_PROJECTION.format("basis_A and basis_B")),
    Rule("VERA", lambda c: not c.save_projection, SAVES_PROJECTION.format("vera_A and vera_B")),
)
"""What PEFT warns of: every rule that applies."""


class Shared(NamedTuple):
    """A field that must have the same value in all adapters of one method on a model."""

    kind: str
    field: str
    words: str


SAVED = "{0} must be saved for all adapters or none, but got multiple different values: {{values}}"
KEY = "{0} must be the same for all adapters. Got config.projection_prng_key={{new}} but previous config had {{old}}."

MUST_AGREE = (
    Shared("VERA", "projection_prng_key", KEY.format("Vera PRNG initialisation key")),
    Shared("PVERA", "projection_prng_key", KEY.format("PVeRA PRNG initialisation key")),
    Shared("RANDLORA", "projection_prng_key", KEY.format("RandLora PRNG initialisation key")),
    Shared("FROD", "projection_prng_key", KEY.format("FRoD projection initialization key")),
    Shared("VERA", "save_projection", SAVED.format("VeRA projection weights")),
    Shared("PVERA", "save_projection", SAVED.format("PVeRA projection weights")),
    Shared("RANDLORA", "save_projection", SAVED.format("RandLora projection weights")),
    Shared("FROD", "save_projection", SAVED.format("FRoD projection weights")),
    Shared("SUPERTUNING", "save_precomputed_indices", SAVED.format("Super-Tuning indices")),
    Shared(
        "FROD",
        "runtime_offload_base_weight",
        "FRoD runtime base-weight offloading must be enabled for all adapters or none, but got multiple different "
        "values: {values}",
    ),
)
"""The fields that PEFT compares with those of the adapters already on the model."""


def check_beside(config: Any, others: Iterable[Any]) -> None:
    """Raise ConfigError if PEFT refuses an adapter because of the adapters already on the model."""
    same_kind = [other for other in others if other.peft_type == config.peft_type]
    if not same_kind:
        return
    for kind, field, words in MUST_AGREE:
        if config.peft_type != kind:
            continue
        new = getattr(config, field)
        old = getattr(same_kind[0], field)
        if new != old:
            raise ConfigError(words.format(new=new, old=old, values=sorted([new, old])))
    uses_kasa = {getattr(c, "kasa_config", None) is not None for c in (config, *same_kind)}
    if len(uses_kasa) > 1:
        raise ConfigError("KaSA cannot be combined with adapters that don't use KaSA, in PEFT; veneer's own API does.")


def check_as_peft(config: Any) -> None:
    """Raise or warn as PEFT does when a config is made."""
    for words in _messages(REFUSED, config):
        raise ConfigError(words)
    for words in _messages(WARNED, config):
        warnings.warn(words, stacklevel=5)


def _messages(rules: tuple[Rule, ...], config: Any) -> Iterator[str]:
    """The messages of the rules that apply to a config."""
    kind = getattr(config.peft_type, "value", None)
    for rule in rules:
        is_for_kind = not rule.kinds or kind in rule.kinds.split()
        if is_for_kind and _applies(rule, config):
            yield rule.words.format(**vars(config))


def _applies(rule: Rule, config: Any) -> bool:
    try:
        return bool(rule.when(config))
    except TypeError:
        return False
