"""`veneer serve`: a server with OpenAI's API for a base model and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .generate import Dtype, TemplateFile

if TYPE_CHECKING:
    from veneer.serve.app import Service

EXAMPLES = """
Clients name an adapter as their model, or the base model by the last part of
its name; one+two stacks two adapters. Requests for different adapters, of
any method, run in one batch.

The server listens on this machine only; for another --host it needs an API
key. It needs fastapi, uvicorn and prometheus-client, which the extra "serve"
of veneer installs.

Examples:

  # two adapters on one base model
  veneer serve --model smollm2-135m-instruct --adapter one --adapter two

  # every adapter in a directory, four of them in memory at a time
  veneer serve --model DIR --adapters my-adapters --max-adapters 4

  # reachable from other machines, with a key from a file
  veneer serve --model DIR --host 0.0.0.0 --api-key-file key.txt
"""


def serve(
    model: Annotated[
        str, typer.Option(help="The base model: a directory, a name that `veneer pull` knows, or a hub id.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADAPTER",
            help="An adapter: a directory or a hub id. Its name is that of the directory unless NAME= gives another. "
            "Repeatable.",
        ),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A directory whose subdirectories are adapters; clients can load more of them.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0: any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VENEER_API_KEY", help="The key that clients must send.", show_default="none is needed"),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Read the key from this file.")] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page that may use the server, such as https://a.org. Repeatable."),
    ] = None,
    dtype: Dtype = "auto",
    chat_template: TemplateFile = None,
    max_adapters: Annotated[int, typer.Option(help="Adapters in memory; the least recently used leave first.")] = 8,
    max_queue: Annotated[int, typer.Option(help="Answers that wait; more requests are refused (status 429).")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(help="The longest answer, in tokens, and the length if a request names none.", min=1)
    ] = 1024,
    cache_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Memory for keys and values. It limits how many answers run together.",
            show_default="a quarter of the free memory, or four fifths of a GPU's",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="How long an answer may take, in seconds.")] = 600.0,
    chunk: Annotated[int, typer.Option(help="Prompt tokens between two tokens of the running answers.", min=1)] = 256,
) -> None:
    """Serve a base model and many adapters with OpenAI's API."""
    from veneer.errors import ConfigError

    _check_extra()
    from veneer.serve.run import Options, quiet_logs
    from veneer.serve.run import serve as run
    from veneer.terminal import quiet

    if api_key and api_key_file:
        raise ConfigError("--api-key and --api-key-file both give a key; give one of them")
    if api_key_file is not None:
        api_key = api_key_file.read_text(encoding="utf-8").strip()
        if not api_key:
            raise ConfigError(f"--api-key-file {str(api_key_file)!r} is empty")
    options = Options(
        model=model,
        adapters=adapter or (),
        folder=adapters,
        host=host,
        port=port,
        dtype=dtype,
        key=api_key or None,
        origins=cors or (),
        most_adapters=max_adapters,
        most_waiting=max_queue,
        most_tokens=max_new_tokens,
        cache_gigabytes=cache_memory,
        seconds=timeout,
        chunk=chunk,
        template_file=chat_template,
    )
    quiet()
    quiet_logs()
    run(options, _show_start)


def _check_extra() -> None:
    """Raise ConfigError unless what the server needs beside veneer is installed."""
    from importlib.util import find_spec

    from veneer.errors import ConfigError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"veneer serve needs {', '.join(missing)}; run: pip install 'veneer[serve]'")


def _show_start(url: str, service: Service) -> None:
    adapters = service.adapters
    names = adapters.names()
    typer.echo(f"veneer serves {', '.join(names)} at {url}  (Ctrl-C stops it)")
    route, body = "completions", f'{{"model": "{names[-1]}", "prompt": "Hello"}}'
    if service.template is not None:
        route = "chat/completions"
        body = f'{{"model": "{names[-1]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    key = " -H 'Authorization: Bearer KEY'" if service.settings.key is not None else ""
    typer.echo(f"Try: curl {url}/v1/{route}{key} -H 'Content-Type: application/json' -d '{body}'")


serve.__doc__ = f"{serve.__doc__}\n{EXAMPLES}"
