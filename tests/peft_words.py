"""What either library under the name peft says and shows where programs look: a program for both.

    python -m tests.peft_words veneer|peft

prints a JSON object: for each case what came of it, or the class and the first words of the error or warning.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import warnings

import torch
from torch import nn

if sys.argv[1] == "veneer":
    import veneer

    veneer.install_as_peft()

import peft  # isort: skip
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import intruders
from peft.tuners.lora.config import EvaConfig, KasaConfig, VeloraConfig
from peft.utils import hotswap, merge_utils


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.lin1 = nn.Embedding(7, 10), nn.Linear(10, 30), nn.Linear(30, 2)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(self.emb(x))))


def said(call):
    """The error, or the warnings, by class and first words; else what came."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = call()
        except Exception as error:
            kinds = [k.__name__ for k in (NotImplementedError, TypeError, ValueError) if isinstance(error, k)]
            return [kinds[0] if kinds else type(error).__name__, str(error)[:WORDS]]
    words = sorted({str(w.message)[:WORDS] for w in seen if issubclass(w.category, (UserWarning, RuntimeWarning))})
    return words or (found if isinstance(found, (str, int, float, bool, list, dict)) else "fine")


WORDS = 48


def on(config, model=None):
    return get_peft_model(model or Mlp(), config)


def types():
    model = on(LoraConfig(target_modules=["emb", "lin0"], modules_to_save=["lin1"]))
    layers = model.base_model.model
    return [f"{type(m).__module__}.{type(m).__name__}" for m in (layers.emb, layers.lin0)] + [
        type(layers.lin1).__name__
    ]


def scaled():
    from peft.helpers import rescale_adapter_scale

    layer = (model := on(LoraConfig(target_modules=["lin0"]))).base_model.model.lin0
    before = layer.scaling
    with rescale_adapter_scale(model, 2.0):
        inside = layer.scaling["default"]
    return [before["default"], inside, layer.scaling["default"]]


def tokens():
    model = on(LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1, 3]}))
    adapter = model.base_model.model.emb.token_adapter
    return [adapter.token_indices["default"], list(adapter.trainable_tokens_delta["default"].shape)]


def converted(rank):
    model = on(peft.LoHaConfig(target_modules=["lin0"], r=3, init_weights=False))
    config, tensors = peft.convert_to_lora(model, rank=rank)
    return [config.r, config.lora_alpha, sorted((k, list(t.shape)) for k, t in tensors.items())]


def reduced():
    torch.manual_seed(0)
    model = on(LoraConfig(target_modules=["lin0"], r=4, init_lora_weights=False))
    sink = io.StringIO()
    intruders.reduce_intruder_dimension(model, logging_sink=lambda line: print(line, file=sink))
    model.base_model.model.lin0.merge()
    return [model.active_adapters, round(float(model.base_model.model.lin0.base_layer.weight.norm()), 3)]


def merged(name):
    torch.manual_seed(0)
    tasks, weights = [torch.randn(7, 5) for _ in range(3)], torch.tensor([0.5, -1.0, 2.0])
    settings = [] if name == "task_arithmetic" else [0.4]
    return round(float(getattr(merge_utils, name)(tasks, weights, *settings).norm()), 4)


def swapped():
    torch.manual_seed(0)
    model, other = on(LoraConfig(target_modules=["lin0"], r=2)), on(LoraConfig(target_modules=["lin0"], r=4))
    nn.init.normal_(other.base_model.model.lin0.lora_B["default"].weight)
    state = {k: v for k, v in other.base_model.model.state_dict().items() if "lora_" in k}
    hotswap.hotswap_adapter_from_state_dict(model.base_model.model, state, "default", other.peft_config["default"])
    two = [m.base_model.model.lin0.get_delta_weight("default") for m in (model, other)]
    return bool(torch.allclose(*two, atol=1e-6))


def shadowed():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=3))
    model = on(peft.ShadowConfig(task_type="SEQ_CLS"), base)
    head = [p for n, p in model.named_parameters() if "shadow_head" in n]
    return [[list(p.shape), p.requires_grad] for p in head]


def second(first, other):
    model = on(first)
    model.add_adapter("other", other)


BAD = dict(target_modules=["lin0"])


