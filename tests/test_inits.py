"""Initialisers of LoRA: each against its paper in NumPy, against PEFT, and from the file on the untouched base."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import veneer
from veneer import (
    ConfigError,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    NotMergeable,
    PeftModel,
    TargetError,
    VeneerError,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    to_plain_lora_,
)
from veneer.methods.inits.loftq import nf4, normal_float

from . import models
from .models import output
from .test_distributed import both
from .test_numpy import adapt, arr, base_of, linear_places, places, state

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
TARGETS = ["q_proj", "k_proj", "down_proj"]
BASES = {"llama": TARGETS, "gpt2": ["c_attn", "mlp.c_proj"]}


@dataclass
class Start:
    """An initialiser with settings, and what it needs before and after the adapter is built."""

    how: str
    settings: dict
    before: str | None = None
    after: bool = False
    noop: bool = True

    def __str__(self) -> str:
        return "-".join([self.how, *(str(v) for s in self.settings.values() for v in vars(s).values())][:3])


STARTS = [
    Start("gaussian", {}),
    Start("orthogonal", {}),
    Start("pissa", {}),
    Start("pissa_niter_4", {}),
    Start("olora", {}),
    Start("corda", dict(corda_config=CordaConfig()), before="corda"),
    Start("corda", dict(corda_config=CordaConfig(corda_method="kpm")), before="corda"),
    Start("lora_ga", dict(lora_ga_config=LoraGAConfig()), before="lora_ga"),
    Start("lora_ga", dict(lora_ga_config=LoraGAConfig(direction="ArBr", scale="weight_svd")), before="lora_ga"),
    Start("eva", {}, after=True),
    Start("loftq", {}, noop=False),
]
FROM_DATA = [start for start in STARTS if start.before]
every_start = pytest.mark.parametrize("start", STARTS, ids=str)


def batches(name: str = "llama", n: int = 4, rows: int = 4, labels: bool = True) -> list[dict]:
    """Batches with padding and labels that leave out the first tokens."""
    found = []
    for seed in range(n):
        ids = models.inputs(name, seed=20 + seed, rows=rows)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = ids.clone().masked_fill(torch.arange(7) < 2, -100)
        found.append(batch)
    return found


def run_on_samples(model):
    def run():
        for seed in range(9):
            model(**models.inputs("llama", seed=seed, rows=1))

    return run


def train_step(model):
    def run():
        for batch in batches():
            model(**batch).loss.backward()

    return run


def started(start: Start, base: str = "llama", seed: int = 5, library=veneer, **more):
    """A model whose adapter starts so."""
    model = models.build(base)
    settings = dict(r=4, lora_alpha=7, target_modules=BASES[base], init_lora_weights=start.how, task_type="CAUSAL_LM")
    config = LoraConfig(**settings | start.settings | more)
    if start.before == "corda":
        preprocess_corda(model, config, run_on_samples(model))
    if start.before == "lora_ga":
        preprocess_loraga(model, config, train_step(model))
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config).eval()
    if start.after:
        initialize_lora_eva_weights(adapted, batches(base), show_progress_bar=False)
    return adapted


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


# Every start


@every_start
@pytest.mark.parametrize("base", BASES)
def test_a_start_is_a_no_op(start: Start, base: str):
    model, batch = started(start, base), models.inputs(base)
    untouched = models.build(base)
    for name, p in untouched.named_parameters():
        assert torch.equal(p, dict(state_walk(model))[name]), "the base weights have moved"
    if start.noop:
        torch.testing.assert_close(output(model, batch), output(untouched, batch), rtol=1e-4, atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(untouched, batch))


def state_walk(model):
    for path, module in veneer.targets.walk.walk(model.get_base_model()):
        for name, p in module._parameters.items():
            if p is not None:
                yield (f"{path}.{name}" if path else name), p


@every_start
def test_a_start_is_the_same_again(start: Start):
    """And where it needs no random numbers it takes none from the user's stream."""
    one, two = (list(state(started(start)).parameters("default")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    if start.how not in ("gaussian", "orthogonal", "eva"):
        other = list(state(started(start, seed=6)).parameters("default"))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_start
@pytest.mark.parametrize("base", BASES)
def test_the_file_is_right_on_the_untouched_base(start: Start, base: str, tmp_path):
    """Here, and in PEFT where it can build that start at all."""
    model, batch = models.perturb(started(start, base)), models.inputs(base)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(models.build(base), tmp_path / "one")
    torch.testing.assert_close(output(again, batch), output(model, batch), **TOLERANCE)
    again.save_pretrained(tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    if start.how in ("pissa_niter_4", "loftq") or (start.how == "olora" and base == "gpt2"):
        return  # test_parity says why
    theirs = peft.PeftModel.from_pretrained(models.build(base), tmp_path / "one").eval()
    torch.testing.assert_close(output(theirs, batch), output(model, batch), **TOLERANCE)


@every_start
@pytest.mark.parametrize("more", [{}, dict(use_rslora=True), dict(use_dora=True), dict(bias="all")], ids=str)
def test_any_start_becomes_plain_lora(start: Start, more: dict, tmp_path):
    if start.how == "loftq":
        if "use_dora" not in more:
            with pytest.raises(NotMergeable, match="quantised"):
                to_plain_lora_(started(start, **more))
        return
    patterns = dict(rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 3})
    model, batch = models.perturb(started(start, **more | patterns)), models.inputs("llama")
    before = output(model, batch)
    to_plain_lora_(model)
    torch.testing.assert_close(output(model, batch), before, **TOLERANCE)
    assert model.peft_config["default"].init_lora_weights is True
    assert all(p.requires_grad for p in state(model).parameters("default"))
    plan = model.parameter_plan()
    assert plan.expected == plan.total
    model.save_pretrained(tmp_path)
    for library, build in ((veneer, models.build), (peft, models.build)):
        loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
        torch.testing.assert_close(output(loaded, batch), before, **TOLERANCE)


@every_start
def test_a_start_is_saved_as_plain_lora_by_pefts_argument(start: Start, tmp_path):
    model, batch = models.perturb(started(start)), models.inputs("llama")
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not read")
    assert veneer.PeftConfig.from_pretrained(tmp_path).init_lora_weights is True
    for library in (veneer, peft):
        loaded = library.PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
        torch.testing.assert_close(output(loaded, batch), output(model, batch), **TOLERANCE)


@pytest.mark.parametrize("how", ["pissa", "corda"])
def test_what_has_other_tensors_of_its_rank_has_no_plain_form(how: str):
    """A start from data could not be saved then, so it is refused before anything is trained."""
    start = Start(how, {}, before="corda" if how == "corda" else None)
    with pytest.raises(ConfigError, match="MonteCLoRA"):
        to_plain_lora_(started(start, monteclora_config=veneer.MontecloraConfig()))


@every_start
def test_a_start_learns(start: Start):
    model = started(start).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for batch in itertools.islice(itertools.cycle(batches()), 24):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[3]


@pytest.mark.parametrize("start", FROM_DATA, ids=str)
def test_training_resumes_into_the_same_parameters(start: Start, tmp_path):
    """The file of twice the rank goes back into the adapter that wrote it."""
    model, batch = models.perturb(started(start)), models.inputs("llama")
    model.save_pretrained(tmp_path)
    expected, parameters = output(model, batch), list(state(model).parameters("default"))
    fresh = started(start)
    for other in (model, fresh):
        models.perturb(other, seed=9)
        other.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(output(other, batch), expected)
    assert all(a is b for a, b in zip(parameters, state(model).parameters("default"), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "orthogonal", "loftq"])
def test_starts_on_a_half_precision_base(how: str, dtype: torch.dtype, tmp_path):
    base = models.build("llama", dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=how)).eval()
    batch = models.inputs("llama")
    if how != "loftq":
        exact = output(models.build("llama", dtype=dtype).double(), batch)
        error_of_base = (output(models.build("llama", dtype=dtype), batch) - exact).norm()
        assert output(model, batch).dtype == dtype
        error = (output(model, batch) - exact).norm()
        # the bias is added after the sum of base and update, with a rounding of its own
        assert error < 1.5 * error_of_base
    models.perturb(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.build("llama", dtype=dtype), tmp_path)
    assert torch.equal(output(again, batch), output(model, batch))


# Starts that follow from the weight


@places
def test_olora(place: str):
    """A0 and B0 are the first rows and columns of R and Q, but for signs; s B0 A0 is taken off."""
    layer, p, W, b = adapt(LoraConfig, place, 0.0, r=3, lora_alpha=5, init_lora_weights="olora")
    Q, R = np.linalg.qr(W)
    A, B = p["lora_A"].reshape(3, -1), p["lora_B"].reshape(-1, 3)
    np.testing.assert_allclose(np.abs(A), np.abs(R[:3]), **TOLERANCE)
    np.testing.assert_allclose(np.abs(B), np.abs(Q[:, :3]), **TOLERANCE)
    np.testing.assert_allclose(B @ A, Q[:, :3] @ R[:3], **TOLERANCE)
    with torch.no_grad():
        layer.adapters["default"].lora_B.weight.mul_(2)
        np.testing.assert_allclose(arr(layer.fold(layer.stack(("default",)))[0]), W + 5 / 3 * B @ A, **TOLERANCE)


@places
def test_orthogonal(place: str):
    """B A = 0 with neither zero, and the rows that face each other are orthonormal halves of one matrix."""
    _, p, _, _ = adapt(LoraConfig, place, 0.0, r=6, lora_alpha=5, init_lora_weights="orthogonal")
    A, B = p["lora_A"].reshape(6, -1), p["lora_B"].reshape(-1, 6)
    assert np.abs(B @ A).max() < 1e-6 < 0.02 < min(A.std(), B.std())
    assert np.linalg.matrix_rank(A, tol=1e-4) == np.linalg.matrix_rank(B, tol=1e-4) == 3


def test_fast_pissa_is_pefts_for_the_same_projection():
    W = models.build("llama").model.layers[0].self_attn.q_proj.weight.detach()
    theirs = peft.get_peft_model(
        models.build("llama"),
        peft.LoraConfig(r=4, target_modules=["layers.0.self_attn.q_proj"], init_lora_weights=False),
    )
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    layer.pissa_init("default", "pissa_niter_4")
    A, B = veneer.methods.inits.pissa.pissa(W, 4, layer.scaling["default"], "pissa_niter_4")
    torch.testing.assert_close(A, layer.lora_A["default"].weight, **TOLERANCE)
    torch.testing.assert_close(B, layer.lora_B["default"].weight, **TOLERANCE)


def test_fast_pissa_comes_near_the_exact_one():
    torch.manual_seed(0)
    W = torch.randn(40, 8) @ torch.randn(8, 61) + 0.01 * torch.randn(40, 61)
    (A, B), (A1, B1) = (veneer.methods.inits.pissa.pissa(W, 8, 2.0, how) for how in ("pissa", "pissa_niter_8"))
    torch.testing.assert_close(B1 @ A1, B @ A, rtol=1e-3, atol=1e-3)


def test_orthogonal_has_pefts_scale():
    """The same spread of entries as PEFT's, which is random too."""
    settings = dict(r=4, target_modules=["down_proj"], init_lora_weights="orthogonal")
    mine = state(get_peft_model(models.build("llama"), LoraConfig(**settings))).adapters("default")
    theirs = peft.get_peft_model(models.build("llama"), peft.LoraConfig(**settings)).base_model.model
    for path, adapter in mine.items():
        layer = theirs.get_submodule(path)
        for one, two in ((adapter.lora_A, layer.lora_A), (adapter.lora_B, layer.lora_B)):
            assert 0.6 < one.weight.std() / two["default"].weight.std() < 1.6


# LoftQ


def test_the_normal_floats_are_the_papers():
    """Dettmers et al., appendix E, to its printed digits."""
    paper = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    paper += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    paper += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]
    np.testing.assert_allclose(normal_float(), paper, atol=2e-7)


