"""Adapters on quantised bases: every library's own numbers, through that library."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import veneer
from veneer import NotMergeable, PeftModel, get_peft_model

from . import models


@torch.no_grad()
def output(model, batch):
    return models.output(model, batch)


SIZES = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def swap(model: nn.Module, make) -> nn.Module:
    """The model with every linear layer but the head quantised by `make`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name != "lm_head":
                parent._modules[name] = make(child)
    return model.requires_grad_(False).eval()


def nf4(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
    )
    kinds = dict(quant_type="nf4", compress_statistics=False)  # as transformers has it
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=new, **kinds)
    new.bias = layer.bias
    return new.to("cpu")


def int8(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


def torchao(layer: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def hqq(layer: nn.Linear) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    how = quantize.BaseQuantizeConfig(nbits=8, group_size=32)
    return quantize.HQQLinear(layer, how, compute_dtype=torch.float32, device="cpu")


def gguf(layer: nn.Linear) -> nn.Module:
    utils = pytest.importorskip("transformers.integrations.gguf.utils")  # of transformers 5.24
    from gguf import GGMLQuantizationType, quantize

    new = utils.GgufLinear(
        layer.in_features, layer.out_features, int(GGMLQuantizationType.Q8_0), layer.bias is not None
    )
    new.weight.data = torch.from_numpy(quantize(layer.weight.data.numpy(), GGMLQuantizationType.Q8_0))
    new.bias = layer.bias
    return new


LIBRARIES = {"nf4": nf4, "int8": int8, "torchao": torchao, "hqq": hqq, "gguf": gguf}
CLOSE = {"nf4": 0.08, "int8": 0.08, "torchao": 1e-4, "hqq": 1e-4, "gguf": 1e-4}
"""How far the library's own product may be from that of the numbers it holds: some round activations too."""
STEP = {"nf4": 0.12, "int8": 0.012, "torchao": 0.012, "hqq": 0.012, "gguf": 0.012}
"""How far quantised numbers are from those that were quantised, relative."""


@pytest.fixture(params=LIBRARIES)
def library(request) -> str:
    return request.param


def base(library: str | None = None) -> nn.Module:
    model = models.llama(**SIZES).requires_grad_(False).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:  # columns of unlike size, so that the blocks of a row differ
            p.data.normal_(0, 0.15).mul_(torch.linspace(0.2, 1.8, p.shape[1]))
    return model if library is None else swap(model, LIBRARIES[library])


METHODS = {
    "lora": veneer.LoraConfig(r=4, target_modules="all-linear"),
    "pissa": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    "dora": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "oft": veneer.OFTConfig(oft_block_size=16, target_modules=["q_proj", "down_proj"]),
    "ia3": veneer.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "hira": veneer.HiraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "loha": veneer.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "fourierft": veneer.FourierFTConfig(n_frequency=50, target_modules=["q_proj", "down_proj"]),
    "bottleneck": veneer.SeqBnConfig(reduction_factor=4),
}


def adapted(model: nn.Module, method: str):
    torch.manual_seed(1)
    model = get_peft_model(model, copy.deepcopy(METHODS[method])).eval()
    return models.perturb(model, "default", 3, 0.3)


def stands_for(library: str) -> nn.Module:
    """A whole model with the numbers that the quantised one stands for."""
    model, quantised = base(), base(library)
    layers = get_peft_model(quantised, veneer.LoraConfig(r=1, target_modules="all-linear"))._state.layers
    for path, layer in layers.items():
        model.get_submodule(path).weight.data.copy_(layer.target.weight())
    return model


def off(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_does_what_it_does_on_the_weights_it_stands_for(library: str, method: str):
    batch = models.inputs("llama")
    whole, quantised = adapted(stands_for(library), method), adapted(base(library), method)
    found, expected = output(quantised, batch), output(whole, batch)
    assert off(found, expected) < CLOSE[library]
    assert off(output(base(library), batch), expected) > 2 * CLOSE[library], "the adapter does more than that"


@pytest.mark.parametrize("method", METHODS)
def test_it_trains(library: str, method: str):
    model, batch = adapted(base(library), method).train(), models.inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_an_evaluation_before_training_changes_no_gradient(library: str):
    """On CPUs with AVX-512 BF16, bitsandbytes packs a weight in evaluation, and packed products have no gradient."""
    batch = models.inputs("llama")
    gradients = []
    for evaluates in (False, True):
        model = adapted(base(library), "lora")
        if evaluates:
            output(model, batch)
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bottleneck"])
def test_merging_quantises_again_and_unmerging_is_exact(library: str, method: str):
    model, batch = adapted(base(library), method), models.inputs("llama")
    with model.disable_adapter():
        plain = output(model, batch)
    active = output(model, batch)
    layers = model._state.layers
    weights = {name: layer.target.weight() for name, layer in layers.items()}
    wanted = {name: layer.fold(layer.stack(["default"]))[0] for name, layer in layers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.RoundingWarning)
        model.merge_adapter()
    merged = output(model, batch)
    for name, W in wanted.items():
        assert off(layers[name].target.weight(), W) < STEP[library]
    assert type(model._state.layers["model.layers.0.self_attn.q_proj"].base_layer) is type(
        base(library).model.layers[0].self_attn.q_proj
    )
    with model.disable_adapter():
        assert torch.equal(output(model, batch), plain)
    assert torch.equal(output(model, batch), merged)
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), active)
    for name, W in weights.items():
        assert torch.equal(model._state.layers[name].target.weight(), W)


def test_a_merge_that_rounding_undoes_says_so(library: str):
    """What is far smaller than a step of the quantised weights is gone when they are quantised again."""
    model = get_peft_model(base(library), veneer.LoraConfig(r=4, target_modules=["q_proj"]))
    models.perturb(model, "default", 3, 0.001)
    with pytest.warns(veneer.RoundingWarning, match=r"an error of \d+% of the update"):
        model.merge_adapter()


def test_merge_and_unload_leaves_a_quantised_model(library: str):
    model, batch = adapted(base(library), "lora"), models.inputs("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.RoundingWarning)
        model.merge_adapter()
    expected = output(model, batch)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is type(base(library).model.layers[0].self_attn.q_proj)
    assert off(output(merged, batch), expected) < CLOSE[library]


def test_a_trained_copy_of_a_quantised_module_is_whole(library: str):
    config = dict(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model, batch = get_peft_model(base(library), veneer.LoraConfig(**config)), models.inputs("llama")
    assert off(output(model, batch), output(base(library), batch)) < CLOSE[library]
    model = get_peft_model(base(library), veneer.LoraConfig(**config)).train()  # bitsandbytes repacks for inference
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_method_that_needs_the_weight_says_so_where_it_cannot_be_read():
    class EetqLinear(nn.Module):
        """What EETQ's layer shows: sizes and packed numbers."""

        def __init__(self, plain: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = plain.in_features, plain.out_features
            self.register_buffer("weight", plain.weight.detach().T.clone())
            self.bias = plain.bias

        def forward(self, x):
            return x @ self.weight + (0 if self.bias is None else self.bias)

    model, batch = swap(base(), EetqLinear), models.inputs("llama")
    adapted = get_peft_model(model, veneer.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    models.perturb(adapted, "default", 3, 0.3)
    active = output(adapted, batch)
    with pytest.raises(NotMergeable, match="EetqLinear"):
        adapted.merge_adapter()
    assert torch.equal(output(adapted, batch), active)
    with pytest.raises(NotMergeable, match="cannot be read"):
        adapted.add_adapter("dora", veneer.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_gptq_is_read_through_its_own_dequantise():
    class TorchQuantLinear(nn.Module):
        """What gptqmodel's layer shows."""

        def __init__(self, plain: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = plain.in_features, plain.out_features
            self.register_buffer("qweight", plain.weight.detach().clone())
            self.bias = plain.bias

        def dequantize_weight(self):
            return self.qweight.T

        def forward(self, x):
            return nn.functional.linear(x, self.qweight, self.bias)

    batch = models.inputs("llama")
    for method in ("lora", "dora", "oft"):
        model = adapted(swap(base(), TorchQuantLinear), method)
        torch.testing.assert_close(output(model, batch), output(adapted(base(), method), batch), rtol=1e-4, atol=1e-4)
        with pytest.raises(NotMergeable, match="TorchQuantLinear"):
            model.merge_adapter()


def test_the_file_goes_between_quantised_and_whole_bases(library: str, tmp_path):
    """What was trained on one may be used, or merged, on the other; another model is refused as ever."""
    adapted(base(library), "lora").save_pretrained(tmp_path / "quantised")
    adapted(base(), "lora").save_pretrained(tmp_path / "whole")
    torch.manual_seed(5)
    other = models.llama(**SIZES).requires_grad_(False)
    for p in other.parameters():
        p.data.normal_(0, 0.2) if p.dim() > 1 else None
    for place in ("quantised", "whole"):
        for model in (base(), base(library)):
            PeftModel.from_pretrained(model, tmp_path / place)
        for model in (copy.deepcopy(other), swap(copy.deepcopy(other), LIBRARIES[library])):
            with pytest.raises(veneer.BaseMismatch):
                PeftModel.from_pretrained(model, tmp_path / place)


def test_the_weights_read_the_same_after_running(library: str):
    """Some libraries repack them for inference."""
    model = adapted(base(library), "lora")
    layers = dict(model._state.layers)
    before = {path: layer.target.weight().clone() for path, layer in layers.items()}
    output(model, models.inputs("llama"))
    with model.disable_adapter():
        output(model, models.inputs("llama"))
    for path, W in before.items():
        assert off(layers[path].target.weight(), W) < 0.01, path
