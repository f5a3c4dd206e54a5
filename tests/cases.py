"""One or more cases for every method of the registry: what the laws and the parity tests run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.core.config import Config, PromptConfig, all_methods

from . import models

LINEARS = ["q_proj", "k_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A method with settings on a model."""

    method: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    noop: bool = True
    """It starts as a no-op with these settings."""
    needs_experts: bool = False
    facts: dict[str, list[int]] = field(default_factory=dict)
    """Arguments of a call that belong to the adapter, as entries for rows in turn."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.model, self.label)))

    @property
    def config_class(self) -> type[Config]:
        return all_methods()[self.method]

    @property
    def is_prompt(self) -> bool:
        return issubclass(self.config_class, PromptConfig)

    def config(self, **more: Any) -> Config:
        settings = dict(self.settings) | more
        if self.needs_experts:
            settings["adapters"] = experts(self.model)
        return self.config_class(**settings)

    def build(self, name: str = "default", seed: int = 0, dtype: torch.dtype = torch.float32, moved: bool = True):
        """The case's model with its adapter on, off its start unless `moved` is false."""
        from veneer import get_peft_model

        base, config = models.build(self.model, seed, dtype), self.config()
        torch.manual_seed(seed + 7)
        model = get_peft_model(base, config, name).eval()
        return models.perturb(model, name) if moved else model

    def inputs(self, **kwargs: Any) -> dict:
        batch = models.inputs(self.model, **kwargs)
        return batch | self.of_call(len(next(iter(batch.values()))))

    def of_call(self, rows: int = 3) -> dict[str, torch.Tensor]:
        """The adapter's own arguments of a call with so many rows."""
        return {name: torch.tensor(of_rows * rows)[:rows] for name, of_rows in self.facts.items()}


_EXPERTS: dict[str, dict[str, str]] = {}


