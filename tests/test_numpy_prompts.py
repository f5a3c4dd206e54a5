"""Methods in front of the input or beside attention, derived again in NumPy from their papers with no code of ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import veneer

from . import models
from .test_numpy import arr, attach, base_of, relu, softmax, state, watching

TOLERANCE = dict(rtol=1e-5, atol=2e-5)


def prompt(model):
    return state(model).prompts["default"]


def values(module) -> dict[str, np.ndarray]:
    return {name: arr(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def spliced(name: str, p: np.ndarray, batch: dict) -> np.ndarray:
    """The base model's logits with embeddings put in front by hand; p is (n, width) or (batch, n, width)."""
    base = models.build(name)
    rows = base.get_input_embeddings()(batch["input_ids"])
    front = torch.tensor(p, dtype=rows.dtype).expand(len(rows), -1, -1)
    with torch.no_grad():
        return arr(base(inputs_embeds=torch.cat([front, rows], 1)).logits)


def lstm(x: np.ndarray, p: dict[str, np.ndarray], ending: str) -> np.ndarray:
    """One direction of an LSTM over (time, width), by its equations."""
    W, U, b = p[f"weight_ih_{ending}"], p[f"weight_hh_{ending}"], p[f"bias_ih_{ending}"] + p[f"bias_hh_{ending}"]
    h = c = np.zeros(U.shape[1])
    out = []
    for row in x[::-1] if ending.endswith("reverse") else x:
        i, f, g, o = np.split(W @ row + U @ h + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out[::-1] if ending.endswith("reverse") else out)


def mlp(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Linear layers with ReLU between them."""
    numbers = sorted({int(name.split(".")[1]) for name in p if name.startswith("mlp_head")})
    for i in numbers:
        x = (x if i == 0 else relu(x)) @ p[f"mlp_head.{i}.weight"].T + p[f"mlp_head.{i}.bias"]
    return x


@pytest.mark.parametrize(("kind", "layers"), [("MLP", 2), ("LSTM", 1), ("LSTM", 2)])
def test_p_tuning(kind: str, layers: int, tmp_path):
    """The encoder's output in front of the input; the file holds just that."""
    config = veneer.PromptEncoderConfig(
        num_virtual_tokens=4,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=11,
        encoder_num_layers=layers,
        encoder_dropout=0.5 if layers > 1 else 0.0,
    )
    model, batch = attach("llama", config), models.inputs("llama")
    p = values(prompt(model))
    x = p["embedding.weight"]
    heads = {name.removeprefix("lstm_head."): v for name, v in p.items()}
    for layer in range(layers if kind == "LSTM" else 0):
        x = np.concatenate([lstm(x, heads, f"l{layer}"), lstm(x, heads, f"l{layer}_reverse")], -1)
    x = mlp(x, p)
    with torch.no_grad():
        np.testing.assert_allclose(arr(model(**batch).logits), spliced("llama", x, batch), **TOLERANCE)
    model.train().save_pretrained(tmp_path)
    assert model.training and prompt(model).training
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt_embeddings"}
    np.testing.assert_allclose(tensors["prompt_embeddings"], x, **TOLERANCE)


def test_p_tuning_cannot_be_trained_on_from_its_file_alone(tmp_path):
    attach("llama", veneer.PromptEncoderConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    (tmp_path / "adapter_training.safetensors").unlink()
    with pytest.raises(veneer.CheckpointError, match="is_trainable=False"):
        veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path, is_trainable=True)


def test_p_tunings_encoder_is_checked():
    with pytest.raises(veneer.ConfigError, match="MLP or LSTM"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="GRU")
    with pytest.raises(veneer.ConfigError, match="encoder_dropout"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_dropout=1.0)


# Cartridges


class Numbers:
    """A tokenizer that reads numbers; with a template it puts a token in front."""

    def __init__(self, template: bool) -> None:
        self.chat_template = "template" if template else None

    def apply_chat_template(self, messages, tokenize: bool):
        return "9 " + messages[0]["content"]

    def __call__(self, text: str, add_special_tokens: bool = True):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cartridge_is_a_cache(name: str):
    """One row a position: for each layer its keys, then its values, head after head."""
    from transformers import DynamicCache

    model = attach(name, veneer.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=2))
    p, (heads, d) = values(prompt(model)), {"llama": (1, 14), "gpt2": (5, 6)}[name]
    assert p["frozen_embedding"].shape == p["trainable_embedding"].shape == (2, 2 * 2 * heads * d)
    rows = np.concatenate([p["frozen_embedding"], p["trainable_embedding"]]).reshape(4, 2, 2, heads, d)
    base, batch = models.build(name), models.inputs(name)
    cache = DynamicCache(config=base.config)
    for layer in range(2):
        k, v = (np.stack([rows[:, layer, i].transpose(1, 0, 2)] * 3) for i in (0, 1))
        cache.update(torch.tensor(k, dtype=torch.float32), torch.tensor(v, dtype=torch.float32), layer)
    with torch.no_grad():
        expected = base(**batch, past_key_values=cache, position_ids=torch.arange(4, 11)[None]).logits
        np.testing.assert_allclose(arr(model(**batch).logits), arr(expected), **TOLERANCE)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("config", [veneer.CartridgeConfig, veneer.PrefixTuningConfig])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_started_at_a_text_a_prefix_is_that_text_in_the_context(name: str, config, template: bool):
    model, batch = attach(name, config(num_virtual_tokens=4)).train(), models.inputs(name)
    before = list(prompt(model).parameters())
    veneer.initialize_kv_prefix_from_text(model, Numbers(template), text="5 17 33 8 40 3")
    assert model.training and all(a is b for a, b in zip(before, prompt(model).parameters(), strict=True))
    text = torch.tensor([[9, 5, 17, 33] if template else [5, 17, 33, 8]]).expand(3, -1)
    with torch.no_grad():
        expected = models.build(name)(torch.cat([text, batch["input_ids"]], 1)).logits[:, 4:]
        np.testing.assert_allclose(arr(model.eval()(**batch).logits), arr(expected), **TOLERANCE)


