"""Adapters that stand on others: averages, splits, and one batch for several adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError, TargetError, get_peft_model

from . import models
from .models import output

TOLERANCE = dict(rtol=2e-4, atol=2e-5)
LINEARS = ["q_proj", "k_proj", "down_proj"]


def two(second=None, name: str = "llama"):
    """A model with the adapters "one" (a LoRA) and "two", both away from their starts."""
    model = get_peft_model(models.build(name), veneer.LoraConfig(r=3, target_modules=LINEARS), "one").eval()
    model.add_adapter("two", second or veneer.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    return models.perturb(models.perturb(model, "one", 1, 0.3), "two", 2, 0.3)


def compose(model, config):
    model.add_adapter("both", config)
    model.set_adapter("both")
    return model


def layer(model, end: str):
    return next(m for name, m in model.named_modules() if name.endswith(end) and hasattr(m, "base_layer"))


def alone(model, module, x, *names: str):
    model.set_adapter(list(names))
    return module(x)


OTHERS = {
    "lora": veneer.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True),
    "oft": veneer.OFTConfig(oft_block_size=5, target_modules=["q_proj"]),
    "hira": veneer.HiraConfig(r=2, target_modules=["q_proj"]),
    "ia3": veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_average_is_the_mean_of_the_outputs(other: str):
    """y' = sum_i w_i y_i, with sum w = 1, for adapters of any methods; each module alone."""
    model = compose(two(OTHERS[other]), veneer.AverageConfig(adapter_names=["one", "two"], weights=[3.0, 1.0]))
    module, x = layer(model, "q_proj"), torch.randn(2, 5, 30)
    both = module(x)
    expected = 0.75 * alone(model, module, x, "one") + 0.25 * alone(model, module, x, "two")
    torch.testing.assert_close(both, expected, **TOLERANCE)
    assert (both - module.base_layer(x)).abs().max() > 1e-2


def test_an_average_of_loras_is_the_weighted_sum_of_their_matrices():
    """W' = W + sum_i w_i B_i A_i: also what `add_weighted_adapter` gives."""
    model, batch = two(), models.inputs("llama")
    settings = dict(adapter_names=["one", "two"], weights=[0.7, -0.4], normalize_weights=False)
    compose(model, veneer.AverageConfig(**settings))
    averaged = output(model, batch)
    q = layer(model, "q_proj")
    W = q.base_layer.weight.detach().double().numpy()
    for name, w in (("one", 0.7), ("two", -0.4)):
        A, B = (getattr(q, f"lora_{m}")[name].weight.detach().double().numpy() for m in "AB")
        W = W + w * q.scaling[name] * B @ A
    np.testing.assert_allclose(q.fold([q.adapters["both"]])[0].detach().numpy(), W, rtol=1e-4, atol=1e-5)
    veneer.add_weighted_adapter(model, ["one", "two"], [0.7, -0.4], "summed", combination_type="cat")
    model.set_adapter("summed")
    torch.testing.assert_close(averaged, output(model, batch), **TOLERANCE)


def test_learned_weights_alone_train():
    model, batch = two(), models.inputs("llama")
    compose(model, veneer.AverageConfig(adapter_names=["one", "two"], learned=True))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.endswith("both.composition_weights") for name in trained)
    fixed = compose(two(), veneer.AverageConfig(adapter_names=["one", "two"]))
    assert not any(p.requires_grad for p in fixed.parameters())


def test_a_split_gives_each_token_its_adapter():
    model = compose(two(OTHERS["oft"]), veneer.SplitConfig(adapter_names=["one", "two"], splits=[2, 1]))
    module, x = layer(model, "q_proj"), torch.randn(2, 5, 30)
    both = module(x)
    first, second = (alone(model, module, x, name) for name in ("one", "two"))
    torch.testing.assert_close(both[:, :2], first[:, :2], **TOLERANCE)
    torch.testing.assert_close(both[:, 2:], second[:, 2:], **TOLERANCE)
    assert (first - second).abs().max() > 1e-2


def test_a_split_counts_from_the_first_real_token():
    model = compose(two(), veneer.SplitConfig(adapter_names=["one", "two"], splits=[2, 3]))
    ids = models.inputs("llama")["input_ids"][:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(input_ids=ids).logits
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 3:], plain, **TOLERANCE
    )


