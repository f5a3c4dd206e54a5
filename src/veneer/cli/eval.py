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
"""Measures that are not shares of the rows or tokens."""
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
        evaluation = evaluate(
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
        _save(save, evaluation)
    if as_json:
        content = {"model": loaded.base, "data": data, **evaluation.as_dict()}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _show(evaluation)


eval.__doc__ = (eval.__doc__ or "") + "\n" + EXAMPLES


def _sources(data: list[str], columns: list[str], split: str) -> list[Any]:
    from veneer.cli._options import pairs
    from veneer.data.sources import Source

    names = dict(pairs(columns))
    return [Source(path=path, weight=1.0, columns=names, split=split) for path in data]


def _save(path: Path, evaluation: Evaluation) -> None:
    from veneer.files.write import write_atomically

    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in evaluation.records]
    write_atomically(path, "".join(lines).encode())


def _show(evaluation: Evaluation) -> None:
    """Print a table on a terminal, a line for each model anywhere else."""
    from rich.console import Console

    console = Console(highlight=False)
    measures = _measures(evaluation)
    if console.is_terminal:
        _print_table(console, evaluation, measures)
    else:
        _print_lines(evaluation, measures)
    account = evaluation.account
    summary = f"{evaluation.rows:,} rows"
    if account.supervised_tokens != evaluation.rows:
        summary += f", {account.supervised_tokens:,} tokens judged"
    console.print(summary, style="dim")
    for line in _lost_rows(evaluation):
        console.print(line, style="yellow", markup=False)


def _measures(evaluation: Evaluation) -> list[str]:
    """The measures that some model has; unfinished answers only if there are any."""
    measures = []
    for measure in HEADINGS:
        values = [result[measure] for result in evaluation.results.values() if measure in result]
        if values and (measure != "unfinished" or any(values)):
            measures.append(measure)
    return measures


def _print_lines(evaluation: Evaluation, measures: list[str]) -> None:
    width = max(len(name) for name in evaluation.results)
    for name, result in evaluation.results.items():
        cells = [f"{name:<{width}}"]
        for measure in measures:
            if measure in result:
                cells.append(f"{HEADINGS[measure]} {_number(measure, result[measure])}")
        typer.echo("  ".join(cells))


def _print_table(console: Any, evaluation: Evaluation, measures: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for measure in measures:
        table.add_column(HEADINGS[measure], justify="right")
    first_result = next(iter(evaluation.results.values()))
    for name, result in evaluation.results.items():
        cells = [Text(name, style="bold cyan")]
        for measure in measures:
            if measure in result:
                value = result[measure]
                cells.append(_number_and_change(measure, value, first_result.get(measure, value)))
            else:
                cells.append(Text("-"))
        table.add_row(*cells)
    console.print(table)


def _number_and_change(measure: str, value: float, before: float) -> Any:
    """A value and how far it is from the first model's, green if it is better."""
    from rich.text import Text

    text = Text(_number(measure, value))
    change = value - before
    if change:
        is_better = (change < 0) == (measure in LESS_IS_BETTER)
        text.append("  " + _number(measure, change, "+"), "green" if is_better else "red")
    return text


def _number(measure: str, value: float, sign: str = "") -> str:
    if measure == "perplexity" and abs(value) >= 100:
        return f"{value:{sign},.0f}"
    if measure == "perplexity":
        return f"{value:{sign}.2f}"
    if measure in PLAIN:
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.1%}"


def _lost_rows(evaluation: Evaluation) -> list[str]:
    """A line for each way in which rows were cut or could not be judged."""
    account = evaluation.account
    first = f" (the first: {account.examples[0]})" if account.examples else ""
    lines = []
    if account.cut_rows:
        lines.append(f"{account.cut_rows} rows were cut to --max-length, {account.cut_tokens:,} tokens lost{first}")
    if account.unlearned_rows:
        lines.append(f"{account.unlearned_rows} rows have no token to judge{first}")
    return lines
