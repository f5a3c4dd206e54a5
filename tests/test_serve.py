"""`veneer serve` as its clients see it: the openai package, plain HTTP, and what a server must not do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch

from veneer import LoraConfig, PromptTuningConfig, get_peft_model
from veneer.data.chat import Template
from veneer.inference.generation import Sampling, Writer
from veneer.model.loading import BASE, load
from veneer.serve.text import Text
from veneer.serve.tools import Call, as_dicts, form_of

from . import room
from .chat_templates import TEMPLATES
from .forked import veneer
from .test_loading import adapter, bases  # noqa: F401
from .test_train_chat import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
KEY = "secret-key"
DEFAULT = "http://127.0.0.1:8000"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "remind", "parameters": {"type": "object", "properties": {}}}}
SAYS = 'Yes.\n<tool_call>\n{"name": "remind", "arguments": {"at": 6}}\n</tool_call>'
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Server:
    """A server in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "veneer", "serve", "--port", "0", *arguments]
        settings = {"PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | settings)
        self.start = self.process.stdout.readline()
        self.try_line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.start)
        assert found, self.process.stderr.read()
        self.url = found[0]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=room.SECONDS)

    def stop(self) -> str:
        """End it as a service manager does; what it logged."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=room.SECONDS)
        return log


@pytest.fixture(scope="module")
def home(bases, tmp_path_factory):  # noqa: F811
    """A base and adapters: of two methods, and one that calls a tool."""
    root = tmp_path_factory.mktemp("served")
    (root / "more").mkdir()
    words = tokenizer(TEMPLATES[0])
    words.chat_template = CALLING
    for seed, name in enumerate(("a", "b", "c")):
        adapter(bases, root / "more" / name, seed=seed)
    adapter(bases, root / "p", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    adapter(bases, root / "stranger", base="two")
    (root / "template.jinja").write_text(CALLING)
    teach(bases / "one", words, root / "caller")
    return root


def teach(base: Path, words, where: Path) -> None:
    """Train an adapter until it answers with a call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    prompt = words.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([words(prompt + SAYS + "<|im_end|>").input_ids])
    labels = ids.clone()
    labels[:, : len(words(prompt).input_ids)] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(where)


@pytest.fixture(scope="module")
def server(bases, home):  # noqa: F811
    arguments = ["--model", str(bases / "one"), "--adapters", str(home / "more"), "--chunk", "8"]
    arguments += ["--adapter", f"p={home / 'p'}", "--adapter", f"caller={home / 'caller'}", "--max-adapters", "3"]
    arguments += ["--chat-template", str(home / "template.jinja"), "--max-new-tokens", "100"]
    running = Server(*arguments)
    yield running
    running.stop()


def written(bases, home, names, messages, most: int) -> str:  # noqa: F811
    """What the model writes without a server."""
    places = {"p": home / "p", "caller": home / "caller"} | {name: home / "more" / name for name in "abc"}
    loaded = load([f"{name}={places[name]}" for name in names], str(bases / "one"))
    writer = Writer(loaded, Sampling(max_new_tokens=most), template_file=home / "template.jinja")
    if len(names) < 2:
        [answer] = writer.write(names or [BASE], [writer.tokens(messages)])
        return answer.text
    loaded.model.set_adapter(list(names))
    ids = torch.tensor([writer.tokens(messages)])
    found = loaded.model.generate(input_ids=ids, generation_config=writer._settings())[0, ids.shape[1] :]
    return loaded.tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("names", [(), ("a",), ("p",), ("a", "b")], ids=str)
def test_the_client_gets_what_the_model_writes(server, bases, home, names):  # noqa: F811
    model = "+".join(names) or "one"
    expected = written(bases, home, names, HELLO, 9)
    settings = dict(model=model, messages=HELLO, temperature=0, max_tokens=9)
    client = server.client()
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason


