"""`veneer generate`: answer one prompt with a model, with and without adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AllowAbsent, Quantise

if TYPE_CHECKING:
    from veneer.inference.generation import Answer, Writer

EXAMPLES = """
The prompt is the argument, the content of --file, or standard input. It is
formatted as a user's question with the model's chat template, if there is
one; --raw passes it to the model unchanged.

Without --temperature, the model takes the most likely token each time, so
the same command gives the same answer.

Examples:

  # answer with an adapter
  veneer generate "What is a veneer?" --adapter my-adapter

  # also show the answer of the base model
  veneer generate "What is a veneer?" --adapter my-adapter --compare

  # several adapters, with the prompt in a file
  veneer generate --file prompt.txt --adapter one --adapter two --compare

  # continue a text with the base model, with random sampling
  veneer generate "Once upon a time" --model DIR --raw --temperature 0.8

  # read the prompt from a pipe, print JSON
  cat prompt.txt | veneer generate --adapter my-adapter --json
"""

Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]ADAPTER",
        help="An adapter: a directory or a hub id. Its name is that of the directory unless NAME= gives another. "
        "Repeatable.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id.",
        show_default="the model that the adapters name",
    ),
]
System = Annotated[str | None, typer.Option(help="System message at the start of the conversation.")]
TemplateFile = Annotated[
    Path | None,
    typer.Option(help="A file with a chat template in Jinja.", show_default="the tokenizer's chat template"),
]
Compare = Annotated[bool, typer.Option("--compare", help="Show the base model and every adapter side by side.")]
Temperature = Annotated[
    float,
    typer.Option(help="Sampling temperature. 0 takes the most likely token each time; higher values vary more."),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample only from the most likely tokens whose probabilities add up to this (above 0, at most 1). Needs "
        "--temperature."
    ),
]
TopK = Annotated[
    int,
    typer.Option(help="Sample only from this many of the most likely tokens; 0: from all. Needs --temperature."),
]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")]
Penalty = Annotated[
    float,
    typer.Option(help="Above 1, tokens that have already occurred become less likely; 1 changes nothing."),
]
Seed = Annotated[int, typer.Option(help="Seed for sampling.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the base model: auto, float32 or bfloat16. auto is bfloat16 on a GPU that supports it, else "
        "float32."
    ),
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt.", show_default="standard input")] = None,
    adapter: Adapter = None,
    model: Model = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    compare: Compare = False,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply a chat template.")] = False,
    chat_template: TemplateFile = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    allow_absent: AllowAbsent = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Answer one prompt with a model, an adapter, or several of them."""
    text = _prompt(prompt, file)
    from veneer.inference.generation import Sampling, Writer
    from veneer.model.loading import load
    from veneer.terminal import quiet, remark

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    quiet()
    loaded = load(adapter or [], model, dtype=dtype, quantise=quantise, allow_absent=allow_absent)
    remark(loaded.remarks)
    writer = Writer(loaded, sampling, template_file=chat_template, raw=raw)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    tokens = writer.tokens(messages)
    names = loaded.names if compare or not adapter else loaded.adapters
    prompts = {name: tokens for name in names}
    if as_json:
        _print_json(writer, text, prompts)
    else:
        _show(writer, prompts)


generate.__doc__ = (generate.__doc__ or "") + "\n" + EXAMPLES


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from the argument, a file or a pipe.

    Raises:
        ConfigError: there is no prompt, more than one, or an empty one.
    """
    from veneer.errors import ConfigError

    if prompt is not None and file is not None:
        raise ConfigError("there are two prompts, the argument and --file; give only one of them")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ConfigError('there is no prompt; give it as an argument ("..."), with --file, or through a pipe')
    if prompt is not None:
        text = prompt
    elif file is not None:
        text = file.read_text(encoding="utf-8").rstrip("\n")
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _show(writer: Writer, prompts: dict[str, list[int]]) -> None:
    import time

    from rich.console import Console

    from veneer.inference.streaming import note, show

    screen = Console(stderr=True, highlight=False)
    start = time.perf_counter()
    answers = show(writer, prompts, Console(highlight=False), headings=False)
    seconds = time.perf_counter() - start
    if not screen.is_terminal:
        return
    speed = sum(answer.tokens for answer in answers.values()) / seconds
    line = f"{speed:.1f} tokens/s"
    if len(answers) == 1:
        (only,) = answers.values()
        line = f"{note(only, writer.sampling.max_new_tokens)}, {line}"
    screen.print(line, style="dim")


def _print_json(writer: Writer, text: str, prompts: dict[str, list[int]]) -> None:
    answers: dict[str, Answer] = {}
    for names in writer.together(list(prompts)):
        written = writer.write(names, [prompts[name] for name in names])
        answers |= dict(zip(names, written, strict=True))
    content = {
        "prompt": text,
        "model": writer.loaded.base,
        "settings": vars(writer.sampling),
        "answers": [{"name": name, **vars(answers[name])} for name in prompts],
    }
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
