"""The file format is PEFT's: what one writes the other reads, with the same keys and the same logits.

`peft` is the oracle here and nowhere else. Where it is at fault, the case says so instead of being compared.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from veneer import CheckpointError, PeftModel, get_peft_model

from . import models
from .cases import CASES, Case
from .models import output

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = dict(rtol=1e-5, atol=1e-5)

HUB = (
    *("seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "seq_bn_inv", "double_seq_bn_inv", "compacter"),
    *("compacter_plus_plus", "loreft", "noreft", "direft", "union", "mam", "unipelt", "fusion"),
)
"""Methods of AdapterHub's library."""
NOT_COMPARED = {
    "bottleneck": "PEFT has no such method",
    **dict.fromkeys(HUB, "PEFT has no such method"),
    "xlora": "PEFT 0.21 writes X-LoRA files without the gate; see test_xlora_with_pefts_gate",
}
FAULTS = {
    "lora-dilated": "PEFT's LoRA convolutions drop the module's dilation, so that shapes do not meet",
    "hra-conv": "PEFT sizes HRA on convolutions by kernel_size[0] twice; hra-square is compared",
    "oft-conv": "PEFT sizes OFT on convolutions by kernel_size[0] twice; oft-square is compared",
    "beft-gpt2": "PEFT has no BEFT on GPT-2's Conv1D",
    "delora-gpt2": "PEFT has no DeLoRA on GPT-2's Conv1D",
    "hra-conv-conv1d": "PEFT has no HRA on Conv1d",
    "oft-conv-conv1d": "PEFT has no OFT on Conv1d",
    "loha-gpt2": "PEFT has no LoHa on GPT-2's Conv1D",
}
MERGED = {
    "oft-square": "PEFT's OFT convolution sums overlapping patches, so even the identity changes; its merge is right"
}
WRONG_GRADIENTS = {
    "loha-conv-effective": "PEFT's backward of LoHa with a core takes the gradient of A1 through the core of the other "
    "product, that of A2 likewise; test_lohas_gradients_with_a_core has the right ones"
}
COMPARED = [c for c in CASES if c.method not in NOT_COMPARED and str(c) not in FAULTS]


def pefts_config(case: Case):
    settings = dict(case.settings)
    kind = case.config_class.peft_type
    if case.method == "dora":
        settings["use_dora"] = True
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


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_pefts_file_loads_here(case: Case, tmp_path):
    theirs = moved(peft.get_peft_model(models.build(case.model), pefts_config(case)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(models.build(case.model), tmp_path / "theirs")
    batch = case.inputs()
    torch.testing.assert_close(output(ours, batch), output(right(theirs, case), batch), **TOLERANCE)
    ours.save_pretrained(tmp_path / "ours")
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path / "theirs").keys()


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_our_file_loads_in_peft(case: Case, tmp_path):
    ours = case.build()
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(models.build(case.model), tmp_path / "ours").eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    batch = case.inputs()
    torch.testing.assert_close(output(right(theirs, case), batch), output(ours, batch), **TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path / "theirs").keys()
    unknown = set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) - set(
        json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    )
    assert not unknown, "fields that PEFT does not know"


def both_ways(build, config, pefts, batch, tmp_path, **facts):
    """Compare two libraries on a model: their file here, our file there, the same keys."""
    theirs = moved(peft.get_peft_model(build(), pefts))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(build(), tmp_path / "theirs")
    torch.testing.assert_close(output(ours, batch, **facts), output(theirs, batch, **facts), **TOLERANCE)
    mine = models.perturb(get_peft_model(build(), config).eval())
    mine.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, batch, **facts), output(mine, batch, **facts), **TOLERANCE)
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path / "theirs").keys()


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
    torch.testing.assert_close(output(ours, batch)[..., :67], output(theirs, batch)[..., :67], **TOLERANCE)
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
    torch.testing.assert_close(output(ours, batch), output(theirs.eval(), batch), **TOLERANCE)


def test_xlora_with_pefts_gate(tmp_path):
    case = next(c for c in CASES if c.method == "xlora")
    ours, batch = case.build(), case.inputs()
    ours.save_pretrained(tmp_path / "ours")

    def without_cache():
        base = models.build(case.model)
        base.config.use_cache = False  # PEFT refuses X-LoRA otherwise
        return base

    theirs = peft.PeftModel.from_pretrained(without_cache(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(theirs, batch), output(ours, batch), **TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="internal_xlora_classifier"):
        PeftModel.from_pretrained(models.build(case.model), tmp_path / "theirs")


def gradients(model, case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the mean squared logits by the parameter's place, whatever the library calls it."""
    output(model, case.inputs()).square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".adapters.default.", ".").replace(".default", "")
            found[name.replace(".modules_to_save.", ".").replace(".module.", ".").removesuffix(".weight")] = p.grad
    return found


SHARED = "veneer_shared."


def without_owner(found: dict[str, torch.Tensor], shared: list[str]) -> dict[str, torch.Tensor]:
    """What all layers share stands under the model here, under its first layer in PEFT: name it alone."""
    return {next((s for s in shared if key.endswith("." + s)), key): grad for key, grad in found.items()}


GRADIENTS = [
    c for c in COMPARED if not c.is_prompt and str(c) not in {**MERGED, **WRONG_GRADIENTS} and "bias" not in c.settings
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
