"""`veneer serve` on SmolLM2-135M with eight LoRA adapters, against `generate`, itself, and `transformers serve`.

    python -m bench.serve

Both servers run in processes of their own, and take turns. All times are seconds for one generated token, but that of
the first token. Results go to docs/performance-serve.json, the table beside it. `--tokens 4 --times 1` shows that it
works, in a minute.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import openai
import torch
import typer

import veneer

from .common import MODEL, load_base
from .pairs import DOCS, Pair, alternate, write

CLIENTS = 8
NAMES = [f"a{i}" for i in range(CLIENTS)]
WORDS = "The keeper of the lighthouse wrote every evening what he had seen of the ships and of the weather. "
SHORT = WORDS * 2
WAIT = 300.0
"""Seconds until a server must listen."""


def save_adapters(where: Path) -> None:
    """Eight adapters that all do something."""
    base, _ = load_base()
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = veneer.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = veneer.get_peft_model(base, config)
        for parameter in model.parameters():
            parameter.data.mul_(0.3 if parameter.requires_grad else 1.0)
        model.save_pretrained(where / name)
        base = model.unload()


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[openai.OpenAI]:
    """A client of a server that runs in the block."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, *command], stdout=nowhere, stderr=nowhere)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=WAIT)
    try:
        _wait(process, port)
        yield client
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + WAIT
    while True:
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the server does not start: {process.args}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(
    client: openai.OpenAI, model: str, prompt: str, tokens: int, begun: Callable[[], Any] | None = None
) -> tuple[float, float, int]:
    """(seconds to the first token, seconds in total, tokens) of one streamed answer.

    Args:
        begun: called at the first token.
    """
    start = time.perf_counter()
    first = 0.0
    count = 0
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            if not count:
                first = time.perf_counter() - start
                if begun is not None:
                    begun()
            count += 1
    return first, time.perf_counter() - start, count


def per_token(client: openai.OpenAI, models: Sequence[str], clients: int, tokens: int) -> float:
    """Seconds for a token when so many clients ask at once, for all models."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        counts = list(threads.map(lambda model: ask(client, model, SHORT, tokens)[2], models))
    return (time.perf_counter() - start) / max(1, sum(counts))


def first_token(client: openai.OpenAI, busy: int, tokens: int) -> float:
    """Seconds to the first token of an answer while `busy` others run, whose prompts were computed before."""
    with ThreadPoolExecutor(max(1, busy)) as threads:
        begun = threading.Barrier(busy + 1)
        others = [threads.submit(ask, client, name, SHORT, 8 * tokens, begun.wait) for name in NAMES[:busy]]
        begun.wait()
        first, _, _ = ask(client, NAMES[-1], SHORT, 2)
        for other in others:
            other.result()
    return first


def plain(where: Path, tokens: int) -> Callable[[], float]:
    """Seconds for a token of `generate`, with the prompt that the server makes."""
    base, tokenizer = load_base()
    model = veneer.PeftModel.from_pretrained(base, where / NAMES[0])
    chat = [{"role": "user", "content": SHORT}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def once() -> float:
        start = time.perf_counter()
        found = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        return (time.perf_counter() - start) / (found.shape[1] - batch["input_ids"].shape[1])

    return once


def main(
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
    times: Annotated[int, typer.Option(help="Measurements of each pair.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
) -> None:
    ours, theirs = free_port(), free_port()
    directory = veneer.pull(MODEL)
    pairs: list[Pair] = []

    def compare(what: str, names: tuple[str, str], limit: float | None, first: Any, second: Any) -> None:
        pairs.append(alternate(Pair(what, *names, limit), first, second, times))

    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        save_adapters(where)
        command = ["-m", "veneer", "serve", "--model", MODEL, "--adapters", str(where), "--port", str(ours)]
        with server(command, ours) as client:
            base = next(model.id for model in client.models.list() if model.parent is None)
            one = partial(per_token, client, NAMES[:1], 1, tokens)
            compare("one answer", ("server", "generate"), 1.05, one, plain(where, tokens))
            together = partial(per_token, client, NAMES, CLIENTS, tokens)
            in_turn = partial(per_token, client, NAMES, 1, tokens)
            compare("eight answers of eight adapters", ("at once", "in turn"), 1 / 3.5, together, in_turn)
            loaded = partial(first_token, client, CLIENTS - 1, tokens)
            idle = partial(first_token, client, 0, tokens)
            compare("first token", ("beside seven", "alone"), 2, loaded, idle)
            command = ["-m", "transformers.cli.transformers", "serve", "--port", str(theirs), "--device", "cpu"]
            command = [*command, "--dtype", "float32", "--continuous-batching", str(directory)]
            with server(["-c", _starter(command)], theirs) as other:
                for clients in (1, CLIENTS):
                    what = f"the base, {clients} at once"
                    mine = partial(per_token, client, [base] * clients, clients, tokens)
                    their = partial(per_token, other, [str(directory)] * clients, clients, tokens)
                    compare(what, ("veneer serve", "transformers serve"), None, mine, their)
    write("serve", pairs, out)


def _starter(command: Sequence[str]) -> str:
    """A program that runs the command of transformers, whose module has no `__main__`."""
    arguments = ["transformers", *command[2:]]
    return f"import sys; sys.argv = {arguments!r}; from transformers.cli.transformers import main; main()"


if __name__ == "__main__":
    typer.run(main)
