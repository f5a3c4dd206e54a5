"""Which modules a config means: names, endings, expressions, layers and roles; every entry must match or is refused."""

from __future__ import annotations

import re
import string

import pytest
import torch
from torch import nn

import veneer
from veneer import ConfigError, LoraConfig, TargetError, get_peft_model
from veneer.core.state import state_of
from veneer.targets.roles import roles

from . import models

pytestmark = pytest.mark.filterwarnings("ignore")


def attach(name: str, **settings):
    return get_peft_model(models.build(name), LoraConfig(r=2, **settings))


def layers(model) -> dict:
    return dict(state_of(model.get_base_model()).layers)


def adapted(model) -> set[str]:
    """Paths of the modules that hold a LoRA."""
    found = {path: layer.adapters["default"].parts for path, layer in layers(model).items()}
    return {path for path, parts in found.items() if any(hasattr(part, "lora_A") for part in parts)}


def picked(name: str, **settings) -> set[str]:
    return set(layers(attach(name, **settings)))


def llama(*endings: str, indices=(0, 1)) -> set[str]:
    return {f"model.layers.{i}.{ending}" for i in indices for ending in endings}


def refused(name: str, error=TargetError, **settings) -> str:
    """The message a config is refused with; the model stays as it was."""
    model = models.build(name)
    before = [n for n, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(error) as caught:
        get_peft_model(model, LoraConfig(r=2, **settings))
    assert ([n for n, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]) == before
    return str(caught.value)


Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
MLP = ("mlp.gate_proj", "mlp.up_proj", DOWN)
ALL = (Q, "self_attn.k_proj", V, "self_attn.o_proj", *MLP)


# target_modules


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], llama(Q)),
        (["q_proj", "down_proj"], llama(Q, DOWN)),
        ({"q_proj", "down_proj"}, llama(Q, DOWN)),
        (("q_proj",), llama(Q)),
        (["self_attn.q_proj"], llama(Q)),
        (["0.self_attn.q_proj", "1.mlp.down_proj"], llama(Q, indices=[0]) | llama(DOWN, indices=[1])),
        (["model.layers.1.self_attn.q_proj"], llama(Q, indices=[1])),
        (r".*\.(q|v)_proj", llama(Q, V)),
        (r"model\.layers\.1\.mlp\..*_proj", llama(*MLP, indices=[1])),
        ("model.layers.1.self_attn.q_proj", llama(Q, indices=[1])),
        ("all-linear", llama(*ALL)),
        (["lm_head", "q_proj"], llama(Q) | {"lm_head"}),
        (["embed_tokens"], {"model.embed_tokens"}),
    ],
)
def test_target_modules(targets, expected):
    assert picked("llama", target_modules=targets) == expected


def test_an_ending_begins_at_a_dot():
    """`proj` is not an ending of `q_proj`, nor `_proj`; an expression must match the whole path."""
    for entry in ("proj", "_proj", "attn.q_proj"):
        assert repr(entry) in refused("llama", target_modules=[entry])
    for expression in ("q_proj", r"layers\..*q_proj", r".*\.q_pro"):
        assert repr(expression) in refused("llama", target_modules=expression)


def test_a_name_given_as_an_expression_is_told_so():
    message = refused("llama", target_modules="q_proj")
    assert "regular expression" in message and "['q_proj']" in message


def test_no_targets_are_refused():
    assert "target_modules" in refused("llama", target_modules=[])


def test_one_bad_entry_among_good_ones_is_refused():
    message = refused("llama", target_modules=["q_proj", "donw_proj", "v_proj"])
    assert "'donw_proj'" in message and "down_proj" in message and "target_modules" in message


@pytest.mark.parametrize(
    ("name", "head"), [("llama", "lm_head"), ("gpt2", "lm_head"), ("t5", "lm_head"), ("bert", None), ("conv", None)]
)
def test_all_linear_takes_every_linear_layer_but_the_output(name: str, head: str | None):
    linears = {p for p, m in models.build(name).named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert picked(name, target_modules="all-linear") == linears - {head}


def test_all_linear_leaves_the_tasks_head_to_be_trained_whole():
    model = get_peft_model(models.build("bert"), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert "classifier" not in adapted(model) and "bert.pooler.dense" in adapted(model)
    assert all(p.requires_grad for p in layers(model)["classifier"].adapters["default"].parameters())


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("gpt2", ["wte", "c_attn", "mlp.c_proj"], {"embedding", "linear"}),
        ("conv", ["first", "third", "head"], {"conv", "linear"}),
        ("bert", ["word_embeddings", "query", "pooler.dense"], {"embedding", "linear"}),
        ("t5", ["q", "wo", "lm_head"], {"linear"}),
    ],
)
def test_several_kinds_of_module_at_once(name, targets, expected):
    model = attach(name, target_modules=targets)
    assert {layer.target.kind for layer in layers(model).values()} == expected
    assert {next(t for t in targets if p == t or p.endswith("." + t)) for p in layers(model)} == set(targets)