def test_a_prefix_cannot_start_at_what_does_not_fit():
    from transformers import DynamicCache

    model = attach("llama", veneer.CartridgeConfig(num_virtual_tokens=4))
    with pytest.raises(veneer.ConfigError, match="3 tokens"):
        veneer.initialize_kv_prefix_from_text(model, Numbers(False), text="5 17 33")
    other = models.build("gpt2")(torch.arange(3, 9)[None], use_cache=True).past_key_values
    with pytest.raises(veneer.ConfigError, match="another model"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=other)
    with pytest.raises(veneer.ConfigError, match="empty"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=DynamicCache())
    with pytest.raises(veneer.ConfigError, match="of its own"):
        veneer.initialize_kv_prefix_from_text(
            attach("llama", veneer.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)),
            Numbers(False),
            text="5 6 7 8",
        )


def test_a_cartridges_first_positions_are_not_trained():
    model, batch = attach("llama", veneer.CartridgeConfig(num_virtual_tokens=3)).train(), models.inputs("llama")
    before = values(prompt(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    after = values(prompt(model))
    assert np.array_equal(before["frozen_embedding"], after["frozen_embedding"])
    assert not np.isclose(before["trainable_embedding"], after["trainable_embedding"]).all(1).any()
    with pytest.raises(veneer.ConfigError, match="leaves none"):
        veneer.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=3)


def test_cartridges_compose(tmp_path):
    for i, n in enumerate((3, 5)):
        torch.manual_seed(i)
        attach("llama", veneer.CartridgeConfig(num_virtual_tokens=n)).save_pretrained(tmp_path / str(i))
    veneer.compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    both = veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path / "both")
    rows = [load_file(tmp_path / d / "adapter_model.safetensors")["prompt_embeddings"] for d in ("0", "1", "both")]
    np.testing.assert_array_equal(np.concatenate(rows[:2]), rows[2])
    assert both.active_peft_config.num_virtual_tokens == 8
    attach("gpt2", veneer.CartridgeConfig(num_virtual_tokens=3)).save_pretrained(tmp_path / "other")
    with pytest.raises(veneer.ConfigError, match="another model: its token_dim is 30"):
        veneer.compose_cartridge_adapters([tmp_path / "0", tmp_path / "other"], output_path=tmp_path / "mixed")
    with pytest.raises(veneer.ConfigError, match="two cartridges"):
        veneer.compose_cartridge_adapters([tmp_path / "0"], output_path=tmp_path / "one")


# Multitask prompt tuning