def test_many_clients_at_once_get_what_each_gets_alone(server):
    """More adapters than there is room for in memory, so that they leave and come back."""
    client = server.client()

    def ask(number: int) -> str:
        model = ["a", "b", "c", "p", "one", "a+b", "caller"][number % 7]
        messages = [{"role": "user", "content": "hello" * (number % 5 + 1)}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
        return answer.choices[0].message.content

    lone = [ask(number) for number in range(35)]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(35))) == lone
    assert len(set(lone)) > 10


def test_models_are_listed_with_their_parents(server):
    listed = {model.id: model.parent for model in server.client().models.list()}
    assert listed == {"one": None} | dict.fromkeys(["a", "b", "c", "p", "caller"], "one")
    assert server.client().models.retrieve("a").parent == "one"
    assert all("/" not in name for name in listed)


def test_a_tool_is_called(server):
    settings = dict(model="caller", messages=HELLO, temperature=0, tools=[TOOL])
    client = server.client()
    [choice] = client.chat.completions.create(**settings).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Yes."
    [call] = choice.message.tool_calls
    assert call.function.name == "remind" and json.loads(call.function.arguments) == {"at": 6}
    with client.chat.completions.stream(**settings) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == "Yes." and streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    without = client.chat.completions.create(**settings | {"tool_choice": "none"}).choices[0]
    assert without.finish_reason == "stop" and without.message.content == SAYS
    answer = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    history = [*HELLO, choice.message.model_dump(exclude_none=True), answer]
    assert client.chat.completions.create(**settings | {"messages": history, "max_tokens": 3}).usage.prompt_tokens > 60


def test_completions_with_tokens_choices_and_probabilities(server):
    client = server.client()
    one = client.completions.create(model="a", prompt=["hello", "other"], temperature=0, max_tokens=5, logprobs=2)
    assert [choice.index for choice in one.choices] == [0, 1] and one.usage.completion_tokens == 10
    for choice in one.choices:
        best = [max(top.values()) for top in choice.logprobs.top_logprobs]
        assert choice.logprobs.token_logprobs == pytest.approx(best) and all(value < 0 for value in best)
    same = client.completions.create(model="a", prompt=[[3, 4], [3, 4]], temperature=0, max_tokens=5)
    assert same.choices[0].text == same.choices[1].text
    draws = dict(model="a", messages=HELLO, max_tokens=8, n=3, logprobs=True, top_logprobs=1)
    first, again, other = (client.chat.completions.create(**draws, seed=seed) for seed in (1, 1, 2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    assert len(first.choices[0].logprobs.content) == 8
    narrow = client.chat.completions.create(**draws, extra_body={"top_k": 1}, temperature=2)
    assert len({choice.message.content for choice in narrow.choices}) == 1


def test_a_stop_string_ends_an_answer_before_it(server):
    client = server.client()
    settings = dict(model="caller", messages=HELLO, temperature=0)
    whole = client.chat.completions.create(**settings, stop=["tool_", "zzz"])
    assert whole.choices[0].message.content == "Yes.\n<" and whole.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**settings, stop="tool_", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "Yes.\n<"


CHAT = {"model": "a", "messages": HELLO}
BAD_CALL = {"id": "1", "function": {"name": "x", "arguments": "[1]"}}


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "aa"}, 404, "there is no model or adapter 'aa'; nearest: a"),
        ({"model": "../more/a"}, 404, "there is no model or adapter"),
        ({"model": "a+a"}, 400, "names an adapter twice"),
        ({"model": "a+b+c+p"}, 400, "names 4 adapters, and the server keeps 3 in memory"),
        ({"model": 3}, 400, "model: input should be a valid string"),
        ({"messages": []}, 400, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role: input should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
        ({"temperature": "hot"}, 400, "temperature: input should be a valid number"),
        ({"temperature": 3}, 400, "temperature: input should be less than or equal to 2"),
        ({"top_p": 0}, 400, "top_p: input should be greater than 0"),
        ({"n": 17}, 400, "n: input should be less than or equal to 16"),
        ({"max_tokens": 101}, 400, "max_tokens = 101 is more than the 100 that this server generates"),
        ({"max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1"),
        ({"max_token": 5}, 400, "there is no field 'max_token'; nearest: max_tokens"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported; leave it out"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported; leave it out"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({"stop": ["x"] * 17}, 400, "stop: must be at most 16 texts"),
        ({"stop": ""}, 400, "stop: must be at most 16 texts"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "the model takes 256 tokens"),
        ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, 400, "must be a JSON object"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools.0.function: needs a name"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_answered_is_said_in_openais_format(server, changes, status, says):
    response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | changes, timeout=room.SECONDS)
    error = response.json()["error"]
    assert response.status_code == status and says in error["message"], response.text
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="there is no model or adapter 'nobody'"):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="no field"):
        client.chat.completions.create(model="a", messages=HELLO, extra_body={"colour": "red"})
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="a", input="x")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"model": "a", "messages"', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (json.dumps(CHAT).encode(), "text/plain", 400),  # a page of a browser may send this without asking
        (b" " * (5 << 20), "application/json", 413),
    ],
    ids=["cut", "deep", "bytes", "empty", "list", "plain", "large"],
)
def test_bodies_that_are_no_request(server, body, kind, status):
    url = f"{server.url}/v1/chat/completions"
    response = httpx.post(url, content=body, headers={"Content-Type": kind}, timeout=room.SECONDS)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"] and "Traceback" not in response.text
    parts = (part for part in [body])  # without a Content-Length
    response = httpx.post(url, content=parts, headers={"Content-Type": kind}, timeout=room.SECONDS)
    assert response.status_code == status, response.text


