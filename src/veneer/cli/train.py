"""`veneer train`: train an adapter from a data file."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.errors import ConfigError

from ._options import Column, Objective, Option, Rank, Set, StartFrom, Targets, add_settings, pairs, source

EXAMPLES = """
Data can be JSONL, JSON, CSV, TSV or Parquet files, directories of them, or
hub datasets. The columns decide what is learned:

  messages                        the assistant's answers in a conversation
  prompt, completion              the completion
  instruction, input, output      the output; input is optional
  question, answer                the answer
  text, label                     the class
  text                            the whole text
  prompt, chosen, rejected        that the chosen answer is better than the
                                  rejected one, with --objective dpo, orpo
                                  or simpo

A recipe is a YAML file. Its keys are the names of the flags below, with
underscores, and some more that --set can also give, such as warmup,
schedule_options and loss_on. Every run saves its full recipe in --output.

Examples:

  # train a LoRA with the default settings
  veneer train --model smollm2-135m-instruct --data rows.jsonl --output out

  # take everything from a recipe
  veneer train recipe.yaml

  # flags override the recipe
  veneer train recipe.yaml --rank 32 --epochs 2

  # learn from pairs of a chosen and a rejected answer
  veneer train --model smollm2-135m-instruct --data pairs.jsonl --output out
      --objective dpo --set beta=0.2

  # QLoRA: the base model in 4 bits
  veneer train --model DIR --quantise nf4 --targets all-linear --data rows.jsonl --output out

  # train an adapter on with other data
  veneer train --start-from out --data more.jsonl --output second

  # continue after a crash
  veneer train --output out --resume

  # repeat a run in another directory
  veneer train out/recipe.yaml --output again

  # two processes; a step has batch_size x accumulate sequences on each
  torchrun --nproc-per-node 2 -m veneer train recipe.yaml

  # the model sharded over several processes
  accelerate launch --use_fsdp --fsdp_version 2 -m veneer train recipe.yaml