@pytest.mark.parametrize("tasks", [[2, 0, 1], torch.tensor([1, 1, 2]), 2])
def test_multitask_prompt_tuning(tasks):
    """P * (U_k V_k) for the task of each row; a number alone is everyone's."""
    config = veneer.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    model, batch = attach("llama", config, scale=0.5), models.inputs("llama")
    p = values(prompt(model))
    of_rows = [tasks] * 3 if isinstance(tasks, int) else [int(k) for k in tasks]
    P = [p["prompt_embeddings"] * (p["prefix_task_cols"][k] @ p["prefix_task_rows"][k]) for k in of_rows]
    with torch.no_grad():
        logits = arr(model(**batch, task_ids=tasks).logits)
    np.testing.assert_allclose(logits, spliced("llama", np.stack(P), batch), **TOLERANCE)
    with pytest.raises(veneer.VeneerError, match="3 tasks; pass task_ids"):
        model(**batch)


def test_beams_keep_their_task():
    config = veneer.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    model, ids = attach("llama", config, scale=0.9), models.inputs("llama")["input_ids"]
    settings = dict(num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    together = model.generate(input_ids=ids, task_ids=[2, 0, 1], **settings)
    for row, task in enumerate((2, 0, 1)):
        alone = model.generate(input_ids=ids[row : row + 1], task_ids=[task], **settings)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_new_task_starts_from_others(how: str, tmp_path):
    settings = dict(num_virtual_tokens=4, num_ranks=2, task_type="CAUSAL_LM")
    source = attach("llama", veneer.MultitaskPromptTuningConfig(num_tasks=3, **settings))
    source.save_pretrained(tmp_path)
    s = values(prompt(source))
    config = veneer.MultitaskPromptTuningConfig(
        prompt_tuning_init=how,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
        prompt_tuning_init_task=1,
        **settings,
    )
    p = values(prompt(veneer.get_peft_model(models.build("llama"), config)))
    np.testing.assert_array_equal(p["prompt_embeddings"], s["prompt_embeddings"])
    for name in ("prefix_task_cols", "prefix_task_rows"):
        expected = {"AVERAGE_SOURCE_TASKS": s[name].mean(0), "EXACT_SOURCE_TASK": s[name][1]}.get(how)
        if expected is None:
            assert 0.005 < p[name].std() < 0.04
        else:
            np.testing.assert_allclose(p[name], expected[None], **TOLERANCE)
    target = attach("llama", config)
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "adapter_model.safetensors").unlink()
    again = veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path / "target")
    batch = models.inputs("llama")
    assert torch.equal(again(**batch).logits, target(**batch).logits), "one task needs neither a number nor its source"


def test_what_a_new_task_cannot_start_from_is_refused(tmp_path):
    settings = dict(num_virtual_tokens=4, prompt_tuning_init_state_dict_path=str(tmp_path))
    attach("llama", veneer.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3)).save_pretrained(tmp_path)

    def start(**more):
        veneer.get_peft_model(models.build("llama"), veneer.MultitaskPromptTuningConfig(**settings | more))

    exact = dict(prompt_tuning_init="EXACT_SOURCE_TASK")
    for error, match, more in (
        (veneer.ConfigError, "the source has 3 tasks", exact | dict(prompt_tuning_init_task=3)),
        (veneer.ConfigError, "starts one task", exact | dict(num_tasks=2)),
        (veneer.ConfigError, "needs prompt_tuning_init_state", exact | dict(prompt_tuning_init_state_dict_path=None)),
        (veneer.CheckpointError, "no safetensors file", exact | dict(prompt_tuning_init_state_dict_path="a.bin")),
        (veneer.CheckpointError, "'prefix_task_cols' is .3, 4, 1. in the file", exact | dict(num_ranks=2)),
        (veneer.CheckpointError, "'prompt_embeddings' is .4, 30.", exact | dict(num_virtual_tokens=5)),
    ):
        with pytest.raises(error, match=match):
            start(**more)


# LLaMA-Adapter


