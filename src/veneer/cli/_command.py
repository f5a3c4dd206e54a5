"""How the command line reads its arguments: usage errors are one line, and options find what was meant."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.errors import ConfigError, nearest
from veneer.files.recipe import OTHER_KEYS

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The base class of the errors in arguments. typer carries its own copy of click, whose place differs by version."""
OTHER_NAMES = {
    "--out": "--output",
    "--output": "--out",
    "--output-dir": "--out",
    "--out-dir": "--out",
    "--lora-alpha": "--option lora_alpha=VALUE",
    "--lora-dropout": "--option lora_dropout=VALUE",
    "--bf16": "--dtype bfloat16",
    "--fp32": "--dtype float32",
    "--adapters": "--adapter",
    "--adapter-path": "--adapter",
    "--peft-model": "--adapter",
    "--max-tokens": "--max-new-tokens",
}
"""What options of other programs that are no keys of a recipe are called here."""


class Command(TyperCommand):
    """A verb. An error in its arguments is a ConfigError that names the nearest option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            raise ConfigError(f"{_in_words(self, error)} (`{ctx.command_path} --help` lists the options)") from None


class Group(TyperGroup):
    """The command `veneer`. An unknown verb is a ConfigError that names the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except UsageError:
            near = nearest(args[0], self.commands)
            raise ConfigError(f"there is no command {args[0]!r}{near} (`veneer --help` lists the commands)") from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            raise ConfigError(f"{_in_words(self, error)} (`veneer --help` lists the options)") from None


def _in_words(command: Any, error: Any) -> str:
    """The message for an error in a command's arguments."""
    typed = getattr(error, "option_name", None)
    has_no_value = type(error).__name__ == "BadOptionUsage"
    if typed is None or has_no_value:
        message = error.format_message().rstrip(".")
        return message[:1].lower() + message[1:]
    known: list[str] = []
    for parameter in command.params:
        known += [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
    return f"there is no option {typed}{_meant(typed, known)}"


def _meant(typed: str, known: list[str]) -> str:
    """What an unknown option probably means, for an error message."""
    typed = typed.lower().replace("_", "-")
    for here in (_as_setting(typed, known), OTHER_NAMES.get(typed, "")):
        if here.partition(" ")[0] in known:
            return f"; here it is {here}"
    words = {name.lstrip("-"): name for name in known}
    near = nearest(typed.lstrip("-"), words)
    return near.replace("nearest: ", "nearest: --").replace(", ", ", --")


def _as_setting(typed: str, known: list[str]) -> str:
    """The option for the recipe's key that an unknown option names by another program's name, or its own."""
    from veneer.train.recipe import Recipe  # a slow import, needed only for an error

    key = typed.lstrip("-").replace("-", "_")
    key = OTHER_KEYS.get(key, key)
    option = "--" + key.replace("_", "-")
    if option in known:
        return option
    return f"--set {key}=VALUE" if key in Recipe.model_fields else ""