def nearest(values: np.ndarray, levels) -> np.ndarray:
    levels = np.asarray(levels)
    return levels[np.abs(values[..., None] - levels).argmin(-1)]


def quantised(W: np.ndarray, bits: int) -> np.ndarray:
    """NF4 in blocks of 64 of the flat matrix, or int8 by rows."""
    if bits == 8:
        scale = np.abs(W).max(1, keepdims=True) / 127
        return np.round(W / scale) * scale
    out, flat = np.empty(W.size), W.ravel()
    for i in range(0, W.size, 64):
        scale = np.abs(flat[i : i + 64]).max()
        out[i : i + 64] = nearest(flat[i : i + 64] / scale, normal_float()) * scale
    return out.reshape(W.shape)


@linear_places
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 3])
def test_loftq(place: str, bits: int, turns: int):
    """Algorithm 1: quantise what the update leaves, then update by the best rank r of what that loses."""
    settings = dict(loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=turns), init_lora_weights="loftq")
    layer, p, W, b = adapt(LoraConfig, place, 0.0, r=3, lora_alpha=5, **settings)
    stored = (lambda M: M.T) if place == "conv1d" and bits == 4 else (lambda M: M)
    update = np.zeros_like(W)
    for _ in range(turns):
        Q = stored(quantised(np.ascontiguousarray(stored((W - update).astype(np.float32).astype(float))), bits))
        U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
        update = U[:, :3] * S[:3] @ Vt[:3]
    np.testing.assert_allclose(5 / 3 * p["lora_B"] @ p["lora_A"], update, rtol=1e-3, atol=2e-5)
    with torch.no_grad():
        folded = arr(layer.fold(layer.stack(("default",)))[0])
    np.testing.assert_allclose(folded, Q + update, rtol=1e-4, atol=2e-5)
    assert np.linalg.norm(folded - W) < np.linalg.norm(Q - W) < np.linalg.norm(W) * (0.2 if bits == 4 else 0.01)


