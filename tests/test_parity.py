"""The file format is PEFT's: what one writes the other reads, with the same keys and the same logits.

`peft` is the oracle here and nowhere else. Where it is at fault, the case says so instead of being compared.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import veneer
from veneer import CheckpointError, LoraConfig, PeftModel, all_methods, get_peft_model
from veneer.core.state import state_of

from . import models
from .cases import CASES, Case
from .models import output

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
"""How near outputs are, as a share of the largest entry (or of 1). Each is a sum of terms as large as that, and how
such a sum is rounded differs by processor."""

NOT_COMPARED = {
    "arrow": "PEFT cannot load the routers it saves; see test_arrow_routes_as_pefts",
    "qalora": "PEFT has QA-LoRA on GPTQ layers alone; see test_pefts_qalora",
    "xlora": "PEFT 0.21 writes X-LoRA files without the gate; see test_xlora_with_pefts_gate",
}
for method, config in all_methods().items():
    if config.peft_type not in peft.PeftType.__members__:
        NOT_COMPARED[method] = "PEFT has no such method"
if importlib.util.find_spec("sklearn") is None:
    NOT_COMPARED["adamss"] = "PEFT's AdaMSS needs scikit-learn, which is not here"
FAULTS = {
    "lora-gpt2-tied": "PEFT ties adapters on embeddings called embed_tokens alone; lora-tied is compared",
    "lora-gpt2-tied-copy": "the same; lora-tied-copy is compared",
    "lora-dilated": "PEFT's LoRA convolutions drop the module's dilation, so that shapes do not meet",
    "hra-conv": "PEFT sizes HRA on convolutions by kernel_size[0] twice; hra-square is compared",
    "oft-conv": "PEFT sizes OFT on convolutions by kernel_size[0] twice; oft-square is compared",
    "beft-gpt2": "PEFT has no BEFT on GPT-2's Conv1D",
    "delora-gpt2": "PEFT has no DeLoRA on GPT-2's Conv1D",
    "hra-conv-conv1d": "PEFT has no HRA on Conv1d",
    "oft-conv-conv1d": "PEFT has no OFT on Conv1d",
    "adaption_prompt-llama": "PEFT adds the output bias a second time, and takes heads x head_dim for the width",
    "multitask_prompt_tuning-t5": "PEFT drops decoder_input_ids; test_a_multitask_prompt_before_an_encoder has labels",
    "c3a-gpt2": "PEFT has no C3A on GPT-2's Conv1D",
    "psoft-gpt2": "PEFT has no PSOFT on GPT-2's Conv1D",
    "boft-gpt2": "PEFT has no BOFT on GPT-2's Conv1D",
    "boft-conv": "PEFT sizes BOFT on convolutions by kernel_size[0] twice; boft-square is compared",
    "boft-conv-butterfly": "the same; test_butterflies_agree_with_pefts_kernel compares several factors",
    "osf-gpt2": "PEFT has no OSF on GPT-2's Conv1D",
    "lora-gpt2-olora": "PEFT decomposes Conv1D's weight as it is stored, (in, out), so that the shapes do not meet",
    "lora-conv-olora": "PEFT has no OLoRA on convolutions",
    "lora-llama-fast-pissa": "PEFT draws the projection of its randomised SVD anew at each load; see test_inits",
    "lora-llama-loftq": "PEFT quantises with bitsandbytes on a GPU only",
    "lora-gpt2-loftq": "PEFT quantises with bitsandbytes on a GPU only",
    "loha-gpt2": "PEFT has no LoHa on GPT-2's Conv1D",
    "glora-gpt2": "PEFT has no GLoRA on GPT-2's Conv1D",
    "peanut-gpt2": "PEFT has no PEANuT on GPT-2's Conv1D",
    "lokr-gpt2": "PEFT has no LoKr on GPT-2's Conv1D",
    "lokr-conv-conv1d-core": "PEFT's LoKr with the core of a Conv1d ends in an error of torch.kron",
    "lokr-volume": "PEFT has no LoKr on Conv3d",
    "lily-gpt2": "PEFT has no Lily on GPT-2's Conv1D",
    "miss-gpt2": "PEFT has no MiSS on GPT-2's Conv1D",
    "miss-gpt2-bat": "PEFT has no MiSS on GPT-2's Conv1D",
    "hira-llama-patterns": "PEFT computes HiRA's ranks from rank_pattern and then builds the first adapter with r",
    "shira-gpt2": "PEFT has no SHiRA on GPT-2's Conv1D",
    "shira-conv": "PEFT has SHiRA on linear layers alone",
    "shira-grouped": "PEFT has SHiRA on linear layers alone",
    "supertuning-gpt2": "PEFT has no Super-Tuning on GPT-2's Conv1D",
    "supertuning-conv": "PEFT has Super-Tuning on linear layers alone",
    "supertuning-grouped": "PEFT has Super-Tuning on linear layers alone",
    "adamss-gpt2": "PEFT has no AdaMSS on GPT-2's Conv1D",
    "poly-gpt2-multi-head": "PEFT has no Poly on GPT-2's Conv1D",
    "kasa-gpt2": "PEFT has no KaSA on GPT-2's Conv1D",
    "mica-conv": "PEFT has no MiCA on convolutions",
    **dict.fromkeys(
        (
            "alora-llama-dora-bias-rslora",
            "lora_bias-gpt2-dora",
            "bdlora-llama-dora-velora",
            "kasa-llama-dora-monteclora-velora",
            "mica-llama-qalora",
        ),
        "PEFT refuses every pair of variants",
    ),
}
MERGED = {
    "oft-square": "PEFT's OFT convolution sums overlapping patches, so even the identity changes; its merge is right",
    "hira-dilated": "PEFT's HiRA convolutions pad with zeros whatever the padding mode; its merge is right",
}
WRONG_GRADIENTS = {
    "lora-tied": "PEFT lists the tied adapter twice, and its gradient under both names",
    "c3a-llama": "PEFT's C3A turns the gradient of its input the other way; test_c3as_gradients has the right one",
    "c3a-llama-gaussian": "as for c3a-llama",
    "loha-conv-effective": "PEFT's backward of LoHa with a core takes the gradient of A1 through the core of the other "
    "product, that of A2 likewise; test_lohas_gradients_with_a_core has the right ones",
}
WRITTEN_ONCE = {
    "lily": "PEFT writes what layers share again for each of them; ours is there once, and PEFT reads it with a warning"
}
COMPARED = [c for c in CASES if c.method not in NOT_COMPARED and str(c) not in FAULTS]


def pefts_config(case: Case):
    settings = dict(case.settings)
    kind = case.config_class.peft_type
    if kind == "LORA":  # a preset, which PEFT lacks, sets fields that it has
        settings |= {name: value for name, value in case.config().to_dict().items() if name in LoraConfig.files}
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(str(kind))](**settings)


def moved(model, seed: int = 2):
    """PEFT's model off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def right(theirs, case: Case):
    """PEFT's model in the form that is not at fault."""
    if str(case) in MERGED:
        theirs.merge_adapter()
    return theirs


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def keys(directory, case: Case) -> set[str]:
    """The keys of a file; of a method that is written once, without those that repeat an earlier tensor."""
    found = tensors(directory)
    if case.method not in WRITTEN_ONCE:
        return set(found)
    values: dict[str, list] = {}
    for key in sorted(found):
        same = values.setdefault(key.split(".", 5)[-1], [])
        if any(torch.equal(found[key], found[other]) for other in same):
            del found[key]
        else:
            same.append(key)
    return set(found)


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    largest = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * largest)


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_pefts_file_loads_here(case: Case, tmp_path):
    theirs = moved(peft.get_peft_model(models.build(case.model), pefts_config(case)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(models.build(case.model), tmp_path / "theirs", follow_paths=True)
    batch = case.inputs()
    near(output(ours, batch), output(right(theirs, case), batch))
    ours.save_pretrained(tmp_path / "ours")
    assert tensors(tmp_path / "ours").keys() == keys(tmp_path / "theirs", case)


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_our_file_loads_in_peft(case: Case, tmp_path):
    ours = case.build()
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(models.build(case.model), tmp_path / "ours").eval()
    if case.method not in WRITTEN_ONCE:
        messages = [str(w.message).lower() for w in caught]
        assert not [m for m in messages if "missing" in m or "unexpected" in m]
    batch = case.inputs()
    near(output(right(theirs, case), batch), output(ours, batch))
    theirs.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path / "ours").keys() == keys(tmp_path / "theirs", case)
    unknown = set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) - set(
        json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    )
    assert not unknown, "fields that PEFT does not know"


