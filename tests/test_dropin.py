"""veneer under the name peft: what there is, what a layer and a model show, and how programs get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import room

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
START = """
import json, sys, tempfile, warnings
import veneer
veneer.install_as_peft()
import peft, torch
from peft import *
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)
    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))

def mlp():
    torch.manual_seed(0)
    return Mlp()

def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["lin0"], "init_lora_weights": False, **settings})

def caught(call, *kinds):
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError("nothing was raised")

x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
"""


def run(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def program(script: str) -> str:
    return run("-c", START + script).stdout


def test_everything_that_peft_exports_is_there():
    pytest.importorskip("peft")
    listing = "print(json.dumps(sorted(n for n in dir(peft) if not n.startswith('_'))))"
    theirs = json.loads(run("-c", "import peft, json; " + listing).stdout)
    ours = json.loads(program(listing))
    assert set(theirs) <= set(ours)


def test_the_kinds_of_things_are_pefts():
    """A class is a class, a function a function, a mapping a mapping with the same keys."""
    pytest.importorskip("peft")
    script = """
import json, peft
def kind(v):
    if isinstance(v, dict) or hasattr(v, "keys"):
        return sorted(str(getattr(k, "value", k)) for k in v) if len(v) < 60 else "mapping"
    return "class" if isinstance(v, type) else "function" if callable(v) else type(v).__name__
print(json.dumps({n: kind(getattr(peft, n)) for n in peft.__all__}))
"""
    theirs, ours = json.loads(run("-c", script).stdout), json.loads(program(script))
    assert {name: ours[name] for name in theirs} == theirs


DEEP = """
from peft.config import PeftConfigMixin, PromptLearningConfig
from peft.functional import cast_adapter_dtype, delete_adapter, inject_adapter_in_model, set_adapter, set_requires_grad
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping_func import get_peft_model
from peft.mixed_model import PeftMixedModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.peft_model import PeftModel, TunerLayerStatus, TunerModelStatus
from peft.tuners import lora
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora import LoraLayer, LoraModel, Linear, Embedding, Conv2d, LoftQConfig, EvaConfig
from peft.tuners.lora.config import CordaConfig, LoraRuntimeConfig
from peft.tuners.lora.layer import Conv1d, ParamWrapper
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.tuners.vera import VeraLayer
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper, PeftType, TaskType, infer_device, transpose, _get_submodules
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft.utils.other import AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy, prepare_model_for_kbit_training
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
import importlib.metadata
from packaging.version import Version
assert Version(importlib.metadata.version("peft")) == Version(peft.__version__) == Version("0.21.2")
assert sorted(targets["llama"]) == ["q_proj", "v_proj"] and "gpt2" in targets and "nonesuch" not in targets
import transformers.utils
assert transformers.utils.is_peft_available()
print("done")
"""


def test_the_deep_paths_that_programs_use_are_there():
    pytest.importorskip("peft")
    assert program(DEEP).strip() == "done"
    imports = [line for line in DEEP.splitlines() if line.startswith("from peft")]
    run("-c", "\n".join(imports))  # the real one has them too


def test_what_programs_read_on_a_layer():
    program("""
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
model = get_peft_model(mlp(), lora(lora_alpha=8, lora_dropout=0.1, modules_to_save=["lin1"])).eval()
layer = model.base_model.model.lin0
assert isinstance(layer, (LoraLayer)) and isinstance(layer, Linear) and isinstance(layer, BaseTunerLayer)
assert not isinstance(layer, IA3Layer) and not isinstance(model.base_model.model.lin1, BaseTunerLayer)
assert isinstance(model.base_model, LoraModel) and model.base_model.prefix == "lora_"
A, B = layer.lora_A["default"], layer.lora_B.default
assert isinstance(A, nn.Linear) and A.weight.shape == (4, 10) and B.out_features == 20
assert layer.r == {"default": 4} and layer.lora_alpha["default"] == 8 and layer.scaling == {"default": 2.0}
assert layer.lora_dropout["default"].p == 0.1 and layer.use_dora["default"] is False
assert layer.weight is layer.base_layer.weight and layer.get_base_layer() is layer.base_layer
assert torch.allclose(layer.get_delta_weight("default"), 2 * B.weight @ A.weight)
by_hand = layer.base_layer(x) + 2 * B(A(x))
assert torch.allclose(layer(x), by_hand, atol=1e-6)
layer.set_scale("default", 3); assert layer.scaling["default"] == 6
layer.scale_layer(2); assert layer.scaling["default"] == 12
layer.unscale_layer(); assert layer.scaling["default"] == 2
layer.scaling["default"] = 0; assert torch.equal(layer(x), layer.base_layer(x)); layer.unscale_layer()
layer.merge(); assert layer.merged and layer.merged_adapters == ["default"]; layer.unmerge(); assert not layer.merged
layer.enable_adapters(False); assert layer.disable_adapters and torch.equal(layer(x), layer.base_layer(x))
layer.enable_adapters(True); assert torch.allclose(layer(x), by_hand, atol=1e-6)
assert model.base_model.model.lin1.weight is model.base_model.model.lin1.modules_to_save.default.weight
layer.update_layer("default", 2, 8, LoraConfig(r=2)); assert layer.lora_A["default"].weight.shape == (2, 10)
names = [name for name, p in model.named_parameters() if p.requires_grad]
assert "base_model.model.lin0.lora_A.default.weight" in names
assert "base_model.model.lin1.modules_to_save.default.weight" in names
""")


def test_layers_may_disagree_for_a_while():
    program("""