def numbers(*tensors):
    """Values, rounded, so that both libraries print the same."""
    return [[round(float(value), 4) for value in tensor.detach().flatten()] for tensor in tensors]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compressed():
    from peft.tuners.lora import velora

    x, v = drawn(3, 2, 7), velora._normalize_projection(drawn(3))
    weight, bias = drawn(5, 7, seed=1).requires_grad_(), drawn(5, seed=2).requires_grad_()
    inputs = x.clone().requires_grad_()
    velora.VeloraFunction.apply(inputs, weight, bias, v, 3, 0.5).square().sum().backward()
    kept = velora._compress_activations(x, v, 3)
    return numbers(kept, velora._reconstruct_activations(kept, v, 7, 0.5), inputs.grad, weight.grad, bias.grad)


def blocks():
    from peft.tuners.lora.variants import BlockDiagonalLinear

    layer = BlockDiagonalLinear(6, 9, nblocks=3)
    with torch.no_grad():
        layer.weight.copy_(drawn(*layer.weight.shape))
    return numbers(layer(drawn(2, 5, 6, seed=1)), layer.weight_as_blockdiagonal_matrix())


def lycoris():
    from peft.tuners.loha.layer import make_weight, make_weight_cp
    from peft.tuners.lokr import layer as lokr

    sizes = [lokr.factorization(n, factor) for n in (12, 127, 256, 360) for factor in (-1, 4, 5)]
    t, a, b = drawn(2, 2, 3, 3), drawn(2, 5, seed=1), drawn(2, 7, seed=2)
    core = lokr.make_weight_cp(t, a, b)
    whole = (
        lokr.make_kron(drawn(2, 3), core, 0.5),
        make_weight_cp(t, a, b, t, a, b, 2.0),
        make_weight(a.T, b, a.T, b, 3.0),
    )
    return [list(map(list, sizes)), numbers(core, *whole)]


def decomposed():
    from peft.tuners.osf.utils import decompose_weight_matrix, project_gradient_to_orthogonal_space

    parts = decompose_weight_matrix(drawn(7, 5), top_k=2)
    high = parts["U_high"] * parts["S_high"] @ parts["V_high"]
    low = parts["U_low"] * parts["S_low"] @ parts["V_low"]
    low.square().sum().backward()
    project_gradient_to_orthogonal_space(parts)
    left = parts["U_high"].T @ parts["U_low"].grad, parts["V_low"].grad @ parts["V_high"].T
    return [parts["rank_high"], numbers(high, low, parts["S_low"].grad), [round(float(x.norm()), 3) for x in left]]


def components():
    from peft.utils.incremental_pca import IncrementalPCA

    pca = IncrementalPCA(n_components=3, batch_size=10).fit(drawn(40, 6).double() * torch.arange(1, 7))
    return numbers(
        pca.components_, pca.singular_values_, pca.mean_, pca.explained_variance_ratio_, pca.explained_variance_
    )


