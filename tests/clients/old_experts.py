"""LoRAs for mixtures of experts from before transformers 5, where experts were linear layers, fit fused experts."""

import copy
import json
from pathlib import Path

from .common import folder, torch

from peft import LoraConfig, PeftModel, get_peft_model  # isort: skip
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

RANK, ALPHA = 2, 3
SIZES = dict(
    hidden_size=30, intermediate_size=22, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
    head_dim=14, vocab_size=67, max_position_embeddings=64, experts_implementation="eager",
)  # fmt: skip
OLDER = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe"),
    "qwen3_moe": (("gate_proj", "up_proj", "down_proj"), "mlp"),
}
MODELS = {
    "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3_moe": Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=22)
    ),
}


@torch.no_grad()
def old_adapter(model: torch.nn.Module, names: tuple[str, ...], block: str, where: Path) -> torch.nn.Module:
    """Write an adapter as it was saved then; the model with the same updates in its fused weights."""
    merged, tensors = copy.deepcopy(model), {}
    for i, layer in enumerate(merged.model.layers):
        fused = layer.mlp.experts
        half = fused.gate_up_proj.shape[1] // 2
        for e in range(len(fused.gate_up_proj)):
            parts = fused.gate_up_proj[e, :half], fused.gate_up_proj[e, half:], fused.down_proj[e]
            for name, W in zip(names, parts, strict=True):
                A, B = torch.randn(RANK, W.shape[1]) * 0.3, torch.randn(W.shape[0], RANK) * 0.3
                prefix = f"base_model.model.model.layers.{i}.{block}.experts.{e}.{name}"
                tensors |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
                W += B @ A * ALPHA / RANK
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=list(names), task_type="CAUSAL_LM")
    (where / "adapter_config.json").write_text(json.dumps(config))
    return merged


x = torch.arange(12).view(2, 6)
for kind, (names, block) in OLDER.items():
    torch.manual_seed(0)
    model, where = MODELS[kind].eval(), folder() / kind
    expected = old_adapter(model, names, block, where)(x).logits
    assert not torch.allclose(model(x).logits, expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), where)
    torch.testing.assert_close(loaded(x).logits, expected, atol=1e-5, rtol=1e-4)
    loaded.save_pretrained(where / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(model), where / "again")
    assert torch.equal(again(x).logits, loaded(x).logits)
    own = copy.deepcopy(model)
    own.load_adapter(str(where))
    torch.testing.assert_close(own(x).logits, expected, atol=1e-5, rtol=1e-4)
    new = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    assert set(new.peft_config["default"].target_parameters) == {"gate.weight", "gate_up_proj", "down_proj"}
    try:
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=[names[0]]))
    except ValueError as error:
        assert f"without also targeting {names[1]}" in str(error)
    else:
        raise AssertionError("half of a fused matrix was adapted")
print("done")