def test_more_turns_of_loftq_come_nearer():
    errors = []
    for turns in (1, 5):
        config = LoftQConfig(loftq_iter=turns)
        layer, _, W, _ = adapt(LoraConfig, "linear", 0.0, r=8, init_lora_weights="loftq", loftq_config=config)
        with torch.no_grad():
            errors.append(np.linalg.norm(arr(layer.fold(layer.stack(("default",)))[0]) - W))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("base", BASES)
def test_the_quantised_base_may_be_had(base: str, tmp_path):
    """Then the adapter is plain LoRA on it, for any reader, and `unload` gives the quantised base."""
    model, batch = models.perturb(started(Start("loftq", {}), base)), models.inputs(base)
    expected, whole = output(model, batch), models.build(base)
    veneer.quantise_base_(model)
    torch.testing.assert_close(output(model, batch), expected, **TOLERANCE)
    model.save_pretrained(tmp_path / "adapter")
    quantised = model.unload()
    quantised.save_pretrained(tmp_path / "base")
    for name, p in quantised.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)) != name.endswith(tuple(f"{t}.weight" for t in BASES[base]))
    for library in (veneer, peft):
        again = library.PeftModel.from_pretrained(type(whole).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        torch.testing.assert_close(output(again.eval(), batch), expected, **TOLERANCE)
    with pytest.raises(VeneerError, match="loftq"):
        veneer.quantise_base_(started(Start("olora", {}), base))


def quantised_base():
    """A model some of whose layers are rounded to NF4."""
    base = models.build("llama")
    with torch.no_grad():
        for name, module in base.named_modules():
            if name.endswith(tuple(TARGETS)):
                module.weight.copy_(nf4(module.weight))
    return base


@pytest.mark.parametrize("sharded", [False, True])
def test_a_quantised_base_gets_loftqs_start(tmp_path, sharded: bool):
    whole = models.build("llama")
    whole.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    config = LoraConfig(r=8, lora_alpha=20, target_modules=TARGETS)
    model, batch = get_peft_model(quantised_base(), config).eval(), models.inputs("llama")
    before = (output(model, batch) - output(whole, batch)).norm()
    asked = []

    def better(adapted, name: str) -> bool:
        asked.append(name)
        return "k_proj" not in name

    veneer.replace_lora_weights_loftq(model, str(tmp_path), callback=better)
    for path, adapter in state(model).adapters("default").items():
        W, _ = base_of(whole.get_submodule(path))
        Q, _ = base_of(adapter.target.base)
        U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
        expected = 0 if "k_proj" in path else U[:, :8] * S[:8] @ Vt[:8]
        np.testing.assert_allclose(arr(adapter.delta()), expected, rtol=1e-3, atol=2e-5)
    assert len(asked) == 6
    assert (output(model, batch) - output(whole, batch)).norm() < 0.9 * before
    with pytest.raises(VeneerError, match="not quantised"):
        veneer.replace_lora_weights_loftq(get_peft_model(models.build("llama"), config), str(tmp_path))
    with pytest.raises(VeneerError, match=r"no model.safetensors"):
        veneer.replace_lora_weights_loftq(model, str(tmp_path / "elsewhere"))


# CorDA


def covariances_by_hand(model, targets) -> dict[str, np.ndarray]:
    """E[x^T x] of sequences, each divided by its largest entry."""
    seen: dict[str, list] = {path: [] for path in targets}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: seen[path].append(arr(args[0])))
        for path in targets
    ]
    with torch.no_grad():
        run_on_samples(model)()
    for hook in hooks:
        hook.remove()
    scaled = {path: [x[0] / abs(x[0].max()) for x in xs] for path, xs in seen.items()}
    return {path: sum(x.T @ x for x in xs) / len(xs) for path, xs in scaled.items()}


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method: str):
    """W = U S V^T C^-1 of W C; the first or the last r of its terms, shared evenly between A0 and B0 by S."""
    start = Start("corda", dict(corda_config=CordaConfig(corda_method=method)), before="corda")
    adapters = state(started(start)).adapters("default")
    found = covariances_by_hand(models.build("llama"), adapters)
    for path, adapter in adapters.items():
        C = found[path] + 0.01 * np.diag(found[path]).mean() * np.eye(len(found[path]))
        W, s = base_of(adapter.target.base)[0], adapter.scaling
        U, S, Vt = np.linalg.svd(W @ C, full_matrices=False)
        keep = slice(0, 4) if method == "ipm" else slice(len(S) - 4, None)
        A, B = arr(adapter.lora_A.weight), arr(adapter.lora_B.weight)
        part = U[:, keep] * S[keep] @ Vt[keep] @ np.linalg.inv(C)
        np.testing.assert_allclose(s * B @ A, part, rtol=2e-2, atol=2e-3 * np.abs(part).max())
        np.testing.assert_allclose(B.T @ B, np.diag(S[keep]) / s, rtol=1e-2, atol=2e-3 * S[keep].max())
        np.testing.assert_allclose(arr(adapter.fold(adapter.target.weight(), None)[0]), W, **TOLERANCE)