def turned(q: np.ndarray, base: float) -> np.ndarray:
    """Rotary positions: halves of (batch, time, heads, d) as complex numbers, turned by time base^(-2i / d)."""
    d = q.shape[-1]
    angle = np.arange(q.shape[1])[:, None] * base ** (-np.arange(0, d, 2) / d)
    z = (q[..., : d // 2] + 1j * q[..., d // 2 :]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


def seen_tokens(base, x: np.ndarray, P: np.ndarray, kind: str) -> np.ndarray:
    """What an attention takes from P: softmax(q K_P^T / sqrt(d)) V_P, and W_o after it but for GPT-2."""
    d = base.head_dim
    if kind == "gpt2":
        W, b = base_of(base.c_attn)
        (q, k, v) = (np.split(t @ W.T + b, 3, -1)[i] for i, t in enumerate((x, P, P)))
    else:
        q, k, v = (
            t @ base_of(p)[0].T + base_of(p)[1] for t, p in ((x, base.q_proj), (P, base.k_proj), (P, base.v_proj))
        )
    q, k, v = q.reshape(*x.shape[:2], -1, d), k.reshape(len(P), -1, d), v.reshape(len(P), -1, d)
    q = q if kind == "gpt2" else turned(q, 10000.0)
    heads = np.arange(q.shape[2]) // (q.shape[2] // k.shape[1])
    weights = softmax(np.einsum("bthd,nhd->bhtn", q, k[:, heads]) / np.sqrt(d))
    out = np.einsum("bhtn,nhd->bthd", weights, v[:, heads]).reshape(*x.shape[:2], -1)
    return out if kind == "gpt2" else out @ base_of(base.o_proj)[0].T


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_adaption_prompts(name: str):
    """y + g W_o softmax(q K_P^T / sqrt(d)) V_P in the upper layers alone."""
    model = attach(name, veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=1))
    ((path, layer),) = state(model).layers.items()
    assert ".1." in path
    p = values(layer.adapters["default"])
    with torch.no_grad(), watching(layer.base_layer) as base, watching(layer) as whole:
        model(**models.inputs(name))
    (x, y), (_, found) = base[0], whole[0]
    seen = seen_tokens(layer.base_layer, x, p["adaption_prompt"][0], name)
    assert np.abs(p["adaption_gate"] * seen).max() > 0.05
    np.testing.assert_allclose(found, y + p["adaption_gate"] * seen, **TOLERANCE)


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**models.LLAMA | dict(attention_bias=False)))


def phi():
    """Rotates a part of each head."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=3, vocab_size=67)
    return PhiForCausalLM(PhiConfig(**sizes, partial_rotary_factor=0.4, attn_implementation="eager"))


def cohere():
    """Rotates neighbours instead of halves."""
    from transformers import CohereConfig, CohereForCausalLM

    settings = {k: v for k, v in models.LLAMA.items() if k not in ("mlp_bias", "head_dim")} | dict(
        num_attention_heads=3, num_key_value_heads=3
    )
    return CohereForCausalLM(CohereConfig(**settings))


@pytest.mark.parametrize("build", [qwen3, phi, cohere])
def test_adaption_prompts_query_as_the_architecture_does(build, monkeypatch):
    """The query that looks at the learned tokens is the one that the attention itself looks at its keys with."""
    import sys

    torch.manual_seed(0)
    model = veneer.get_peft_model(build(), veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=1)).eval()
    ((_, layer),) = state(models.perturb(model)).layers.items()
    seen, module = {}, sys.modules[type(layer.base_layer).__module__]
    attend, adapter = module.eager_attention_forward, layer.adapters["default"]

    def watched(attention, query, *args, **kwargs):
        seen[attention] = query
        return attend(attention, query, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", watched)
    turned_by = adapter._turned
    monkeypatch.setattr(adapter, "_turned", lambda q: seen.setdefault("ours", turned_by(q)))
    model(input_ids=models.inputs("llama")["input_ids"])
    torch.testing.assert_close(seen["ours"], seen[layer.base_layer])


def test_a_mixed_batch_of_adaption_prompts_and_adapted_projections():
    """The rows of one are not projected by the adapters of the others; active together, they are."""
    model = attach("llama", veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=2), scale=0.9)
    model.add_adapter("lora", veneer.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "o_proj"]))
    models.perturb(model, "lora", 5, 0.9)
    batch, names = models.inputs("llama", rows=4), ["lora", "default", "__base__", "default"]
    alone = {}
    for name in ("lora", "default", ["default", "lora"]):
        model.set_adapter(name)
        alone[str(name)] = model(**batch).logits
    with model.disable_adapter():
        alone["__base__"] = model(**batch).logits
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)
    assert (alone["['default', 'lora']"] - alone["lora"]).abs().max() > 0.01


def test_adaption_prompts_say_what_they_cannot_adapt():
    with pytest.raises(veneer.ConfigError, match="adapter_len"):
        veneer.AdaptionPromptConfig(adapter_layers=1)
    for settings, match in (
        (dict(adapter_layers=3), "adapter_layers = 3, but the targets are 2"),
        (dict(adapter_layers=1, target_modules="mlp"), "no attention of a known form"),
    ):
        with pytest.raises(veneer.TargetError, match=match):
            attach("llama", veneer.AdaptionPromptConfig(adapter_len=4, **settings))


# Context-aware prompt tuning

CONTEXT = dict(cpt_token_ids=[5, 9, 30, 41, 7, 8, 12], cpt_tokens_type_mask=[1, 2, 3, 4, 5, 8, 8])
TYPES = torch.tensor([[0, 1, 2, 2, 3, 4, 4], [1, 2, 2, 3, 4, 4, 0], [1, 2, 3, 3, 3, 3, 4]])


def cpt_loss(logits: np.ndarray, labels: np.ndarray, types: np.ndarray, factor: float) -> float:
    """The mean over answers of -log p(answer), one k answers before the row's last weighing factor^k."""
    losses = []
    for row in range(len(labels)):
        kinds = sorted({t for t in types[row] if t > 0 and t % 4 == 0}, reverse=True)
        for at in range(1, labels.shape[1]):
            if types[row, at] in kinds and labels[row, at] != -100:
                p = softmax(logits[row, at - 1])[labels[row, at]]
                losses.append(-np.log(p) * factor ** kinds.index(types[row, at]))
    return float(np.mean(losses))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("factor", [None, 0.7])
