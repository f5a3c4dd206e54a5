"""What veneer runs on: versions, processors, memory, and what in it would get in the way."""

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
    veneer: str
    python: str
    system: str
    packages: dict[str, str | None]
    """Versions; None: not installed."""
    tried: dict[str, str]
    """The versions that veneer was tried with."""
    processors: int
    torch_threads: int
    accelerators: list[str]
    memory_bytes: int
    free_bytes: int
    cache: str
    models: list[str]
    """Those of `veneer pull` that are here."""
    offline: bool
    untried: list[str] = field(default_factory=list)
    """What is installed outside of the versions that were tried; it may work all the same."""
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def environment() -> Environment:
    """Look around. Imports torch; opens no socket."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = Environment(
        veneer=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: versions.installed(name) for name in (*versions.TRIED, "peft")},
        tried={name: str(tried) for name, tried in versions.TRIED.items()},
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        accelerators=gpus + (["mps"] if torch.backends.mps.is_available() else []),
        memory_bytes=memory.total,
        free_bytes=memory.available,
        cache=str(cache_dir()),
        models=[name for name, source in MODELS.items() if is_complete(cache_dir() / name, source)],
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )
    found.untried = [str(package) for package in versions.untried()]
    found.problems = list(_problems(found))
    return found


def _problems(found: Environment) -> list[str]:
    problems = []
    for name in NEEDED:
        if found.packages[name] is None:
            problems.append(f"{name} is not installed; veneer needs {versions.TRIED[name].oldest} or newer")
    for package in versions.untried():
        if package.place == "older":
            problems.append(f"{package.name} {package.version}; veneer needs {package.tried.oldest} or newer")
    if found.torch_threads > found.processors:
        what = f"torch has {found.torch_threads} threads for {found.processors} processors"
        problems.append(f"{what}: set OMP_NUM_THREADS={found.processors}")
    return problems
