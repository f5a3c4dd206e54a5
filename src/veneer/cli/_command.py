"""How the command line reads its arguments: usage errors are one line, and options find what was meant."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.errors import ConfigError, nearest

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The base class of the errors in arguments. typer carries its own copy of click, whose place differs by version."""
OTHER_NAMES = {
    "--lr": "--learning-rate",
    "--base-model": "--model",
    "--model-name-or-path": "--model",
    "--base": "--model",
    "--dataset": "--data",
    "--train-data": "--data",
    "--train-file": "--data",
    "--validation-file": "--eval-data",
    "--out": "--output",
    "--output-dir": "--output",
    "--out-dir": "--output",
    "--output": "--out",
    "--peft-type": "--method",
    "--r": "--rank",
    "--lora-r": "--rank",
    "--target-modules": "--targets",
    "--lora-alpha": "--option lora_alpha=VALUE",
    "--lora-dropout": "--option lora_dropout=VALUE",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--steps": "--max-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--accumulate",
    "--grad-accum": "--accumulate",
    "--max-seq-length": "--max-length",
    "--max-seq-len": "--max-length",
    "--cutoff-len": "--max-length",
    "--bf16": "--dtype bfloat16",
    "--fp32": "--dtype float32",
    "--adapters": "--adapter",
    "--adapter-path": "--adapter",
    "--peft-model": "--adapter",
    "--max-tokens": "--max-new-tokens",
    "--warmup-ratio": "--set warmup=SHARE",
    "--warmup-steps": "--set warmup=STEPS",
    "--weight-decay": "--set weight_decay=VALUE",
    "--lr-scheduler-type": "--set schedule=NAME",
    "--optim": "--set optimizer=NAME",
    "--save-steps": "--save-every",
    "--eval-steps": "--eval-every",
    "--logging-steps": "--set log_every=STEPS",
    "--test-split": "--eval-split",
    "--val-size": "--eval-split",
}
"""What options of other programs are called here."""


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
    here = OTHER_NAMES.get(typed.lower().replace("_", "-"), "")
    if here.partition(" ")[0] in known:
        return f"; here it is {here}"
    words = {name.lstrip("-"): name for name in known}
    near = nearest(typed.lstrip("-").replace("_", "-"), words)
    return near.replace("nearest: ", "nearest: --").replace(", ", ", --")