model = get_peft_model(mlp(), lora(target_modules=["lin0", "lin1"]))
model.add_adapter("b", lora(target_modules=["lin0", "lin1"]))
first = model.base_model.model.lin0
first.set_adapter("b")
assert model.get_model_status().active_adapters == "irregular"
both = model(x)
model.base_model.model.lin1.set_adapter("b")
assert model.get_model_status().active_adapters == ["b"] and first.own is None
assert not torch.allclose(model(x), both)
""")


def test_warns_where_veneer_refuses_unless_strict():
    script = """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = get_peft_model(mlp(), lora(target_modules=["lin0", "absent"], rank_pattern={"zzz": 2}))
assert any("did not match any targeted module" in str(w.message) for w in seen)
assert "not found in the base model" in caught(lambda: get_peft_model(mlp(), lora(target_modules=["zzz"])), ValueError)
assert "unexpected keyword" in caught(lambda: LoraConfig(nonsense=1), TypeError)
"""
    program(script)
    strict = START.replace("install_as_peft()", "install_as_peft(strict=True)")
    refused = (
        "assert 'absent' in caught(lambda: get_peft_model(mlp(), lora(target_modules=['lin0', 'absent'])), ValueError)"
    )
    run("-c", strict + refused)


def test_the_real_peft_in_the_process_is_refused():
    pytest.importorskip("peft")
    done = run("-c", "import peft, veneer; veneer.install_as_peft()", code=1)
    assert "imported already" in done.stderr


def test_a_program_runs_unchanged(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text("import sys, peft\nprint(sys.argv[1:], hasattr(peft, '_veneer_drop_in'), __name__)\n")
    assert run("-m", "veneer.as_peft", str(path), "a", "--b").stdout.split() == ["['a',", "'--b']", "True", "__main__"]
    assert "no such program" in run("-m", "veneer.as_peft", str(tmp_path / "none.py"), code=2).stderr
    assert run("-m", "veneer.as_peft", "--help").stdout.startswith("usage")


def test_from_pretrained_takes_what_pefts_takes():
    program("""
