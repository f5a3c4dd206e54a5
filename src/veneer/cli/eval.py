"""`veneer eval`: how good is an adapter on a file, and how much better than its base?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .generate import Adapter, Dtype, MaxNewTokens, Model, Penalty, TemplateFile

if TYPE_CHECKING:
    from veneer.inference.evaluation import Evaluation

EXAMPLES = """
Reads what `veneer train` reads: conversations, prompt and completion,
question and answer, text, text and label. Loss, perplexity and token
accuracy are of the tokens that training would learn. --exact and
--extract let each model write answers, the likeliest token each time, and
count the right ones. Adapters that classify get accuracy and macro F1.

Examples:

  veneer eval --adapter my-adapter --data test.jsonl

  veneer eval --adapter one --adapter two --data test.jsonl --limit 200

  veneer eval --adapter my-adapter --data gsm8k/test.jsonl --extract "####"     the number after ####

  veneer eval --adapter my-adapter --data test.jsonl --extract "answer: (.*)"   what the group matches

  veneer eval --model smollm2-135m-instruct --data test.jsonl --exact --json    a model without adapters
"""
HEADINGS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "extracted_match": "extracted match",
    "unfinished": "unfinished",
}
PLAIN = ("loss", "perplexity", "macro_f1")
"""Measures that are no shares of the rows or tokens."""
LESS_IS_BETTER = ("loss", "perplexity", "unfinished")
Data = Annotated[list[str], typer.Option(help="A file, a directory, or a hub id; repeatable.")]
Column = Annotated[list[str] | None, typer.Option(help="OURS=THEIRS: a column's other name; repeatable.")]
Extracted = Annotated[str | None, typer.Option(help="Write answers, and compare what this regex finds in them.")]


def eval(
    data: Data,
    adapter: Adapter = None,
    model: Model = None,
    exact: Annotated[bool, typer.Option("--exact", help="Write answers, and compare them as a whole.")] = False,
    extract: Extracted = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row in tokens, for the loss.")] = 1024,
    max_new_tokens: MaxNewTokens = 256,
    repetition_penalty: Penalty = 1.0,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Split of a directory or a hub id.")] = "test",
    task: Annotated[str, typer.Option(help="auto, text, or classification.")] = "auto",
    labels: Annotated[str | None, typer.Option(help="Classes in the order of training, with commas between.")] = None,
    loss_on: Annotated[str, typer.Option(help="assistant, or all tokens.")] = "assistant",
    chat_template: TemplateFile = None,
    save: Annotated[Path | None, typer.Option(help="Write every answer to this file, as JSONL.")] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge adapters on a file, side by side with their base model."""
    from veneer.inference.evaluation import evaluate, read, task_of
    from veneer.inference.generation import Sampling
    from veneer.model.loading import load
    from veneer.terminal import quiet, showing

    sampling = Sampling(max_new_tokens, repetition_penalty=repetition_penalty)
    sources = _sources(data, column or [], split)
    quiet()
    names = None if labels is None else [name.strip() for name in labels.split(",")]
    loaded = load(adapter or [], model, task=task_of(sources, task), labels=names, dtype=dtype)
    rows = read(loaded, sources, task=task, limit=limit)
    with showing() as progress:
        found = evaluate(
            loaded,
            rows,
            exact=exact,
            extract=extract,
            sampling=sampling,
            batch_size=batch_size,
            max_length=max_length,
            loss_on=loss_on,
            template_file=chat_template,
            progress=progress,
        )
    if save is not None:
        _save(save, found)
    content = {"model": loaded.base, "data": data, **found.as_dict()}
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False)) if as_json else _show(found)


eval.__doc__ = (eval.__doc__ or "") + "\n" + EXAMPLES


def _sources(data: list[str], columns: list[str], split: str) -> list[Any]:
    from veneer.cli._options import pairs
    from veneer.data.sources import Source

    return [Source(path=path, weight=1.0, columns=dict(pairs(columns)), split=split) for path in data]


def _save(path: Path, found: Evaluation) -> None:
    from veneer.files.write import write_atomically

    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.records).encode())


def _show(found: Evaluation) -> None:
    """A table on a terminal, a line for each model anywhere else."""
    from rich.console import Console

    console = Console(highlight=False)
    measures = [name for name in HEADINGS if any(name in own for own in found.results.values())]
    if not any(own.get("unfinished") for own in found.results.values()):
        measures = [name for name in measures if name != "unfinished"]
    if console.is_terminal:
        _table(console, found, measures)
    else:
        width = max(map(len, found.results))
        for name, own in found.results.items():
            cells = [f"{HEADINGS[measure]} {_number(measure, own[measure])}" for measure in measures if measure in own]
            typer.echo("  ".join([f"{name:<{width}}", *cells]))
    account = found.account
    judged = f", {account.supervised_tokens:,} tokens judged" if account.supervised_tokens != found.rows else ""
    console.print(f"{found.rows:,} rows{judged}", style="dim")
    for line in _lost(found):
        console.print(line, style="yellow", markup=False)


def _table(console: Any, found: Evaluation, measures: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for measure in measures:
        table.add_column(HEADINGS[measure], justify="right")
    first = next(iter(found.results.values()))
    for name, own in found.results.items():
        cells = [Text("-") if m not in own else _number_and_change(m, own[m], first.get(m, own[m])) for m in measures]
        table.add_row(Text(name, style="bold cyan"), *cells)
    console.print(table)


def _number_and_change(measure: str, value: float, before: float) -> Any:
    from rich.text import Text

    text, change = Text(_number(measure, value)), value - before
    if change:
        style = "green" if (change < 0) == (measure in LESS_IS_BETTER) else "red"
        text.append("  " + _number(measure, change, "+"), style)
    return text


def _number(measure: str, value: float, sign: str = "") -> str:
    if measure == "perplexity":
        return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.2f}"
    return f"{value:{sign}.4f}" if measure in PLAIN else f"{value:{sign}.1%}"


def _lost(found: Evaluation) -> list[str]:
    account = found.account
    where = f" (the first: {account.examples[0]})" if account.examples else ""
    cut = f"{account.cut_rows} rows were cut to --max-length, {account.cut_tokens:,} tokens lost{where}"
    return ([cut] if account.cut_rows else []) + (
        [f"{account.unlearned_rows} rows have no token to judge{where}"] if account.unlearned_rows else []
    )
