"""Models of many kinds with adapters on them: a program for either library under the name peft.

    python -m tests.peft_kinds veneer|peft

prints one JSON line for each (kind, method): what is adapted, and the outputs adapted, reloaded and merged.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from torch import nn

from .peft_calls import values_for

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(**SMALL, vocab_size=40)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Any) -> Any:
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)


class Timm(nn.Module):
    """The shape of timm's convolutional models: a stem, stages of blocks, a head with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GroupNorm(2, 8))
        self.stages = nn.Sequential(*(nn.Sequential(Block(8), Block(8)) for _ in range(2)))
        self.head = nn.ModuleDict({"flatten": nn.Flatten(), "fc": nn.Linear(8, 3)})

    def forward(self, x: Any) -> Any:
        return self.head["fc"](self.head["flatten"](self.stages(self.stem(x)).mean((2, 3))))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 11), nn.ReLU(), nn.Linear(11, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.lin(self.mha(x, x, x, need_weights=False)[0])


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 40, (2, 6))}


def kinds() -> dict[str, tuple[Any, Any, Any]]:
    """(how it is built, what it is called with, targets; None: the default)."""
    import transformers as t

    vision = dict(**SMALL, image_size=16, patch_size=8)
    whisper = t.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, num_mel_bins=8, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    llava = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**vision), text_config=t.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=39, image_seq_length=4,
    )  # fmt: skip
    t5 = t.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=4, d_kv=4, vocab_size=40)
    bart = t.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
    )  # fmt: skip
    mixtral = t.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2)
    experts = dict(num_experts=2, moe_intermediate_size=8, num_experts_per_tok=1)
    qwen = t.Qwen3MoeConfig(**TEXT, **experts, num_key_value_heads=2, head_dim=4)
    sound = lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, 40, (2, 4))}  # noqa: E731
    seq2seq = lambda: {**ids(), "decoder_input_ids": torch.randint(3, 40, (2, 4))}  # noqa: E731
    image = lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}  # noqa: E731
    both = lambda: {**image(), "input_ids": torch.tensor([[39] * 4 + [5, 6]] * 2)}  # noqa: E731
    return {
        "decoder": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, num_key_value_heads=2)), ids, None),
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40)), ids, None),
        "encoder": (lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), ids, None),
        "t5": (lambda: t.T5ForConditionalGeneration(t5), seq2seq, None),
        "bart": (lambda: t.BartForConditionalGeneration(bart), seq2seq, None),
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**vision)), image, ["q_proj", "v_proj"]),
        "whisper": (lambda: t.WhisperForConditionalGeneration(whisper), sound, ["q_proj", "v_proj"]),
        "llava": (lambda: t.LlavaForConditionalGeneration(llava), both, r".*language_model.*\.(q_proj|v_proj)"),
        "mixtral": (lambda: t.MixtralForCausalLM(mixtral), ids, ["q_proj", "v_proj"]),
        "qwen_moe": (lambda: t.Qwen3MoeForCausalLM(qwen), ids, ["q_proj"]),
        "mlp": (Mlp, lambda: {"input": torch.randn(5, 7)}, ["0", "2"]),
        "timm": (Timm, lambda: {"x": torch.randn(2, 3, 8, 8)}, ["fc1", "fc2", "dwconv"]),
        "attention": (Attention, lambda: {"x": torch.randn(2, 4, 8)}, ["lin"]),
    }  # fmt: skip


def methods(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {"lora": ("LoraConfig", dict(r=4, lora_alpha=8))}
    if kind != "gpt2":
        found["loha"] = ("LoHaConfig", dict(r=2, alpha=4))
        found["lokr"] = ("LoKrConfig", dict(r=2, alpha=4))
    if kind in ("decoder", "encoder", "t5", "vit", "whisper", "llava", "mixtral", "mlp", "attention"):
        found["vera"] = ("VeraConfig", dict(r=4))
        found["dora"] = ("LoraConfig", dict(r=4, use_dora=True))
    if kind in ("decoder", "gpt2", "t5"):
        found["ia3"] = ("IA3Config", {})
    if kind in ("mixtral", "qwen_moe"):
        found["experts"] = ("LoraConfig", dict(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    if kind == "encoder":
        found["heads"] = ("LoraConfig", dict(r=4, task_type="SEQ_CLS"))
    return found


def outputs(model: Any, given: Any) -> list[float]:
    torch.manual_seed(3)
    with torch.no_grad():
        found = model(*given().values()) if isinstance(model, nn.Sequential) else model(**given())
    found = found.logits if hasattr(found, "logits") else found
    return [round(float(v), 5) for v in found.flatten()[:: max(1, found.numel() // 20)][:20]]


def run(peft: Any, kind: str, config: Any) -> dict[str, Any]:
    make, given, _ = kinds()[kind]

    def base() -> Any:
        torch.manual_seed(1)
        return make().eval()

    model = peft.get_peft_model(base(), config).eval()
    found = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {**found, **values_for(found, "default")})
    seen = {"keys": sorted(found), "count": model.get_nb_trainable_parameters()[0], "adapted": outputs(model, given)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base(), folder)
        seen["reloaded"] = outputs(again, given)
    again.merge_adapter()
    seen["merged"] = outputs(again, given)
    again.unmerge_adapter()
    seen["unmerged"] = outputs(again, given)
    plain = again.merge_and_unload()
    return {**seen, "plain": outputs(plain, given), "names": sorted(plain.state_dict())}


def main() -> None:
    which = sys.argv[1]
    if which == "veneer":
        import veneer

        veneer.install_as_peft()
    import peft

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind, (_, _, targets) in kinds().items():
        for name, (config, settings) in methods(kind).items():
            own = {"target_modules": targets} if targets is not None else {}
            if name == "experts":
                own = {"target_modules": []}
            line = {"kind": kind, "method": name}
            print(json.dumps({**line, **run(peft, kind, getattr(peft, config)(**own, **settings))}), flush=True)


if __name__ == "__main__":
    main()
