"""The engine of `veneer serve`: an answer has the tokens of `generate`, whatever runs beside it."""

from __future__ import annotations

import random
import time

import pytest
import torch

from veneer import (
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    LoReftConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from veneer.core.state import state_of
from veneer.errors import ConfigError, VeneerError
from veneer.model.loading import load
from veneer.serve.adapters import Adapters
from veneer.serve.engine import Answer, End, Engine, Limits
from veneer.serve.errors import Refused
from veneer.serve.sampling import Sampling, Token

from . import models
from .cases import CASES
from .models import perturb
from .test_loading import adapter, bases  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY = Sampling(temperature=0.0)
TASK = dict(task_type="CAUSAL_LM")
METHODS = {
    "a": LoraConfig(r=2, **TASK),
    "b": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **TASK),
    "dora": LoraConfig(r=2, use_dora=True, **TASK),
    "oft": OFTConfig(oft_block_size=5, target_modules=["q_proj"], **TASK),
    "ia3": IA3Config(**TASK),
    "blocks": BottleneckConfig(**TASK),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "reft": LoReftConfig(r=2, **TASK),
}
STACKS = [(), *((name,) for name in METHODS), ("a", "b"), ("ia3", "a"), ("prompt", "oft"), ("a", "reft")]
GAP = 1e-3
"""The least distance between the two largest logits: below it, another order of sums may choose the other token."""
NEW = 12
NEVER = 10_000
"""An end token that no model here has."""


@pytest.fixture(scope="module")
def places(bases, tmp_path_factory):  # noqa: F811
    """An adapter of each method, on disk."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(METHODS.items()):
        adapter(bases, root / name, config, seed=seed)
    return root


@pytest.fixture(scope="module")
def served(bases, places):  # noqa: F811
    """The adapters on one base, all in memory."""
    model = load((), str(bases / "one")).model
    return Adapters(model, "one", {}, places, len(METHODS))


def engine_of(adapters: Adapters, positions: int = 10_000, stops=(), **limits) -> Engine:
    return Engine(adapters, stops, Limits(positions, **limits))


class Client:
    """What a client receives of one answer."""

    def __init__(self, prompt, names=(), most: int = NEW, sampling: Sampling = GREEDY, **more) -> None:
        self.tokens: list[Token] = []
        self.end: End | None = None
        self.answer = Answer(prompt, names, sampling, most, self.take, **more)

    def take(self, event) -> None:
        assert self.end is None, "nothing comes after the end"
        if isinstance(event, End):
            self.end = event
        else:
            self.tokens.append(event)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def run(engine: Engine, *clients: Client, steps: int = 500) -> None:
    """Step until all answers are finished."""
    engine.submit([client.answer for client in clients])
    while any(client.end is None for client in clients):
        steps -= 1
        assert steps > 0, "the answers do not end"
        step(engine)


def step(engine: Engine) -> None:
    with torch.no_grad():
        engine.step()


def alone(model, prompt, names, **settings) -> list[int]:
    """What `generate` writes with the adapters active."""
    ids = torch.tensor([prompt])
    settings = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=NEVER, pad_token_id=0) | settings
    if names:
        model.set_adapter(list(names))
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    else:
        with model.disable_adapter():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0, len(prompt) :].tolist()


def gap(model, prompt, names, tokens) -> float:
    """The least distance of the two largest logits over the tokens, in one pass without a cache."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.no_grad():
        if names:
            model.set_adapter(list(names))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        else:
            with model.disable_adapter():
                logits = model(input_ids=ids, use_cache=False).logits
    largest = logits[0, -len(tokens) :].topk(2, -1).values
    return float((largest[:, 0] - largest[:, 1]).min())


@pytest.fixture(scope="module")
def pool(bases, places):  # noqa: F811
    """Prompts for every stack, with the tokens that `generate` answers, on a model of its own."""
    model = load([f"{name}={places / name}" for name in METHODS], str(bases / "one")).model
    draw = random.Random(0)
    entries, close = [], 0
    for stack in STACKS * 4:
        prompt = [draw.randrange(3, 60) for _ in range(draw.choice((1, 2, 5, 11, 23)))]
        tokens = alone(model, prompt, stack)
        if "reft" not in stack and gap(model, prompt, stack, tokens) < GAP:
            close += 1
        else:
            entries.append((prompt, stack, tokens))
    assert close <= 4 and len({tuple(tokens) for *_, tokens in entries}) > 20
    return entries


