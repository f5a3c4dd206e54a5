"""One or more cases for every method of the registry: what the laws and the parity tests run over."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from veneer import (
    BottleneckConfig,
    DoubleSeqBnConfig,
    HiraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from veneer.core.config import Config, PromptConfig, all_methods

from . import models

LINEARS = ["q_proj", "k_proj", "down_proj"]
BLOCKS = dict(target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj"], nblocks=5)


@dataclass(frozen=True)
class Case:
    """A method with settings on a model."""

    method: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    noop: bool = True
    """It starts as a no-op with these settings."""
    facts: dict[str, list[int]] = field(default_factory=dict)
    """Arguments of a call that belong to the adapter: an entry for each row, over and over."""
    needs_experts: bool = False
    siblings: dict[str, Config] = field(default_factory=dict)
    """Adapters that it reads, by name: on the model before it."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.model, self.label)))

    @property
    def config_class(self) -> type[Config]:
        return all_methods()[self.method]

    @property
    def trust(self) -> dict[str, bool]:
        """What a load must be told: its file names experts that lie elsewhere."""
        return {"follow_paths": True} if self.needs_experts else {}

    @property
    def is_prompt(self) -> bool:
        """It, or a method that it unites, is a prompt."""
        return any(isinstance(member, PromptConfig) for member in self.settings.get("configs", ())) or issubclass(
            self.config_class, PromptConfig
        )

    def config(self, **more: Any) -> Config:
        settings = copy.deepcopy(self.settings) | more
        if self.needs_experts and self.method == "arrow":
            settings["arrow_config"] = dict(task_adapter_names=list(experts(self.model).values()), top_k=2)
        elif self.needs_experts:
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

        base, kwargs = models.build(self.model) if base is None else base, self.trust | kwargs
        model = self.with_siblings(base)
        if model is None:
            return PeftModel.from_pretrained(base, directory, name, **kwargs)
        model.load_adapter(directory, name, **kwargs)
        model.set_adapter(name)
        return model.eval()

    def inputs(self, rows: int = 3, **kwargs: Any) -> dict:
        return models.inputs(self.model, rows=rows, **kwargs) | self.facts_of(rows)

    def facts_of(self, rows: int) -> dict[str, torch.Tensor]:
        """The facts of a call with so many rows."""
        return {name: torch.tensor([x[i % len(x)] for i in range(rows)]) for name, x in self.facts.items()}


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
    Case("lora", "llama", dict(r=4, target_modules=LINEARS, trainable_token_indices=[3, 11]), "tokens"),
    Case("lora", "gpt2", dict(r=4, target_modules=["c_attn"], trainable_token_indices={"wte": [5, 4]}), "tied-tokens"),
    Case("lora", "gpt2", dict(r=4, target_modules=["wte", "c_attn"], ensure_weight_tying=True), "tied"),
    Case("lora", "tied", dict(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    Case(
        "lora",
        "tied",
        dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "copy",
    ),
    Case(
        "lora",
        "gpt2",
        dict(r=4, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True),
        "tied-copy",
    ),
    Case("dora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS)),
    Case("dora", "grouped", dict(r=4, target_modules=["conv"])),
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
    Case("oft", "llama", dict(oft_block_size=5, target_modules=["embed_tokens", "q_proj"]), "embedding"),
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
    Case("ln_tuning", "llama", dict(target_modules=["norm", "q_proj"]), "linear"),
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
    Case("shira", "llama", dict(r=3, target_modules=LINEARS)),
    Case("shira", "llama", dict(r=3, target_modules=LINEARS, random_seed=5), "seed"),
    Case("shira", "gpt2", dict(r=3, target_modules=["c_attn", "mlp.c_proj"])),
    Case("shira", "conv", dict(r=2, target_modules=["first", "second", "third", "head"])),
    Case("shira", "grouped", dict(r=2, target_modules=["conv"])),
    Case("supertuning", "llama", dict(sparsity=0.9, target_modules=LINEARS)),
    Case(
        "supertuning",
        "llama",
        dict(sparsity=0.9, select_top=False, r=3, target_modules=LINEARS, save_precomputed_indices=False),
        "supra",
    ),
    Case("supertuning", "gpt2", dict(sparsity=0.9, r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"])),
    Case("supertuning", "conv", dict(sparsity=0.8, r=3, target_modules=["first", "second", "third", "head"])),
    Case("supertuning", "grouped", dict(sparsity=0.5, target_modules=["conv"])),
    Case(
        "poly",
        "llama",
        dict(r=3, n_tasks=3, n_skills=5, target_modules=LINEARS, task_type="CAUSAL_LM"),
        facts={"task_ids": [2, 0, 1]},
    ),
    Case(
        "poly",
        "gpt2",
        dict(r=3, n_tasks=4, n_splits=5, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
        "multi-head",
        facts={"task_ids": [3, 3, 0]},
    ),
    Case(
        "poly",
        "t5",
        dict(r=3, n_tasks=2, n_splits=3, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"),
        "multi-head",
        facts={"task_ids": [1, 0]},
    ),
    Case("bitfit", "llama", dict()),
    Case("bitfit", "gpt2", dict()),
    Case("bitfit", "gpt2", dict(target_modules=["ln_1", "mlp.c_proj"], layers_to_transform=1), "named"),
    Case("bitfit", "conv", dict(target_modules=["first", "third", "head"])),
    Case(
        "mtl_lora",
        "llama",
        dict(r=3, n_tasks=3, temperature=0.7, target_modules=LINEARS),
        facts={"task_ids": [2, 0, 1]},
    ),
    Case(
        "mtl_lora",
        "gpt2",
        dict(r=4, n_tasks=2, n_up_projections=2, target_modules=["c_attn", "c_fc"]),
        facts={"task_ids": [1, 1, 0]},
    ),
    Case(
        "mtl_lora",
        "t5",
        dict(r=3, n_tasks=2, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"),
        facts={"task_ids": [1, 0]},
    ),
    Case(
        "lora", "mixtral", dict(r=4, lora_alpha=7, target_parameters=["experts.gate_up_proj", "down_proj"]), "experts"
    ),
    Case(
        "lora",
        "mixtral",
        dict(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"], rank_pattern={"gate.weight": 3}),
        "router",
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
    Case("hira", "llama", dict(r=5, target_modules=LINEARS)),
    Case("hira", "llama", dict(r=5, target_modules=LINEARS, rank_pattern={"k_proj": 3}), "patterns"),
    Case("hira", "llama", dict(r=5, target_modules=LINEARS, init_weights="gaussian"), "gaussian"),
    Case("hira", "gpt2", dict(r=5, target_modules=["wte", "c_attn"])),
    Case("hira", "conv", dict(r=5, target_modules=["first", "second", "third", "head"])),
    Case("hira", "dilated", dict(r=5, target_modules=["conv"])),
    Case("hira", "volume", dict(r=5, target_modules=["conv"])),
    Case("miss", "llama", dict(r=4, target_modules=LINEARS)),
    Case("miss", "llama", dict(r=4, target_modules=LINEARS, init_weights=False), "random", noop=False),
    Case("miss", "llama", dict(r=7, mini_r=5, target_modules=["o_proj", "down_proj"], init_weights="mini"), "mini"),
    Case("miss", "llama", dict(r=5, target_modules=["q_proj", "down_proj"], init_weights="bat"), "bat"),
    Case("miss", "llama", dict(r=4, target_modules=["q_proj", "down_proj"], bias="MiSS_only"), "biases"),
    Case("miss", "gpt2", dict(r=4, target_modules=["c_attn", "mlp.c_proj"])),
    Case("miss", "gpt2", dict(r=15, target_modules=["c_attn", "mlp.c_proj"], init_weights="bat"), "bat"),
    Case("pvera", "llama", dict(r=5, target_modules=LINEARS)),
    Case("pvera", "gpt2", dict(r=5, target_modules=["c_attn", "c_fc"], save_projection=False), "unsaved"),
    Case("tinylora", "llama", dict(r=3, u=7, target_modules=LINEARS)),
    Case("tinylora", "llama", dict(r=3, u=7, weight_tying=0.4, target_modules=LINEARS), "sharing"),
    Case(
        "tinylora",
        "gpt2",
        dict(r=3, u=7, target_modules=["c_attn", "mlp.c_proj"], weight_tying=1.0, save_projection=False),
        "unsaved",
    ),
    Case("tinylora", "gpt2", dict(r=3, u=7, target_modules=["wte", "c_fc"]), "embedding"),
    Case(
        "tinylora",
        "llama",
        dict(r=40, u=7, target_modules=["q_proj", "k_proj"], init_weights="uniform"),
        "full-rank",
        noop=False,
    ),
    Case(
        "vblora", "llama", dict(r=3, num_vectors=9, vector_length=5, target_modules=["q_proj", "down_proj"]), noop=False
    ),
    Case(
        "vblora",
        "gpt2",
        dict(r=3, num_vectors=9, vector_length=15, topk=3, target_modules=["c_attn", "c_fc"]),
        noop=False,
    ),
    Case(
        "vblora",
        "llama",
        dict(
            r=3,
            num_vectors=9,
            vector_length=2,
            topk=3,
            target_modules=["k_proj", "q_proj"],
            save_only_topk_weights=True,
        ),
        "chosen",
        noop=False,
    ),
    Case("unilora", "llama", dict(r=3, theta_d_length=23, target_modules=LINEARS), noop=False),
    Case("unilora", "gpt2", dict(r=3, theta_d_length=4000, target_modules=["c_attn", "c_fc"]), "long", noop=False),
    Case(
        "unilora", "llama", dict(r=3, theta_d_length=23, target_modules=LINEARS, save_indices=True), "fat", noop=False
    ),
    Case("frod", "llama", dict(sparse_rate=0.1, target_modules=LINEARS)),
    Case(
        "frod", "gpt2", dict(sparse_rate=0.1, target_modules=["c_attn", "mlp.c_proj"], save_projection=False), "unsaved"
    ),
    Case("lily", "llama", dict(r=5, num_B=3, scaling=3.0, target_modules=LINEARS)),
    Case("lily", "llama", dict(r=5, num_B=3, stride_A=2, scaling=3.0, target_modules=LINEARS), "stride"),
    Case("lily", "gpt2", dict(r=5, num_B=3, stride_A=2, scaling=3.0, target_modules=["c_attn", "mlp.c_proj"])),
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
    Case(
        "c3a",
        "llama",
        dict(block_size=5, block_size_pattern={"k_proj": 2}, target_modules=LINEARS, init_weights=True),
    ),
    Case(
        "c3a",
        "llama",
        dict(block_size=10, target_modules=["q_proj", "o_proj"], init_weights="gaussian"),
        "gaussian",
        noop=False,
    ),
    Case("c3a", "gpt2", dict(block_size=15, target_modules=["c_attn", "mlp.c_proj"]), noop=False),
    Case("deft", "llama", dict(r=4, alpha=7, target_modules=LINEARS)),
    Case("deft", "llama", dict(r=16, target_modules=LINEARS, decomposition_method="qr"), "qr"),
    Case("deft", "llama", dict(r=4, target_modules=LINEARS, decomposition_method="qr", para=True), "para", noop=False),
    Case("deft", "gpt2", dict(r=4, target_modules=["c_attn", "mlp.c_proj"])),
    Case("psoft", "llama", dict(r=11, psoft_alpha=7, target_modules=LINEARS)),
    Case(
        "psoft",
        "llama",
        dict(
            r=7,
            target_modules=LINEARS,
            ab_svd_init="pissa_init",
            psoft_svd="lowrank",
            psoft_svd_lowrank_niter=3,
            use_cayley_neumann=True,
            cayley_neumann_eps=0.3,
            psoft_mag_a=False,
        ),
        "series",
    ),
    Case("psoft", "llama", dict(r=7, target_modules=["q_proj"], psoft_orth=False, psoft_mag_b=False), "free"),
    Case("psoft", "gpt2", dict(r=11, target_modules=["c_attn", "mlp.c_proj"])),
    Case("boft", "llama", dict(boft_block_size=5, target_modules=LINEARS)),
    Case("boft", "llama", dict(boft_block_size=0, boft_block_num=5, target_modules=LINEARS), "number"),
    Case("boft", "gpt2", dict(boft_block_size=3, target_modules=["c_attn", "mlp.c_proj"])),
    Case("boft", "square", dict(boft_block_size=9, target_modules=["conv"])),
    Case("boft", "conv", dict(boft_block_size=9, target_modules=["first", "second", "third"])),
    Case("boft", "conv", dict(boft_block_size=6, boft_n_butterfly_factor=2, target_modules=["second"]), "butterfly"),
    Case("waveft", "llama", dict(n_frequency=40, scaling=5.0, target_modules=LINEARS)),
    Case(
        "waveft",
        "llama",
        dict(n_frequency=40, wavelet_family="sym5", proportional_parameters=True, target_modules=LINEARS),
        "proportional",
    ),
    Case(
        "waveft",
        "gpt2",
        dict(n_frequency=40, n_frequency_pattern={"c_fc": 9}, wavelet_family="db3", target_modules=["c_attn", "c_fc"]),
    ),
    Case("waveft", "llama", dict(n_frequency=40, wavelet_family="coif2", target_modules=["down_proj"]), "coiflet"),
    Case("waveft", "llama", dict(n_frequency=40, use_idwt=False, target_modules=LINEARS), "sparse"),
    Case("osf", "llama", dict(effective_rank=9, target_modules=LINEARS)),
    Case("osf", "llama", dict(effective_rank=0.4, rank_pattern={"k_proj": 3}, target_modules=LINEARS), "share"),
    Case("osf", "gpt2", dict(target_modules=["c_attn", "mlp.c_proj"])),
    Case("adamss", "llama", dict(r=7, num_subspaces=4, subspace_rank=2, target_modules=LINEARS)),
    Case(
        "adamss",
        "llama",
        dict(r=11, num_subspaces=3, subspace_rank=9, use_dynamic_rank=True, svd_threshold=0.5, target_modules=LINEARS),
        "dynamic",
    ),
    Case("adamss", "gpt2", dict(r=7, subspace_rank=3, random_seed=4, target_modules=["c_attn", "mlp.c_proj"])),
    Case("lokr", "llama", dict(r=2, alpha=40, target_modules=LINEARS)),
    Case("lokr", "llama", dict(r=1, alpha=9, target_modules=LINEARS, decompose_both=True), "both"),
    Case("lokr", "llama", dict(r=2, alpha=9, target_modules=LINEARS, init_weights="lycoris"), "lycoris"),
    Case("lokr", "llama", dict(r=9, alpha=40, decompose_factor=3, target_modules=LINEARS), "whole"),
    Case("lokr", "llama", dict(r=2, alpha=8, target_modules=LINEARS, init_weights=False), "random", noop=False),
    Case("lokr", "llama", dict(r=2, alpha=40, decompose_factor=15, target_modules=["o_proj", "down_proj"]), "factor"),
    Case("lokr", "llama", dict(r=2, alpha=40, target_modules=LINEARS, rank_pattern={"k_proj": 1}), "patterns"),
    Case("lokr", "gpt2", dict(r=2, alpha=40, target_modules=["c_attn", "c_fc"], alpha_pattern={"c_fc": 20})),
    Case("lokr", "conv", dict(r=1, alpha=60, target_modules=["first", "second", "third", "head"])),
    Case("lokr", "conv", dict(r=8, alpha=90, target_modules=["first", "second", "third", "head"]), "whole"),
    Case("lokr", "conv", dict(r=1, alpha=90, target_modules=["first", "second"], use_effective_conv2d=True), "core"),
    Case("lokr", "conv", dict(r=1, alpha=90, target_modules=["third"], use_effective_conv2d=True), "conv1d-core"),
    Case("lokr", "grouped", dict(r=1, alpha=40, target_modules=["conv"])),
    Case("lokr", "volume", dict(r=1, alpha=40, target_modules=["conv"], use_effective_conv2d=True)),
    Case("gralora", "llama", dict(r=10, alpha=12, gralora_k=5, target_modules=["q_proj", "down_proj"])),
    Case("gralora", "llama", dict(r=4, alpha=9, hybrid_r=3, target_modules=["q_proj", "k_proj"]), "hybrid"),
    Case("gralora", "llama", dict(r=3, gralora_k=1, target_modules=LINEARS, init_weights=False), "random", noop=False),
    Case("gralora", "gpt2", dict(r=9, alpha=12, gralora_k=3, hybrid_r=2, target_modules=["c_attn", "mlp.c_proj"])),
    Case("peanut", "llama", dict(r=5, scaling=1.7, target_modules=LINEARS)),
    Case("peanut", "llama", dict(r=5, depth=2, act_fn="tanh", target_modules=LINEARS), "deep"),
    Case(
        "peanut",
        "llama",
        dict(r=5, depth=1, act_fn="gelu", target_modules=["q_proj"], init_weights=False),
        "random",
        noop=False,
    ),
    Case("peanut", "gpt2", dict(r=5, depth=1, act_fn="silu", target_modules=["c_attn", "mlp.c_proj"])),
    Case("lora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS, init_lora_weights="olora"), "olora"),
    Case("lora", "gpt2", dict(r=4, target_modules=["c_attn", "mlp.c_proj"], init_lora_weights="olora"), "olora"),
    Case("lora", "conv", dict(r=4, target_modules=["first", "third", "head"], init_lora_weights="olora"), "olora"),
    Case("lora", "llama", dict(r=4, target_modules=LINEARS, init_lora_weights="orthogonal"), "orthogonal"),
    Case("lora", "llama", dict(r=4, target_modules=LINEARS, init_lora_weights="pissa_niter_4"), "fast-pissa"),
    Case("lora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS, init_lora_weights="loftq"), "loftq", False),
    Case(
        "lora",
        "gpt2",
        dict(
            r=4,
            target_modules=["c_attn", "mlp.c_proj"],
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": 8, "loftq_iter": 3},
        ),
        "loftq",
        noop=False,
    ),
    Case("dora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS, init_lora_weights="pissa"), "pissa"),
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
    Case(
        "alora",
        "llama",
        dict(r=4, lora_alpha=7, target_modules=LINEARS, alora_invocation_tokens=[15], task_type="CAUSAL_LM"),
    ),
    Case(
        "alora",
        "gpt2",
        dict(
            r=4,
            target_modules=["c_attn", "mlp.c_proj"],
            alora_invocation_tokens=[15, 11],
            task_type="CAUSAL_LM",
        ),
    ),
    Case(
        "alora",
        "llama",
        dict(
            r=4,
            target_modules=["q_proj", "k_proj"],
            alora_invocation_tokens=[15],
            use_dora=True,
            lora_bias=True,
            use_rslora=True,
        ),
        "dora-bias-rslora",
    ),
    Case("lora_bias", "llama", dict(r=4, lora_alpha=7, target_modules=["q_proj", "k_proj"])),
    Case("lora_bias", "conv", dict(r=4, lora_alpha=7, target_modules=["first", "third", "head"])),
    Case("lora_bias", "gpt2", dict(r=4, target_modules=["c_attn", "mlp.c_proj"], use_dora=True), "dora"),
    Case("qalora", "llama", dict(r=4, qalora_group_size=5, target_modules=LINEARS)),
    Case("qalora", "gpt2", dict(r=4, qalora_group_size=3, target_modules=["c_attn", "mlp.c_proj"])),
    Case("bdlora", "llama", dict(r=10, use_bdlora=BLOCKS, target_modules=["q_proj", "o_proj", "down_proj"])),
    Case(
        "bdlora",
        "llama",
        dict(
            r=10,
            use_bdlora=BLOCKS,
            target_modules=["q_proj", "o_proj", "down_proj"],
            use_dora=True,
            velora_config=dict(num_groups=7),
            lora_dropout=0.1,
        ),
        "dora-velora",
    ),
    Case("velora", "llama", dict(r=4, lora_alpha=7, velora_config=dict(num_groups=7), target_modules=LINEARS)),
    Case("velora", "gpt2", dict(r=4, velora_config=dict(num_groups=4, init_type="random"), target_modules=["c_attn"])),
    Case("kasa", "llama", dict(r=4, lora_alpha=3, target_modules=LINEARS), noop=False),
    Case("kasa", "gpt2", dict(r=4, target_modules=["c_attn", "mlp.c_proj"]), noop=False),
    Case(
        "kasa",
        "llama",
        dict(r=4, target_modules=LINEARS, use_dora=True, monteclora_config={}, velora_config=dict(num_groups=7)),
        "dora-monteclora-velora",
        noop=False,
    ),
    Case("monteclora", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS)),
    Case(
        "monteclora",
        "gpt2",
        dict(r=4, target_modules=["c_attn", "mlp.c_proj"], monteclora_config=dict(num_samples=3, sample_scaler=0.1)),
    ),
    Case("monteclora", "llama", dict(r=4, target_modules=LINEARS, init_lora_weights="pissa"), "pissa"),
    Case("mica", "llama", dict(r=4, lora_alpha=7, target_modules=LINEARS)),
    Case("mica", "gpt2", dict(r=4, target_modules=["wte", "mlp.c_proj"])),
    Case("mica", "conv", dict(r=3, lora_alpha=40, target_modules=["first", "second", "third", "head"])),
    Case("mica", "llama", dict(r=4, target_modules=LINEARS, use_qalora=True, qalora_group_size=5), "qalora"),
    Case("arrow", "llama", dict(), noop=False, needs_experts=True),
    Case("glora", "llama", dict(r=3, target_modules=LINEARS)),
    Case(
        "glora",
        "llama",
        dict(config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=LINEARS),
        "vectors",
    ),
    Case("glora", "llama", dict(config_A_B="constant", config_C="none", target_modules=LINEARS), "numbers"),
    Case("glora", "llama", dict(r=3, config_A_B="none", target_modules=["q_proj", "k_proj"]), "bias-only"),
    Case(
        "glora",
        "llama",
        dict(r=3, config_D_E="none", target_modules=["q_proj"], init_weights=False),
        "random",
        noop=False,
    ),
    Case("glora", "llama", dict(r=3, target_modules=LINEARS, bias="glora_only"), "biases"),
    Case("glora", "gpt2", dict(r=3, config_D_E="vector", target_modules=["c_attn", "mlp.c_proj"])),
    Case("adapter_plus", "llama", dict(stochastic_depth=0.0), noop=False),
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
    Case(
        "average",
        "llama",
        dict(adapter_names=["one", "two"], weights=[0.3, 0.9], learned=True),
        noop=False,
        siblings=dict(
            one=LoraConfig(r=3, target_modules=LINEARS),
            two=OFTConfig(oft_block_size=5, target_modules=["q_proj", "o_proj"]),
        ),
    ),
    Case(
        "average",
        "gpt2",
        dict(adapter_names=["one", "two", "three"], learned=True),
        noop=False,
        siblings=dict(
            one=LoraConfig(r=3, target_modules=["c_fc"]),
            two=IA3Config(),
            three=HiraConfig(r=2, target_modules=["c_attn"]),
        ),
    ),
    Case(
        "split",
        "llama",
        dict(adapter_names=["one", "two"], splits=[2, 3], learned=True),
        noop=False,
        siblings=dict(
            one=LoraConfig(r=3, target_modules=LINEARS),
            two=OFTConfig(oft_block_size=5, target_modules=["q_proj", "o_proj"]),
        ),
    ),
    Case(
        "split",
        "gpt2",
        dict(adapter_names=["one", "two"], splits=[1, 2], weights=[1.0, 0.5], learned=True),
        noop=False,
        siblings=dict(one=LoraConfig(r=3, target_modules=["c_fc"]), two=GPT2_BN),
    ),
    Case("mam", "llama", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("mam", "gpt2", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("mam", "t5", dict(configs=[PREFIX, ParBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "llama", dict(configs=[LoraConfig(r=4), PREFIX, SeqBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "gpt2", dict(configs=[LoraConfig(r=4), PREFIX, DoubleSeqBnConfig(reduction_factor=5)]), noop=False),
    Case("unipelt", "t5", dict(configs=[LoraConfig(r=4), PREFIX]), noop=False),
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
    mixes_groups = str(case) in ("lora-grouped", "dora-grouped")
    return case.config_class.adapter.has_fold and not mixes_groups


MERGEABLE = [case for case in LAYER_CASES if has_fold(case)]


def without_dropout(case: Case) -> Case:
    """The same case where training draws nothing at random."""
    none = {f.name: 0.0 for f in fields(case.config_class) if f.name.endswith("dropout")}
    return replace(case, settings=case.settings | none)
