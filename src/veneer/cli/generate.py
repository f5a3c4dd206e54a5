"""`veneer generate`: what a model writes, with and without adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.inference.generation import Answer, Writer

EXAMPLES = """
The prompt is the argument, or what stands in a file, or what is piped in.
It is put as a question of a user into the model's chat template, where
there is one; --raw leaves it as it stands. Without --temperature the
likeliest token is taken each time, so that the same command gives the
same answer.

Examples:

  veneer generate "What is a veneer?" --adapter my-adapter

  veneer generate "What is a veneer?" --adapter my-adapter --compare    the base model's answer beside it

  veneer generate --file prompt.txt --adapter one --adapter two --compare

  veneer generate "Once upon a time" --model smollm2-135m-instruct --raw --temperature 0.8 --seed 1

  cat prompt.txt | veneer generate --adapter my-adapter --json
"""

Adapter = Annotated[list[str] | None, typer.Option(help="An adapter's directory or hub id, or NAME=PLACE; repeatable.")]
Model = Annotated[str | None, typer.Option(help="The base model; else the one that the adapters name.")]
System = Annotated[str | None, typer.Option(help="Instructions before the conversation.")]
TemplateFile = Annotated[Path | None, typer.Option(help="A chat template in place of the tokenizer's.")]
Compare = Annotated[bool, typer.Option("--compare", help="The base model and each adapter side by side.")]
Temperature = Annotated[float, typer.Option(help="Above 0: draw tokens at random, the wilder the higher.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens of this share.")]
TopK = Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0: all.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
Penalty = Annotated[float, typer.Option(help="Above 1: less of what has occurred already.")]
Seed = Annotated[int, typer.Option(help="Of the draw.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    adapter: Adapter = None,
    model: Model = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    compare: Compare = False,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template.")] = False,
    chat_template: TemplateFile = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an answer to a prompt with a model, an adapter, or several side by side."""
    text = _prompt(prompt, file)
    from veneer.inference.generation import Sampling, Writer
    from veneer.model.loading import load
    from veneer.terminal import quiet

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    quiet()
    loaded = load(adapter or [], model, dtype=dtype)
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
        ConfigError: there is none, or more than one, or it is empty.
    """
    from veneer.errors import ConfigError

    if prompt is not None and file is not None:
        raise ConfigError("there are two prompts, an argument and a file; give one of them")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ConfigError('there is no prompt; give one ("..."), a file (--file), or pipe it in')
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