def test_adapters_come_and_go_by_name(server, bases, home, tmp_path):  # noqa: F811
    def ask(route: str, name: str) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{route}_lora_adapter", json={"lora_name": name}, timeout=room.SECONDS)

    adapter(bases, home / "more" / "late", seed=7)
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="late", messages=HELLO)
    assert ask("load", "late").status_code == 200
    first = client.chat.completions.create(model="late", messages=HELLO, temperature=0, max_tokens=9)
    adapter(bases, home / "more" / "late", seed=8)  # trained again
    assert ask("load", "late").status_code == 200
    second = client.chat.completions.create(model="late", messages=HELLO, temperature=0, max_tokens=9)
    assert first.choices[0].message.content != second.choices[0].message.content
    assert ask("unload", "late").status_code == 200
    assert ask("unload", "late").status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="late", messages=HELLO)
    outside = tmp_path / "outside"
    adapter(bases, outside, seed=9)
    for name in (str(outside), "../p", "more", ".", "", "late/../late", "p\0"):
        response = ask("load", name)
        assert response.status_code == 404 and str(home) not in response.text, name
    given = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(outside)})
    assert given.status_code == 400 and "there is no field 'lora_path'" in given.text


def test_a_damaged_adapter_harms_nobody_else(server, bases, home):  # noqa: F811
    """Cut short, of another base, or with values that are not finite."""
    for name, damage in (("cut", cut), ("foreign", foreign), ("nan", spoil)):
        place = home / "more" / name
        adapter(bases, place, seed=3, base="two" if damage is foreign else "one")
        damage(place)
        body = {"lora_name": name}
        response = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=room.SECONDS)
        error = response.json()["error"]
        assert response.status_code == 500 and error["code"] == "adapter_not_loaded", response.text
        assert str(home) not in response.text
    answer = server.client().chat.completions.create(model="a", messages=HELLO, max_tokens=3)
    assert answer.usage.completion_tokens == 3


def cut(place: Path) -> None:
    file = place / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def foreign(place: Path) -> None:
    pass


def spoil(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)