def test_corda_finds_what_peft_finds(monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT imports it for this alone, and does not require it
    from peft.tuners.lora.corda import preprocess_corda as pefts_corda

    for method in ("ipm", "kpm"):
        start = Start("corda", dict(corda_config=CordaConfig(corda_method=method)), before="corda")
        ours = state(started(start, rank_pattern={"k_proj": 2})).adapters("default")
        base = models.build("llama")
        config = peft.LoraConfig(
            r=4,
            lora_alpha=7,
            target_modules=TARGETS,
            rank_pattern={"k_proj": 2},
            init_lora_weights="corda",
            corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
        )
        pefts_corda(base, config, run_on_samples(base))
        theirs = peft.get_peft_model(base, config).base_model.model
        for path, adapter in ours.items():
            layer = theirs.get_submodule(path)
            B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            mine = adapter.lora_B.weight
            for one, two in ((mine @ adapter.lora_A.weight, B @ A), (mine.abs(), B.abs())):
                torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3 * float(two.abs().max()))


def test_corda_takes_batches():
    """A batch is its rows one by one."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="corda")
    one, two = models.build("llama"), models.build("llama")
    rows = models.inputs("llama", rows=6)["input_ids"]
    preprocess_corda(one, config, lambda: one(rows))
    preprocess_corda(two, config, lambda: [two(row[None]) for row in rows])
    for a, b in zip(state(get_peft_model(one, config)).parameters("default"), parameters_of(two, config), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def parameters_of(base, config):
    return state(get_peft_model(base, config)).parameters("default")


def test_cordas_files_stand_in_for_a_run(tmp_path):
    files = dict(cache_file=str(tmp_path / "new" / "start"), covariance_file=str(tmp_path / "C"))
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig(**files))
    base = models.build("llama")
    preprocess_corda(base, config, run_on_samples(base))
    first = [p.clone() for p in parameters_of(base, config)]
    base = models.build("llama")
    preprocess_corda(base, config)
    assert all(torch.equal(a, b) for a, b in zip(first, parameters_of(base, config), strict=True))
    other = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig(**files))
    base = models.build("llama")
    preprocess_corda(base, other)
    with pytest.raises(ConfigError, match="rank 4"):
        get_peft_model(base, other)
    other.corda_config = CordaConfig(covariance_file=files["covariance_file"])
    base = models.build("llama")
    preprocess_corda(base, other)
    get_peft_model(base, other)
    other.target_modules = ["o_proj"]
    with pytest.raises(ConfigError, match="other targets"):
        preprocess_corda(base, other)


def test_the_bare_model_is_as_it_was_before_the_run():
    base = models.build("llama").train()
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="corda")
    preprocess_corda(base, config, run_on_samples(base))
    assert base.training and not any(m._forward_pre_hooks for m in base.modules())
    model = get_peft_model(base, config)
    assert not any("_veneer_start" in m.__dict__ for m in model.modules())
    assert config.target_modules == TARGETS and config.init_lora_weights == "corda"


# LoRA-GA


def gradients_by_hand(paths) -> dict[str, np.ndarray]:
    model, total = models.build("llama").train(), {}
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for path in paths:
            total[path] = total.get(path, 0) + arr(model.get_submodule(path).weight.grad) / len(batches())
    return total


HALVES = {
    "ArB2r": (slice(0, 3), slice(3, 6)),
    "A2rBr": (slice(3, 6), slice(0, 3)),
    "ArBr": (slice(1, 6, 2), slice(0, 6, 2)),
}


@pytest.mark.parametrize("direction", HALVES)
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga(direction: str, scale: str):
    """A0 and B0 are orthonormal singular vectors of the gradient, both of the size that the paper gives them."""
    config = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    targets = ["q_proj", "v_proj"]
    start = Start("lora_ga", dict(lora_ga_config=config), before="lora_ga")
    adapters = state(started(start, r=3, lora_alpha=5, target_modules=targets)).adapters("default")
    found = gradients_by_hand(adapters)
    of_A, of_B = HALVES[direction]
    for path, adapter in adapters.items():
        W, s = base_of(adapter.target.base)[0], 5 / 3
        U, _, Vt = np.linalg.svd(found[path], full_matrices=False)
        top = np.linalg.svd(W, compute_uv=False)[:3]
        size = dict(stable=len(W) ** 0.25 / 3, gd_scale=1 / s, unit=1, weight_svd=np.sqrt(top / s).mean())[scale]
        for mine, theirs in ((arr(adapter.lora_A.weight), Vt[of_A]), (arr(adapter.lora_B.weight).T, U[:, of_B].T)):
            np.testing.assert_allclose(np.abs(mine @ theirs.T), size * np.eye(3), rtol=2e-2, atol=2e-2 * size)


def test_lora_gas_random_directions_are_disjoint_and_fixed():
    start = Start("lora_ga", dict(lora_ga_config=LoraGAConfig(direction="random", scale="unit")), before="lora_ga")
    adapters = state(started(start)).adapters("default")
    found = gradients_by_hand(adapters)
    for path, adapter in adapters.items():
        U, _, Vt = np.linalg.svd(found[path], full_matrices=False)
        A = np.abs(arr(adapter.lora_A.weight) @ Vt[:8].T) > 0.9
        B = np.abs(arr(adapter.lora_B.weight).T @ U[:, :8]) > 0.9
        assert (A.sum(0) + B.sum(0) == 1).all()


@pytest.mark.parametrize("direction", HALVES)
def test_lora_ga_takes_the_directions_peft_takes(direction: str):
    """Of the sizes only the paper's are right: PEFT multiplies B by the gradient's singular values as well."""
    start = Start("lora_ga", dict(lora_ga_config=LoraGAConfig(direction=direction, scale="unit")), before="lora_ga")
    ours = state(started(start)).adapters("default")
    base = models.build("llama")
    settings = peft.LoraGAConfig(direction=direction, scale="unit")
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=settings
    )
    peft.tuners.lora.preprocess_loraga(base, config, train_step(base))
    theirs = peft.get_peft_model(base, config).base_model.model
    for path, adapter in ours.items():
        layer = theirs.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for mine, reference in ((adapter.lora_A.weight, A), (adapter.lora_B.weight.T, (B / B.norm(dim=0)).T)):
            torch.testing.assert_close((mine @ reference.T).abs(), torch.eye(4), rtol=2e-2, atol=2e-2)


def test_estimating_gradients_leaves_the_model_as_it_was(tmp_path):
    base, config = models.build("llama"), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="lora_ga")
    base.lm_head.weight.requires_grad_(False)
    base.model.norm.weight.grad = kept = torch.ones(30)
    preprocess_loraga(base, config, train_step(base), str(tmp_path / "grads"))
    assert not base.training and base.model.norm.weight.grad is kept
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in base.parameters() if p is not base.model.norm.weight)
    first = [p.clone() for p in parameters_of(base, config)]
    base = models.build("llama")
    preprocess_loraga(base, config, lambda: pytest.fail("it ran again"), str(tmp_path / "grads"))
    assert all(torch.equal(a, b) for a, b in zip(first, parameters_of(base, config), strict=True))


# EVA


def rows_read(targets, which: list[dict]) -> dict[str, np.ndarray]:
    """What each target reads at positions that are neither padding nor left out by their label."""
    model, seen = uneven(models.build("llama")), {}
    for batch in which:
        keep = (batch["attention_mask"].bool() & (batch["labels"] != -100)).numpy()

        def note(module, args, path, keep=keep):
            seen.setdefault(path, []).append(arr(args[0])[keep])

        hooks = [
            model.get_submodule(p).register_forward_pre_hook(lambda m, args, p=p: note(m, args, p)) for p in targets
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return {path: np.concatenate(parts) for path, parts in seen.items()}


def test_eva():
    """A's rows are the principal components of the inputs, and the ranks go where the most variance is explained."""
    config = LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights="eva")
    model = get_peft_model(uneven(models.build("llama")), config)
    loader = batches(n=1, rows=12)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    adapters = state(model).adapters("default")
    paths = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    rows = rows_read(paths, loader)
    shares, vectors = {}, {}
    for path, x in rows.items():
        _, S, vectors[path] = np.linalg.svd(x - x.mean(0), full_matrices=False)
        shares[path] = (S**2 / (S**2).sum())[:6]
    best = sorted(((share, path) for path in paths for share in shares[path]), reverse=True)[: 3 * len(paths)]
    ranks = {path: sum(1 for _, p in best if p == path) for path in paths}
    found = {path: adapters[path].r if path in adapters else 0 for path in paths}
    assert sum(found.values()) == 18 and found == ranks
    assert max(found.values()) > 3 > min(found.values())
    for path, adapter in adapters.items():
        A = arr(adapter.lora_A.weight)
        np.testing.assert_allclose(A @ A.T, np.eye(len(A)), atol=1e-4)
        np.testing.assert_allclose(np.abs(A @ vectors[path][: len(A)].T), np.eye(len(A)), atol=0.05)
        assert not adapter.lora_B.weight.any() and adapter.scaling == pytest.approx(7 / 3)