def test_answers_do_not_depend_on_what_runs_beside_them(served, pool):
    """200 random mixes: of methods, lengths, arrivals, departures, chunks and room."""
    largest = 0
    for seed in range(200):
        draw = random.Random(seed)
        engine = engine_of(served, draw.choice((80, 150, 1000)), chunk=draw.choice((1, 3, 8, 256)))
        mix = [(prompt, stack, tokens, draw.randrange(2, NEW + 1)) for prompt, stack, tokens in draw.choices(pool, k=6)]
        clients = [Client(prompt, stack, most) for prompt, stack, _, most in mix]
        leaving = draw.randrange(len(clients))
        coming = list(clients)
        for _ in range(1000):
            for _ in range(draw.choice((0, 1, 1, 3))):
                if coming:
                    engine.submit([coming.pop(0).answer])
            if draw.random() < 0.05:
                engine.cancel(clients[leaving].answer)
            step(engine)
            largest = max(largest, len({row.stack for row in engine.rows}))
            if not coming and all(client.end for client in clients):
                break
        assert not (engine.running() or engine.waiting)
        for place, (client, (_, stack, tokens, most)) in enumerate(zip(clients, mix, strict=True)):
            assert client.end is not None and client.end.error is None, (seed, stack)
            if place != leaving:
                assert client.end.reason == "length" and len(client.tokens) == most
            assert client.ids == tokens[: len(client.tokens)], (seed, stack)
    assert largest >= 4, "no batch had rows of many kinds"


FAMILIES = ("llama", "mistral", "gpt2", "tied", "mixtral")


OF_FAMILIES = [case for case in CASES if case.model in FAMILIES]
ONE_EACH = {case.method: case for case in reversed(OF_FAMILIES)}


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
def test_every_method_answers_as_alone(case, tmp_path):
    """Beside the base and a LoRA, after a prompt in parts."""
    model = case.build()
    base = models.build(case.model)
    try:
        model.save_pretrained(tmp_path / "served")
    except VeneerError as error:
        pytest.skip(f"cannot be saved: {error}")
    perturb(get_peft_model(models.build(case.model), LoraConfig(r=2)), seed=3).save_pretrained(tmp_path / "lora")
    adapters = Adapters(base, "base-model", {}, tmp_path, 4)
    engine = engine_of(adapters, chunk=4)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]]
    clients = [Client(prompt, ("served",), 4) for prompt in prompts]
    others = [Client([3, 4, 5], (), 6), Client([9, 8, 7, 6, 5, 4], ("lora",), 6)]
    run(engine, *clients, *others)
    assert others[0].ids == alone(model, [3, 4, 5], (), max_new_tokens=6)
    assert others[1].end.reason == "length"
    try:
        expected = [alone(model, prompt, ("default",), max_new_tokens=4) for prompt in prompts]
    except VeneerError:  # it needs facts of a call
        expected = None
    if case.needs_experts or case.siblings or expected is None:
        assert all(client.end.error.code == "adapter_not_loaded" for client in clients)
    else:
        assert not any(client.end.error for client in clients)
        assert [client.ids for client in clients] == expected


# What the engine takes on


def test_draws_are_those_of_generate(served, places, bases):  # noqa: F811
    """The same seed gives the tokens of `generate`, whatever runs beside it."""
    model = load([f"a={places / 'a'}"], str(bases / "one")).model
    prompt = [5, 6, 7, 8]
    settings = dict(temperature=0.8, top_p=0.9, top_k=20)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = alone(model, prompt, ("a",), do_sample=True, **settings)
        drawn = Client(prompt, ("a",), sampling=Sampling(**settings, seed=seed))
        run(engine_of(served), Client([9, 8], ("oft",)), drawn, Client([4] * 9, (), sampling=Sampling()))
        assert drawn.ids == expected


def test_probabilities_are_those_of_the_logits(served):
    clients = [Client([5, 6, 7], names, 4, Sampling(temperature=0.0, logprobs=3)) for names in ((), ("a",))]
    run(engine_of(served), *clients)
    for client, names in zip(clients, ((), ("a",)), strict=True):
        ids = torch.tensor([[5, 6, 7, *client.ids]])
        with torch.no_grad(), state_of(served.base_model).running(names):
            logprobs = served.base_model(ids).logits[0, 2:-1].log_softmax(-1)
        for row, token in zip(logprobs, client.tokens, strict=True):
            values, likeliest = row.topk(3)
            assert [id for id, _ in token.top] == likeliest.tolist()
            assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)


def test_an_end_token_ends_an_answer(served):
    client = Client([5, 6, 7])
    run(engine_of(served), client)
    stop = client.ids[3]
    again = Client([5, 6, 7])
    run(engine_of(served, stops=[stop]), again)
    assert again.ids == client.ids[: client.ids.index(stop)] and again.end.reason == "stop"


