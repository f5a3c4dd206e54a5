"""One or more cases for every method of the registry: what the laws and the parity tests run over."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer import BottleneckConfig, DoubleSeqBnConfig, LoraConfig, ParBnConfig, PrefixTuningConfig, SeqBnConfig
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
    siblings: dict[str, Config] = field(default_factory=dict)
    """Adapters that it reads, by name: on the model before it."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.model, self.label)))

    @property
    def config_class(self) -> type[Config]:
        return all_methods()[self.method]

    @property
    def is_prompt(self) -> bool:
        """It, or a method that it unites, is a prompt."""
        return any(isinstance(member, PromptConfig) for member in self.settings.get("configs", ())) or issubclass(
            self.config_class, PromptConfig
        )

    def config(self, **more: Any) -> Config:
        settings = copy.deepcopy(self.settings) | more
        if self.needs_experts:
            settings["adapters"] = experts(self.model)
        return self.config_class(**settings)

    def build(self, name: str = "default", seed: int = 0, dtype: torch.dtype = torch.float32, moved: bool = True):
        """The case's model with its adapter on, off its start unless `moved` is false."""
        from veneer import get_peft_model

        base, config = models.build(self.model, seed, dtype), self.config()
        model = self.with_siblings(base)
        torch.manual_seed(seed + 7)
        if model is not None:
            model.add_adapter(name, config)
            model.set_adapter(name)
        else:
            model = get_peft_model(base, config, name)
        return models.perturb(model.eval(), name) if moved else model.eval()

    def with_siblings(self, base):
        """`base` with the adapters that it reads, None if there are none."""
        from veneer import get_peft_model

        model = None
        torch.manual_seed(5)
        for i, (name, config) in enumerate(self.siblings.items()):
            if model is None:
                model = get_peft_model(base, config, name)
            else:
                model.add_adapter(name, config)
            models.perturb(model, name, 20 + i, 0.3)
        return model

    def load(self, directory, name: str = "default", base=None, **kwargs):
        """The case's model with a saved adapter on."""
        from veneer import PeftModel

        base = models.build(self.model) if base is None else base
        model = self.with_siblings(base)
        if model is None:
            return PeftModel.from_pretrained(base, directory, name, **kwargs)
        model.load_adapter(directory, name, **kwargs)
        model.set_adapter(name)
        return model.eval()

    def inputs(self, **kwargs: Any) -> dict:
        return models.inputs(self.model, **kwargs)


_EXPERTS: dict[str, dict[str, str]] = {}


def experts(model: str) -> dict[str, str]:
    """Directories of two trained LoRA adapters for a model."""
    import tempfile

    from veneer import get_peft_model

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


DOWN_BN = DoubleSeqBnConfig(reduction_factor=7, target_modules=["down_proj"])
GPT2_BN = BottleneckConfig(reduction_factor=7, target_modules=["c_fc"])
PREFIX = PrefixTuningConfig(num_virtual_tokens=3)

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
    Case(
        "bottleneck",
        "gpt2",
        dict(placement="houlsby", reduction_factor=4, ln_before=True, ln_after=True, scaling="learned"),
        "norms",
    ),
    Case("seq_bn", "llama", dict(reduction_factor=4)),
    Case("seq_bn", "t5", dict(reduction_factor=4)),
    Case("double_seq_bn", "gpt2", dict(reduction_factor=4)),
    Case("double_seq_bn", "t5", dict(reduction_factor=7, non_linearity="tanh")),
    Case("par_bn", "llama", dict(scaling="learned")),
    Case("par_bn", "gpt2", dict(target_modules=["c_fc", "mlp.c_proj"], input_modules=["c_fc"]), "tapped"),
    Case("adapter_plus", "llama", dict(stochastic_depth=0.0), noop=False),
    Case("compacter", "llama", dict(phm_dim=5, phm_rank=2, reduction_factor=3, phm_init_range=0.5)),
    Case(
        "compacter",
        "gpt2",
        dict(phm_dim=3, reduction_factor=5, shared_phm_rule=False, factorized_phm_rule=True, phm_c_init="uniform"),
        "own-rules",
    ),
    Case("compacter", "llama", dict(phm_dim=3, reduction_factor=5, learn_phm=False, phm_init_range=0.5), "fixed-rules"),
    Case("compacter_plus_plus", "t5", dict(phm_dim=5, reduction_factor=6, phm_init_range=0.5)),
    Case("seq_bn_inv", "llama", dict(reduction_factor=7)),
    Case("seq_bn_inv", "gpt2", dict(reduction_factor=7, inv_adapter="glow"), "glow"),
    Case("seq_bn_inv", "t5", dict(reduction_factor=7, inv_adapter="glow")),
    Case("double_seq_bn_inv", "llama", dict(reduction_factor=7, inv_adapter_reduction_factor=3)),
    Case("union", "llama", dict(configs=[LoraConfig(r=4, target_modules=LINEARS), SeqBnConfig(), DOWN_BN])),
    Case("union", "t5", dict(configs=[dict(peft_type="LORA", r=3), dict(peft_type="COMPACTER", phm_dim=5)])),
    Case(
        "fusion",
        "llama",
        dict(adapter_names=["one", "two"]),
        noop=False,
        siblings=dict(one=SeqBnConfig(), two=SeqBnConfig(reduction_factor=7)),
    ),
    Case(
        "fusion",
        "gpt2",
        dict(adapter_names=["one", "two", "three"], value=False),
        noop=False,
        siblings=dict(
            one=LoraConfig(r=3, target_modules=["c_fc"]),
            two=LoraConfig(r=3, target_modules=["mlp.c_proj", "c_fc"]),
            three=GPT2_BN,
        ),
    ),
    Case("loreft", "llama", dict(r=4, dropout=0.0)),
    Case(
        "loreft",
        "gpt2",
        dict(
            r=3,
            layers=[1],
            prefix_positions=0,
            suffix_positions=2,
            non_linearity="tanh",
            target_modules=["mlp"],
            init_weights=False,
        ),
        "suffix",
        noop=False,
    ),
    Case("loreft", "t5", dict(r=3, prefix_positions=2, suffix_positions=2, tied_weights=True)),
    Case(
        "noreft",
        "llama",
        dict(r=4, dropout=0.0, prefix_positions=1, suffix_positions=2, init_weights=False),
        noop=False,
    ),
    Case("direft", "gpt2", dict(r=4, prefix_positions="all")),
    Case("prefix_tuning", "llama", dict(num_virtual_tokens=3, task_type="CAUSAL_LM"), noop=False),
    Case(
        "prefix_tuning",
        "gpt2",
        dict(num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=11),
        "projection",
        noop=False,
    ),
    Case("prefix_tuning", "t5", dict(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), noop=False),
    Case("mam", "llama", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("mam", "gpt2", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("mam", "t5", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "llama", dict(configs=[LoraConfig(r=4), PREFIX, SeqBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "gpt2", dict(configs=[LoraConfig(r=4), PREFIX, DoubleSeqBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "t5", dict(configs=[LoraConfig(r=4), PREFIX]), noop=False),
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