def uneven(base):
    """What the first layers read lies nearly in one direction, so that they need less rank."""
    first = base.model.layers[0].input_layernorm if hasattr(base, "model") else base.transformer.h[0].ln_1
    with torch.no_grad():
        first.weight[0] *= 50
    return base


@pytest.mark.parametrize("settings", [{}, dict(rho=1.0), dict(rho=3.0, adjust_scaling_factors=False), dict(tau=0.9)])
@pytest.mark.parametrize("base", BASES)
def test_eva_finds_what_peft_finds(settings: dict, base: str, tmp_path):
    config = dict(r=3, lora_alpha=7, target_modules=BASES[base], init_lora_weights="eva", task_type="CAUSAL_LM")
    config |= dict(rank_pattern={"c_attn": 2} if base == "gpt2" else {"k_proj": 2})
    ours = get_peft_model(uneven(models.build(base)), LoraConfig(**config, eva_config=EvaConfig(**settings)))
    theirs = peft.get_peft_model(
        uneven(models.build(base)), peft.LoraConfig(**config, eva_config=peft.EvaConfig(**settings))
    )
    initialize_lora_eva_weights(ours, batches(base), show_progress_bar=False)
    peft.initialize_lora_eva_weights(theirs, batches(base), show_progress_bar=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, reference = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert mine.keys() == reference.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], reference[key], rtol=1e-3, atol=1e-3)
    ranks = {len(t) for key, t in mine.items() if "lora_A" in key}
    assert ranks != {2, 3} or settings.get("rho") == 1, "no rank has moved"
    again = PeftModel.from_pretrained(uneven(models.build(base)), tmp_path / "theirs")
    scalings = {p: a.scaling for p, a in state(again).adapters("default").items()}
    assert scalings == pytest.approx({p: a.scaling for p, a in state(ours).adapters("default").items()})


