"""`veneer plan`: what a fine-tune would train and take, before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._options import Column, pairs, source

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.report.epoch import Epoch
    from veneer.report.forecast import Forecast

EXAMPLES = """
Examples:

  veneer plan --model smollm2-135m-instruct                    LoRA at its defaults

  veneer plan --model-type llama --method dora --rank 16       an architecture at its default sizes, no download

  veneer plan --model DIR --targets q_proj,v_proj --layers     with every layer

  veneer plan --model DIR --batch-size 8 --max-length 1024 --gradient-checkpointing

  veneer plan --model DIR --method fourierft --set n_frequency=500 --json

  veneer plan --model smollm2-135m-instruct --data rows.jsonl --batch-size 8    and what an epoch takes
"""


def plan(
    model: Annotated[str | None, typer.Option(help="Directory, name or hub id; only its config is read.")] = None,
    model_type: Annotated[str | None, typer.Option(help='An architecture instead, "gpt2" or "llama".')] = None,
    method: Annotated[str, typer.Option(help="What to train; `veneer methods` lists them.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="Rank of the update.")] = None,
    targets: Annotated[str | None, typer.Option(help='Modules, as "q_proj,v_proj", or "all-linear".')] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Another setting, field=value.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Rows to train on, as in `veneer train`; repeatable.")] = None,
    column: Column = None,
    packing: Annotated[bool, typer.Option(help="Several rows of the data in one sequence.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes of a step.")] = 1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; of data, the most.")] = 1024,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Plan with recomputation.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every adapted module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a fine-tune would train, and the memory it takes, by the model's config alone; of data, an epoch."""
    from veneer.core.config import all_methods
    from veneer.files.skeleton import skeleton
    from veneer.model.catalogue import config_for, page
    from veneer.report.forecast import forecast, settings_of
    from veneer.terminal import quiet

    quiet()
    given = settings_of(all_methods()[page(method).name], rank, targets, settings or [])
    sources = [source(text) | {"columns": dict(pairs(column or []))} for text in data or []]
    epoch = _epoch(model, method, sources, batch_size, accumulate, max_length, packing) if sources else None
    length = math.ceil(epoch.largest_batch / batch_size) if epoch else max_length
    base = skeleton(model, model_type)
    found = forecast(base, config_for(method, **given), batch_size, length, gradient_checkpointing)
    if as_json:
        content = found.as_dict() | ({"data": epoch.as_dict()} if epoch else {})
        typer.echo(json.dumps(content, indent=2, default=str))
        return
    _show(found, layers)
    if epoch:
        _show_epoch(epoch, max_length)


plan.__doc__ = (plan.__doc__ or "") + "\n" + EXAMPLES


def _epoch(
    model: str | None, method: str, data: list[Any], batch_size: int, accumulate: int, max_length: int, packing: bool
) -> Epoch:
    from veneer.report.epoch import epoch_of
    from veneer.train.recipe import make

    if model is None:
        raise typer.BadParameter("--data needs --model: its tokenizer says what a token is")
    batches = {"batch_size": batch_size, "accumulate": accumulate, "max_length": max_length, "packing": packing}
    return epoch_of(make({"model": model, "method": method, "data": data, "output": "-", **batches}))


def _show_epoch(epoch: Epoch, max_length: int) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    share = epoch.supervised_tokens / epoch.tokens
    console.print(f"\n{'rows':<20}{epoch.kept:,} of {epoch.rows:,}")
    console.print(f"{'tokens':<20}{epoch.tokens:,}, {epoch.supervised_tokens:,} of them learned ({share:.0%})")
    console.print(f"{'longest row':<20}{epoch.longest:,} tokens (the limit is {max_length:,})")
    lost = {
        f"{epoch.cut_rows:,} rows cut, {epoch.cut_tokens:,} tokens lost": epoch.cut_rows,
        f"{epoch.unlearned_rows:,} rows dropped without a token to learn": epoch.unlearned_rows,
    }
    for line in [line for line, count in lost.items() if count]:
        console.print(f"{'':<20}{line}", style="yellow")
    console.print(f"{'an epoch':<20}{epoch.sequences:,} sequences, {epoch.steps:,} steps")
    console.print(_bars(epoch))


def _bars(epoch: Epoch) -> Table:
    table, most = _table("length", "rows", ""), max(count for *_, count in epoch.lengths)
    for first, last, count in epoch.lengths:
        table.add_row(f"{first:,}-{last:,}", f"{count:,}", "\u2588" * math.ceil(30 * count / most))
    return table


def _show(found: Forecast, layers: bool) -> None:
    from rich.console import Console

    from veneer.terminal import size

    console = Console(highlight=False)
    shown = ", ".join(f"{name}={value}" for name, value in found.settings.items())
    console.print(f"[bold]{found.method}[/bold] on {found.model}" + (f": {shown}" if shown else ""))
    if found.hits:
        console.print(_hits(found))
    if layers:
        console.print(_rows(found))
    if found.outside:
        console.print(f"outside the layers  {found.outside:,}")
    share = found.trainable / found.total
    console.print(f"trainable           {found.trainable:,} of {found.total:,} ({share:.4%})")
    console.print(f"adapter file        {size(found.file_bytes)}")
    _show_memory(console, found)


def _show_memory(console: object, found: Forecast) -> None:
    from veneer.terminal import size

    memory = found.memory
    step = "unknown for this method" if memory.step is None else size(memory.step)
    lines = {
        "base weights": size(memory.base),
        "adapter": size(memory.adapter),
        "optimizer (AdamW)": size(memory.optimizer),
        "activations, grads": f"{step}  ({found.batch_size} x {found.length} tokens)",
    }
    where = "  (of the process, on a CPU)" if memory.process else "  (of the accelerator)"
    if memory.process:
        lines["Python, libraries"] = size(memory.process)
        lines["holes in the heap"] = "unknown" if memory.heap is None else size(memory.heap)
    lines |= {
        "memory in all": "unknown" if memory.total is None else size(memory.total) + where,
    }
    for name, text in lines.items():
        console.print(f"{name:<20}{text}")  # type: ignore[attr-defined]


def _hits(found: Forecast) -> Table:
    table = _table("target", "modules", "trainable", "where")
    for hit in found.hits:
        table.add_row(hit.entry, str(len(hit.paths)), f"{hit.parameters:,}", "\n".join(folded(hit.paths)))
    return table


def _rows(found: Forecast) -> Table:
    table = _table("module", "in", "out", "trainable")
    for row in found.rows:
        sizes = [str(n) if n else "-" for n in (row.in_features, row.out_features)]
        table.add_row(row.path, *sizes, f"{row.added:,}")
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_number = name in ("modules", "trainable", "in", "out", "length", "rows")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def folded(paths: tuple[str, ...]) -> list[str]:
    """Paths that differ in their first index only, as one: model.layers.{0-29}.self_attn.q_proj."""
    groups: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        parts = re.match(r"(.*?\.)(\d+)(\..*)", path)
        place = (parts[1], parts[3]) if parts else (path, "")
        groups.setdefault(place, []).extend([int(parts[2])] if parts else [])
    return [f"{before}{_range(numbers)}{after}" for (before, after), numbers in groups.items()]


def _range(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"