def test_cpt(given: bool, factor: float | None):
    """Embeddings in front of the input, and a loss over the answers of the examples and of the input."""
    weighing = dict(opt_weighted_loss_type="decay", opt_loss_decay_factor=factor) if factor else {}
    model, batch = attach("llama", veneer.CPTConfig(**CONTEXT, **weighing)), models.inputs("llama")
    ids = batch["input_ids"]
    labels = torch.where(torch.arange(7) == 2, -100, ids)
    own = np.array(CONTEXT["cpt_tokens_type_mask"])
    types = np.concatenate(
        [np.stack([own] * 3), np.where(TYPES > 0, TYPES + 8, 0) if given else np.full((3, 7), 12)], 1
    )
    facts, kept = dict(input_type_mask=TYPES) if given else {}, TYPES.clone()
    with torch.no_grad():
        out = model(**batch, labels=labels, **facts)
    np.testing.assert_allclose(
        arr(out.logits), spliced("llama", values(prompt(model))["prompt_embeddings"], batch), **TOLERANCE
    )
    answers = np.concatenate([np.stack([np.array(CONTEXT["cpt_token_ids"])] * 3), labels.numpy()], 1)
    np.testing.assert_allclose(float(out.loss), cpt_loss(arr(out.logits), answers, types, factor or 1.0), rtol=1e-5)
    assert torch.equal(TYPES, kept) and "loss" not in model(**batch)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch, labels=ids).loss, models.build("llama")(**batch, labels=ids).loss)


def test_cpts_own_types_leave_the_inputs_labels():
    """The default mask ends at 1, no multiple of 4: the input's types are shifted by the next one."""
    model, batch = attach("llama", veneer.CPTConfig(cpt_token_ids=[5, 9])), models.inputs("llama")
    with torch.no_grad():
        out = model(**batch, labels=batch["input_ids"])
    labels = np.concatenate([np.full((3, 2), -100), batch["input_ids"].numpy()], 1)
    np.testing.assert_allclose(float(out.loss), cpt_loss(arr(out.logits), labels, np.full((3, 9), 4), 1.0), rtol=1e-5)


def test_cpt_stays_in_its_balls():
    """However far a step goes; the answers do not move, not even by weight decay; a copy trains by itself."""
    import copy

    config = veneer.CPTConfig(**CONTEXT, opt_projection_epsilon=3.0, opt_projection_format_epsilon=1.5)
    first = veneer.get_peft_model(models.build("llama"), config)
    for model in (first, copy.deepcopy(first)):
        start, batch = values(prompt(model))["prompt_embeddings"], models.inputs("llama")
        words = arr(models.build("llama").get_input_embeddings().weight)
        np.testing.assert_array_equal(start, words[CONTEXT["cpt_token_ids"]])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
        for _ in range(3):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = np.linalg.norm(values(prompt(model))["prompt_embeddings"] - start, axis=1)
        eps = np.array([1.5, 3.0, 1.5, 0, 1.5, 0, 0]) * np.sqrt(30 / 2048)
        np.testing.assert_allclose(moved, eps, rtol=1e-4, atol=1e-6)