def test_eva_whitens_each_layer_once():
    """PEFT divides in place what layers with the same input share, so its second one is divided twice."""
    loader = batches()
    settings = dict(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights="eva")
    plain, white = (
        veneer.get_eva_state_dict(
            models.build("llama"),
            loader,
            LoraConfig(**settings, eva_config=EvaConfig(rho=1.0, whiten=whiten)),
            show_progress_bar=False,
        )
        for whiten in (False, True)
    )
    for path in plain:
        scale = white[path].norm(dim=1)
        torch.testing.assert_close(white[path], plain[path] * scale[:, None])
        assert (scale[1:] > scale[:-1]).all(), "the stronger a component, the more it is divided"
    assert torch.equal(white["model.layers.0.self_attn.q_proj"], white["model.layers.0.self_attn.v_proj"])


def test_eva_from_what_was_found_before(tmp_path):
    """By the names of the bare model or of the adapted one; other adapters and their state stay."""
    config = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="eva", bias="all")
    found = veneer.get_eva_state_dict(models.build("llama"), batches(), config, show_progress_bar=False)
    model = get_peft_model(models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), "other")
    model.add_adapter("eva", config)
    model.set_adapter(["eva", "other"])
    initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name="eva")
    assert model.active_adapters == ["eva", "other"] and set(model.peft_config) == {"eva", "other"}
    assert all(p.requires_grad for p in state(model).parameters("eva"))
    for path, adapter in state(model).adapters("eva").items():
        part = next((p for p in adapter.parts if hasattr(p, "lora_A")), None)
        assert (part is None) == (path not in found or not len(found[path]))
        if part is not None:
            assert torch.equal(part.lora_A.weight, found[path].float())
    del found["model.layers.0.mlp.down_proj"]
    with pytest.raises(VeneerError, match="down_proj"):
        initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name="eva")