def test_an_answer_ends_when_its_client_goes(server):
    """Both of a stream and of a whole answer: nothing runs on."""
    client = server.client()
    for is_stream in (True, False):
        body = CHAT | {"max_tokens": 100, "stream": is_stream, "n": 16}
        begun = generated(server)
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            content = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            room.until(lambda: metric(server, "veneer_answers_running") > 0, "the answers")
        room.until(lambda: metric(server, "veneer_answers_running") == 0, "the end of the answers")
        assert generated(server) - begun < 1600
    assert client.chat.completions.create(model="a", messages=HELLO, max_tokens=2).usage.completion_tokens == 2


def metric(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=room.SECONDS).text
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def generated(server) -> float:
    return metric(server, "veneer_generated_tokens_total")


def test_the_state_is_shown(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.client().chat.completions.create(model="a", messages=HELLO, max_tokens=2)
    assert metric(server, "veneer_adapters_loaded") <= 3
    text = httpx.get(f"{server.url}/metrics").text
    assert 'veneer_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "hello" not in text
    for path in ("/docs", "/openapi.json", "/v1/nothing"):
        response = httpx.get(f"{server.url}{path}")
        assert response.status_code == 404 and "error" in response.json(), path


def test_a_page_of_a_browser_cannot_use_it(server):
    """Neither under another name of this machine, nor with CORS."""
    response = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert response.status_code == 403
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/chat/completions", headers=asked).status_code == 405


def test_the_printed_command_works(server):
    command = server.try_line.removeprefix("Try: ").strip()
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=room.SECONDS)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0, done.stderr