def stepped(**settings):
    """B and a trained head after three steps of LoRA-FA's optimizer."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lin0"], r=4, modules_to_save=["lin1"], init_lora_weights=False)
    model = on(config)
    lin0 = model.base_model.model.lin0
    with torch.no_grad():
        lin0.lora_A["default"].weight.copy_(drawn(4, 10))
        lin0.lora_B["default"].weight.copy_(drawn(30, 4, seed=1))
    from peft.optimizers import create_lorafa_optimizer

    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1, **settings)
    for _ in range(3):
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    average = optimizer.state["base_model.model.lin0.lora"]["exp_avg_B"]  # AdamW's step hides how long the gradient is
    norms = [f"{float(tensor.norm()):.2g}" for tensor in (lin0.lora_B["default"].weight.detach(), average)]
    return [norms, sorted(optimizer.param_groups[0].keys())]


def alone():
    """A layer that its class makes around a module of no model."""
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    layer = Linear(nn.Linear(6, 4), "first", LoraConfig(target_modules=["a"]), r=3, lora_alpha=9)
    return [
        type(layer).__name__,
        layer.scaling["first"],
        list(layer.lora_A["first"].weight.shape),
        layer.active_adapters,
    ]


def again():
    """Whether `reset_lora_parameters` gives new values, and leaves an adapter without effect."""
    layer = on(LoraConfig(target_modules=["lin0"], init_lora_weights=False)).base_model.model.lin0
    before = layer.lora_A["default"].weight.clone()
    layer.reset_lora_parameters("default", True)
    return [
        bool((layer.lora_A["default"].weight == before).all()),
        float(layer.lora_B["default"].weight.detach().norm()),
    ]


def by_position():
    """A config and a setting whose fields are given by position."""
    config = LoraConfig("CAUSAL_LM", None, None, None, "base")
    return [config.task_type, config.base_model_name_or_path, KasaConfig(0.5, 0.25).gamma]


def prefixes():
    from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes

    model = on(peft.VeraConfig(target_modules=["lin0"], r=2))
    found = _get_tuner_state_dict_key_prefixes(model, "default")
    return sorted(prefix for prefix in found if "dropout" not in prefix)  # without one, veneer has no module for it


CASES = {
    "inside: velora": compressed,
    "inside: blocks": blocks,
    "inside: lycoris": lycoris,
    "inside: osf": decomposed,
    "inside: pca": components,
    "inside: lora-fa": stepped,
    "inside: lora-fa decay": lambda: stepped(weight_decay=0.5),
    "inside: alone": alone,
    "inside: again": again,
    "inside: by position": by_position,
    "inside: prefixes": prefixes,
    "types": types,
    "scaled": scaled,
    "tokens": tokens,
    "shadowed": shadowed,
    "swapped": swapped,
    "reduced": reduced,
    **{f"converted {r}": lambda r=r: converted(r) for r in (2, 0, 1.5, 99)},
    **{f"merged {n}": lambda n=n: merged(n) for n in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
    "merged": lambda: merged("task_arithmetic"),
    "adalora dora": lambda: peft.AdaLoraConfig(use_dora=True, total_step=1),
    "adamss": lambda: peft.AdamssConfig(use_asa=True, mask_interval=0, init_warmup=0),
    "bias and dora": lambda: LoraConfig(lora_bias=True, use_dora=True),
    "bias and start": lambda: LoraConfig(lora_bias=True, init_lora_weights="pissa"),
    "corda alone": lambda: LoraConfig(init_lora_weights="corda"),
    "eva": lambda: EvaConfig(rho=0.5),
    "eva alone": lambda: LoraConfig(init_lora_weights="eva"),
    "gralora": lambda: peft.GraloraConfig(r=6, gralora_k=4),
    "kasa": lambda: KasaConfig(beta=-1.0),
    "kasa type": lambda: LoraConfig(kasa_config=3),
    "lily": lambda: peft.LilyConfig(num_B=1),
    "parameters": lambda: LoraConfig(target_parameters="lin0.weight"),
    "pissa conversion": lambda: LoraConfig(init_lora_weights="pissa", use_rslora=True, rank_pattern={"lin0": 2}),
    "prompt text": lambda: peft.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
    "psoft": lambda: peft.PsoftConfig(use_cayley_neumann=True, cayley_neumann_eps=1.5),
    "psoft terms": lambda: peft.PsoftConfig(num_cayley_neumann_terms=3),
    "road": lambda: peft.RoadConfig(group_size=3),
    "supertuning": lambda: peft.SupertuningConfig(lora_alpha=2.0),
    "velora": lambda: VeloraConfig(num_groups=0),
    "vera": lambda: peft.VeraConfig(save_projection=False),
    "waveft": lambda: peft.WaveFTConfig(wavelet_family="none"),
    "on: c3a": lambda: on(peft.C3AConfig(block_size=3, **BAD)),
    "on: gralora": lambda: on(peft.GraloraConfig(r=9, gralora_k=9, **BAD)),
    "on: groups": lambda: on(peft.HiraConfig(target_modules=["conv"])),
    "on: kasa": lambda: on(LoraConfig(r=10, kasa_config=KasaConfig(), **BAD)),
    "on: miss": lambda: on(peft.MissConfig(r=11, **BAD)),
    "on: nothing": lambda: on(LoraConfig(target_modules=["lin"])),
    "on: orthogonal": lambda: on(LoraConfig(r=7, init_lora_weights="orthogonal", **BAD)),
    "on: psoft": lambda: on(peft.PsoftConfig(r=11, **BAD)),
    "on: rank of groups": lambda: on(LoraConfig(r=3, target_modules=["conv"])),
    "on: road": lambda: on(peft.RoadConfig(group_size=64, **BAD)),
    "on: vblora": lambda: on(peft.VBLoRAConfig(vector_length=3, **BAD)),
    "on: waveft": lambda: on(peft.WaveFTConfig(n_frequency=0, **BAD)),
    "beside: vera": lambda: second(
        peft.VeraConfig(**BAD, save_projection=True), peft.VeraConfig(**BAD, projection_prng_key=1)
    ),
    "beside: kasa": lambda: second(LoraConfig(**BAD), LoraConfig(kasa_config=KasaConfig(), **BAD)),
}

if __name__ == "__main__":
    print(json.dumps({name: copy.deepcopy(said(case)) for name, case in CASES.items()}))
