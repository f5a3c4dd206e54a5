"""What must hold of an adapted model, whatever its architecture.

Each check raises AssertionError where veneer is at fault, and VeneerError where it refuses. A check that the model
without an adapter does not pass itself says nothing of veneer: it raises `OfTheModel`.

Two results agree when they differ by far less than what the adapter does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    TargetError,
    VeneerError,
    get_peft_model,
    ops,
)

from ..models import perturb

Builder = Callable[[], nn.Module]
NEW = 5
"""Tokens to generate."""


class OfTheModel(Exception):
    """The model does not hold to the law without an adapter."""


def batch_of(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Two rows of nine tokens, without padding."""
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5].contiguous()
    return batch


def logits_of(model: nn.Module, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """The logits of a call without a cache."""
    with torch.no_grad():
        return model(**batch, use_cache=False, **more).logits.float()


def generated(model: nn.Module, use_cache: bool) -> Tensor:
    """The logits of each generated token: (tokens, rows, words)."""
    batch = batch_of(model)
    batch.pop("decoder_input_ids", None)
    out = model.generate(
        **batch,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack([step.float() for step in out.logits])


def agree(got: Tensor, expected: Tensor, effect: Tensor | float, what: str) -> None:
    """Fail where two results differ by more than a thousandth of what the adapter does."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    error = (got - expected).abs().max().item()
    size = effect if isinstance(effect, float) else effect.abs().max().item()
    rounding = 2e-6 * (1 + expected.abs().max().item())
    assert error <= 1e-3 * size + rounding, f"{what}: they differ by {error:.2g}; the adapter's effect is {size:.2g}"


def acts(effect: Tensor) -> None:
    """Fail where an adapter does nothing; where it does next to nothing, a check would see no difference."""
    size = effect.abs().max().item()
    assert size > 0, "the adapter does nothing"
    if size < 1e-4:
        raise OfTheModel(f"the adapter acts too weakly to tell, {size:.2g}")


@contextmanager
def of_the_model() -> Iterator[None]:
    """A failure in here is the model's own."""
    try:
        yield
    except Exception as error:
        raise OfTheModel(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def task(model: nn.Module) -> str:
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


READ = ("dt_proj", "router.classifier")
"""Linear layers whose weights some models read without running them, which veneer tells at the first call."""


def all_that_run(model: nn.Module, settings: dict[str, Any]) -> LoraConfig:
    """LoRA on all linear layers that the model runs."""
    paths = [path for path, _ in model.named_modules()]
    read = [name for name in READ if any(path.endswith(f".{name}") for path in paths)]
    return LoraConfig(**settings, target_modules="all-linear", exclude_modules=read or None)


def adapted(build: Builder, name: str = "default", **settings: Any) -> PeftModel:
    """A model with LoRA on its default targets, or on all linear layers where it has none."""
    model = build()
    settings = {"task_type": task(model), "r": 3} | settings
    try:
        peft_model = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    except TargetError:
        if "target_modules" in settings:
            raise
        peft_model = get_peft_model(build(), all_that_run(model, settings), adapter_name=name)
    return perturb(peft_model, name, scale=0.2).eval()


def has_default_targets(build: Builder) -> None:
    """`LoraConfig()` finds its targets."""
    model = build()
    get_peft_model(model, LoraConfig(task_type=task(model), r=3))


def saves_and_merges(build: Builder, **settings: Any) -> None:
    """A saved adapter gives the same outputs when it is loaded, and merged weights too; unloaded, the base is left."""
    base = build()
    batch = batch_of(base)
    plain = logits_of(base, batch)
    if not torch.equal(plain, logits_of(base, batch)):
        raise OfTheModel("two calls differ, without an adapter")
    model = adapted(build, **settings)
    active = logits_of(model, batch)
    effect = active - plain
    acts(effect)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(build(), folder).eval()
    assert torch.equal(logits_of(loaded, batch), active), "loaded and saved differ"
    with model.disable_adapter():
        agree(logits_of(model, batch), plain, 0.0, "disabled and base")
    merged = model.merge_and_unload().eval()
    agree(logits_of(merged, batch), active, effect, "merged and active")
    agree(logits_of(loaded.unload(), batch), plain, 0.0, "unloaded and base")


def all_linear(build: Builder) -> None:
    """The same with all linear layers adapted."""
    saves_and_merges(build, target_modules="all-linear")


def cached(build: Builder, make: Callable[[], PeftModel]) -> None:
    """Generation with a cache gives the logits of generation without."""
    base = build()
    with of_the_model():
        plain = generated(base, use_cache=True)
        agree(plain, generated(base, use_cache=False), 0.0, "cached and not, without an adapter")
    model = make()
    with_cache = generated(model, use_cache=True)
    effect = with_cache - plain
    acts(effect)
    agree(with_cache, generated(model, use_cache=False), effect, "cached and not")


def generates(build: Builder) -> None:
    """LoRA, with a cache and without."""
    cached(build, lambda: adapted(build))


def prompt(config_class: type, scale: float = 0.5, **settings: Any) -> Callable[[Builder], None]:
    """The same for a prompt method whose parameters were moved by so much."""

    def check(build: Builder) -> None:
        def make() -> PeftModel:
            model = build()
            peft_model = get_peft_model(model, config_class(task_type=task(model), **settings))
            return perturb(peft_model, scale=scale).eval()

        cached(build, make)

    return check


def mixes(build: Builder) -> None:
    """Two adapters in one batch give what each gives alone."""
    model = adapted(build, "first")
    config = model.peft_config["first"]
    targets = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    model.add_adapter("second", LoraConfig(task_type=task(model), r=2, **targets))
    perturb(model, "second", seed=3)
    batch = batch_of(model)
    mixed = logits_of(model, batch, adapter_names=["second", "first"])
    rows = []
    for i, name in enumerate(("second", "first")):
        model.set_adapter(name)
        rows.append(logits_of(model, {key: value[i : i + 1] for key, value in batch.items()}))
    effect = rows[0] - rows[1]
    with of_the_model():
        base = build()
        whole = logits_of(base, batch)
        first = logits_of(base, {key: value[:1] for key, value in batch.items()})
        agree(whole[:1], first, 0.0, "a row alone and in a batch, without an adapter")
    agree(mixed, torch.cat(rows), effect, "mixed and alone")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch and the gradients of all that trains."""
    labels = batch.get("decoder_input_ids", batch["input_ids"]).clone()
    if "decoder_input_ids" not in batch:
        labels[batch["attention_mask"] == 0] = -100
    model.zero_grad()
    torch.manual_seed(0)  # for routers that draw
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert trained, "nothing has a gradient"
    return loss.item(), trained


def same_gradients(got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], what: str) -> None:
    assert abs(got[0] - expected[0]) < 1e-4 * (1 + abs(expected[0])), f"{what}: loss {got[0]}, not {expected[0]}"
    assert got[1].keys() == expected[1].keys(), f"{what}: not the same parameters have gradients"
    if not all(gradient.isfinite().all() for gradient in expected[1].values()):
        raise OfTheModel("gradients are not finite, with the plain paths either")
    scale = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (got[1][name] - gradient).abs().max().item()
        assert error <= 1e-3 * scale, f"{what}: gradient of {name} differs by {error:.2g} of {scale:.2g}"


def checkpoints(build: Builder) -> None:
    """Gradient checkpointing gives the same gradients."""
    model = adapted(build).train()
    if not getattr(model.get_base_model(), "supports_gradient_checkpointing", False):
        raise OfTheModel("the model has no gradient checkpointing")
    batch = batch_of(model)
    with of_the_model():
        base = build().train()
        labels = batch.get("decoder_input_ids", batch["input_ids"])
        assert torch.equal(logits_of(base, batch), logits_of(base, batch)), "the model is random in training"
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base(**batch, labels=labels, use_cache=False).loss.backward()
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_gradients(gradients(model, batch), expected, "with checkpointing")


def padded(batch: dict[str, Tensor], left: bool) -> dict[str, Tensor]:
    """The batch with three tokens of its first row taken for padding."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    cut = slice(0, 3) if left else slice(6, 9)
    ids[0, cut] = 0
    mask[0, cut] = 0
    return batch | {"input_ids": ids, "attention_mask": mask}


def fast(build: Builder) -> None:
    """The fast paths give the loss and the gradients of the plain ones, with and without padding."""
    for kind in ("whole", "right", "left"):
        model = adapted(build).train()
        batch = batch_of(model)
        if kind != "whole":
            batch = padded(batch, kind == "left")
        with of_the_model(), ops.plain():
            labels = batch.get("decoder_input_ids", batch["input_ids"])
            loss = build().train()(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            assert loss.isfinite(), "the loss is not finite"
        with ops.plain():
            expected = gradients(model, batch)
        same_gradients(gradients(model, batch), expected, f"fast and plain, padding: {kind}")


def pads(build: Builder) -> None:
    """A row gives the same logits alone as in a batch with padding, where it does without an adapter."""
    for left in (False, True):

        def difference(model: nn.Module, left: bool = left) -> tuple[Tensor, Tensor]:
            batch = padded(batch_of(model), left)
            real = batch["attention_mask"][0].bool()
            alone = {key: value[:1] for key, value in batch.items()}
            alone |= {key: batch[key][:1, real] for key in ("input_ids", "attention_mask")}
            whole = logits_of(model, batch)[:1]
            if "decoder_input_ids" not in batch:
                whole = whole[:, real]
            return whole, logits_of(model, alone)

        side = "left" if left else "right"
        base = build()
        with of_the_model():
            agree(*difference(base), 0.0, f"padded on the {side} and alone, without an adapter")
        model = adapted(build)
        whole, alone = difference(model)
        agree(whole, alone, alone - difference(base)[1], f"padded on the {side} and alone")


CPT = dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 2])
CHECKS: dict[str, Callable[[Builder], None]] = {
    "default targets": has_default_targets,
    "save, load, merge": saves_and_merges,
    "all-linear": all_linear,
    "generate": generates,
    "mixed batch": mixes,
    "checkpointing": checkpoints,
    "fast paths": fast,
    "padding": pads,
    "prompt tuning": prompt(PromptTuningConfig, num_virtual_tokens=3),
    "p-tuning": prompt(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=16),
    "cpt": prompt(CPTConfig, **CPT),
    "prefix tuning": prompt(PrefixTuningConfig, num_virtual_tokens=3),
    "cartridge": prompt(CartridgeConfig, num_virtual_tokens=3),
    "shadow": prompt(ShadowConfig, scale=0.1),
}


def outcome(check: Callable[[Builder], None], build: Builder) -> tuple[str, str]:
    """What a check says of an architecture: ("holds" | "refused" | "model" | "fault", the reason)."""
    try:
        check(build)
    except OfTheModel as error:
        return "model", str(error)
    except AssertionError as error:
        return "fault", " ".join(str(error).split())
    except VeneerError as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:
        return "fault", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "holds", ""
