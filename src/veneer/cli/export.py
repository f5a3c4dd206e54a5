"""`veneer export`: write an adapter, or the merged model, for llama.cpp and Ollama, or an adapter for a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import Base

if TYPE_CHECKING:
    from veneer.merging.exported import Export

EXAMPLES = """
An adapter becomes a LoRA in GGUF, which llama.cpp loads beside its base
model. An adapter of another method becomes the nearest LoRA, and the command
says what it lacks. With --merged, the adapter is folded into its base and
the whole model is written, one tensor at a time and rounded once.

Architectures: Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text), Phi-3,
SmolLM2, SmolLM3, GPT-2. Nothing is overwritten, and an error leaves no file.

With --to vllm or --to sglang, the adapter becomes a LoRA that the server
loads: of any method that updates weights, with one scaling, within its
ranks, with experts one by one. `veneer doctor --for vllm` says whether
that is necessary.

Types of a model: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0. K-quants are
made by llama.cpp from the f16 file: llama-quantize f16.gguf q4.gguf Q4_K_M

Examples:

  # the adapter alone: llama-cli -m base.gguf --lora my-adapter.gguf
  veneer export my-adapter --to gguf --out my-adapter.gguf

  # its base, or any model without an adapter
  veneer export DIR --to gguf --out base.gguf

  # a LoRA that vLLM loads: vllm serve ... --lora-modules mine=served
  veneer export my-adapter --to vllm --out served

  # the whole model with 8 bits for each weight
  veneer export my-adapter --to gguf --out model.gguf --merged --dtype q8_0

  # for Ollama, with a Modelfile: ollama create mine -f Modelfile
  veneer export my-adapter --to gguf --out model.gguf --merged --ollama
"""


def export(
    source: Annotated[
        str, typer.Argument(help="Directory or hub id of an adapter, or the directory of a model without one.")
    ],
    out: Annotated[
        str, typer.Option(metavar="PATH", help="The file to write, for a server the directory; it must not exist.")
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="What it is for: gguf, vllm or sglang.")] = "gguf",
    model: Base = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole model with the adapter merged into it.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="The type of the weights; see above.", show_default="f32, with --merged f16"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA that an adapter becomes.", show_default="exact; at most 64 without factors"
        ),
    ] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="With --merged: also write a Modelfile, in the same directory.")
    ] = False,
    check_base: Annotated[
        bool, typer.Option(help="Refuse a base model other than the one that the adapter was trained on.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write an adapter or a merged model as GGUF, for llama.cpp and Ollama, or an adapter for vLLM or SGLang."""
    from rich.console import Console
    from rich.progress import Progress

    from veneer.merging.export import export as run

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("exporting", total=None)
        report = run(
            source,
            out,
            model,
            to=to,
            merged=merged,
            dtype=dtype.lower() if dtype else None,
            rank=rank,
            ollama=ollama,
            check_base=check_base,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _show(report)


export.__doc__ = (export.__doc__ or "") + "\n" + EXAMPLES


def _show(report: Export) -> None:
    from veneer.terminal import size

    typer.echo(f"wrote     {report.out}: {report.tensors} tensors, {size(report.bytes)}, {report.dtype}")
    if report.kind == "adapter":
        typer.echo(f"adapter   LoRA of rank {report.rank} for {report.base} ({report.architecture})")
        typer.echo(f"loss      {_loss(report)}")
    elif report.rounding is not None:
        typer.echo(f"model     {report.base} ({report.architecture}) with the adapter merged in")
        typer.echo(
            f"rounding  {report.rounding:.2g} of the changed weights, {report.rounding_of_change:.2g} of the change"
        )
    else:
        typer.echo(f"model     {report.base} ({report.architecture})")
    if report.modelfile is not None:
        typer.echo(f"ollama    {report.modelfile}: ollama create NAME -f {report.modelfile}")
    for note in report.notes:
        typer.echo(f"note      {note}")


def _loss(report: Export) -> str:
    if not report.lost:
        return "none: the file holds the whole update"
    return f"{report.lost:.2%} of the update; a higher --rank keeps more, a merged model all of it"
