"""Random sequences of PEFT's API calls, and what is seen after each: a program for either library under the name peft.

    python -m tests.peft_calls veneer|peft FIRST LAST

prints one JSON line for each seed: the calls, and after each the active, merged and trainable adapters, the keys of
state dicts, the counts of parameters, the outputs, or the class of the error that was raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAMES = ("default", "other", "third")
ERRORS = ("ValueError", "TypeError", "AttributeError", "KeyError", "RuntimeError", "NotImplementedError")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 21)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(21, 14, bias=False)
        self.norm = nn.LayerNorm(14)
        self.lin2 = nn.Linear(14, 3)

    def forward(self, x: Any) -> Any:
        return self.lin2(self.norm(self.lin1(self.relu(self.lin0(x)))))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 3), stride=2, padding=1)
        self.emb = nn.Embedding(7, 6)
        self.lin = nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        return self.lin(self.conv(x).mean((2, 3)) + self.emb(torch.tensor([1, 2])))


def models() -> dict[str, Any]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    t5 = dict(d_model=16, d_ff=24, num_layers=2, num_heads=4, d_kv=4, vocab_size=40, decoder_start_token_id=0)
    return {
        "mlp": (Mlp, (), lambda: (torch.randn(4, 10),)),
        "conv": (Conv, (), lambda: (torch.randn(2, 3, 8, 8),)),
        "llama": (LlamaForCausalLM, (LlamaConfig(**small, num_key_value_heads=2),), tokens),
        "gpt2": (GPT2LMHeadModel, (GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=64),), tokens),
        "bert": (BertForSequenceClassification, (BertConfig(**small),), tokens),
        "t5": (
            T5ForConditionalGeneration,
            (T5Config(**t5),),
            lambda: (torch.randint(0, 40, (2, 5)), None, torch.randint(0, 40, (2, 4))),
        ),
    }


def tokens() -> tuple[Any, ...]:
    return (torch.randint(0, 40, (2, 6)),)


TARGETS = {
    "mlp": [["lin0"], ["lin1", "lin0"], "lin.*", ["lin0", "absent"]],
    "conv": [["lin"], ["conv"], ["conv", "lin"], ["emb", "lin"]],
    "llama": [None, ["q_proj", "k_proj"], ["gate_proj"], "all-linear", r".*\.1\..*v_proj"],
    "gpt2": [None, ["c_attn"], ["c_proj"]],
    "bert": [None, ["query", "dense"], ["key"]],
    "t5": [None, ["q", "v"], ["wi"]],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
LINEAR = ("mlp", "llama", "t5", "bert")


def methods() -> dict[str, tuple[str, Any, tuple[str, ...]]]:
    """(config class, settings drawn at random, models it fits)."""
    everywhere = ("mlp", "llama", "gpt2", "bert", "t5", "conv")
    return {
        "lora": (
            "LoraConfig",
            lambda r: dict(r=r.choice([2, 4]), lora_alpha=r.choice([4, 8]), use_rslora=r.random() < 0.2),
            everywhere,
        ),
        "dora": ("LoraConfig", lambda r: dict(r=2, use_dora=True), ("mlp", "llama", "bert", "t5")),
        "lora_bias": ("LoraConfig", lambda r: dict(r=2, lora_bias=True), ("mlp",)),
        "saved": ("LoraConfig", lambda r: dict(r=2, modules_to_save=["lin2"], target_modules=["lin0"]), ("mlp",)),
        "ia3": ("IA3Config", lambda r: {}, ("llama", "gpt2", "t5", "bert")),
        "ia3_mlp": (
            "IA3Config",
            lambda r: dict(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]),
            ("mlp",),
        ),
        "loha": ("LoHaConfig", lambda r: dict(r=2, alpha=4), ("mlp", "llama", "bert")),
        "lokr": ("LoKrConfig", lambda r: dict(r=2, alpha=4), ("mlp", "llama", "bert")),
        "vera": ("VeraConfig", lambda r: dict(r=4), LINEAR),
        "oft": ("OFTConfig", lambda r: dict(r=0, oft_block_size=2, use_cayley_neumann=False), ("llama",)),
        "hra": ("HRAConfig", lambda r: dict(r=2), ("mlp", "llama")),
        "fourierft": ("FourierFTConfig", lambda r: dict(n_frequency=9), ("mlp", "llama", "bert")),
        "delora": ("DeloraConfig", lambda r: dict(r=2), ("mlp", "llama")),
        "randlora": ("RandLoraConfig", lambda r: dict(r=4), ("mlp", "llama")),
        "vblora": ("VBLoRAConfig", lambda r: dict(r=2, vector_length=2, num_vectors=6, topk=2), ("llama",)),
        "adalora": ("AdaLoraConfig", lambda r: dict(init_r=3, target_r=2, total_step=10), ("mlp", "llama", "bert")),
        "prompt": ("PromptTuningConfig", lambda r: dict(num_virtual_tokens=3), ("llama", "gpt2", "bert")),
        "prefix": ("PrefixTuningConfig", lambda r: dict(num_virtual_tokens=3), ("llama", "gpt2")),
        "p_tuning": ("PromptEncoderConfig", lambda r: dict(num_virtual_tokens=3, encoder_hidden_size=8), ("llama",)),
    }


class Run:
    """One sequence of calls on one model."""

    def __init__(self, peft: Any, seed: int) -> None:
        self.peft, self.random = peft, random.Random(seed)
        method = self.random.choice(list(methods()))
        self.method = method
        self.config_class, self.settings, fits = methods()[method]
        self.kind = self.random.choice(fits)
        self.steps: list[dict[str, Any]] = []
        self.is_prompt = method in ("prompt", "prefix", "p_tuning")
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[str] = []

    def base(self) -> nn.Module:
        torch.manual_seed(1)
        make, arguments, _ = models()[self.kind]
        return make(*arguments).eval()

    def config(self, chosen: random.Random) -> Any:
        settings = dict(self.settings(chosen))
        if not self.is_prompt:
            settings.setdefault("target_modules", chosen.choice(TARGETS[self.kind]))
            if settings["target_modules"] is None:
                del settings["target_modules"]
        if self.kind in TASKS and (self.is_prompt or chosen.random() < 0.7):
            settings["task_type"] = TASKS[self.kind]
        return getattr(self.peft, self.config_class)(**settings)

    def fill(self, name: str) -> None:
        if self.method == "p_tuning":  # its file holds what the encoder makes
            return
        """Give an adapter values that depend on its keys alone, whatever the library drew."""
        found = self.peft.get_peft_model_state_dict(self.model, adapter_name=name)
        values = values_for(found, name)
        self.peft.set_peft_model_state_dict(self.model, {**found, **values}, adapter_name=name)

    # Seeing

    def output(self, model: Any) -> list[float]:
        torch.manual_seed(3)
        given = models()[self.kind][2]()
        with torch.no_grad():
            if self.kind == "t5":
                out = model(input_ids=given[0], decoder_input_ids=given[2])
            elif self.kind in TASKS:
                out = model(input_ids=given[0])
            else:
                out = model(*given)
        found = out.logits if hasattr(out, "logits") else out
        return [round(float(v), 5) for v in found.flatten()[:: max(1, found.numel() // 24)][:24]]

    def seen(self) -> dict[str, Any]:
        model = self.model
        found: dict[str, Any] = {"configs": sorted(model.peft_config)}
        for name in ("active_adapter", "active_adapters"):
            found[name] = quietly(lambda name=name: getattr(model, name))
        layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        found["merged"] = sorted({n for m in layers for n in m.merged_adapters})
        found["trainable"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        found["count"] = quietly(lambda: list(model.get_nb_trainable_parameters()))
        found["keys"] = sorted(model.state_dict())
        for name in model.peft_config:
            found[f"adapter {name}"] = quietly(lambda name=name: shapes(self.peft, model, name))
        found["output"] = quietly(lambda: self.output(model))
        if not self.is_prompt:
            found["status"] = quietly(lambda: dataclasses.asdict(model.get_model_status()))
        return found

    # Calling

    def attach(self) -> None:
        self.model = self.peft.get_peft_model(self.base(), self.config(self.random), self.random.choice(NAMES[:2]))
        self.fill(next(iter(self.model.peft_config)))

    def calls(self) -> dict[str, Any]:
        pick, model = self.random, self.model
        name, directory = pick.choice(NAMES), str(Path(self.folder.name) / str(len(self.saved)))
        configured = random.Random(pick.random())
        several = pick.sample(NAMES, 2)
        flag = pick.random() < 0.5
        found = {
            "add_adapter": lambda: (model.add_adapter(name, self.config(configured)), self.fill(name)),
            "add_wrong_type": lambda: model.add_adapter(name, self.wrong_type()),
            "set_adapter": lambda: model.set_adapter(name),
            "set_inference": lambda: model.set_adapter(name, inference_mode=True),
            "set_several": lambda: model.base_model.set_adapter(several),
            "merge": lambda: model.merge_adapter(),
            "merge_one": lambda: model.merge_adapter(adapter_names=[name]),
            "merge_string": lambda: model.merge_adapter(adapter_names=name),
            "unmerge": lambda: model.unmerge_adapter(),
            "delete": lambda: model.delete_adapter(name),
            "requires_grad": lambda: model.set_requires_grad(name, requires_grad=flag),
            "disable": lambda: self.disabled(),
            "layers_off": lambda: model.base_model.disable_adapter_layers(),
            "layers_on": lambda: model.base_model.enable_adapter_layers(),
            "save": lambda: self.save(directory),
            "reload": lambda: self.reload(flag),
            "load_adapter": lambda: self.load(name, flag),
            "train_step": lambda: self.train_step(),
        }
        return found

    def wrong_type(self) -> Any:
        other = "IA3Config" if self.config_class != "IA3Config" else "LoraConfig"
        return getattr(self.peft, other)(
            target_modules=["lin0", "q_proj"], **({"feedforward_modules": []} if other == "IA3Config" else {})
        )

    def disabled(self) -> Any:
        with self.model.disable_adapter():
            return self.output(self.model)

    def save(self, directory: str) -> Any:
        self.model.save_pretrained(directory)
        self.saved.append(directory)
        return sorted(str(p.relative_to(directory)) for p in Path(directory).rglob("*"))

    def source(self) -> str:
        root = Path(self.saved[-1])
        return str(next(p.parent for p in sorted(root.rglob("adapter_config.json"))))

    def reload(self, trainable: bool) -> Any:
        self.model = self.peft.PeftModel.from_pretrained(self.base(), self.source(), is_trainable=trainable)
        return type(self.model).__name__

    def load(self, name: str, trainable: bool) -> Any:
        result = self.model.load_adapter(self.source(), name, is_trainable=trainable)
        return [sorted(result.missing_keys), [k for k in result.unexpected_keys if "embed" not in k]]

    def train_step(self) -> Any:
        learned = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        given = models()[self.kind][2]()
        keys = ("input_ids", "decoder_input_ids") if self.kind == "t5" else ("input_ids",)
        given = (given[0], given[2]) if self.kind == "t5" else given
        out = self.model(**dict(zip(keys, given, strict=True))) if self.kind in TASKS else self.model(*given)
        loss = (out.logits if hasattr(out, "logits") else out).square().mean()
        loss.backward()
        moved = sorted(n for n, p in learned.items() if p.grad is not None and p.grad.abs().sum() > 0)
        with torch.no_grad():
            for p in learned.values():
                p.grad = None
        return [round(float(loss.detach()), 4), moved]

    def step(self, name: str, call: Any) -> bool:
        """Make a call, and note what is seen then; false where nothing can follow."""
        entry: dict[str, Any] = {"call": name}
        self.steps.append(entry)
        try:
            result = call()
            entry["result"] = result if isinstance(result, (list, str, float)) else None
        except Exception as error:  # noqa: BLE001 - which one is what is compared
            entry["error"] = kinds_of(error)
            entry["message"] = str(error)[:300]
        if not hasattr(self, "model"):
            return False
        entry["seen"] = quietly(self.seen)
        return True

    def run(self, length: int) -> dict[str, Any]:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alive = self.step("attach", self.attach)
            for _ in range(length if alive else 0):
                calls = self.calls()
                name = self.random.choice([n for n in calls if self.saved or n not in ("reload", "load_adapter")])
                self.step(name, calls[name])
            if alive and not self.is_prompt:
                ending = self.random.choice(["merge_and_unload", "unload"])
                self.step_out(ending)
        self.folder.cleanup()
        return {"method": self.method, "model": self.kind, "steps": self.steps}

    def step_out(self, ending: str) -> None:
        entry: dict[str, Any] = {"call": ending}
        self.steps.append(entry)
        try:
            plain = getattr(self.model, ending)()
            entry["result"] = [type(plain).__name__, sorted(plain.state_dict()), self.output(plain)]
        except Exception as error:  # noqa: BLE001
            entry["error"], entry["message"] = kinds_of(error), str(error)[:300]


def values_for(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Values for an adapter's tensors that depend on their keys alone, whatever the library drew."""
    values = {}
    for key in sorted(found):
        if not found[key].is_floating_point() or "embed_tokens" in key or "base_layer.weight" in key:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{key}".encode()) % 2**31)
        size = 1.0 if "magnitude" in key or key.endswith("ia3_l") else 0.0
        values[key] = size + 0.3 * torch.randn(found[key].shape, generator=generator)
    return values


def quietly(look: Any) -> Any:
    try:
        return look()
    except Exception as error:  # noqa: BLE001
        return f"raises {kinds_of(error)[0]}"


def kinds_of(error: Exception) -> list[str]:
    """The builtin classes that a program could catch an error as."""
    return [c.__name__ for c in type(error).__mro__ if c.__name__ in ERRORS] or [type(error).__name__]


def shapes(peft: Any, model: Any, name: str) -> Any:
    found = peft.get_peft_model_state_dict(model, adapter_name=name)
    return sorted([key, list(t.shape)] for key, t in found.items())


def main() -> None:
    which, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if which == "veneer":
        import veneer

        veneer.install_as_peft()
    import peft

    assert hasattr(peft, "_veneer_drop_in") == (which == "veneer")
    torch.set_num_threads(1)
    for seed in range(first, last):
        chosen = random.Random(seed).randint(3, 8)
        print(json.dumps({"seed": seed, **Run(peft, seed).run(chosen)}), flush=True)


if __name__ == "__main__":
    main()
