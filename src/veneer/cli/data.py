"""`veneer data`: show the rows of a data file as the model will see them, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.errors import ConfigError

from ._options import Column, Objective, Set, add_settings, pairs, partial_recipe, source

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from veneer.data.look import Look
    from veneer.train.recipe import Recipe

EXAMPLES = """
Reads the data as `veneer train` does, with the model's tokenizer and chat
template, and shows the first rows token by token: what is given, what is
learned, and what the length limit cuts off. Then shows lengths, duplicates
(also between training and evaluation data), and odd rows with their numbers:
nothing learned, mostly cut, empty texts, unusual characters, roles out of
order, one question with several answers.

Exits with status 1 if training would refuse the data.

Examples:

  # the first three rows, and a summary of all
  veneer data rows.jsonl --model smollm2-135m-instruct

  # rows 17 and 40, as a page for the browser
  veneer data rows.jsonl --model DIR --row 17 --row 40 --html data.html

  # the data of a recipe
  veneer data recipe.yaml

  # evaluation rows that are also in the training data
  veneer data rows.jsonl --eval-data held-out.jsonl --model DIR
"""
RECIPES = (".yaml", ".yml")
STYLES = {
    "learned": ("black on green", "black on bright_green"),
    "given": ("", "dim"),
    "cut": ("red strike", "bright_red strike"),
    "left out": ("italic", "italic"),
}
"""Two styles of each kind of token, which alternate, so that the tokens can be told apart."""


def data(
    files: Annotated[list[str], typer.Argument(help="Data as in `veneer train --data`, or a recipe in YAML.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a directory, a name that `veneer pull` knows, or a hub id. Only its tokenizer and "
            "config are read.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Data to evaluate on during training. Repeatable.")
    ] = None,
    eval_split: Annotated[
        float | None, typer.Option(help="Hold out rows as `veneer train --eval-split` does.", show_default="none")
    ] = None,
    objective: Objective = None,
    column: Column = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Maximum length of a sequence in tokens; longer rows are cut.", show_default="1024"),
    ] = None,
    set_: Set = None,
    shown: Annotated[int, typer.Option("--rows", min=0, help="Number of rows to show, from the beginning.")] = 3,
    row: Annotated[
        list[int] | None, typer.Option(min=1, help="Show the row of this number (line of the file). Repeatable.")
    ] = None,
    most: Annotated[
        int, typer.Option("--limit", min=1, help="Rows to read, of training and of evaluation data.")
    ] = 100_000,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show data as the model will see it: tokens, lengths, duplicates and odd rows."""
    from veneer.data.look import look
    from veneer.files.write import write_atomically
    from veneer.terminal import quiet
    from veneer.train.setup import facts_of, load_tokenizer, within_positions

    quiet()
    flags = {"model": model, "objective": objective, "eval_split": eval_split, "max_length": max_length}
    content = _content(files) | {name: value for name, value in flags.items() if value is not None}
    if eval_data:
        content["eval_data"] = [source(text) for text in eval_data]
    add_settings(content, set_, None)
    recipe = partial_recipe(content)
    recipe = recipe.changed(**_with_columns(recipe, dict(pairs(column or []))))
    if "model" not in content:
        raise ConfigError("give --model: its tokenizer splits the rows into tokens")
    recipe = within_positions(recipe)
    tokenizer = load_tokenizer(recipe)
    with _counting() as step:
        seen = look(recipe, tokenizer, facts_of(recipe), shown=shown, numbers=row or (), most=most, step=step)
    _check_found(row or [], seen)
    if page:
        from veneer.report.data_page import render_data

        write_atomically(page, render_data(seen.as_dict(), recipe).encode())
    if as_json:
        typer.echo(json.dumps(seen.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show(seen)
        if page:
            typer.echo(f"\npage: {page}")
    parts = [seen.train] if seen.evaluation is None else [seen.train, seen.evaluation]
    raise typer.Exit(1 if any(part.refused for part in parts) else 0)


data.__doc__ = (data.__doc__ or "") + "\n" + EXAMPLES


def _content(files: list[str]) -> dict[str, Any]:
    """The keys of a recipe file, or the files as its data."""
    recipes = [name for name in files if name.lower().endswith(RECIPES)]
    if not recipes:
        return {"data": [source(text) for text in files]}
    if len(files) > 1:
        raise ConfigError(f"give one recipe, or data files; got {', '.join(files)}")
    from veneer.files.recipe import read

    return read(files[0])


def _with_columns(recipe: Recipe, columns: dict[str, str]) -> dict[str, Any]:
    """The recipe's sources, with the columns that are given by option."""
    changed = {}
    for key in ("data", "eval_data"):
        sources = []
        for one in getattr(recipe, key):
            sources.append(one.model_dump() | {"columns": {**one.columns, **columns}})
        changed[key] = sources
    return changed


def _counting() -> Any:
    """A context manager that shows on a terminal how many rows are read."""
    from contextlib import contextmanager

    from rich.console import Console

    @contextmanager
    def counting() -> Iterator[Any]:
        with Console(stderr=True).status("reading the data") as status:

            def step(count: int) -> None:
                if count % 500 == 0:
                    status.update(f"reading the data: {count:,} rows")

            yield step

    return counting()


def _check_found(numbers: Sequence[int], seen: Look) -> None:
    found = [int(row["place"].rpartition(":")[2]) for row in seen.rows]
    missing = [str(number) for number in numbers if number not in found]
    if missing:
        last = seen.train.account.rows
        raise ConfigError(f"there is no row {', '.join(missing)} to show; {last:,} rows were read")


# Output


def _show(seen: Look) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for facts in seen.rows:
        _show_row(console, facts)
    _show_table(console, seen)
    _show_remarks(console, seen)


def _show_row(console: Console, facts: dict[str, Any]) -> None:
    """A row token by token. Each run of one kind begins on a new line, after a word that says its kind."""
    from rich.table import Table
    from rich.text import Text

    place = facts["place"]
    if facts["answer"]:
        place += f", {facts['answer']}"
    title = f"{place}  {facts['tokens']:,} tokens, {facts['learned']:,} of them learned"
    if facts["cut"]:
        title += f", {facts['cut']:,} cut off"
    if facts["dropped"]:
        title += "; the row is dropped"
    console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=7)
    grid.add_column(overflow="fold")
    if facts["label"] is not None:
        grid.add_row("class", Text(facts["label"], style=STYLES["learned"][0]))
    for kind, pieces in groupby(facts["pieces"], key=lambda piece: piece[1]):
        grid.add_row("…" if kind == "left out" else kind, _run(kind, [text for text, _ in pieces]))
    console.print(grid)
    console.print()


def _run(kind: str, texts: Sequence[str]) -> Text:
    """The tokens of a run, in alternating styles."""
    from rich.text import Text

    from veneer.terminal import visible

    run = Text()
    for i, text in enumerate(texts):
        run.append(visible(text), style=STYLES[kind][i % 2])
    if run.plain.endswith("\n"):
        run.right_crop(1)
    return run


def _show_table(console: Console, seen: Look) -> None:
    """Counts and lengths, a column for each part of the data."""
    from rich.table import Table

    from veneer.data.look import part_facts
    from veneer.data.summary import table_rows

    columns = {"training": part_facts(seen.train)}
    if seen.evaluation is not None:
        columns["evaluation"] = part_facts(seen.evaluation)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, cells in table_rows(list(columns.values()), seen.max_length):
        table.add_row(name, *cells)
    if seen.held_out:
        table.add_row("held out", f"{seen.held_out:,}")
    console.print(table)


def _show_remarks(console: Console, seen: Look) -> None:
    from rich.text import Text

    from veneer.data.summary import remarks

    for style, line in remarks(seen.as_dict()):
        console.print(Text(line, style=style))