def test_the_layout_of_the_weights_is_read_off_the_modules():
    for name, target, stored_transposed in (("gpt2", "c_attn", True), ("llama", "q_proj", False)):
        model = attach(name, target_modules=[target], fan_in_fan_out=not stored_transposed)
        assert model.peft_config["default"].fan_in_fan_out is stored_transposed


NAMES = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "mlp.c_proj", "wte"],
    "bert": ["query", "attention.output.dense", "classifier"],
    "t5": ["q", "EncDecAttention", "relative_attention_bias"],
}


def typos(name: str, letters: str = "") -> set[str]:
    """Every string one deletion, transposition or substitution away."""
    cuts = range(len(name))
    found = {name[:i] + name[i + 1 :] for i in cuts}
    found |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in cuts[:-1]}
    return (found | {name[:i] + c + name[i + 1 :] for i in cuts for c in letters}) - {name}


def real(entry: str, paths: list[str]) -> bool:
    return any(path == entry or path.endswith("." + entry) for path in paths)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in NAMES for target in NAMES[name]])
def test_every_typo_in_a_target_is_refused(name: str, target: str):
    """All deletions, transpositions and substitutions; those of a long enough name are told the right one."""
    model = models.build(name)
    before = [n for n, _ in model.named_modules()]
    paths = [p for p in before if p]
    assert real(target, paths)
    wrong = [t for t in typos(target, string.ascii_lowercase + "_.0") if not real(t, paths)]
    assert len(wrong) > 20 * len(target)
    for typo in wrong:
        with pytest.raises(TargetError) as caught:
            get_peft_model(model, LoraConfig(target_modules=[typo]))
        assert repr(typo) in str(caught.value)
        assert len(target) < 6 or target.rpartition(".")[2] in str(caught.value), typo
    assert [n for n, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("field", "entry", "of"),
    [
        ("exclude_modules", "down_proj", lambda t: [t]),
        ("modules_to_save", "lm_head", lambda t: [t]),
        ("rank_pattern", "down_proj", lambda t: {t: 4}),
        ("alpha_pattern", "down_proj", lambda t: {t: 4}),
        ("layers_pattern", "layers", lambda t: t),
    ],
)
def test_every_typo_in_the_other_fields_is_refused(field: str, entry: str, of):
    """The message names the field, the entry and the right name."""
    settings = dict(target_modules="all-linear") | ({"layers_to_transform": 0} if field == "layers_pattern" else {})
    assert picked("llama", **settings, **{field: of(entry)})
    for typo in typos(entry, "x_"):
        message = refused("llama", **settings, **{field: of(typo)})
        assert field in message and repr(typo) in message and entry in message, message


def test_each_entry_of_each_field_must_match():
    """A good entry beside it does not excuse a bad one."""
    settings = dict(target_modules=["q_proj", "down_proj"])
    for field, value in {
        "exclude_modules": ["layers.0.self_attn.q_proj", "oops"],
        "modules_to_save": ["lm_head", "oops"],
        "rank_pattern": {"q_proj": 4, "oops": 4},
        "alpha_pattern": {"q_proj": 4, "oops": 4},
    }.items():
        message = refused("llama", **settings, **{field: value})
        assert field in message and "'oops'" in message
    message = refused("llama", **settings, layers_to_transform=0, layers_pattern=["layers", "oops"])
    assert "layers_pattern" in message and "'oops'" in message


def test_an_empty_entry_is_refused():
    """It is not the name of the whole model."""
    settings = dict(target_modules=["q_proj"])
    for field, value in {
        "target_modules": [""],
        "exclude_modules": [""],
        "modules_to_save": ["lm_head", ""],
        "rank_pattern": {"": 4},
        "alpha_pattern": {"": 4},
    }.items():
        message = refused("llama", **settings | {field: value})
        assert field in message and "''" in message


def test_a_pattern_for_a_module_that_is_no_target_is_refused():
    """`k_proj` exists, but nothing there would have the rank."""
    for field in ("rank_pattern", "alpha_pattern"):
        assert "'k_proj'" in refused("llama", target_modules=["q_proj"], **{field: {"k_proj": 4}})


def test_the_feedforward_modules_of_ia3_must_be_targets():
    """By whichever way the targets are given."""
    for targets in (["k_proj", "down_proj"], r".*\.(k_proj|down_proj)"):
        for feedforward in (["donw_proj"], ["v_proj"], r".*\.donw_proj"):
            with pytest.raises((ConfigError, TargetError), match="feedforward_modules"):
                config = veneer.IA3Config(target_modules=targets, feedforward_modules=feedforward)
                get_peft_model(models.build("llama"), config)