def both_ways(build, config, pefts, batch, tmp_path, **facts):
    """Compare two libraries on a model: their file here, our file there, the same keys."""
    theirs = moved(peft.get_peft_model(build(), pefts))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(build(), tmp_path / "theirs")
    near(output(ours, batch, **facts), output(theirs, batch, **facts))
    mine = models.perturb(get_peft_model(build(), config).eval())
    mine.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    near(output(again, batch, **facts), output(mine, batch, **facts))
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path / "theirs").keys()


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies_agree_with_pefts_kernel(factors: int, tmp_path, monkeypatch):
    """Without CUDA PEFT takes one factor only; its kernel is replaced by what it computes."""
    from peft.tuners.boft import layer

    from veneer import BOFTConfig

    def block_diagonals(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: object())
    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonals)

    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(48, 7), torch.nn.Tanh()).eval()

    settings = dict(target_modules=["0"], boft_block_size=6, boft_n_butterfly_factor=factors)
    batch = {"x": torch.randn(5, 48)}
    both_ways(build, BOFTConfig(**settings), peft.BOFTConfig(**settings), batch, tmp_path)


HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["Lora", "PromptTuning"])
def test_encoder_tasks_train_and_save_their_head(head: str, method: str, tmp_path):
    import veneer

    def build():
        torch.manual_seed(0)
        return models.bert(head).eval()

    settings = dict(task_type=HEADS[head], modules_to_save=["pooler"] if head == "ForSequenceClassification" else None)
    settings |= dict(r=4) if method == "Lora" else dict(num_virtual_tokens=3)
    ours, theirs = getattr(veneer, f"{method}Config"), getattr(peft, f"{method}Config")
    batch = {"input_ids": torch.randint(3, 67, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    if head == "ForQuestionAnswering" and method == "PromptTuning":
        pytest.skip("PEFT does not lengthen what question answering compares; prompts there are tested in test_prompts")
    both_ways(build, ours(**settings), theirs(**settings), batch, tmp_path)


def test_a_multitask_prompt_before_an_encoder(tmp_path):
    """With labels, from which the decoder's input comes: PEFT drops a given one."""
    case = next(c for c in CASES if str(c) == "multitask_prompt_tuning-t5")
    batch = case.inputs()
    batch["labels"] = batch.pop("decoder_input_ids")
    both_ways(lambda: models.build("t5"), case.config(), pefts_config(case), batch, tmp_path)


@pytest.mark.parametrize("weighing", ["none", "decay"])
def test_cpt_trains_as_pefts_does(weighing: str, tmp_path):
    """Its loss, what does not move, and how far the rest may."""
    import veneer

    settings = dict(
        cpt_token_ids=[5, 9, 30, 41, 7, 8],
        cpt_tokens_type_mask=[1, 2, 3, 4, 5, 8],
        opt_weighted_loss_type=weighing,
        opt_loss_decay_factor=0.6,
        opt_projection_epsilon=2.0,
        task_type="CAUSAL_LM",
    )
    ours = get_peft_model(models.build("llama"), veneer.CPTConfig(**settings))
    theirs = peft.get_peft_model(models.build("llama"), peft.CPTConfig(**settings))
    losses = []
    for model in (ours, theirs):
        ids = models.inputs("llama")["input_ids"]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(4):
            types = torch.tensor([[1, 2, 2, 3, 4, 4, 0]] * 3)
            loss = model(input_ids=ids, labels=ids, input_type_mask=types).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.save_pretrained(tmp_path / type(model).__name__)
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5) and losses[3] < losses[0] - 0.01
    mine, reference = (tensors(tmp_path / type(m).__name__)["prompt_embeddings"] for m in (ours, theirs))
    near(mine, reference)


SHADOW = dict(r=3, shadow_alpha=0.9, auxiliary_loss_weight=0.4)


def test_a_shadows_own_loss_is_pefts(tmp_path):
    import veneer

    theirs = moved(
        peft.get_peft_model(models.build("llama"), peft.ShadowConfig(**SHADOW, task_type="CAUSAL_LM")), seed=5
    )
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path, is_trainable=True).eval()
    batch = models.inputs("llama")
    labels = torch.where(torch.arange(7) == 2, -100, batch["input_ids"])
    for mask in (None, torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 3)):
        losses = [m(**batch, labels=labels, attention_mask=mask).loss for m in (ours, theirs)]
        torch.testing.assert_close(*losses)
    losses[0].backward()
    losses[1].backward()
    backbones = (state_of(ours.get_base_model()).shared["default"], theirs.base_model)
    mine, reference = (m.shadow_backbone["default"].norm.weight.grad for m in backbones)
    torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.tensor([2, 0, 1]), torch.rand(3, 3)], ids=["one", "several"])