A run can be resumed with another number of processes if batch_size x
accumulate x processes stays the same.
"""


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe in YAML; flags override its keys.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id.",
            rich_help_panel="Model and method",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[*WEIGHT]",
            help="Training data: a file, a directory, or a hub id. WEIGHT is how often each row is seen in an epoch; "
            "PATH*0.5 takes a random half. Repeatable.",
            rich_help_panel="Data",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Directory for the adapter, the report and the checkpoints.", rich_help_panel="Run"
        ),
    ] = None,
    start_from: StartFrom = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="The method; `veneer methods` lists all.", show_default="lora", rich_help_panel="Model and method"
        ),
    ] = None,
    rank: Rank = None,
    targets: Targets = None,
    option: Option = None,
    objective: Objective = None,
    column: Column = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Which split of a directory or a hub dataset to train on.",
            show_default="train",
            rich_help_panel="Data",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Data to evaluate on during training. Repeatable.",
            show_default="none",
            rich_help_panel="Data",
        ),
    ] = None,
    eval_split: Annotated[
        float | None,
        typer.Option(
            help="Hold out rows of the training data for evaluation, instead of --eval-data: a share below 1, or a "
            "number of rows.",
            show_default="none",
            rich_help_panel="Data",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Maximum length of a sequence in tokens; longer rows are cut.",
            show_default="1024",
            rich_help_panel="Data",
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(
            help="Put several rows into one sequence; they do not attend to each other.",
            show_default="off",
            rich_help_panel="Switches",
        ),
    ] = None,
    streaming: Annotated[
        bool | None,
        typer.Option(
            help="Read the data while training, for data larger than memory. Needs --max-steps.",
            show_default="off",
            rich_help_panel="Switches",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", show_default="1", rich_help_panel="Training")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Number of optimizer steps; overrides --epochs.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per forward pass, on each process.", show_default="8", rich_help_panel="Training"),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Forward passes per optimizer step.", show_default="1", rich_help_panel="Training"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="set by the method", rich_help_panel="Training"),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="How the learning rate changes: linear, cosine, constant, warmup_stable_decay ...",
            show_default="cosine",
            rich_help_panel="Training",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="lora_fa, riemannian, or an optimizer of torch, transformers or bitsandbytes.",
            show_default="adamw_torch",
            rich_help_panel="Training",
        ),
    ] = None,
    lora_plus_ratio: Annotated[
        float | None,
        typer.Option(
            help="LoRA+: the matrices B learn at this multiple of the learning rate; 16 is usual.",
            show_default="off",
            rich_help_panel="Training",
        ),
    ] = None,
    neftune_alpha: Annotated[
        float | None,
        typer.Option(
            help="NEFTune: add noise to the embeddings in training; 5 is usual.",
            show_default="off",
            rich_help_panel="Training",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            help="Recompute activations in the backward pass: less memory, more time.",
            show_default="off",
            rich_help_panel="Switches",
        ),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many evaluations in a row without a lower loss. Needs --eval-data or --eval-split.",
            show_default="off",
            rich_help_panel="Training",
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Optimizer steps between evaluations.", show_default="one epoch", rich_help_panel="Training"),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps between checkpoints.",
            show_default="at each evaluation; without evaluation 100, or one epoch if that is shorter",
            rich_help_panel="Training",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the base model: auto, float32 or bfloat16. auto is bfloat16 on a GPU that supports it, else "
            "float32.",
            show_default="auto",
            rich_help_panel="Model and method",
        ),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="Quantise the base model while it is loaded: nf4 (QLoRA) or int8 with bitsandbytes, int4 with HQQ; or "
            "none.",
            show_default="none; with --start-from, as for that adapter",
            rich_help_panel="Model and method",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed for everything that is random.", show_default="0", rich_help_panel="Training"),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also log to wandb, trackio, mlflow or swanlab. Repeatable.",
            show_default="TensorBoard only",
            rich_help_panel="Run",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="After training, upload the adapter, its card and its report to the Hugging Face hub; private unless "
            "--set hub_private=false.",
            show_default="off",
            rich_help_panel="Run",
        ),
    ] = None,
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.", rich_help_panel="Run")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the results of an earlier run in --output.", rich_help_panel="Run"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="At the end, print report.json.", rich_help_panel="Run")
    ] = False,
) -> None:
    """Train an adapter from flags, a recipe file, or both."""
    flags = {name: value for name, value in locals().items() if name not in NOT_KEYS and value is not None}
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give only one of them")
    for name in ("data", "eval_data"):
        if name in flags:
            flags[name] = [source(text) for text in flags[name]]
    content = _content(recipe, flags, resume)
    content |= flags
    add_settings(content, set_, option)
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
    """Read the recipe's keys from its file or from that of the run to resume; empty if there is neither."""
    from veneer.files.recipe import RECIPE_NAME, read

    saved = Path(flags.get("output", "")) / RECIPE_NAME
    if path:
        content = read(path)
    elif resume and flags.get("output") and saved.is_file():
        content = read(saved)
    else:
        content = {}
    if not resume and saved.is_file() and not {"model", "data", "start_from"} & {*content, *flags}:
        output = shlex.quote(str(flags["output"]))
        raise ConfigError(
            f"neither a model nor data is given; --output {output} holds a run, which `veneer train --output {output} "
            "--resume` continues"
        )
    if resume and not content and "data" not in flags:
        raise ConfigError(
            f"there is no run to resume: {str(saved)!r} does not exist; give the --output of a run that was started"
        )
    return content


def _add_columns(content: dict[str, Any], columns: dict[str, str], split: str | None) -> None:
    """Add column names to every data source, and the split to the sources of training data."""
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
    """The value as a list: a single source becomes a list of one, an empty value an empty list."""
    if not value:
        return []
    return value if isinstance(value, list) else [value]


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
    typer.echo(f"next       {_next_command(output, report)}")


def _next_command(output: str, report: dict[str, Any]) -> str:
    """A command that uses the adapter of a run."""
    adapter = f"--adapter {shlex.quote(output)}"
    template = report["recipe"]["chat_template"]
    if report["labels"] is not None:
        return f"veneer eval {adapter} --data FILE"
    if not report["chat_template"]:
        return f'veneer generate "..." {adapter}'
    if template is not None:
        adapter += f" --chat-template {shlex.quote(template)}"
    return f"veneer chat {adapter}"
