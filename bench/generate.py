"""Generation with adapters against the base model, in veneer and in PEFT: SmolLM2-135M, 8 rows, greedy.

    python -m bench.generate

LoRA of rank 16 on all linear layers. Results go to docs/performance-generate.json, the table beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import veneer

from .common import load_base
from .pairs import DOCS, Pair, alternate, timed, write

ROWS, PROMPT, NEW = 8, 16, 24


def adapted(library: Any, base: Any) -> Any:
    """The model with eight adapters that all do something."""
    torch.manual_seed(0)
    config = dict(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = library.get_peft_model(base, library.LoraConfig(**config), "a0")
    for i in range(1, ROWS):
        model.add_adapter(f"a{i}", library.LoraConfig(**config))
    model.set_adapter("a0")
    return model.eval()


def main(out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS, times: int = 5) -> None:
    import peft

    plain, tokenizer = load_base()
    ids = torch.randint(100, 40_000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    settings |= dict(min_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id or 0)
    names, pairs = [f"a{i}" for i in range(ROWS)], []
    base = lambda: timed(lambda: plain.generate(**settings))  # noqa: E731
    for name, library, limits in (("veneer", veneer, (1.10, 1.35)), ("peft", peft, (None, None))):
        model = adapted(library, load_base()[0])
        one = Pair(f"generate {ROWS} rows, one adapter", name, "base", limits[0])
        pairs.append(alternate(one, lambda m=model: timed(lambda: m.generate(**settings)), base, times))  # type: ignore[misc]
        many = Pair(f"generate {ROWS} rows, {ROWS} adapters", name, "base", limits[1])
        mixed = lambda m=model: timed(lambda: m.generate(**settings, adapter_names=names))  # noqa: E731
        pairs.append(alternate(many, mixed, base, times))
        del model
    write("generate", pairs, out)


if __name__ == "__main__":
    typer.run(main)