def experts(model: str) -> dict[str, str]:
    """Directories of two trained LoRA adapters for a model."""
    import tempfile

    from veneer import LoraConfig, get_peft_model

    if model not in _EXPERTS:
        root = Path(tempfile.mkdtemp(prefix="veneer-experts-"))
        for i, target in enumerate((["q_proj", "down_proj"], ["q_proj", "v_proj"])):
            adapted = get_peft_model(
                models.build(model),
                LoraConfig(r=3, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM"),
            )
            models.perturb(adapted, seed=i).save_pretrained(root / str(i))
        _EXPERTS[model] = {"0": str(root / "0"), "1": str(root / "1")}
    return _EXPERTS[model]


CASES = [
    Case("lora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS)),
    Case("lora", "gpt2", dict(r=4, lora_alpha=7, target_modules=["c_attn", "mlp.c_proj"], use_rslora=True), "rslora"),
    Case("lora", "gpt2", dict(r=4, target_modules=["wte", "c_fc"]), "embedding"),
    Case("lora", "conv", dict(r=4, lora_alpha=7, target_modules=["first", "second", "third", "head"])),
    Case("lora", "grouped", dict(r=4, target_modules=["conv"])),
    Case("lora", "dilated", dict(r=4, target_modules=["conv"])),
    Case("lora", "volume", dict(r=4, target_modules=["conv"])),
    Case("lora", "llama", dict(r=4, target_modules=LINEARS, init_lora_weights="pissa"), "pissa"),
    Case("lora", "llama", dict(r=4, target_modules=LINEARS, init_lora_weights="gaussian"), "gaussian"),
    Case(
        "lora",
        "llama",
        dict(r=4, target_modules=LINEARS, bias="lora_only", modules_to_save=["lm_head"]),
        "bias-and-head",
    ),
    Case("lora", "gpt2", dict(r=4, target_modules=["c_attn"], bias="all"), "all-biases"),
    Case("lora", "t5", dict(r=4, task_type="SEQ_2_SEQ_LM")),
    Case("dora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS)),
    Case("dora", "conv", dict(r=4, target_modules=["first", "third", "head"])),
    Case("dora", "gpt2", dict(r=4, target_modules=["wte", "c_attn"]), "embedding"),
    Case("ia3", "llama", dict(target_modules=LINEARS, feedforward_modules=["down_proj"])),
    Case("ia3", "gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    Case("ia3", "conv", dict(target_modules=["first", "second", "head"], feedforward_modules=["second", "head"])),
    Case("ia3", "grouped", dict(target_modules=["conv"], feedforward_modules=["conv"])),
    Case("hra", "llama", dict(r=4, target_modules=LINEARS)),
    Case(
        "hra", "llama", dict(r=3, target_modules=LINEARS, apply_GS=True, init_weights=False), "gram-schmidt", noop=False
    ),
    Case("hra", "conv", dict(r=4, target_modules=["first", "head"])),
    Case("hra", "conv", dict(r=4, target_modules=["third"]), "conv1d"),
    Case("oft", "llama", dict(oft_block_size=5, target_modules=LINEARS)),
    Case("oft", "llama", dict(oft_block_size=0, r=3, target_modules=["q_proj"], use_cayley_neumann=False), "exact"),
    Case(
        "oft", "llama", dict(oft_block_size=5, target_modules=["q_proj"], block_share=True, coft=True, eps=0.05), "coft"
    ),
    Case("hra", "square", dict(r=4, target_modules=["conv"])),
    Case("oft", "square", dict(oft_block_size=3, target_modules=["conv"])),
    Case("oft", "conv", dict(oft_block_size=3, target_modules=["first", "head"])),
    Case("oft", "conv", dict(oft_block_size=3, target_modules=["third"]), "conv1d"),
    Case("vera", "llama", dict(r=5, target_modules=LINEARS)),
    Case("vera", "gpt2", dict(r=5, target_modules=["c_attn", "c_fc"], save_projection=False), "unsaved"),
    Case("fourierft", "llama", dict(n_frequency=40, scaling=20.0, target_modules=LINEARS, init_weights=True)),
    Case(
        "fourierft",
        "gpt2",
        dict(n_frequency=40, n_frequency_pattern={"c_fc": 9}, target_modules=["c_attn", "c_fc"]),
        noop=False,
    ),
    Case("adalora", "llama", dict(init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5, target_modules=LINEARS)),
    Case("adalora", "gpt2", dict(init_r=4, target_r=2, total_step=20, target_modules=["c_attn"])),
    Case("ln_tuning", "llama", dict()),
    Case("ln_tuning", "gpt2", dict(target_modules=["ln_1", "ln_f"])),
    Case("trainable_tokens", "llama", dict(token_indices=[3, 11, 66])),
    Case("trainable_tokens", "gpt2", dict(token_indices=[5, 4]), "tied"),
    Case(
        "xlora",
        "llama",
        dict(xlora_depth=2, xlora_size=11, layerwise_scalings=True, task_type="CAUSAL_LM"),
        noop=False,
        needs_experts=True,
    ),
    Case("bottleneck", "llama", dict(placement="houlsby", reduction_factor=4)),
    Case("bottleneck", "gpt2", dict(placement="pfeiffer", reduction_factor=4)),
    Case("bottleneck", "llama", dict(placement="parallel", reduction_factor=4), "parallel"),
    Case(
        "bottleneck",
        "llama",
        dict(placement="parallel", reduction_factor=4, target_modules=["self_attn"]),
        "attention-block",
    ),
    Case("beft", "llama", dict(target_modules=["q_proj", "v_proj"])),
    Case("beft", "gpt2", dict(target_modules=["c_attn", "mlp.c_proj"])),
    Case("delora", "llama", dict(r=5, delora_lambda=3, target_modules=LINEARS)),
    Case(
        "delora",
        "llama",
        dict(r=5, rank_pattern={"q_proj": 3}, lambda_pattern={"down_proj": 0.7}, target_modules=LINEARS),
        "patterns",
    ),
    Case("delora", "gpt2", dict(r=5, delora_lambda=3, target_modules=["c_attn", "mlp.c_proj"])),
    Case("loha", "llama", dict(r=3, alpha=40, target_modules=LINEARS)),
    Case("loha", "gpt2", dict(r=5, alpha=40, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 3})),
    Case("loha", "conv", dict(r=3, alpha=40, target_modules=["first", "second", "third", "head"])),
    Case(
        "loha",
        "conv",
        dict(r=3, alpha=90, target_modules=["first", "second", "third", "head"], use_effective_conv2d=True),
        "effective",
    ),
    Case("loha", "grouped", dict(r=3, alpha=40, target_modules=["conv"])),
    Case("randlora", "llama", dict(r=4, randlora_alpha=6, target_modules=LINEARS)),
    Case(
        "randlora",
        "gpt2",
        dict(r=7, randlora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], save_projection=False),
        "unsaved",
    ),
    Case("randlora", "llama", dict(r=4, randlora_alpha=6, target_modules=LINEARS, sparse=True), "sparse"),
    Case("road", "llama", dict(variant="road_4", group_size=10, target_modules=["q_proj", "down_proj"])),
    Case("road", "llama", dict(variant="road_2", group_size=6, target_modules=["down_proj", "o_proj"]), "2"),
    Case("road", "llama", dict(group_size=14, target_modules=["q_proj", "k_proj"]), "1"),
    Case("p_tuning", "llama", dict(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=11), noop=False),
    Case(
        "p_tuning",
        "gpt2",
        dict(
            num_virtual_tokens=3,
            task_type="CAUSAL_LM",
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=11,
            encoder_num_layers=1,
        ),
        "lstm",
        noop=False,
    ),
    Case(
        "p_tuning",
        "t5",
        dict(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", encoder_reparameterization_type="LSTM"),
        noop=False,
    ),
    Case("cartridge", "llama", dict(num_virtual_tokens=3, task_type="CAUSAL_LM"), noop=False),
    Case("cartridge", "gpt2", dict(num_virtual_tokens=4, num_frozen_tokens=0, task_type="CAUSAL_LM"), noop=False),
    Case("cartridge", "t5", dict(num_virtual_tokens=5, num_frozen_tokens=2, task_type="SEQ_2_SEQ_LM"), noop=False),
    Case(
        "multitask_prompt_tuning",
        "llama",
        dict(num_virtual_tokens=3, num_ranks=2, task_type="CAUSAL_LM"),
        noop=False,
        facts=dict(task_ids=[0]),
    ),
    Case(
        "multitask_prompt_tuning",
        "gpt2",
        dict(num_virtual_tokens=3, num_tasks=3, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
        "tasks",
        noop=False,
        facts=dict(task_ids=[2, 0, 1]),
    ),
    Case(
        "multitask_prompt_tuning",
        "t5",
        dict(num_virtual_tokens=3, num_tasks=2, num_ranks=2, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1),
        noop=False,
        facts=dict(task_ids=[1, 0]),
    ),
    Case("adaption_prompt", "llama", dict(adapter_len=4, adapter_layers=2)),
    Case("adaption_prompt", "mistral", dict(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")),
    Case("adaption_prompt", "gpt2", dict(adapter_len=5, adapter_layers=2, target_modules="attn")),
    Case(
        "cpt",
        "llama",
        dict(cpt_token_ids=[5, 9, 30, 41, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4, 5, 8], task_type="CAUSAL_LM"),
        noop=False,
    ),
    Case(
        "cpt",
        "gpt2",
        dict(
            cpt_token_ids=[5, 9, 30, 41, 8],
            cpt_tokens_type_mask=[2, 4, 5, 6, 8],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.8,
            task_type="CAUSAL_LM",
        ),
        "decay",
        noop=False,
    ),
    Case(
        "shadow",
        "llama",
        dict(r=3, shadow_alpha=0.9, update_hidden_size=7, shadow_dropout=0.0, task_type="CAUSAL_LM"),
    ),
    Case("shadow", "gpt2", dict(r=3, shadow_alpha=0.9, shadow_num_hidden_layers=2, shadow_intermediate_size=17)),
    Case(
        "shadow",
        "llama",
        dict(r=3, shadow_alpha=0.9, shadow_hidden_size=18, target_modules=["model.layers.0"], share_embeddings=False),
        "narrow",
    ),
    Case("prefix_tuning", "llama", dict(num_virtual_tokens=3, task_type="CAUSAL_LM"), noop=False),
    Case(
        "prefix_tuning",
        "gpt2",
        dict(num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=11),
        "projection",
        noop=False,
    ),
    Case("prefix_tuning", "t5", dict(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), noop=False),
    Case("prompt_tuning", "llama", dict(num_virtual_tokens=3, task_type="CAUSAL_LM"), noop=False),
    Case(
        "prompt_tuning",
        "gpt2",
        dict(num_virtual_tokens=3, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
        "vocabulary",
        noop=False,
    ),
    Case("prompt_tuning", "t5", dict(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), noop=False),
]
LAYER_CASES = [case for case in CASES if not case.is_prompt]
ONE_EACH = list({case.method: case for case in reversed(CASES)}.values())[::-1]
"""One case for each method, for the slow laws."""


def has_fold(case: Case) -> bool:
    """Every adapter of the case has a form as a weight."""
    if case.is_prompt:
        return False
    return case.config_class.adapter.has_fold and str(case) != "lora-grouped"  # its update mixes the groups


MERGEABLE = [case for case in LAYER_CASES if has_fold(case)]
