"""`veneer plan`: estimate what a run trains and needs, before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli._options import (
    ABSENT,
    Column,
    Objective,
    Option,
    Rank,
    Set,
    StartFrom,
    Targets,
    add_settings,
    pairs,
    partial_recipe,
    source,
)
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from veneer.report.epoch import Epoch
    from veneer.report.forecast import Forecast
    from veneer.train.recipe import Recipe

EXAMPLES = """
Reads the model's config (with --data also its tokenizer), not its weights.
Shows which modules are adapted, the number of trainable parameters, the
size of the adapter file, and the peak memory of a training step. With
--data it also shows how many tokens and steps an epoch has, how long the
rows are, and how many would be cut or dropped.

Examples:

  # LoRA with its default settings
  veneer plan --model smollm2-135m-instruct

  # an architecture in its default size, without a download
  veneer plan --model-type llama --method dora --rank 16

  # list every adapted module
  veneer plan --model DIR --targets q_proj,v_proj --layers

  # memory with gradient checkpointing
  veneer plan --model DIR --max-length 4096 --gradient-checkpointing

  # another setting of the method, for scripts
  veneer plan --model DIR --method fourierft --option n_frequency=500 --json

  # an epoch over your data
  veneer plan --model smollm2-135m-instruct --data rows.jsonl
"""


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id. Only its "
            "config is read.",
            rich_help_panel="Model and method",
        ),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            help="An architecture in transformers' default size instead of a model, such as gpt2 or llama.",
            rich_help_panel="Model and method",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="The method; `veneer methods` lists all.", rich_help_panel="Model and method")
    ] = "lora",
    rank: Rank = None,
    targets: Targets = None,
    option: Option = None,
    objective: Objective = "sft",
    start_from: StartFrom = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="Plan for a quantised base model: nf4, int8 or int4; or none.",
            show_default="none; with --start-from, as for that adapter",
            rich_help_panel="Model and method",
        ),
    ] = None,
    set_: Set = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[*WEIGHT]",
            help="Training data, as in `veneer train`; describe an epoch of it. Repeatable.",
            rich_help_panel="Data",
        ),
    ] = None,
    column: Column = None,
    packing: Annotated[
        bool,
        typer.Option(
            help="Put several rows of the data into one sequence.", show_default="off", rich_help_panel="Switches"
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.", rich_help_panel="Data")] = 8,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Forward passes per optimizer step.", rich_help_panel="Data")
    ] = 1,
    max_length: Annotated[
        int,
        typer.Option(
            min=1,
            help="Length of a sequence in tokens. With --data: the maximum; longer rows are cut.",
            rich_help_panel="Data",
        ),
    ] = 1024,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            help="Plan for activations that are recomputed in the backward pass.",
            show_default="off",
            rich_help_panel="Switches",
        ),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="List every adapted module.", rich_help_panel="Output")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Estimate what a run trains and how much memory it needs."""
    from veneer.files.skeleton import skeleton
    from veneer.report.forecast import forecast
    from veneer.terminal import quiet
    from veneer.train.setup import method_config
    from veneer.train.stage import begun
    from veneer.upstream.models import positions_of
    from veneer.upstream.quantisation import quantisation

    quiet()
    columns = dict(pairs(column or []))
    content: dict[str, Any] = {
        "method": method,
        "objective": objective,
        "rank": rank,
        "targets": targets,
        "start_from": start_from,
        "quantise": quantise,
        "data": [source(text) | {"columns": columns} for text in data or []],
        "batch_size": batch_size,
        "accumulate": accumulate,
        "max_length": max_length,
        "packing": packing,
        "gradient_checkpointing": gradient_checkpointing,
    }
    if model is not None:
        content["model"] = model
    add_settings(content, set_, option)
    recipe = begun(partial_recipe(content))
    is_named = model_type is None and recipe.model != ABSENT
    base = skeleton(recipe.model if is_named else content.get("model"), model_type)
    positions = positions_of(base.config)
    if positions is not None:
        recipe = recipe.changed(max_length=min(recipe.max_length, positions))
    epoch = None
    sequences = recipe.batch_size * (2 if recipe.reads_pairs else 1)
    length = recipe.max_length
    steps = recipe.max_steps or STEPS
    if content["data"]:
        epoch = _epoch(recipe)
        length = math.ceil(epoch.largest_batch / sequences)
        steps = epoch.steps
    config = method_config(recipe, None, steps)
    how = quantisation(recipe.quantise, recipe.quantise_options)
    result = forecast(base, config, sequences, length, recipe.gradient_checkpointing, how)
    if as_json:
        content = result.as_dict()
        if epoch:
            content["data"] = epoch.as_dict()
        typer.echo(json.dumps(content, indent=2, default=str))
        return
    _show(result, layers)
    if epoch:
        _show_epoch(epoch, recipe.max_length)


