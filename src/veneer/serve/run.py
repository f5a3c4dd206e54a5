"""From a base model and adapters on disk to a running server."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VeneerError
from ..inference.generation import Sampling, Writer
from ..model.loading import load, named
from . import batch
from .adapters import Adapters
from .app import Service, Settings, create_app
from .engine import Engine, Limits
from .security import LOOPBACK

SHARE = {"cuda": 0.8, "cpu": 0.25}
"""The part of the free memory that the key-value caches get."""


@dataclass(frozen=True)
class Options:
    """What `veneer serve` is asked for."""

    model: str
    adapters: Sequence[str] = ()
    """NAME=DIR, or a directory whose name is the adapter's."""
    folder: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    key: str | None = None
    origins: Sequence[str] = ()
    most_adapters: int = 8
    most_waiting: int = 64
    most_tokens: int = 1024
    cache_gigabytes: float | None = None
    """None: a quarter of the free memory, or four fifths of a GPU's."""
    seconds: float = 600.0
    chunk: int = 256
    template_file: Path | None = None


def serve(options: Options, started: Callable[[str, Service], None]) -> None:
    """Load the model, and answer requests until the process is told to stop.

    Args:
        started: called with the server's URL when it listens.

    Raises:
        VeneerError: the options contradict each other, the port is taken, or a file is missing or damaged.
    """
    import uvicorn

    _check(options)
    with _bound(options.host, options.port) as listener:
        service = build(options)
        url = _url(options.host, listener.getsockname()[1])
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=int(options.seconds) + 1,  # a client that does not read must not prevent the end
        )
        server = uvicorn.Server(config)
        listener.listen(config.backlog)
        started(url, service)
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])


def build(options: Options) -> Service:
    """Load the base model and the adapters that are named one by one, and make everything but the HTTP server."""
    places = named(options.adapters)
    loaded = load((), options.model, dtype=options.dtype)
    writer = Writer(loaded, Sampling(), template_file=options.template_file)
    base = Path(options.model).name or "base"
    adapters = Adapters(loaded.model, base, places, options.folder, options.most_adapters)
    for name in list(places)[-options.most_adapters :]:
        try:
            adapters.ensure((name,), ())
        except VeneerError as error:
            raise ConfigError(f"adapter {name!r} cannot be served: {error}") from None
    limits = Limits(_positions(options, loaded.model), options.most_waiting, options.chunk)
    engine = Engine(adapters, writer.stops, limits)
    hosts = LOOPBACK if options.host in LOOPBACK and options.key is None else None
    settings = Settings(options.most_tokens, options.seconds, options.key, hosts, options.origins)
    return Service(engine, loaded.tokenizer, writer.template, settings)


def _check(options: Options) -> None:
    if options.host not in LOOPBACK and options.key is None:
        raise ConfigError(
            f"--host {options.host} lets others reach the server; give an API key with VENEER_API_KEY or --api-key-file"
        )
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--adapters: {str(options.folder)!r} is not a directory")
    for name, value in (("max-adapters", options.most_adapters), ("max-queue", options.most_waiting)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be 1 or more")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before the model is loaded, so that a mistake shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; choose another with --port") from None
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _positions(options: Options, model: Any) -> int:
    """How many positions the key-value caches may hold in total."""
    size = batch.bytes_per_position(model)
    if options.cache_gigabytes is not None:
        memory = options.cache_gigabytes * 1e9
    else:
        memory = _free(model) * SHARE.get(model.device.type, SHARE["cuda"])
    positions = int(memory // size)
    if positions < 64:
        raise ConfigError(f"--cache-memory {memory / 1e9:g} holds {positions} tokens of this model; give more")
    return positions


def _free(model: Any) -> int:
    """The free memory of the model's device, in bytes."""
    import psutil
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return int(psutil.virtual_memory().available)


def quiet_logs() -> None:
    """Show what the server has to say, without what uvicorn says about each connection."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn", "uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
