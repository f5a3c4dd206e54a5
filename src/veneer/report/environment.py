"""The environment of veneer: versions, processors and memory, and problems with them."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__
from ..files.pull import MODELS, cache_dir, is_complete
from ..upstream import versions

NEEDED = ("torch", "transformers")


@dataclass
class Environment:
    """The machine and the packages that veneer runs on."""

    veneer: str
    python: str
    system: str
    packages: dict[str, str | None]
    """Versions of packages; None if a package is not installed."""
    tried: dict[str, str]
    """Ranges of versions that veneer is tested with."""
    processors: int
    torch_threads: int
    accelerators: list[str]
    memory_bytes: int
    free_bytes: int
    cache: str
    models: list[str]
    """Models that `veneer pull` has downloaded."""
    offline: bool
    untried: list[str] = field(default_factory=list)
    """Installed packages whose versions are not tested; they may still work."""
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def environment() -> Environment:
    """Describe the environment. Imports torch; does not use the network."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cache = cache_dir()
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    result = Environment(
        veneer=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: versions.installed(name) for name in (*versions.TRIED, "peft")},
        tried={name: str(tried) for name, tried in versions.TRIED.items()},
        processors=_processors(),
        torch_threads=torch.get_num_threads(),
        accelerators=accelerators,
        memory_bytes=memory.total,
        free_bytes=memory.available,
        cache=str(cache),
        models=[name for name, source in MODELS.items() if is_complete(cache / name, source)],
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )
    result.untried = [str(package) for package in versions.untried()]
    result.problems = _problems(result)
    return result


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _problems(environment: Environment) -> list[str]:
    problems = []
    for name in NEEDED:
        if environment.packages[name] is None:
            problems.append(f"{name} is not installed; veneer needs {versions.TRIED[name].oldest} or newer")
    for package in versions.untried():
        if package.place == "older":
            problems.append(f"{package.name} {package.version}; veneer needs {package.tried.oldest} or newer")
    threads = environment.torch_threads
    processors = environment.processors
    if threads > processors:
        problems.append(
            f"torch uses {threads} threads on {processors} processors, which is slow: set OMP_NUM_THREADS={processors}"
        )
    return problems