def test_answers_run_as_far_as_the_cache_holds_them(served):
    """Rows are as long as the longest of them, so a long one leaves room for fewer."""
    engine = engine_of(served, positions=100)
    clients = [Client([5] * 10, ("a",), 10) for _ in range(8)]
    engine.submit([client.answer for client in clients])
    step(engine)
    assert len(engine.running()) == 5 and engine.positions() == 100 and len(engine.waiting) == 3
    with pytest.raises(Refused, match="100 positions") as refusal:
        engine.submit([Client([5] * 91, (), 10).answer])
    assert refusal.value.status == 400
    while engine.running() or engine.waiting:
        assert engine.positions() <= 100
        step(engine)
    assert all(len(client.ids) == 10 for client in clients)
    long, *short = Client([5] * 40, ("a",), 10), Client([5], ("a",), 5), Client([5], ("a",), 5)
    engine.submit([long.answer, *(client.answer for client in short)])
    step(engine)
    assert len(engine.running()) == 2


def test_learned_positions_count(served):
    engine = engine_of(served, positions=22)
    fits, prompt = Client([5] * 10, ("a",), 12), Client([5] * 10, ("prompt",), 12)
    run(engine, fits)
    assert fits.end.error is None
    run(engine, prompt)
    assert "exceeds the server's cache" in prompt.end.error.message


def test_a_full_queue_refuses_all_or_none(served):
    engine = engine_of(served, waiting=3)
    engine.submit([Client([5]).answer for _ in range(2)])
    with pytest.raises(Refused, match="2 requests are waiting, and the queue holds 3") as refusal:
        engine.submit([Client([5]).answer for _ in range(2)])
    assert refusal.value.status == 429 and refusal.value.retry_after and len(engine.waiting) == 2


def test_prompts_are_computed_in_parts_between_tokens(served):
    """An answer that runs gets a token in every step, while a long prompt begins."""
    engine = engine_of(served, chunk=5)
    short, long = Client([5, 6], ("a",), 30), Client([7] * 32, ("b",), 3)
    engine.submit([short.answer])
    step(engine)
    engine.submit([long.answer])
    for number in range(7):
        assert not long.tokens and len(short.tokens) == 2 + number
        step(engine)
    assert len(long.tokens) == 2


def test_short_prompts_are_computed_in_one_call(served, monkeypatch):
    """Also for different adapters; a learned prompt has a call of its own."""
    engine = engine_of(served, chunk=20)
    names = ((), ("b",), ("a",), ("a", "b"), ("prompt",), ("a",))
    clients = [Client([5 + number] * (number + 1), stack, 5) for number, stack in enumerate(names)]
    engine.submit([client.answer for client in clients])
    calls = []
    forward = engine._forward

    def counted(rows, *more, **kwargs):
        calls.append(len(rows))
        return forward(rows, *more, **kwargs)

    monkeypatch.setattr(engine, "_forward", counted)
    step(engine)
    assert calls == [4, 4]
    while engine.running():
        step(engine)
    for client, stack in zip(clients, names, strict=True):
        lone = Client(client.answer.prompt, stack, 5)
        run(engine_of(served), lone)
        assert lone.ids == client.ids


def test_memory_does_not_grow_with_requests(served):
    """After 300 answers nothing of them is left."""
    import gc

    engine = engine_of(served)
    for number in range(300):
        engine.submit([Client([5 + number % 50] * (number % 9 + 1), ((), ("a",), ("reft",))[number % 3], 3).answer])
        step(engine)
    while engine.running():
        step(engine)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Answer)]
    assert engine.cache is None and not engine.sources


def test_what_ends_early_leaves_nothing(served):
    engine = engine_of(served)
    late, gone = Client([5], ("a",), deadline=time.monotonic() - 1), Client([6], ("reft",))
    engine.submit([late.answer, gone.answer])
    engine.cancel(gone.answer)
    step(engine)
    assert late.end.error.status == 504 and gone.end.reason == "cancelled"
    assert not (engine.running() or engine.waiting or late.tokens or gone.tokens)


def test_the_least_recently_used_adapter_leaves(bases, places):  # noqa: F811
    adapters = Adapters(load((), str(bases / "one")).model, "one", {}, places, 2)
    engine = engine_of(adapters)
    first = Client([5, 6], ("a",))
    run(engine, first)
    run(engine, Client([5], ("b",)), Client([5], ("a",)))
    run(engine, Client([5], ("ia3",)))
    assert list(adapters.loaded) == ["a", "ia3"]
    waiting = [Client([5, 6], (name,), 5) for name in ("a", "ia3", "oft", "prompt", "a")]
    engine.submit([client.answer for client in waiting])
    step(engine)
    assert [answer.names for answer in engine.waiting] == [("oft",), ("prompt",), ("a",)]
    while engine.running() or engine.waiting:
        assert len(adapters.loaded) <= 2
        step(engine)
    assert waiting[-1].ids == first.ids[:5] and not any(client.end.error for client in waiting)