STEPS = 1000
"""The steps of a run whose data is not given, for methods with a schedule; no size depends on it."""
plan.__doc__ = (plan.__doc__ or "") + "\n" + EXAMPLES


def _epoch(recipe: Recipe) -> Epoch:
    from veneer.report.epoch import epoch_of

    if recipe.model == ABSENT:
        raise ConfigError("--data needs --model: its tokenizer splits the rows into tokens")
    return epoch_of(recipe)


def _show_epoch(epoch: Epoch, max_length: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    share = epoch.supervised_tokens / epoch.tokens
    console.print(f"\n{'rows':<20}{epoch.kept:,} of {epoch.rows:,}")
    console.print(f"{'tokens':<20}{epoch.tokens:,}, {epoch.supervised_tokens:,} of them learned ({share:.0%})")
    console.print(f"{'longest row':<20}{epoch.longest:,} tokens (the limit is {max_length:,})")
    for line in epoch.warnings:
        console.print(Text(f"{'':<20}{line}", style="yellow"))
    console.print(f"{'an epoch':<20}{epoch.sequences:,} sequences, {epoch.steps:,} steps")
    console.print(_bars(epoch))


def _bars(epoch: Epoch) -> Table:
    """A histogram of the rows' lengths."""
    table = _table("length", "rows", "")
    most = max(count for *_, count in epoch.lengths)
    for first, last, count in epoch.lengths:
        blocks = math.ceil(30 * count / most)
        table.add_row(f"{first:,}-{last:,}", f"{count:,}", "\u2588" * blocks)
    return table


def _show(result: Forecast, layers: bool) -> None:
    from rich.console import Console

    from veneer.terminal import size

    console = Console(highlight=False)
    title = f"[bold]{result.method}[/bold] on {result.model}"
    settings = [f"{name}={value}" for name, value in result.settings.items()]
    if settings:
        title += f": {', '.join(settings)}"
    console.print(title)
    if result.hits:
        console.print(_hits(result))
    if layers:
        console.print(_rows(result))
    if result.outside:
        console.print(f"other parameters    {result.outside:,}")
    share = result.trainable / result.total
    console.print(f"trainable           {result.trainable:,} of {result.total:,} ({share:.4%})")
    console.print(f"adapter file        {size(result.file_bytes)}")
    _show_memory(console, result)


def _show_memory(console: Console, result: Forecast) -> None:
    from veneer.terminal import size

    memory = result.memory
    step = "unknown for this method" if memory.step is None else size(memory.step)
    lines: dict[str, str] = {}
    lines["base weights"] = size(memory.base)
    lines["adapter"] = size(memory.adapter)
    lines["optimizer (AdamW)"] = size(memory.optimizer)
    lines["activations, grads"] = f"{step}  ({result.batch_size} x {result.length} tokens)"
    where = "on the accelerator"
    if memory.process:
        where = "whole process, on a CPU"
        lines["Python, libraries"] = size(memory.process)
        lines["heap fragmentation"] = "unknown" if memory.heap is None else size(memory.heap)
    lines["or, after training"] = f"{size(memory.end)}  (evaluation and verification)"
    lines["peak memory"] = "unknown" if memory.total is None else f"{size(memory.total)}  ({where})"
    for name, text in lines.items():
        console.print(f"{name:<20}{text}")


def _hits(result: Forecast) -> Table:
    """The modules that each entry of the targets matches."""
    table = _table("target", "modules", "trainable", "where")
    for hit in result.hits:
        places = "\n".join(folded(hit.paths))
        table.add_row(hit.entry, str(len(hit.paths)), f"{hit.parameters:,}", places)
    return table


def _rows(result: Forecast) -> Table:
    """Every adapted module, with its sizes."""
    table = _table("module", "in", "out", "trainable")
    for row in result.rows:
        in_features = str(row.in_features or "-")
        out_features = str(row.out_features or "-")
        table.add_row(row.path, in_features, out_features, f"{row.added:,}")
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_number = name in ("modules", "trainable", "in", "out", "length", "rows")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def folded(paths: tuple[str, ...]) -> list[str]:
    """Join paths that differ only in their first index: model.layers.{0-29}.self_attn.q_proj."""
    groups: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        match = re.match(r"(.*?\.)(\d+)(\..*)", path)
        if match is None:
            groups[path, ""] = []
        else:
            groups.setdefault((match[1], match[3]), []).append(int(match[2]))
    return [f"{before}{_range(numbers)}{after}" for (before, after), numbers in groups.items()]


def _range(numbers: list[int]) -> str:
    """Format several numbers as {0-29} or {0,2,5}, a single number as itself, and none as an empty string."""
    listed = ",".join(str(number) for number in numbers)
    if len(numbers) < 2:
        return listed
    first = numbers[0]
    last = numbers[-1]
    is_whole = numbers == list(range(first, last + 1))
    return f"{{{first}-{last}}}" if is_whole else f"{{{listed}}}"
