"""Quantised base models from the command line: training, the forecast, and every verb that loads such an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from veneer import PeftModel
from veneer.cli import app
from veneer.core.checkpoint import read_notes
from veneer.errors import ConfigError, NotMergeable
from veneer.model.loading import load
from veneer.model.verify import verify
from veneer.upstream import quantisation as schemes
from veneer.upstream.quantisation import quantisation

from . import models
from .chat_templates import TEMPLATES
from .test_quantised import SIZES
from .test_train import data, recipe, run, same  # noqa: F401 (fixtures)
from .test_train_chat import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4": "hqq"}
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "int4": "HQQLinear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny Llama on disk, of sizes that every library can quantise."""
    where = tmp_path_factory.mktemp("base")
    return saved(where, **SIZES)


def saved(where, **sizes) -> str:
    words = tokenizer(TEMPLATES[0])
    words.pad_token = "<|im_end|>"
    words.save_pretrained(where)
    torch.manual_seed(0)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=words.eos_token_id)
    models.llama(vocab_size=len(words), max_position_embeddings=256, **ids, **sizes).save_pretrained(where)
    return str(where)


@pytest.fixture(params=LIBRARIES)
def scheme(request) -> str:
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


def call(*arguments: str):
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, ValueError), done.output
    return str(done.exception)


def test_an_adapter_is_trained_on_it_and_loads_on_both(base, data, tmp_path, scheme):  # noqa: F811
    report = run(base, data, tmp_path / "out", quantise=scheme, eval_split=4, epochs=2)
    assert report["verified"] and report["eval"]["loss"] < report["eval"]["before"]["loss"]
    assert report["recipe"]["quantise"] == scheme
    assert read_notes(tmp_path / "out")["preparation"]["quantised"] == {"scheme": scheme, "options": {}}
    for given, expected in ((None, LAYERS[scheme]), ("none", "Linear")):
        loaded = load([str(tmp_path / "out")], quantise=given)
        layer = loaded.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        assert type(layer).__name__ == expected
        assert bool(loaded.remarks) and scheme in loaded.remarks[0]
        with loaded.running("base"):
            assert type(loaded.model.get_base_model().lm_head).__name__ == "Linear"


def test_sizes_that_a_library_cannot_pack_run(tmp_path):
    pytest.importorskip("bitsandbytes")
    loaded = load(model=saved(tmp_path), quantise="nf4")
    assert torch.isfinite(models.output(loaded.model, models.inputs("llama"))).all()