def test_cpts_settings_are_checked():
    for settings, match in (
        (dict(cpt_token_ids=[1, 2], cpt_mask=[1]), "long"),
        (dict(cpt_token_ids=[1, 2], num_virtual_tokens=3), "long"),
        (dict(cpt_token_ids=[1], task_type="SEQ_CLS"), "CAUSAL_LM"),
        (dict(cpt_token_ids=[1], opt_weighted_loss_type="linear"), "linear"),
        (dict(cpt_token_ids=[]), "num_virtual_tokens"),
    ):
        with pytest.raises(veneer.ConfigError, match=match):
            veneer.CPTConfig(**settings)
    with pytest.raises(veneer.ConfigError, match="below 67"):
        attach("llama", veneer.CPTConfig(cpt_token_ids=[67]))
    with pytest.raises(veneer.ConfigError, match="decoder"):
        attach("t5", veneer.CPTConfig(cpt_token_ids=[3], task_type="CAUSAL_LM"))


# ShadowPEFT

SHADOW = dict(r=3, shadow_alpha=0.8, update_hidden_size=7)


def gelu(x: np.ndarray) -> np.ndarray:
    from math import erf

    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def two_layers(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    W = {i: p[f"{name}.default.{i}.weight"] for i in (0, 2)}
    b = {i: p[f"{name}.default.{i}.bias"] for i in (0, 2)}
    return gelu(x @ W[0].T + b[0]) @ W[2].T + b[2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("width", [None, 18])
def test_shadow(name: str, width: int | None):
    """Each block's input corrected by what differs from the shadow's state, which its output moves on."""
    sizes = dict(shadow_hidden_size=width, shadow_num_attention_heads=3) if width else {}
    model, batch = attach(name, veneer.ShadowConfig(**SHADOW, **sizes)), models.inputs(name)
    layers = list(state(model).layers.values())
    network = state(model).shared["default"]
    with torch.no_grad(), watching(layers[0]) as first, watching(layers[1]) as second:
        with watching(layers[0].base_layer) as first_inside, watching(layers[1].base_layer) as second_inside:
            model(**batch)
        backbone = network.shadow_backbone["default"]
        assert len(getattr(backbone, "layers", getattr(backbone, "h", None))) == 1
        words = model.get_base_model().get_input_embeddings()(batch["input_ids"])
        inputs = dict(input_ids=batch["input_ids"]) if width else dict(inputs_embeds=words)
        s = arr(backbone(**inputs).last_hidden_state)
    s = s @ arr(network.shadow_projection["default"].weight).T if width else s
    seen = ((first, first_inside), (second, second_inside))
    for layer, (outside, inside) in zip(layers, seen, strict=True):
        p = values(layer.adapters["default"])
        (h, _), (corrected, out) = outside[0], inside[0]
        step = 0.8 * (h - s) @ p["shadow_down.default.weight"].T @ p["shadow_up.default.weight"].T
        assert np.abs(step).max() > 0.05
        np.testing.assert_allclose(corrected, h + step, rtol=1e-4, atol=1e-4)
        gate = sigmoid(two_layers(p, "shadow_update_gate", out))
        s = (1 - gate) * s + gate * two_layers(p, "shadow_update_transform", out)


def test_shadows_own_loss():
    """The model's head on s_0, weighed, in training alone."""
    model, batch = (
        attach("llama", veneer.ShadowConfig(task_type="CAUSAL_LM", auxiliary_loss_weight=0.3)),
        models.inputs("llama"),
    )
    labels = torch.where(torch.arange(7) == 2, -100, batch["input_ids"])
    with torch.no_grad():
        network, base = state(model).shared["default"], model.get_base_model()
        alone = float(model(**batch, labels=labels).loss)
        logits = arr(base.lm_head(network(base, batch)))[:, :-1]
    wanted, target = labels[:, 1:].numpy() != -100, labels[:, 1:].numpy()
    judged = -np.log(softmax(logits)[wanted][np.arange(wanted.sum()), target[wanted]]).mean()
    np.testing.assert_allclose(model(**batch, labels=labels).loss.item(), alone + 0.3 * judged, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_shadows_cache_is_reordered_with_the_models(name: str, beams: int):
    """Rows of two shadows and of none in one batch, with beams, equal each row alone without a cache."""
    base = models.build(name)
    model = veneer.get_peft_model(base, veneer.ShadowConfig(**SHADOW), "one").eval()
    model.add_adapter("two", veneer.ShadowConfig(r=2, shadow_alpha=2.0, shadow_num_hidden_layers=2))
    models.perturb(models.perturb(model, "one", 3, 0.5), "two", 4, 0.5)
    ids, names = models.inputs(name, rows=4)["input_ids"], ["one", "two", "__base__", "one"]
    settings = dict(num_beams=beams, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    mixed = model.generate(input_ids=ids, adapter_names=names, **settings)
    rows = []
    for row, adapter in enumerate(names):
        model.set_adapter("one" if adapter == "__base__" else adapter)
        with model.disable_adapter() if adapter == "__base__" else torch.no_grad():
            rows.append(model.generate(input_ids=ids[row : row + 1], use_cache=False, **settings))
    assert torch.equal(mixed, torch.cat(rows)) and len({tuple(r[0, -5:].tolist()) for r in rows}) > 2


def test_a_cache_the_shadow_did_not_see_is_refused():
    from transformers import DynamicCache

    model, ids = attach("llama", veneer.ShadowConfig(**SHADOW)), models.inputs("llama")["input_ids"]
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(veneer.VeneerError, match="filled without"):
        model(input_ids=ids[:, 4:], past_key_values=cache)
    for cache in (DynamicCache(), DynamicCache(config=model.get_base_model().config)):
        first = model(input_ids=ids[:, :4], past_key_values=cache).logits
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, rest], 1), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(veneer.VeneerError, match="static cache"):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")


def projected(directory, width: int = 18):
    """A shadow on disk with its projection to the model's width; returns both."""
    import json

    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(4)
    small = LlamaModel(
        LlamaConfig(**models.LLAMA | dict(hidden_size=width, num_hidden_layers=1, num_attention_heads=3))
    )
    W = torch.randn(30, width)
    tensors = {f"shadow_model.{k}": t for k, t in small.state_dict().items()} | {"shadow_hidden_projection.weight": W}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    inner = {k: v for k, v in small.config.to_dict().items() if k not in ("transformers_version", "architectures")}
    content = dict(model_type="causal_lm_with_hidden_projection", shadow_model_config=inner)
    (directory / "config.json").write_text(json.dumps(content))
    return small, W


def test_a_projected_shadow_is_read_from_its_directory(tmp_path):
    small, W = projected(tmp_path / "shadow")
    model = veneer.get_peft_model(
        models.build("llama"), veneer.ShadowConfig(shadow_model=str(tmp_path / "shadow"), task_type="CAUSAL_LM")
    )
    network, batch = state(model).shared["default"], models.inputs("llama")
    with torch.no_grad():
        expected = small.eval()(**batch).last_hidden_state @ W.T
        torch.testing.assert_close(network.eval()(model.get_base_model(), batch), expected)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert "shadow_projection.default.weight" in trained and not any("embed_tokens" in n for n in trained)
    small.save_pretrained(tmp_path / "plain")
    plain = veneer.ShadowConfig(shadow_model=str(tmp_path / "plain"))
    network = state(veneer.get_peft_model(models.build("llama"), plain)).shared["default"]
    assert torch.equal(network.shadow_backbone["default"].norm.weight, small.norm.weight)
    assert network.shadow_projection["default"].weight.shape == (30, 18)


def test_what_a_shadow_cannot_be_is_refused(tmp_path):
    with pytest.raises(veneer.ConfigError, match="sizes are the mirror's"):
        veneer.ShadowConfig(shadow_model="somewhere", shadow_hidden_size=3)
    for name, config, error, match in (
        ("llama", veneer.ShadowConfig(shadow_model="somewhere"), veneer.CheckpointError, "no directory"),
        ("t5", veneer.ShadowConfig(), veneer.TargetError, "decoder"),
        ("conv", veneer.ShadowConfig(), veneer.TargetError, "no list of layers"),
        ("llama", veneer.ShadowConfig(target_modules=["q_proj"]), veneer.TargetError, "linear"),
    ):
        with pytest.raises(error, match=match):
            veneer.get_peft_model(models.build(name), config)