@pytest.mark.parametrize("kind", ["SeqBnInvConfig", "DoubleSeqBnInvConfig", "BottleneckConfig", "ParBnConfig"])
def test_the_ends_of_bottlenecks_must_be_targets(kind: str):
    """Given ones are not lost where the targets are left to the library, nor where they have no use."""
    for field in ("input_modules", "output_modules"):
        if hasattr(getattr(veneer, kind), field):
            with pytest.raises((ConfigError, TargetError), match=field):
                get_peft_model(models.build("llama"), getattr(veneer, kind)(**{field: ["oops"]}))
    with pytest.raises(ConfigError, match="input_modules go with"):
        veneer.BottleneckConfig(input_modules=["o_proj"])


@pytest.mark.parametrize("pattern", [{"oops": [True]}, {"q_proj": 4}, {"q_proj": [1]}, {"oops.lora_E": [True] * 12}])
def test_the_ranks_of_a_cut_adalora_must_be_of_its_targets(pattern):
    with pytest.raises((ConfigError, TargetError), match="rank_pattern"):
        config = veneer.AdaLoraConfig(total_step=9, target_modules=["q_proj"], rank_pattern=pattern)
        get_peft_model(models.build("llama"), config)


# exclude_modules, layers_to_transform


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["o_proj", "mlp.gate_proj"], llama(*(set(ALL) - {"self_attn.o_proj", "mlp.gate_proj"}))),
        ({"layers.0.self_attn.q_proj"}, llama(*ALL) - llama(Q, indices=[0])),
        (r".*\.mlp\..*", llama(*ALL[:4])),
        (["embed_tokens"], llama(*ALL)),
    ],
)
def test_exclude_modules(exclude, left):
    assert picked("llama", target_modules="all-linear", exclude_modules=exclude) == left


def test_excluding_everything_is_refused():
    message = refused("llama", target_modules=["q_proj"], exclude_modules=["q_proj"])
    assert "exclude" in message and "q_proj" in message


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", dict(layers_to_transform=1), llama(Q, indices=[1])),
        ("llama", dict(layers_to_transform=[0]), llama(Q, indices=[0])),
        ("llama", dict(layers_to_transform=[0, 1]), llama(Q)),
        ("llama", dict(layers_to_transform=1, layers_pattern="layers"), llama(Q, indices=[1])),
        ("llama", dict(layers_to_transform=[1], layers_pattern=["layers"]), llama(Q, indices=[1])),
        ("gpt2", dict(layers_to_transform=[1], layers_pattern="h"), {"transformer.h.1.attn.c_attn"}),
        ("bert", dict(layers_to_transform=0), {"bert.encoder.layer.0.attention.self.query"}),
    ],
)
def test_layers_to_transform(name, settings, expected):
    target = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}[name]
    assert picked(name, target_modules=[target], **settings) == expected


def test_layers_where_a_path_holds_two_indices():
    """T5: `encoder.block.2.layer.1...`; the pattern says which index is meant."""
    everywhere = picked("t5", target_modules=["q"])
    by_block = picked("t5", target_modules=["q"], layers_to_transform=[2], layers_pattern="block")
    by_layer = picked("t5", target_modules=["q"], layers_to_transform=[1], layers_pattern="layer")
    assert by_block == {p for p in everywhere if ".block.2." in p} and len(by_block) == 3
    assert by_layer == {p for p in everywhere if ".layer.1." in p} and len(by_layer) == 3


def test_layers_that_are_not_there_are_refused():
    for asked in (2, [0, 7], -1):
        message = refused("llama", target_modules=["q_proj"], layers_to_transform=asked)
        assert str(max([asked] if isinstance(asked, int) else asked)) in message and "[0, 1]" in message
    message = refused("llama", target_modules=["lm_head"], layers_to_transform=0)
    assert "layers_to_transform" in message


def test_no_layers_at_all_are_refused():
    assert "layers_to_transform" in refused("llama", target_modules=["q_proj"], layers_to_transform=[])


def test_a_pattern_without_layers_is_refused():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        LoraConfig(layers_pattern="layers")


# rank_pattern, alpha_pattern