def eva_on_one_half(rank: int) -> None:
    halves = [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in batches()]
    for found, reference in zip(eva_alone(halves), eva_alone(batches(), gather_distributed_inputs=False), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3)


def eva_alone(loader, **more) -> list[torch.Tensor]:
    config = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="eva")
    base = uneven(models.build("llama"))
    return list(veneer.get_eva_state_dict(base, loader, config, show_progress_bar=False, **more).values())


def test_eva_gathers_the_rows_of_all_processes():
    """Two processes with half of each batch find what one finds with the whole."""
    both(eva_on_one_half)


def test_eva_refuses_what_cannot_converge():
    config = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="eva")
    few = [{"input_ids": torch.randint(3, 67, (1, 7))}]
    with pytest.raises(VeneerError, match="tokens"):
        initialize_lora_eva_weights(get_peft_model(models.build("llama"), config), few, show_progress_bar=False)
    with pytest.raises(VeneerError, match="empty"):
        initialize_lora_eva_weights(get_peft_model(models.build("llama"), config), [], show_progress_bar=False)
    with pytest.raises(ConfigError, match="dataloader"):
        initialize_lora_eva_weights(get_peft_model(models.build("llama"), config))
    with pytest.raises(ConfigError, match="eva"):
        initialize_lora_eva_weights(get_peft_model(models.build("llama"), LoraConfig(r=2)), batches())


