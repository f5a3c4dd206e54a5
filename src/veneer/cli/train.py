"""`veneer train`: from a data file to an adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ._options import Column, pairs, source

EXAMPLES = """
Examples:

  veneer train --model smollm2-135m-instruct --data rows.jsonl --output my-adapter

  veneer train recipe.yaml                            everything from a file

  veneer train recipe.yaml --rank 32 --epochs 2       flags override it

  veneer train --output my-adapter --resume           go on after a crash, or a kill

  veneer train my-adapter/recipe.yaml --output again  the same run once more

  torchrun --nproc-per-node 2 -m veneer train recipe.yaml                several processes: a step is batch_size x
accumulate on each of them; --resume goes on with another number where that product over all stays the same

  accelerate launch --use_fsdp --fsdp_version 2 -m veneer train recipe.yaml      the model sharded over them

The data is JSONL, JSON, CSV, Parquet, a directory or a hub id, with the columns messages; prompt and completion;
instruction, input and output; question and answer; text and label; or text. A recipe holds the same keys as the flags
(in YAML, with _ for -), and `set` gives those that have no flag.
"""


Data = Annotated[list[str] | None, typer.Option(help="What to train on; PATH or PATH*WEIGHT, may be repeated.")]
EvalSplit = Annotated[float | None, typer.Option(help="Or rows to take from the data: a share, or a number.")]


def train(
    recipe: Annotated[str | None, typer.Argument(help="A YAML recipe; flags override its keys.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a directory, a known name, or a hub id.")] = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option(help="Directory of the result.")] = None,
    method: Annotated[str | None, typer.Option(help="`veneer methods` lists all. [lora]")] = None,
    rank: Annotated[int | None, typer.Option(help="The method's rank.")] = None,
    targets: Annotated[str | None, typer.Option(help='"all-linear", or names with commas between.')] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the method's config; repeatable.")] = None,
    column: Column = None,
    split: Annotated[str | None, typer.Option(help="Split of a directory or a hub id. [train]")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="What to evaluate on; repeatable.")] = None,
    eval_split: EvalSplit = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens. [1024]")] = None,
    packing: Annotated[bool | None, typer.Option(help="Several rows in one sequence.")] = None,
    streaming: Annotated[bool | None, typer.Option(help="Read the data as it is used.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of one forward pass. [8]")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes of one step. [1]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate. [the method's own]")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="Evaluations without gain before it stops.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations. [an epoch]")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn at random. [0]")] = None,
    wandb: Annotated[bool | None, typer.Option(help="Also log to Weights & Biases.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of any other key; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away an earlier run's result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json when done.")] = False,
) -> None:
    """Train an adapter from a recipe, from flags, or both."""
    flags = {name: value for name, value in locals().items() if name not in NOT_KEYS and value is not None}
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    for name in ("data", "eval_data"):
        if name in flags:
            flags[name] = [source(text) for text in flags[name]]
    content = _content(recipe, flags, resume)
    content |= flags
    for key, text in pairs(set_ or []):
        content[key] = _value(text)
    _add_options(content, option or [])
    _add_columns(content, dict(pairs(column or [])), split)

    from veneer.train.recipe import make

    checked = make(content)

    from veneer.train.run import train as run  # imports torch; a wrong recipe is refused before that

    report = run(checked, resume=resume, overwrite=overwrite)
    if not _is_main_process():
        return
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _summary(checked.output, report)


train.__doc__ = (train.__doc__ or "") + "\n" + EXAMPLES
NOT_KEYS = ("recipe", "option", "column", "split", "set_", "resume", "overwrite", "as_json")
"""Parameters of `train` that are not keys of a recipe."""


def _content(path: str | None, flags: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The recipe's keys from its file, or from the file of the run to resume; empty if there is neither."""
    from veneer.errors import ConfigError
    from veneer.files.recipe import RECIPE_NAME, read

    saved = Path(flags.get("output", "")) / RECIPE_NAME
    if path:
        content = read(path)
    elif resume and flags.get("output") and saved.is_file():
        content = read(saved)
    else:
        content = {}
    if resume and not content and "data" not in flags:
        raise ConfigError(f"there is no run to resume: {str(saved)!r} is not there; give --output of one that began")
    return content


def _add_options(content: dict[str, Any], texts: list[str]) -> None:
    """Add NAME=VALUE fields of the method's config to the recipe's options."""
    if not texts:
        return
    options = dict(content.get("options") or {})
    for name, text in pairs(texts):
        options[name] = _value(text)
    content["options"] = options


def _add_columns(content: dict[str, Any], columns: dict[str, str], split: str | None) -> None:
    """Add column names to every source of data, and the split to those of training data."""
    if not columns and not split:
        return
    for key in ("data", "eval_data"):
        sources = []
        for item in _listed(content.get(key)):
            keys: dict[str, Any] = {"path": item} if isinstance(item, str) else dict(item)
            keys["columns"] = {**keys.get("columns", {}), **columns}
            if split and key == "data":
                keys["split"] = split
            sources.append(keys)
        content[key] = sources


def _listed(value: Any) -> list[Any]:
    """A list as it is, one source as a list of one, nothing as an empty list."""
    if not value:
        return []
    return value if isinstance(value, list) else [value]


def _value(text: str) -> Any:
    """The value that YAML reads from a text, such as a number, true, null or a [list]; else the text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _summary(output: str, report: dict[str, Any]) -> None:
    """Print the main facts of a run."""
    evaluation = report["eval"]
    steps = report["steps"]
    plural = "" if steps == 1 else "s"
    typer.echo(f"adapter    {output}  ({report['trainable_parameters']:,} parameters, {steps:,} step{plural})")
    if evaluation:
        before = f"{evaluation['before']['loss']:.4f} -> " if evaluation["before"] else ""
        loss = f"{before}{evaluation['loss']:.4f}"
        typer.echo(f"evaluation loss {loss}, accuracy {evaluation['accuracy']:.1%}, of step {evaluation['step']}")
    speed = f"{report['tokens_per_second'] or 0:,.0f} tokens/s"
    memory = f"{report['peak_rss_bytes'] / 1e9:.1f} GB"
    typer.echo(f"speed      {speed}, {report['train_seconds']:.0f} s of training, {memory}")
    passed = [check["name"] for check in report["verification"] if check["passed"]]
    typer.echo(f"verified   {', '.join(passed)}")
    typer.echo(f"report     {output}/report.html")