def test_a_key_a_full_queue_a_page_and_a_graceful_stop(bases, home, tmp_path):  # noqa: F811
    """A server with a key: 401 without it, 429 when the queue is full, and running streams end whole."""
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    arguments = ["--model", str(bases / "one"), "--adapters", str(home / "more"), "--api-key-file", str(key)]
    arguments += ["--max-queue", "2", "--cors", "https://page.example", "--cache-memory", "0.00005"]
    server = Server(*arguments)
    try:
        for given in ("none", KEY + "x", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                server.client(given).models.list()
        assert httpx.get(f"{server.url}/health").status_code == 200
        page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/models", headers=page)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        client = server.client(KEY)
        with pytest.raises(openai.BadRequestError, match="exceed the server's cache of"):
            client.completions.create(model="a", prompt="x" * 50, max_tokens=200)
        settings = dict(model="a", messages=HELLO, stream=True, max_tokens=150, temperature=0)
        streams = [client.chat.completions.create(**settings)]
        next(iter(streams[0]))
        with pytest.raises(openai.RateLimitError, match="the queue holds 2") as refusal:
            for _ in range(4):
                streams.append(client.chat.completions.create(**settings))
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        with ThreadPoolExecutor(len(streams)) as threads:
            ends = threads.map(last_reason, streams)
            log = server.stop()
        assert list(ends) == ["length"] * len(streams) and len(streams) >= 2
    finally:
        server.process.kill()
    assert KEY not in log and "hello" not in log and "Traceback" not in log, log


def last_reason(stream) -> str:
    return [chunk.choices[0].finish_reason for chunk in stream][-1]


def test_what_takes_too_long_ends(bases, home):  # noqa: F811
    server = Server("--model", str(bases / "one"), "--adapters", str(home / "more"), "--timeout", "0.000001")
    try:
        with pytest.raises(openai.InternalServerError, match="longer than the server allows") as late:
            server.client().chat.completions.create(model="a", messages=HELLO)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(server.client().chat.completions.create(model="a", messages=HELLO, stream=True))
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others reach the server; give an API key"),
        (["--adapter", "STRANGER"], "stranger"),
        (["--adapter", "one=STRANGER"], "an adapter cannot be called 'one'"),
        (["--adapter", "x/y=STRANGER"], "an adapter cannot be called 'x/y'"),
        (["--adapters", "nowhere"], "--adapters: 'nowhere' is not a directory"),
        (["--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
        (["--max-adapters", "0"], "--max-adapters 0 must be 1 or more"),
        (["--cache-memory", "0.00000001"], "holds 0 tokens of this model; give more"),
        (["--api-key", "x", "--api-key-file", "y"], "--api-key and --api-key-file both give a key"),
        (["--prot", "3"], "there is no option --prot; nearest: --port"),
    ],
    ids=str,
)
def test_a_server_that_cannot_start_says_why_in_a_line(bases, home, arguments, says):  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"STRANGER": str(home / "stranger"), "TAKEN": str(taken.getsockname()[1])}
        for word, place in places.items():
            arguments = [argument.replace(word, place) for argument in arguments]
        done = veneer("serve", "--model", str(bases / "one"), *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("language", ["", ".zh"])
def test_the_guide_runs(bases, home, tmp_path, monkeypatch, capsys, language):  # noqa: F811
    """The command that starts the server, those of clients, and the Python, on another port."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases / "one", "base")
    shutil.copytree(home / "more" / "a", "my-adapter")
    shutil.copytree(home / "more" / "b", "other-adapter")
    guide = (room.ROOT / "docs" / "guides" / f"serve{language}.md").read_text(encoding="utf-8")
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)).splitlines()
    [start] = [line for line in commands if line.startswith("veneer serve ")]
    server = Server(*shlex.split(start)[2:])
    try:
        calls = [line for line in commands if line.startswith("curl ")]
        assert len(calls) == len(commands) - 1 == 3
        for call in calls:
            done = subprocess.run(call.replace(DEFAULT, server.url), shell=True, capture_output=True, text=True)
            assert "error" not in json.loads(done.stdout), done.stdout
        [script] = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
        exec(compile(script.replace(DEFAULT, server.url), "serve.md", "exec"), {})
        assert "completion_tokens" in capsys.readouterr().out
    finally:
        server.stop()


# Parts


@pytest.mark.parametrize("stock", TEMPLATES, ids=lambda stock: getattr(stock, "name", ""))
def test_calls_are_read_as_the_template_writes_them(stock):
    """A rendered answer gives back its calls, for each template that writes them as JSON."""
    template = Template(tokenizer(stock))
    form = form_of(template)
    if form is None:
        return
    function = {"name": "remind", "arguments": {"at": 6, "what": '</tool_call> "x"'}}
    call = {"id": "123456789", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = template.text([*HELLO, answer]).removeprefix(template.text(HELLO, prompt=True))
    words, calls = form.find(text)
    assert words.strip() == "" and calls == [Call("remind", json.dumps(function["arguments"]))]
    assert form.find("no call") == ("no call", [])
    damaged = text[: text.index("6") + 1]
    assert form.find(damaged) == (damaged, [])


def test_some_templates_write_calls():
    forms = [form_of(Template(tokenizer(stock))) for stock in TEMPLATES]
    assert sum(form is not None for form in forms) >= 3


def test_texts_of_arguments_become_objects():
    call = {"id": "1", "function": {"name": "x", "arguments": '{"a": 1}'}}
    [message] = as_dicts([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize("words", ["plain text", "Grüße, 世界 🙂 e\u0301!", "ab" * 30, "x STOP y STO P"])
def test_text_grows_to_what_the_tokenizer_decodes(words):
    """Whole characters only, and no part of a stop string."""
    made = tokenizer(TEMPLATES[0], words=("🙂 e", "STO"))
    ids = made(words).input_ids
    text = Text(made)
    pieces = [text.push(token) for token in ids]
    assert "".join(pieces) + text.finish() == words and not any("�" in piece for piece in pieces)
    stopped = Text(made, ["STOP"])
    shown = ""
    for token in ids:
        shown += stopped.push(token)
        assert words.partition("STOP")[0].startswith(shown)
        if stopped.is_stopped:
            break
    assert shown + stopped.finish() == words.partition("STOP")[0]
    assert stopped.is_stopped == ("STOP" in words)