# Refusals


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_start_from_data_without_data_is_refused(how: str, tmp_path):
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=how)
    with pytest.raises(ConfigError, match="preprocess_"):
        get_peft_model(models.build("llama"), config)


def test_a_file_made_for_a_changed_base_is_refused(tmp_path):
    """PEFT's LoRA-GA file goes with a base that the start was taken off; on the untouched one it would be wrong."""
    base = models.build("llama")
    settings = dict(r=4, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    config = peft.LoraConfig(**settings, task_type="CAUSAL_LM")
    peft.tuners.lora.preprocess_loraga(base, config, train_step(base))
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "true")
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    expected = output(theirs, models.inputs("llama"))
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = PeftModel.from_pretrained(models.build("llama"), tmp_path / "converted")
    torch.testing.assert_close(output(ours, models.inputs("llama")), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(init_lora_weights="olra"), "olora"),
        (dict(init_lora_weights="pissa_niter_x"), "pissa_niter_N"),
        (dict(init_lora_weights="orthogonal", r=3), "even"),
        (dict(init_lora_weights="olora", r=20), "20"),
        (dict(init_lora_weights="loftq", r=20), "20"),
        (dict(init_lora_weights="loftq", use_dora=True), "LoftQ"),
        (dict(loftq_config=LoftQConfig()), "loftq"),
        (dict(init_lora_weights="eva", corda_config=CordaConfig()), "corda"),
        (dict(init_lora_weights="eva", eva_config={"roh": 2}), "rho"),
    ],
    ids=str,
)
def test_a_start_without_sense_is_refused(settings: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        get_peft_model(models.build("llama"), LoraConfig(target_modules=TARGETS, **settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EvaConfig, dict(rho=0.5)),
        (EvaConfig, dict(tau=1.5)),
        (EvaConfig, dict(tua=0.9)),
        (CordaConfig, dict(corda_method="ipk")),
        (LoraGAConfig, dict(direction="AB")),
        (LoraGAConfig, dict(scale="gd")),
        (LoraGAConfig, dict(stable_gamma=0)),
        (LoftQConfig, dict(loftq_bits=2)),
        (LoftQConfig, dict(loftq_iter=0)),
    ],
    ids=str,
)
def test_settings_are_checked(kind, settings: dict):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        kind(**settings)


def test_data_starts_are_for_linear_layers():
    base = models.build("llama")
    for how, prepare in (("corda", preprocess_corda), ("lora_ga", preprocess_loraga)):
        config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=how)
        with pytest.raises(TargetError, match="embed_tokens"):
            prepare(base, config, lambda: None)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=how)
        with pytest.raises(VeneerError, match="q_proj"):
            prepare(base, config, lambda: None)


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal", "loftq"])
def test_a_grouped_convolution_has_no_matrix_to_start_from(how: str):
    with pytest.raises(TargetError, match="groups"):
        get_peft_model(models.build("grouped"), LoraConfig(r=4, target_modules=["conv"], init_lora_weights=how))


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_second_adapter_starts_from_data_too(how: str):
    """The data run through the base alone, whatever is on it."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=how)
    model, alone = models.perturb(get_peft_model(models.build("llama"), LoraConfig(r=2))), models.build("llama")
    for target in (model, alone):
        if how == "corda":
            preprocess_corda(target, config, run_on_samples(target))
        else:
            preprocess_loraga(target, config, train_step(target))
    model.add_adapter("second", config)
    expected = state(get_peft_model(alone, config)).adapters("default")
    for path, adapter in state(model).adapters("second").items():
        for mine, theirs in zip(adapter.parameters(), expected[path].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters() if "adapters.default" in n
    ]


def test_settings_come_back_from_a_file(tmp_path):
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5))
    config.save_pretrained(tmp_path)
    assert veneer.Config.from_pretrained(tmp_path) == config
    assert peft.PeftConfig.from_pretrained(tmp_path).eva_config.rho == 1.5


def test_pefts_old_files_with_an_empty_loftq_config_load(tmp_path):
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    assert veneer.Config.from_pretrained(tmp_path).loftq_config is None