def test_the_saved_recipe_repeats_the_run(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_use_double_quant": True}
    run(base, data, tmp_path / "one", quantise="nf4", quantise_options=options, max_steps=3)
    call("train", str(tmp_path / "one" / "recipe.yaml"), "--output", str(tmp_path / "two"))
    assert same(tmp_path / "one", tmp_path / "two")
    assert read_notes(tmp_path / "two")["preparation"]["quantised"]["options"] == options


def test_evaluations_between_steps_change_no_gradient(base, data, tmp_path):  # noqa: F811
    """On some CPUs bitsandbytes switches to products without a gradient as soon as a model has been evaluated."""
    pytest.importorskip("bitsandbytes")
    settings = dict(quantise="nf4", max_steps=3, best=False)
    quiet = run(base, data, tmp_path / "one", **settings)
    evaluated = run(base, data, tmp_path / "two", **settings, eval_data=data, eval_every=1)
    assert evaluated["losses"] == quiet["losses"]
    assert same(tmp_path / "one", tmp_path / "two")


def test_verification_computes_as_training_did(base, data, tmp_path):  # noqa: F811
    """In evaluation, bitsandbytes' products round on some CPUs, also in the layers that have no adapter."""
    pytest.importorskip("bitsandbytes")
    run(base, data, tmp_path / "out", quantise="nf4", targets=["q_proj"], max_steps=2)
    found = verify(tmp_path / "out", load(model=base, quantise="nf4").model)
    (same_outputs,) = (check for check in found.checks if check.name == "same outputs")
    assert float(same_outputs.detail.split()[-1]) < 1e-6


def test_a_second_stage_is_quantised_as_the_first(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_use_double_quant": True}
    run(base, data, tmp_path / "one", quantise="nf4", quantise_options=options, max_steps=2)
    arguments = ["--start-from", str(tmp_path / "one"), "--data", str(data), "--max-steps", "1"]
    assert " in nf4" in call("train", *arguments, "--output", str(tmp_path / "two"))
    assert read_notes(tmp_path / "two")["preparation"]["quantised"] == {"scheme": "nf4", "options": options}
    call("train", *arguments, "--output", str(tmp_path / "three"), "--quantise", "none")
    assert "quantised" not in read_notes(tmp_path / "three").get("preparation", {})
    plan = ["plan", "--start-from", str(tmp_path / "one"), "--json"]
    quantised, whole = (json.loads(call(*plan, *more))["memory"]["base"] for more in ((), ("--quantise", "none")))
    assert quantised < whole


def test_every_verb_loads_it_as_it_was_in_training(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    out = str(tmp_path / "out")
    report = run(base, data, tmp_path / "out", quantise="nf4", eval_data=data, max_steps=4)

    def loss(*more: str) -> float:
        shown = CliRunner().invoke(app, ["eval", "--adapter", out, "--data", str(data), "--json", *more])
        return json.loads(shown.stdout)["results"]["out"]["loss"]

    assert loss() == pytest.approx(report["eval"]["loss"], rel=1e-2)
    assert loss("--quantise", "none") != loss()
    assert "quantised to nf4" in call("generate", "a?", "--adapter", out, "--max-new-tokens", "2")
    assert "ok     same outputs" in call("verify", out)


def test_merging_takes_the_unquantised_weights_and_says_so(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    run(base, data, tmp_path / "out", quantise="nf4", max_steps=2)
    shown = call("merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged"))
    assert "quantised to nf4 in training" in shown
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    batch = models.inputs("llama")
    torch.testing.assert_close(models.output(merged, batch), models.output(adapted, batch), rtol=1e-4, atol=1e-5)


def test_a_base_that_is_stored_quantised_is_refused(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    run(base, data, tmp_path / "out", max_steps=1)
    quantised = load(model=base, quantise="nf4")
    quantised.model.save_pretrained(tmp_path / "stored")
    quantised.tokenizer.save_pretrained(tmp_path / "stored")
    stored = str(tmp_path / "stored")
    assert "already quantised (bitsandbytes)" in refused(
        "train", "--model", stored, "--quantise", "nf4", "--data", str(data), "--output", str(tmp_path / "no")
    )
    assert not (tmp_path / "no").exists()
    with pytest.raises(NotMergeable, match="give the original model with --model"):
        CliRunner().invoke(
            app,
            ["merge", str(tmp_path / "out"), "--model", stored, "--out", str(tmp_path / "merged")],
            catch_exceptions=False,
        )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(quantise="nf5"), "quantise = 'nf5' must be nf4, int8 or int4"),
        (dict(quantise_options={"group_size": 32}), "quantise_options has no effect without quantise"),
        (dict(quantise="nf4", quantise_options={"group_size": 32}), "no 'group_size' for nf4; bitsandbytes takes bnb_"),
        (dict(quantise="nf4", quantise_options={"bnb_4bit_compute_dtype": "float3"}), "bnb_4bit_compute_dtype"),
        (dict(quantise="int8", quantise_options={"llm_int8_threshold": "high"}), "llm_int8_threshold"),
        (dict(quantise="int4", quantise_options={"group_size": 7}), "cannot be quantised to int4"),
    ],
)
def test_bad_settings_are_refused_in_one_line(base, data, tmp_path, given, message):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        run(base, data, tmp_path / "out", **given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(schemes, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'int4' needs hqq, which is not installed: pip install hqq"):
        quantisation("int4")


def test_adapters_of_different_bases_need_a_word(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    run(base, data, tmp_path / "one", quantise="nf4", max_steps=1)
    run(base, data, tmp_path / "two", max_steps=1)
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(ConfigError, match=r"one nf4; two none.*--quantise"):
        load(both)
    loaded = load(both, quantise="nf4")
    assert loaded.remarks == ("the base model is quantised to nf4",)


def test_the_forecast_counts_what_is_stored(base, scheme, tmp_path):  # noqa: F811
    """Against the tensors of a model that is quantised."""

    def planned(*more: str) -> int:
        shown = CliRunner().invoke(app, ["plan", "--model", base, "--json", *more])
        return json.loads(shown.stdout)["memory"]["base"]

    loaded = load(model=base, quantise=scheme).model
    assert planned("--quantise", scheme) == pytest.approx(stored(loaded), rel=0.02)
    assert planned("--quantise", scheme) < 0.9 * planned()


def stored(model) -> int:
    """The bytes of a model's tensors, those of its quantised weights included."""
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        tensors = list(module._parameters.values())
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            tensors.append(state.absmax)
        tensors.append(getattr(module._parameters.get("weight"), "SCB", None))
        if type(module).__name__ == "HQQLinear":
            tensors += [module.W_q, module.meta["scale"], module.meta["zero"]]
        for tensor in tensors:
            if tensor is not None and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.nbytes
    return total


def test_a_file_format_is_no_way_to_quantise():
    with pytest.raises(ConfigError, match="quantise = 'gguf': a GGUF file is given as the model"):
        recipe("base.gguf", "rows.jsonl", "out", quantise="gguf")