@pytest.mark.parametrize(
    "pattern",
    [
        {"down_proj": 5},
        {"mlp.down_proj": 5, "q_proj": 3},
        {r".*\.0\..*": 5},
        {r"layers\.1\.self_attn\.(q|k)_proj": 5, "q_proj": 4},
        {"^model.layers.0.mlp.down_proj": 5},
    ],
    ids=str,
)
def test_rank_and_alpha_patterns_are_pefts(pattern):
    peft = pytest.importorskip("peft")
    settings = dict(target_modules=["q_proj", "k_proj", "down_proj"], r=2, lora_alpha=6)
    alphas = {key: value * 10 for key, value in pattern.items()}
    theirs = peft.get_peft_model(
        models.build("llama"), peft.LoraConfig(**settings, rank_pattern=pattern, alpha_pattern=alphas)
    )
    ours = get_peft_model(models.build("llama"), LoraConfig(**settings, rank_pattern=pattern, alpha_pattern=alphas))
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    found = {path: layer.adapters["default"] for path, layer in layers(ours).items()}
    assert {path: (a.r, a.lora_alpha) for path, a in found.items()} == expected
    assert all(a.lora_A.weight.shape[0] == a.r and a.scaling == a.lora_alpha / a.r for a in found.values())
    assert len({a.r for a in found.values()}) > 1


# modules_to_save, bias