def test_without_adapters_the_base_answers(bases):  # noqa: F811
    """And after the last adapter has left, the base is as it was."""
    adapters = Adapters(load((), str(bases / "one")).model, "one", {}, None, 2)
    before = Client([5, 6, 7])
    run(engine_of(adapters), before)
    assert adapters.state is None and len(before.ids) == NEW


@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_that_changes_the_layers_is_refused(bases, places, tmp_path, is_first):  # noqa: F811
    """And leaves the base model as it was."""
    deeper = LoraConfig(r=2, layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj"], **TASK)
    adapter(bases, tmp_path / "deeper", deeper)
    here = {"deeper": str(tmp_path / "deeper")}
    adapters = Adapters(load((), str(bases / "one")).model, "one", here, places, 3)
    engine = engine_of(adapters)
    before, refused, after = Client([5, 6, 7]), Client([5], ("deeper",)), Client([5, 6, 7])
    if not is_first:
        run(engine, Client([5], ("a",)))
    run(engine, before)
    run(engine, refused)
    run(engine, after)
    assert refused.end.error.code == "adapter_not_loaded" and "deeper" not in adapters.loaded
    assert after.ids == before.ids and len(after.ids) == NEW


def test_an_error_in_a_step_ends_its_answers_only(served, monkeypatch):
    engine = engine_of(served)
    alone, *rows = Client([5], ("reft",)), Client([5], ("a",)), Client([6], ("b",))
    monkeypatch.setattr(engine, "_advance_rows", lambda: 1 / 0)
    run(engine, alone, *rows)
    assert len(alone.ids) == NEW and all(client.end.error.status == 500 for client in rows)
    monkeypatch.undo()
    again = Client([5], ("a",))
    run(engine, again)
    assert len(again.ids) == NEW


def test_the_thread_finishes_what_it_has(served):
    engine = engine_of(served)
    engine.start()
    clients = [Client([5, 6], (name,)) for name in ("a", "reft", "prompt", "b")]
    engine.submit([client.answer for client in clients])
    engine.close()
    assert all(len(client.ids) == NEW for client in clients) and not engine.thread.is_alive()
    with pytest.raises(Refused, match="the server is stopping") as refusal:
        engine.submit([Client([5]).answer])
    assert refusal.value.status == 503


@pytest.mark.parametrize("name", ["one", "__base__", "a+b", "../a", "", "a/b", "x" * 129])
def test_names_that_no_adapter_can_have(served, name):
    with pytest.raises(ConfigError, match="an adapter cannot be called"):
        Adapters(served.base_model, "one", {name: "somewhere"}, None, 2)


def recurrent():
    """A hybrid, whose layers are recurrent or attend."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, head_dim=8)
    sizes |= dict(num_key_value_heads=2, vocab_size=67, linear_num_value_heads=4, linear_num_key_heads=2)
    sizes |= dict(linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1)
    sizes |= dict(moe_intermediate_size=20, shared_expert_intermediate_size=20, pad_token_id=0)
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes)).eval()


def sliding():
    """Layers that keep the last three positions, and layers that keep all."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=3, num_attention_heads=5, head_dim=14)
    sizes |= dict(num_key_value_heads=1, vocab_size=67, sliding_window=4, pad_token_id=0, query_pre_attn_scalar=14)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    return model.eval()


@pytest.mark.parametrize(("build", "shares"), [(sliding, True), (recurrent, False)])
def test_models_whose_layers_forget_answer_as_alone(build, shares):
    """A window drops keys; a state has no positions, so its answers are not batched."""
    model = build()
    adapters = Adapters(model, "one", {}, None, 2)
    assert adapters.shares == shares
    prompts = [[5, 9, 7, 8, 5, 4, 3, 9, 9, 11, 12], [6, 7], [8] * 5, [3], [10, 11, 12, 13], [14] * 9]
    clients = [Client(prompt, most=NEW + number) for number, prompt in enumerate(prompts)]
    engine = engine_of(adapters, chunk=7)
    waiting = list(clients)
    while waiting or engine.running():
        if waiting:
            engine.submit([waiting.pop().answer])
        step(engine)
    for prompt, client in zip(prompts, clients, strict=True):
        ids = torch.tensor([prompt])
        settings = dict(do_sample=False, max_new_tokens=client.answer.most, eos_token_id=NEVER, pad_token_id=0)
        assert client.ids == model.generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()