def test_a_split_generates_as_without_a_cache():
    model = compose(two(), veneer.SplitConfig(adapter_names=["one", "two"], splits=[9, 3]))
    ids = models.inputs("llama")["input_ids"][:, :4]
    settings = dict(
        max_new_tokens=8, min_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    cached, plain = (model.generate(input_ids=ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), **TOLERANCE)


def test_a_split_above_another_adapter_that_it_must_fold_is_refused():
    model = compose(two(OTHERS["oft"]), veneer.SplitConfig(adapter_names=["one", "two"], splits=[2, 1]))
    model.set_adapter(["one", "both"])
    with pytest.raises(veneer.NotMergeable):
        output(model, models.inputs("llama"))


def test_an_average_merges_if_all_it_reads_do():
    model = two(veneer.SeqBnConfig(reduction_factor=3))
    compose(model, veneer.AverageConfig(adapter_names=["one", "two"]))
    before = output(model, models.inputs("llama"))
    with pytest.raises(veneer.NotMergeable):
        model.merge_adapter()
    assert torch.equal(output(model, models.inputs("llama")), before)


def test_parallel_asks_each_adapter_about_each_row():
    model, batch = two(), models.inputs("llama")
    rows = len(batch["input_ids"])
    answers = model(**veneer.parallel(batch, ["one", "two", "__base__"])).logits
    for i, name in enumerate(("one", "two")):
        model.set_adapter(name)
        torch.testing.assert_close(answers[i * rows : (i + 1) * rows], output(model, batch), **TOLERANCE)
    with model.disable_adapter():
        torch.testing.assert_close(answers[2 * rows :], output(model, batch), **TOLERANCE)
    made = model.generate(**veneer.parallel(batch, ["one", "two"]), max_new_tokens=3, do_sample=False)
    assert len(made) == 2 * rows
    with pytest.raises(veneer.VeneerError, match="as many rows"):
        veneer.parallel({"a": torch.zeros(2), "b": torch.zeros(3)}, ["one"])


def test_a_composition_saves_and_loads(tmp_path):
    model, batch = two(), models.inputs("llama")
    compose(model, veneer.AverageConfig(adapter_names=["one", "two"], weights=[3, 1]))
    model.save_pretrained(tmp_path)
    other = veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path / "one", "one")
    with pytest.raises(veneer.VeneerError, match="reads adapter 'two'"):
        other.load_adapter(tmp_path / "both", "both")
    other.load_adapter(tmp_path / "two", "two")
    other.load_adapter(tmp_path / "both", "both")
    other.set_adapter("both")
    assert torch.equal(output(other.eval(), batch), output(model, batch))


def test_a_trained_head_is_averaged_too():
    model = models.build("llama")
    config = dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, veneer.LoraConfig(**config), "one").eval()
    model.add_adapter("two", veneer.LoraConfig(**config))
    for i, name in enumerate(("one", "two")):
        models.perturb(model, name, i, 0.3)
    compose(model, veneer.AverageConfig(adapter_names=["one", "two"]))
    head, x = layer(model, "lm_head"), torch.randn(2, 3, 30)
    both = head(x)
    expected = (alone(model, head, x, "one") + alone(model, head, x, "two")) / 2
    torch.testing.assert_close(both, expected, **TOLERANCE)


def test_what_cannot_be_composed_is_refused():
    model = two()
    with pytest.raises(TargetError, match="reads adapter 'three'; add or load it first"):
        model.add_adapter("both", veneer.AverageConfig(adapter_names=["one", "three"]))
    model.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(TargetError, match="'prompt' adapts none"):
        model.add_adapter("both", veneer.AverageConfig(adapter_names=["one", "prompt"]))
    with pytest.raises(ConfigError, match="two different adapters"):
        veneer.AverageConfig(adapter_names=["one"])
    with pytest.raises(ConfigError, match="3 entries for 2"):
        veneer.AverageConfig(adapter_names=["one", "two"], weights=[1, 2, 3])
    with pytest.raises(ConfigError, match="sum to 0"):
        veneer.AverageConfig(adapter_names=["one", "two"], weights=[1, -1])
    with pytest.raises(ConfigError, match="splits must give each"):
        veneer.SplitConfig(adapter_names=["one", "two"], splits=[3])
    t5 = get_peft_model(models.build("t5"), veneer.LoraConfig(target_modules=["q"]), "one")
    t5.add_adapter("two", veneer.LoraConfig(target_modules=["v"]))
    with pytest.raises(TargetError, match="source and target"):
        t5.add_adapter("both", veneer.SplitConfig(adapter_names=["one", "two"], splits=[3, 4]))