with tempfile.TemporaryDirectory() as folder:
    model = get_peft_model(mlp(), lora())
    model.save_pretrained(folder + "/sub/dir")
    settings = dict(subfolder="sub/dir", adapter_name="other", torch_device="cpu", low_cpu_mem_usage=True)
    again = PeftModel.from_pretrained(mlp(), folder, ephemeral_gpu_offload=True, **settings)
    assert list(again.peft_config) == ["other"] and torch.allclose(again(x), model(x))
    assert again.peft_config["other"].runtime_config.ephemeral_gpu_offload
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
        def forward(self, x):
            return self.inner(x)
    mapped = PeftModel.from_pretrained(Outer(), folder, subfolder="sub/dir", key_mapping={"^lin0": "inner.lin0"})
    assert torch.allclose(mapped(x), model(x))
    model.save_pretrained(folder, safe_serialization=False)
    assert torch.allclose(PeftModel.from_pretrained(mlp(), folder)(x), model(x))
""")


def test_missing_tensors_are_a_warning_and_are_named():
    program("""
from safetensors.torch import load_file, save_file
with tempfile.TemporaryDirectory() as folder:
    get_peft_model(mlp(), lora()).save_pretrained(folder)
    path = folder + "/adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lin0.lora_B.weight"]
    save_file(tensors, path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(mlp(), folder)
    assert any("Found missing adapter keys" in str(w.message) for w in seen)
    result = model.load_adapter(folder, "default")
    assert result.missing_keys == ["base_model.model.lin0.lora_B.default.weight"]
""")


def test_push_to_hub_and_back_with_a_stand_in_for_the_hub():
    program("""
import pathlib, shutil, huggingface_hub
hub = pathlib.Path(tempfile.mkdtemp())
calls = []
def create_repo(repo_id, **settings):
    (hub / repo_id).mkdir(parents=True, exist_ok=True)
    return type("Url", (str,), {"repo_id": repo_id})(repo_id)
def upload_folder(*, repo_id, folder_path, **settings):
    calls.append(settings["commit_message"])
    shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
def hf_hub_download(repo_id, filename, subfolder=None, revision=None, cache_dir=None, **settings):
    path = hub / repo_id / (subfolder or "") / filename
    if not path.exists():
        raise OSError(filename)
    return str(path)
huggingface_hub.create_repo, huggingface_hub.upload_folder = create_repo, upload_folder
huggingface_hub.hf_hub_download = hf_hub_download
model = get_peft_model(mlp(), lora())
model.push_to_hub("me/adapter", commit_message="an adapter")
assert calls == ["an adapter"] and (hub / "me/adapter/README.md").read_text().startswith("---")
again = PeftModel.from_pretrained(mlp(), "me/adapter", revision="main")
assert torch.allclose(again(x), model(x))
lora().push_to_hub("me/config")
assert PeftConfig.from_pretrained("me/config").r == 4
""")


def test_a_copy_and_a_pickle_of_a_model_are_whole():
    program("""
import copy, io, pickle
model = get_peft_model(mlp(), lora(modules_to_save=["lin1"], use_dora=True))
for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    assert torch.equal(other(x), model(x)) and sorted(other.state_dict()) == sorted(model.state_dict())
    other.base_model.model.lin0.lora_A.default.weight.data.zero_()
    assert not torch.equal(other(x), model(x))
fresh = get_peft_model(mlp(), lora(modules_to_save=["lin1"], use_dora=True))
fresh.load_state_dict(model.state_dict())
assert torch.equal(fresh(x), model(x))
half = copy.deepcopy(model).to(torch.bfloat16)
assert half.base_model.model.lin0.lora_A.default.weight.dtype == torch.bfloat16 and half(x.bfloat16()).isfinite().all()
""")


def test_fsdp_takes_the_parameters_and_gives_their_values_back():
    """Those that stand in containers by adapter name, and DoRA's magnitudes, are another module's here."""
    program("""
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
configs = [
    lora(use_dora=True), IA3Config(target_modules=["lin0"], feedforward_modules=[], init_ia3_weights=False),
    VeraConfig(target_modules=["lin0"], r=4, init_weights=False), C3AConfig(target_modules=["lin0"], block_size=10,
    init_weights=False), OFTConfig(target_modules=["lin0"], oft_block_size=5, init_weights=False),
]
for config in configs:
    adapted = get_peft_model(mlp(), config).eval()
    expected = adapted(x).detach()
    wrapped = FSDP(adapted, use_orig_params=True, device_id=torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(wrapped(x), expected), config.peft_type
    tensors = get_peft_model_state_dict(wrapped)
    fresh = get_peft_model(mlp(), type(config)(**{n: getattr(config, n) for n in ("target_modules",)}, **{
        n: getattr(config, n) for n in ("r", "use_dora", "block_size", "oft_block_size", "feedforward_modules")
        if hasattr(config, n)})).eval()
    set_peft_model_state_dict(fresh, tensors)
    assert torch.allclose(fresh(x), expected), config.peft_type
dist.destroy_process_group()
""")


def test_tied_modules_may_be_named_together_where_tying_is_ensured():
    program("""
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
for field in ("modules_to_save", "target_modules"):
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    settings = {"target_modules": ["q_proj"]} | {field: ["lm_head", "embed_tokens"]}
    model = get_peft_model(base, LoraConfig(r=2, ensure_weight_tying=True, **settings))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("embed_tokens" in n for n in names) and not any("lm_head" in n and "save" in n for n in names), names
""")


def test_a_compiled_model_is_prepared_for_other_ranks():
    program("""
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
with tempfile.TemporaryDirectory() as folder:
    other = get_peft_model(mlp(), lora(r=7))
    other.save_pretrained(folder)
    model = get_peft_model(mlp(), lora(r=3)).eval()
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.allclose(model(x), before) and model.base_model.model.lin0.lora_A.default.weight.shape[0] == 8
    hotswap_adapter(model, folder, "default")
    assert torch.allclose(model(x), other.eval()(x))
""")


def test_configs_say_what_peft_s_say():
    program("""
assert isinstance(lora().target_modules, set) and lora().peft_version == peft.__version__ == peft.config.__version__
assert "runtime_config" not in lora().to_dict()
wrong = caught(lambda: AdaLoraConfig(total_step=10, tinit=8, tfinal=4), ValueError)
assert "don't allow for a budgeting phase" in wrong
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    AdaLoraConfig(total_step=10, r=3)
assert any("`r` is not used in AdaLora" in str(w.message) for w in seen)
""")


def test_layers_that_are_on_and_off_are_told_when_all_are_switched_off():
    program("""
model = get_peft_model(mlp(), lora(target_modules=["lin0", "lin1"]))
first = model.base_model.model.lin0
first.enable_adapters(False)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    with model.disable_adapter():
        pass
assert any("some adapter layers that are enabled" in str(w.message) for w in seen) and not first.disable_adapters
assert first.in_features == 10 and first.out_features == 20
broken = get_peft_model(mlp(), lora())
broken.base_model.model.lin0.lora_A.default.weight.data.fill_(float("nan"))
assert "NaNs detected in the merged weights" in caught(lambda: broken.merge_adapter(safe_merge=True), ValueError)
""")


def test_what_is_not_there_says_so_when_it_is_used():
    program("""
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.tp_layer import LoraParallelLinear, dispatch_megatron
from peft.tuners.lora import Linear
model = get_peft_model(mlp(), lora())
assert not any(isinstance(module, LoraParallelLinear) for module in model.modules())
assert "Megatron" in caught(lambda: LoraParallelLinear(nn.Linear(2, 2), "default"), NotImplementedError)
assert "Megatron" in caught(lambda: dispatch_megatron(nn.Linear(2, 2), "default"), NotImplementedError)
assert "veneer/methods" in caught(lambda: type("Own", (LoraVariant,), {}), NotImplementedError)
assert "adaption_prompt" in caught(lambda: TRANSFORMERS_MODEL_CONFIG["llama"], NotImplementedError)
assert "config" in caught(lambda: Linear.pissa_init(model.base_model.model.lin0, "default"), NotImplementedError)
assert "without an adapter" in caught(lambda: peft.tuners.lora.LoraLayer(nn.Linear(2, 2)), NotImplementedError)
""")


def test_a_layer_without_a_model():
    """PEFT's layer classes wrap a module, with an adapter that is merged and initialised like any other."""
    program("""
from peft.tuners import boft, c3a, ia3, loha, lora
def lin():
    return nn.Linear(10, 6)
layers = [
    lora.Linear(lin(), "a", lora.LoraConfig(layers_to_transform=[1], init_lora_weights=False), r=3, lora_alpha=6),
    ia3.Linear(lin(), "a", IA3Config(feedforward_modules=[], init_ia3_weights=False), False),
    boft.layer.Linear(lin(), "a", BOFTConfig(boft_block_size=2, init_weights=False)),
    loha.Linear(lin(), "a", LoHaConfig(init_weights=False), r=2, alpha=4.0),
    c3a.C3ALinear(lin(), "a", C3AConfig(init_weights="gaussian"), block_size=2),
]
for layer in layers:
    y = layer(x)
    assert not torch.allclose(y, layer.base_layer(x), atol=1e-4), layer
    layer.merge()
    assert torch.allclose(layer(x), y, atol=1e-5), layer
    layer.unmerge()
assert layers[0].r == {"a": 3} and layers[0].scaling == {"a": 2.0} and layers[3].scaling == {"a": 2.0}
A = layers[0].lora_A["a"].weight
layers[0].reset_lora_parameters("a", True)
layers[2].reset_boft_parameters("a", True)
assert layers[0].lora_A["a"].weight is A
assert all(torch.allclose(layer(x), layer.base_layer(x), atol=1e-5) for layer in (layers[0], layers[2]))
""")


def test_an_adapter_saved_as_a_lora_loads():
    program("""
model = get_peft_model(mlp(), LoHaConfig(target_modules=["lin0"], r=2, init_weights=False)).eval()
with tempfile.TemporaryDirectory() as place:
    save_as_lora(place, model, rank=4)
    loaded = PeftModel.from_pretrained(mlp(), place).eval()
assert loaded.peft_config["default"].peft_type == "LORA" and loaded.peft_config["default"].r == 4
assert torch.allclose(loaded(x), model(x), atol=1e-5)
""")


EXPERTS = """
import copy, tempfile, sys
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

def base(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=67, num_experts_per_tok=2, moe_intermediate_size=16,
        experts_implementation="eager")
    if kind == "glm4_moe":
        return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, n_routed_experts=4, n_group=1, topk_group=1)).eval()
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, num_experts=4, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"])).eval()

ids = torch.arange(12).view(2, 6)
where, kind = sys.argv[1:]
"""


@pytest.mark.parametrize("kind", ["glm4_moe"])
def test_our_lora_on_shared_experts_is_read_as_it_was_written(kind: str, tmp_path: Path):
    """PEFT takes "gate_proj" there for the fused parameter of all experts; in our file it is the shared expert's."""
    write = """
from veneer import LoraConfig, get_peft_model
torch.manual_seed(1)
model = get_peft_model(base(kind), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
model.save_pretrained(where)
torch.save(model(ids).logits, where + "/expected.pt")
print("done")
"""
    read = """
import warnings
warnings.simplefilter("error", UserWarning)
import veneer
veneer.install_as_peft()
from peft import PeftModel
expected = torch.load(where + "/expected.pt")
torch.testing.assert_close(PeftModel.from_pretrained(base(kind), where)(ids).logits, expected)
other = PeftModel.from_pretrained(base(kind), where, adapter_name="first")
other.load_adapter(where, "second")
other.set_adapter("second")
torch.testing.assert_close(other(ids).logits, expected)
print("done")
"""
    for script in (write, read):
        assert run("-c", EXPERTS + script, str(tmp_path), kind).stdout.strip().endswith("done")