def test_modules_to_save_trains_a_whole_copy():
    model = attach("llama", target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    assert set(layers(model)) == llama(Q) | {"lm_head", "model.norm"} and adapted(model) == llama(Q)
    learns = {name for name, p in model.get_base_model().named_parameters() if p.requires_grad}
    assert {n for n in learns if "lora" not in n} == {
        "lm_head.adapters.default.module.weight",
        "model.norm.adapters.default.module.weight",
    }


def test_what_is_saved_whole_is_not_adapted_too():
    model = attach("llama", target_modules=["q_proj"], modules_to_save=["layers.0.self_attn"])
    assert adapted(model) == llama(Q, indices=[1])


def test_a_target_inside_a_saved_module_is_refused_for_that_reason():
    message = refused("llama", target_modules=["q_proj", "down_proj"], modules_to_save=["self_attn"])
    assert "'q_proj'" in message and "modules_to_save" in message


def test_a_task_brings_its_head():
    model = get_peft_model(models.build("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert "classifier" in layers(model) and "classifier" in model.peft_config["default"].modules_to_save


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("lora_only", {"q_proj"}), ("all", {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_bias(bias: str, expected: set[str]):
    """The tiny llama has biases in its attention, not in its MLP."""
    model = attach("llama", target_modules=["q_proj", "down_proj"], bias=bias)
    learns = [n for n, p in model.get_base_model().named_parameters() if p.requires_grad and n.endswith("bias")]
    assert {n.split(".")[4] for n in learns} == expected and len(learns) == 2 * len(expected)
    assert adapted(model) == llama(Q, DOWN)


# Kinds


class Odd(nn.Module):
    """Modules of kinds that are not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 5, 2)
        self.memory = nn.LSTM(5, 7)
        self.attention = nn.MultiheadAttention(10, 2)
        self.fine = nn.Linear(3, 5)


@pytest.mark.parametrize(
    ("config", "model", "target", "kind"),
    [
        (LoraConfig, "llama", "input_layernorm", "norm"),
        (LoraConfig, "llama", "self_attn", "block"),
        (LoraConfig, "llama", "rotary_emb", "block"),
        (LoraConfig, "llama", "layers", "block"),
        (veneer.VeraConfig, "conv", "first", "conv"),
        (veneer.VeraConfig, "gpt2", "wte", "embedding"),
        (veneer.FourierFTConfig, "conv", "third", "conv"),
        (veneer.HRAConfig, "gpt2", "wte", "embedding"),
        (veneer.IA3Config, "gpt2", "wte", "embedding"),
        (veneer.BottleneckConfig, "llama", "input_layernorm", "norm"),
        (LoraConfig, Odd, "up", "ConvTranspose2d"),
        (LoraConfig, Odd, "memory", "LSTM"),
        (veneer.VeraConfig, Odd, "attention", "MultiheadAttention"),
        (LoraConfig, Odd, "attention.out_proj", "MultiheadAttention"),
    ],
)
def test_kinds_that_a_method_cannot_adapt_are_refused_by_name(config, model, target, kind):
    base = models.build(model) if isinstance(model, str) else model()
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(TargetError) as caught:
        get_peft_model(base, config(target_modules=[target]))
    assert kind in str(caught.value) and target in str(caught.value)
    assert [n for n, _ in base.named_modules()] == names


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_a_grouped_convolution_is_called_by_its_name(kind: str):
    model = nn.Sequential(getattr(nn, kind)(6, 9, 3, groups=3))
    with pytest.raises(TargetError, match=f"rank 4 on '0' must be a multiple of the 3 groups of this {kind}"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))


def test_all_linear_leaves_out_what_the_method_refuses_and_says_so():
    """The output layer of nn.MultiheadAttention is a Linear that is never called."""
    with pytest.warns(UserWarning, match="(?s)leaves out linear layers that LORA cannot adapt.*attention.out_proj"):
        model = get_peft_model(Odd(), LoraConfig(target_modules="all-linear"))
    assert list(model._state.layers) == ["fine"]


def test_an_expression_that_also_matches_other_kinds_is_refused_with_their_names():
    message = refused("llama", target_modules=r"model\.layers\.0\..*")
    assert "input_layernorm: norm (LlamaRMSNorm)" in message and "mlp: block (LlamaMLP)" in message


# Default targets


SIZES = dict(
    hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=5, vocab_size=67, pad_token_id=0
)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=1)
GPT = dict(n_embd=30, n_layer=2, n_head=5, vocab_size=67, n_positions=64)
T5 = dict(d_model=30, d_kv=6, d_ff=45, num_layers=2, num_heads=5, vocab_size=67)
BART = dict(
    d_model=30, encoder_ffn_dim=45, decoder_ffn_dim=45, encoder_layers=2, decoder_layers=2, encoder_attention_heads=5,
    decoder_attention_heads=5, vocab_size=67, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
VIT = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=5, image_size=8, patch_size=4)
LATENT = dict(kv_lora_rank=8, q_lora_rank=9, qk_rope_head_dim=4, v_head_dim=6, qk_nope_head_dim=6)
EXPERTS = dict(moe_intermediate_size=15, num_experts_per_tok=1)

ARCHITECTURES = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gptj": ("GPTJForCausalLM", GPT | dict(rotary_dim=2)),
    "codegen": ("CodeGenForCausalLM", GPT | dict(n_embd=32, n_head=4, rotary_dim=2)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        dict(hidden_size=30, num_layers=2, num_heads=5, attention_types=[[["global", "local"], 1]], vocab_size=67),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "bloom": ("BloomForCausalLM", dict(hidden_size=30, n_layer=2, n_head=5, vocab_size=67)),
    "falcon": ("FalconForCausalLM", dict(hidden_size=30, num_hidden_layers=2, num_attention_heads=5, vocab_size=67)),
    "mpt": ("MptForCausalLM", dict(d_model=30, n_heads=5, n_layers=2, vocab_size=67, max_seq_len=64)),
    "opt": ("OPTForCausalLM", SIZES | dict(ffn_dim=45, word_embed_proj_dim=30)),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "mixtral": ("MixtralForCausalLM", GROUPED | dict(num_local_experts=2)),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2_moe": ("Qwen2MoeForCausalLM", GROUPED | EXPERTS | dict(num_experts=2, shared_expert_intermediate_size=15)),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | dict(head_dim=6)),
    "gemma": ("GemmaForCausalLM", GROUPED | dict(head_dim=6)),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | dict(head_dim=6)),
    "gemma3_text": ("Gemma3ForCausalLM", GROUPED | dict(head_dim=6)),
    "phi": ("PhiForCausalLM", SIZES),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", GROUPED),
    "olmo": ("OlmoForCausalLM", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED),
    "stablelm": ("StableLmForCausalLM", SIZES | dict(num_key_value_heads=5)),
    "cohere": ("CohereForCausalLM", GROUPED),
    "granite": ("GraniteForCausalLM", GROUPED),
    "glm": ("GlmForCausalLM", GROUPED | dict(head_dim=6)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        SIZES
        | LATENT
        | EXPERTS
        | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
        | dict(num_key_value_heads=5),
    ),
    "bert": ("BertForSequenceClassification", SIZES),
    "roberta": ("RobertaForSequenceClassification", SIZES),
    "xlm-roberta": ("XLMRobertaForTokenClassification", SIZES),
    "distilbert": ("DistilBertForQuestionAnswering", dict(dim=30, hidden_dim=45, n_layers=2, n_heads=5, vocab_size=67)),
    "electra": ("ElectraForSequenceClassification", SIZES | dict(embedding_size=14)),
    "albert": ("AlbertForSequenceClassification", SIZES | dict(embedding_size=14)),
    "deberta": ("DebertaForSequenceClassification", SIZES),
    "deberta-v2": ("DebertaV2ForSequenceClassification", SIZES),
    "modernbert": ("ModernBertForSequenceClassification", SIZES),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 gated": ("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu")),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "mbart": ("MBartForConditionalGeneration", BART),
    "whisper": (
        "WhisperForConditionalGeneration",
        {k: v for k, v in BART.items() if k != "max_position_embeddings"}
        | dict(max_source_positions=20, max_target_positions=20, num_mel_bins=7)
        | dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    ),
    "vit": ("ViTForImageClassification", VIT),
    "clip": ("CLIPVisionModel", VIT),
}
MISSING = "PEFT has no defaults for it"
DIFFERENCES = {
    "phi": ("PEFT's table adds the MLP for LoRA on this architecture alone", "q_proj v_proj"),
    "mixtral": ("PEFT's names for the experts are not those of transformers 5", "q_proj v_proj"),
    "deepseek_v3": (
        "PEFT's table has no match in it; keys and values come out of one latent projection",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    ),
    "phi3": (MISSING, "qkv_proj"),
    "modernbert": (MISSING, "Wqkv"),
    "distilbert": (MISSING, "q_lin v_lin"),
    "albert": (MISSING, "query value"),
    **{name: (MISSING, "q_proj v_proj") for name in ("qwen2_moe", "smollm3", "olmo", "olmo2", "starcoder2")},
    **{name: (MISSING, "q_proj v_proj") for name in ("cohere", "granite", "glm", "mbart", "whisper", "vit", "clip")},
}
"""Architectures where we pick other modules than PEFT: why, and which."""


def tiny(name: str) -> nn.Module:
    """A model without memory."""
    import transformers

    cls, sizes = ARCHITECTURES[name]
    model_class = getattr(transformers, cls)
    with torch.device("meta"):
        return model_class(model_class.config_class(**sizes))


def pefts_choice(name: str) -> set[str] | None:
    peft = pytest.importorskip("peft")
    try:
        model = peft.get_peft_model(tiny(name), peft.LoraConfig(r=1))
    except ValueError:
        return None
    adapters = {p for p, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    return {path.removeprefix("base_model.model.") for path in adapters}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets(name: str):
    """Without `target_modules` we pick what PEFT picks, or what DIFFERENCES says."""
    model = get_peft_model(tiny(name), LoraConfig(r=1), low_cpu_mem_usage=True)
    ours, theirs = set(layers(model)), pefts_choice(name)
    if name not in DIFFERENCES:
        assert ours == theirs
        return
    reason, endings = DIFFERENCES[name]
    assert (theirs is None) == (reason != DIFFERENCES["phi"][0]) and ours != theirs
    assert ours == {p for p, _ in tiny(name).named_modules() if p.rpartition(".")[2] in endings.split()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mpt", "distilbert", "deberta"])
def test_default_targets_are_names_that_mean_the_same_modules_again(name: str):
    """What goes to the file: short endings, no paths."""
    model = get_peft_model(tiny(name), LoraConfig(r=1), low_cpu_mem_usage=True)
    targets = model.peft_config["default"].target_modules
    assert isinstance(targets, list) and not any("." in target for target in targets)
    again = get_peft_model(tiny(name), LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True)
    assert layers(again).keys() == layers(model).keys()


def test_default_targets_on_a_model_that_has_adapters():
    model = get_peft_model(models.build("llama"), LoraConfig(r=1, target_modules="all-linear"))
    model.add_adapter("other", LoraConfig(r=1))
    assert set(state_of(model.get_base_model()).adapters("other")) == llama(Q, V)


@pytest.mark.parametrize("model", ["conv", "mamba"])
def test_a_model_that_shows_no_attention_asks_for_targets(model: str):
    if model == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        with torch.device("meta"):
            base = MambaForCausalLM(MambaConfig(hidden_size=30, num_hidden_layers=2, vocab_size=67, state_size=4))
    else:
        base = models.build(model)
    with pytest.raises(TargetError, match=rf"{type(base).__name__}.*attention.*give target_modules"):
        get_peft_model(base, LoraConfig())


@pytest.mark.parametrize("name", ["deberta", "bert", "gpt2", "llama", "t5"])
def test_ia3s_defaults_scale_keys_values_and_the_mlps_input(name: str):
    model = get_peft_model(tiny(name), veneer.IA3Config(), low_cpu_mem_usage=True)
    found = roles(model.get_base_model())
    wanted = {p for p, role in found.items() if role in ("attention.k", "attention.v", "attention.qkv", "mlp.out")}
    assert set(layers(model)) == wanted
    feedforward = {p for p, layer in layers(model).items() if layer.adapters["default"].is_feedforward}
    assert feedforward == {p for p, role in found.items() if role == "mlp.out"} and feedforward


# Roles


LLAMA = {
    "attention": "self_attn",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp": "mlp",
    "mlp.in": "mlp.gate_proj mlp.up_proj",
    "mlp.out": "mlp.down_proj",
    "norm": "input_layernorm post_attention_layernorm",
}
BERT = {
    "attention": "attention",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "mlp.in": "intermediate.dense",
    "mlp.out": "output.dense",
    "norm": "attention.output.LayerNorm output.LayerNorm",
}
ENCODER = {
    "attention": "self_attn",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.in": "fc1",
    "mlp.out": "fc2",
    "norm": "self_attn_layer_norm final_layer_norm",
}
DECODER = ENCODER | {
    "attention": "self_attn encoder_attn",
    **{f"attention.{x}": f"self_attn.{x}_proj encoder_attn.{x}_proj" for x in "qkv"},
    "attention.out": "self_attn.out_proj encoder_attn.out_proj",
    "norm": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
}
T5_ENCODER = {
    "attention": "layer.N.SelfAttention",
    **{f"attention.{x}": f"layer.N.SelfAttention.{x}" for x in "qkv"},
    "attention.out": "layer.N.SelfAttention.o",
    "mlp": "layer.N.DenseReluDense",
    "mlp.in": "layer.N.DenseReluDense.wi",
    "mlp.out": "layer.N.DenseReluDense.wo",
    "norm": "layer.N.layer_norm",
}
T5_DECODER = T5_ENCODER | {
    role: f"{places} {places.replace('Self', 'EncDec')}" for role, places in T5_ENCODER.items() if "attention" in role
}
GPT2 = {
    "attention": "attn",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp": "mlp",
    "mlp.in": "mlp.c_fc",
    "mlp.out": "mlp.c_proj",
    "norm": "ln_1 ln_2",
}
GPTJ = {
    "attention": "attn",
    **{f"attention.{x}": f"attn.{x}_proj" for x in "qkv"},
    "attention.out": "attn.out_proj",
    "mlp": "mlp",
    "mlp.in": "mlp.fc_in",
    "mlp.out": "mlp.fc_out",
    "norm": "ln_1",
}
NEOX = {
    "attention": "attention",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp": "mlp",
    "mlp.in": "mlp.dense_h_to_4h",
    "mlp.out": "mlp.dense_4h_to_h",
    "norm": "input_layernorm post_attention_layernorm",
}
BLOOM = NEOX | {role: f"self_{places}" for role, places in NEOX.items() if "attention" in role}
QK_NORM = {"norm": f"{LLAMA['norm']} self_attn.q_norm self_attn.k_norm"}
GEMMA2 = {"norm": f"{LLAMA['norm']} pre_feedforward_layernorm post_feedforward_layernorm"}


def without(table: dict[str, str], *gone: str, **changed: str) -> dict[str, str]:
    return {role: places for role, places in table.items() if role not in gone} | changed


ROLES = {
    "gpt2": {"transformer.h.N": GPT2},
    "gpt_bigcode": {"transformer.h.N": GPT2},
    "gptj": {"transformer.h.N": GPTJ},
    "gpt_neox": {"gpt_neox.layers.N": NEOX},
    "bloom": {"transformer.h.N": BLOOM},
    "falcon": {"transformer.h.N": BLOOM | {"norm": "input_layernorm"}},
    "mpt": {
        "transformer.blocks.N": {
            "attention": "attn",
            "attention.qkv": "attn.Wqkv",
            "attention.out": "attn.out_proj",
            "mlp": "ffn",
            "mlp.in": "ffn.up_proj",
            "mlp.out": "ffn.down_proj",
            "norm": "norm_1 norm_2",
        }
    },
    "opt": {"model.decoder.layers.N": ENCODER},
    "llama": {"model.layers.N": LLAMA},
    "mistral": {"model.layers.N": LLAMA},
    "mixtral": {"model.layers.N": without(LLAMA, "mlp", "mlp.in", "mlp.out")},
    "qwen2": {"model.layers.N": LLAMA},
    "qwen2_moe": {
        "model.layers.N": LLAMA
        | {
            "mlp": "mlp.shared_expert",
            "mlp.in": "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert_gate",
            "mlp.out": "mlp.shared_expert.down_proj",
        }
    },
    "qwen3": {"model.layers.N": LLAMA | QK_NORM},
    "gemma": {"model.layers.N": LLAMA},
    "gemma2": {"model.layers.N": LLAMA | GEMMA2},
    "gemma3_text": {"model.layers.N": LLAMA | {"norm": f"{QK_NORM['norm']} {GEMMA2['norm']}"}},
    "phi": {
        "model.layers.N": LLAMA
        | {"attention.out": "self_attn.dense", "mlp.in": "mlp.fc1", "mlp.out": "mlp.fc2", "norm": "input_layernorm"}
    },
    "phi3": {
        "model.layers.N": without(LLAMA, "attention.q", "attention.k", "attention.v")
        | {"attention.qkv": "self_attn.qkv_proj", "mlp.in": "mlp.gate_up_proj"}
    },
    "smollm3": {"model.layers.N": LLAMA},
    "olmo": {"model.layers.N": without(LLAMA, "norm")},
    "olmo2": {
        "model.layers.N": LLAMA
        | {"norm": "self_attn.q_norm self_attn.k_norm post_attention_layernorm post_feedforward_layernorm"}
    },
    "starcoder2": {"model.layers.N": LLAMA | {"mlp.in": "mlp.c_fc", "mlp.out": "mlp.c_proj"}},
    "stablelm": {"model.layers.N": LLAMA},
    "cohere": {"model.layers.N": LLAMA | {"norm": "input_layernorm"}},
    "glm": {"model.layers.N": LLAMA | {"mlp.in": "mlp.gate_up_proj"}},
    "bert": {"bert.encoder.layer.N": BERT},
    "roberta": {"roberta.encoder.layer.N": BERT},
    "electra": {"electra.encoder.layer.N": BERT},
    "deberta-v2": {
        "deberta.encoder.layer.N": BERT
        | {f"attention.{x[0]}": f"attention.self.{x}_proj" for x in ("query", "key", "value")}
    },
    "deberta": {
        "deberta.encoder.layer.N": without(BERT, "attention.q", "attention.k", "attention.v")
        | {"attention.qkv": "attention.self.in_proj"}
    },
    "distilbert": {
        "distilbert.transformer.layer.N": {
            "attention": "attention",
            **{f"attention.{x}": f"attention.{x}_lin" for x in "qkv"},
            "attention.out": "attention.out_lin",
            "mlp": "ffn",
            "mlp.in": "ffn.lin1",
            "mlp.out": "ffn.lin2",
            "norm": "sa_layer_norm output_layer_norm",
        }
    },
    "albert": {
        "albert.encoder.albert_layer_groups.N.albert_layers.N": {
            "attention": "attention",
            **{f"attention.{x[0]}": f"attention.{x}" for x in ("query", "key", "value")},
            "attention.out": "attention.dense",
            "mlp.in": "ffn",
            "mlp.out": "ffn_output",
            "norm": "full_layer_layer_norm attention.LayerNorm",
        }
    },
    "t5": {"encoder.block.N": T5_ENCODER, "decoder.block.N": T5_DECODER},
    "bart": {"model.encoder.layers.N": ENCODER, "model.decoder.layers.N": DECODER},
    "mbart": {"model.encoder.layers.N": ENCODER, "model.decoder.layers.N": DECODER},
    "whisper": {"model.encoder.layers.N": ENCODER, "model.decoder.layers.N": DECODER},
    "vit": {
        "vit.layers.N": {
            "attention": "attention",
            **{f"attention.{x}": f"attention.{x}_proj" for x in "qkv"},
            "attention.out": "attention.o_proj",
            "mlp": "mlp",
            "mlp.in": "mlp.fc1",
            "mlp.out": "mlp.fc2",
            "norm": "layernorm_before layernorm_after",
        }
    },
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str):
    """What each module of a layer is for, in every layer alike; outside the layers are norms and embeddings only."""
    found: dict[tuple[str, str], int] = {}
    for path, role in roles(tiny(name)).items():
        if role != "embedding":
            shape = re.sub(r"\.\d+(?=\.|$)", ".N", path)
            found[shape, role] = found.get((shape, role), 0) + 1
    expected = {
        (f"{prefix}.{place}", role)
        for prefix, table in ROLES[name].items()
        for role, places in table.items()
        for place in places.split()
    }
    inside = {key for key in found if key[0].startswith(tuple(f"{prefix}." for prefix in ROLES[name]))}
    assert inside == expected
    assert {role for _, role in found.keys() - inside} <= {"norm"}
    assert all(count >= 2 for (_, role), count in found.items() if (_, role) in inside) or name == "albert"


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", "intermediate_size"), ("gpt2", "n_inner"), ("bert", "intermediate_size"), ("t5", "d_ff")],
)
def test_roles_of_an_mlp_that_is_as_wide_as_the_stream(name: str, size: str):
    assert roles(models.BUILDERS[name](**{size: 30})) == roles(models.BUILDERS[name]())


def test_latent_attention_has_its_keys_and_values_in_one():
    found = roles(tiny("deepseek_v3"))
    assert {p.rpartition(".")[2] for p, role in found.items() if role == "attention.qkv"} == {
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    }


def test_default_targets_tell_which_layers_of_a_hybrid_they_leave_out():
    from .test_prompts import qwen35

    with pytest.warns(UserWarning, match=r"(?s)lie in 2 of its 4 layers.*model.layers.0\n  model.layers.2") as told:
        get_peft_model(qwen35(), LoraConfig(task_type="CAUSAL_LM"))
    [warning] = [warning for warning in told if "default targets" in str(warning.message)]
    assert warning.filename == __file__
