"""The cost of a training step by method, against LoRA's and against PEFT's, and several adapters trained together.

    python -m bench.adapters

SmolLM2-135M, 2 rows of 96 tokens, no dropout. Results go to docs/performance-adapters.json, the table beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import veneer

from .common import load_base
from .pairs import DOCS, Pair, alternate, timed, write

METHODS = ("dora", "hra", "loha", "lokr", "fourierft", "waveft", "boft", "oft", "c3a", "shira", "hira", "glora")
TOGETHER = 4
LENGTH, ROWS = 96, 2


def make(library: Any, method: str, base: Any, name: str = "default") -> Any:
    """An adapter of a method on all linear layers; C3A's blocks must divide every size."""
    more = {"c3a": {"block_size": 64}, "dora": {"use_dora": True}}.get(method, {})
    kind = "lora" if method == "dora" else method
    if library is veneer:
        config = veneer.all_methods()[kind]
    else:
        config = library.PEFT_TYPE_TO_CONFIG_MAPPING[library.PeftType[kind.upper()]]
    more |= {"r": 16} if kind == "lora" else {}
    config = config(target_modules="all-linear", task_type="CAUSAL_LM", **more)
    return library.get_peft_model(base, config, name).train()


def step(model: Any, ids: torch.Tensor, **facts: Any) -> None:
    model(input_ids=ids, labels=ids, **facts).loss.backward()
    model.zero_grad()


def over_lora(times: int, methods: tuple[str, ...], libraries: list[Any]) -> list[Pair]:
    """Each method's step over that of LoRA in the same library."""
    ids = torch.randint(100, 40_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for library in libraries:
        lora = make(library, "lora", load_base()[0])
        for method in methods:
            model = make(library, method, load_base()[0])
            limit = 1.2 if (method, library) == ("dora", veneer) else None
            pair = Pair(f"step, {library.__name__}", method, "lora", limit)
            run = lambda m=model: timed(lambda: step(m, ids))  # noqa: E731
            found.append(alternate(pair, run, lambda m=lora: timed(lambda: step(m, ids)), times))  # type: ignore[misc]
    return found


def together(times: int) -> Pair:
    """A step of four adapters on a row each, over four steps of one adapter on one row."""
    ids = torch.randint(100, 40_000, (TOGETHER, LENGTH // 2), generator=torch.Generator().manual_seed(0))
    names = [f"a{i}" for i in range(TOGETHER)]
    model = make(veneer, "lora", load_base()[0], names[0])
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    alone = make(veneer, "lora", load_base()[0])
    model.set_adapter(names)

    def one_by_one() -> None:
        for row in range(TOGETHER):
            step(alone, ids[row : row + 1])

    pair = Pair(f"{TOGETHER} adapters", "together", "one by one", 0.6)
    return alternate(
        pair, lambda: timed(lambda: step(model, ids, adapter_names=names)), lambda: timed(one_by_one), times
    )


def main(
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
    times: int = 5,
    only: Annotated[list[str] | None, typer.Option(help="Just these methods.")] = None,
    against_peft: Annotated[bool, typer.Option(help="Also PEFT's methods over PEFT's LoRA.")] = True,
) -> None:
    import peft

    pairs = over_lora(times, tuple(only or METHODS), [veneer, peft] if against_peft else [veneer])
    write("adapters", [*pairs, together(times)], out)


if __name__ == "__main__":
    typer.run(main)