def test_a_shadow_of_a_classifier(labels: torch.Tensor, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    import veneer

    def build():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**models.LLAMA, num_labels=3)).eval()

    settings = dict(SHADOW, task_type="SEQ_CLS")
    batch = models.inputs("llama") | {
        "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 0] + [1] * 5])
    }
    both_ways(build, veneer.ShadowConfig(**settings), peft.ShadowConfig(**settings), batch, tmp_path)
    ours = veneer.PeftModel.from_pretrained(build(), tmp_path / "theirs", is_trainable=True).eval()
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(*(m(**batch, labels=labels).loss for m in (ours, theirs)))


def test_a_projected_shadow(tmp_path):
    import veneer

    from .test_numpy_prompts import projected

    projected(tmp_path / "shadow")
    settings = dict(SHADOW, shadow_model=str(tmp_path / "shadow"))
    both_ways(
        lambda: models.build("llama"),
        veneer.ShadowConfig(**settings),
        peft.ShadowConfig(**settings),
        models.inputs("llama"),
        tmp_path,
    )


def test_a_named_embedding_is_in_the_file_whole(tmp_path):
    from veneer import LoraConfig

    settings = dict(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    both_ways(
        lambda: models.build("llama"),
        LoraConfig(**settings),
        peft.LoraConfig(**settings),
        models.inputs("llama"),
        tmp_path,
    )
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors(tmp_path / "ours")


def test_a_resized_embedding_comes_with_the_file(tmp_path):
    settings = dict(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")

    def resized(seed):
        base = models.build("llama")
        torch.manual_seed(seed)
        base.resize_token_embeddings(70)
        return base

    theirs = moved(peft.get_peft_model(resized(1), peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[69, 68, 5]])}
    ours = PeftModel.from_pretrained(resized(2), tmp_path)
    near(output(ours, batch)[..., :67], output(theirs, batch)[..., :67])
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(70\)"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_a_pruned_adalora_file_loads_here(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=1,
        total_step=8,
        tinit=1,
        tfinal=2,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(models.build("llama"), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    batch = models.inputs("llama")
    for step in range(1, 9):
        theirs(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    sizes = {t.shape[0] for k, t in tensors(tmp_path).items() if k.endswith("lora_E")}
    assert len(sizes) > 1 or 0 in sizes, "nothing was pruned unevenly; the test would show nothing"
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    near(output(ours, batch), output(theirs.eval(), batch))


def test_xlora_with_pefts_gate(tmp_path):
    case = next(c for c in CASES if c.method == "xlora")
    ours, batch = case.build(), case.inputs()
    ours.save_pretrained(tmp_path / "ours")

    def without_cache():
        base = models.build(case.model)
        base.config.use_cache = False  # PEFT refuses X-LoRA otherwise
        return base

    theirs = peft.PeftModel.from_pretrained(without_cache(), tmp_path / "ours").eval()
    near(output(theirs, batch), output(ours, batch))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="internal_xlora_classifier"):
        PeftModel.from_pretrained(models.build(case.model), tmp_path / "theirs", follow_paths=True)


def test_arrow_routes_as_pefts(tmp_path):
    """PEFT looks for each expert's first direction by 15 steps from a random start, so each has one that stands out."""
    sources = []
    for i in range(3):
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = models.perturb(get_peft_model(models.build("llama"), config), seed=i)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_A" in name:
                    p[1:] *= 0.03
        model.save_pretrained(tmp_path / str(i))
        sources.append(str(tmp_path / str(i)))
    batch = models.inputs("llama")
    for settings in (dict(top_k=1), dict(top_k=2, router_temperature=3.0), dict(top_k=2, use_gks=True)):
        general = sources[2:] if settings.get("use_gks") else None
        tasks = sources[: 2 if general else 3]
        theirs, ours = (
            library.create_arrow_model(models.build("llama"), tasks, library.ArrowConfig(**settings), general).eval()
            for library in (peft, veneer)
        )
        near(output(ours, batch), output(theirs, batch))


def test_pefts_qalora():
    """PEFT's formula, called on a stand-in for the GPTQ layer it wants."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    path = "model.layers.0.mlp.down_proj"
    model = models.perturb(
        get_peft_model(models.build("llama"), veneer.QALoraConfig(r=4, qalora_group_size=9, target_modules=[path]))
    )
    layer = model.get_base_model().get_submodule(path).eval()
    stand_in = SimpleNamespace(
        **{name: getattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "in_features")},
        lora_dropout={"default": torch.nn.Identity()},
        qalora_group_size={"default": 9},
        training=False,
    )
    x = torch.randn(2, 3, 45)
    theirs = QALoraLinearVariant.forward(stand_in, "default", x, layer.base_layer(x))
    near(layer(x), theirs)


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_velora_trains_as_pefts(kind: str, tmp_path):
    """The approximate gradients of two batches, too."""
    settings = dict(num_groups=7, scale=1.5, init_type=kind)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], velora_config=peft.VeloraConfig(**settings))
    theirs = moved(peft.get_peft_model(models.build("llama"), config))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path, is_trainable=True)
    case = next(c for c in CASES if c.method == "velora")
    exact = {key: grad.clone() for key, grad in gradients(ours, case).items()}
    for model in (ours, theirs):
        model.zero_grad()
        model.train()(**models.inputs("llama", seed=4)).logits.square().mean().backward()
    mine, reference = gradients(ours, case), gradients(theirs, case)
    for key in mine:
        scale = reference[key].abs().max()
        torch.testing.assert_close(mine[key] / scale, reference[key] / scale, rtol=1e-3, atol=2e-5)
    key = next(key for key in exact if key.endswith("down_proj.lora_A"))
    assert (exact[key] - mine[key]).abs().max() > 0.1 * exact[key].abs().max()


def test_kasas_loss_is_pefts(tmp_path):
    config = dict(r=4, target_modules=["q_proj", "down_proj"], kasa_config=dict(beta=0.2, gamma=0.03))
    theirs = moved(peft.get_peft_model(models.build("llama"), peft.LoraConfig(**config)))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    state = state_of(ours.get_base_model())
    term = state.configs["default"].loss(list(state.adapters("default").values()))
    near(term, theirs.base_model._get_kasa_loss())


def test_alora_generates_as_pefts(tmp_path):
    settings = dict(r=4, lora_alpha=40, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = moved(
        peft.get_peft_model(models.build("llama"), peft.LoraConfig(alora_invocation_tokens=[15, 11], **settings))
    )
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    ids = torch.tensor([[9, 20, 15, 11, 30, 31], [15, 11, 40, 15, 11, 41], [9, 15, 12, 11, 33, 34]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))


def gradients(model, case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the mean squared logits by the parameter's place, whatever the library calls it."""
    output(model, case.inputs()).square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".adapters.default.", ".").replace(".default", "")
            name = name.replace(".members.0.", ".base_layer.").replace(".members.1.", ".")  # two parameters of a module
            name = name.replace(".token_adapter.", ".")
            found[name.replace(".modules_to_save.", ".").replace(".module.", ".").removesuffix(".weight")] = p.grad
    return found


SHARED = "veneer_shared."


def without_owner(found: dict[str, torch.Tensor], shared: list[str]) -> dict[str, torch.Tensor]:
    """What all layers share stands under the model here, under its first layer in PEFT: name it alone."""
    return {next((s for s in shared if key.endswith("." + s)), key): grad for key, grad in found.items()}


NO_TRAINING = {"bias", "save_only_topk_weights"}
"""Settings whose files do not hold what training needs, or hold it under other names."""
GRADIENTS = [
    c
    for c in COMPARED
    if not c.is_prompt and str(c) not in {**MERGED, **WRONG_GRADIENTS} and not NO_TRAINING & c.settings.keys()
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_agree(case: Case, tmp_path):
    theirs = moved(peft.get_peft_model(models.build(case.model), pefts_config(case)))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.build(case.model), tmp_path, is_trainable=True)
    mine, reference = gradients(ours, case), gradients(theirs, case)
    shared = [key.removeprefix(SHARED) for key in mine if key.startswith(SHARED)]
    mine, reference = without_owner(mine, shared), without_owner(reference, shared)
    assert mine.keys() == reference.keys()
    for key in mine:
        scale = reference[key].abs().max().clamp_min(1e-6)
        torch.testing.assert_close(mine[key] / scale, reference[key].view_as(mine[key]) / scale, rtol=1e-3, atol=2e-5)


def test_categories_are_pefts():
    from peft.tuners.frod import model as frod

    from veneer.methods.families.categories import by_category, category, layer_number

    paths = [
        "lm_head",
        "model.layers.3.self_attn.q_proj",
        "encoder.layer.11.attention.self.query",
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "transformer.h.5.mlp.c_fc",
        "blocks.2.fc",
        "vision.7.tower.layers.4.mlp.fc1",
        "a.layers.proj.2.fc",
        "head.dense",
    ]
    for path in paths:
        assert category(path) == frod._category_from_key(path)
        assert layer_number(path, 99) == frod._layer_index_from_key(path, 99)
    assert by_category(["b.1.x", "b.0.x", "c.1.x"]) == {"x": ["b.0.x", "c.1.x"]}
