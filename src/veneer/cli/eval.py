"""`veneer eval`: evaluate adapters on data, next to their base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import AllowAbsent, Quantise
from .generate import Adapter, Dtype, MaxNewTokens, Model, Penalty, TemplateFile

if TYPE_CHECKING:
    from veneer.inference.evaluation import Evaluation

EXAMPLES = """
Reads the same data as `veneer train`. For models that write text it reports
the loss, perplexity and token accuracy over the tokens that training would
learn. With --exact or --extract, each model also writes an answer to every
prompt, taking the most likely token each time, and the correct answers are
counted. For classifiers it reports accuracy and macro F1.

Examples:

  # loss, next to that of the base model
  veneer eval --adapter my-adapter --data test.jsonl

  # two adapters, on the first 200 rows
  veneer eval --adapter one --adapter two --data test.jsonl --limit 200

  # compare the number after "####", as in GSM8K
  veneer eval --adapter my-adapter --data test.jsonl --extract "####"

  # compare what the group in parentheses matches
  veneer eval --adapter out --data test.jsonl --extract "answer: (.*)"

  # a model without adapters; whole answers must match
  veneer eval --model smollm2-135m-instruct --data test.jsonl --exact
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
"""Measures that are numbers, not shares of the rows or tokens."""
LESS_IS_BETTER = ("loss", "perplexity", "unfinished")
Data = Annotated[
    list[str],
    typer.Option(
        metavar="PATH",
        help="Data to evaluate on: a file (.jsonl, .json, .csv, .tsv, .parquet), a directory, or a hub id. Repeatable.",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OURS=THEIRS",
        help="Read one of veneer's columns from a column with another name, such as prompt=title. Repeatable.",
    ),
]
Extracted = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Write answers, and compare what follows the last match of this regular expression on its line; if it has "
        "a group, compare the group.",
    ),
]


def eval(
    data: Data,
    adapter: Adapter = None,
    model: Model = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Write answers, and compare them with the expected ones.")
    ] = False,
    extract: Extracted = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many rows, the first of each --data.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    max_length: Annotated[
        int, typer.Option(min=2, help="Maximum length of a row in tokens, for the loss; longer rows are cut.")
    ] = 1024,
    max_new_tokens: MaxNewTokens = 256,
    repetition_penalty: Penalty = 1.0,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Which split of a directory or a hub dataset to read.")] = "test",
    task: Annotated[
        str,
        typer.Option(help="auto, text or classification. auto is classification if the data has a label column."),
    ] = "auto",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Names of the classes in the order of training, separated by commas.",
            show_default="from the recipe.yaml next to the adapter",
        ),
    ] = None,
    loss_on: Annotated[
        str, typer.Option(help="Tokens that the loss is computed on: assistant (only the answers) or all.")
    ] = "assistant",
    chat_template: TemplateFile = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the rows with the models' answers to this file, as JSON lines.")
    ] = None,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    allow_absent: AllowAbsent = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate adapters on data, next to their base model."""
    from veneer.inference.evaluation import evaluate, read, task_of
    from veneer.inference.generation import Sampling
    from veneer.model.loading import load
    from veneer.terminal import quiet, remark, showing

    sampling = Sampling(max_new_tokens, repetition_penalty=repetition_penalty)
    sources = _sources(data, column or [], split)
    quiet()
    names = None if labels is None else [name.strip() for name in labels.split(",")]
    loaded = load(
        adapter or [],
        model,
        task=task_of(sources, task),
        labels=names,
        dtype=dtype,
        quantise=quantise,
        allow_absent=allow_absent,
    )
    remark(loaded.remarks)
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
    """Print a table on a terminal, and one line per model elsewhere."""
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
    """The measures that at least one model has; `unfinished` only if a model has unfinished answers."""
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
    """A value and its difference from the first model's: green if better, red if worse."""
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
    return lines + account.remarks()
