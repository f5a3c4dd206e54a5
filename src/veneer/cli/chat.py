"""`veneer chat`: a conversation with a model, with and without adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._options import AllowAbsent, Quantise
from .generate import (
    Adapter,
    Compare,
    Dtype,
    MaxNewTokens,
    Model,
    Penalty,
    Seed,
    System,
    Temperature,
    TemplateFile,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from veneer.inference.generation import Conversation

EXAMPLES = """
The first adapter answers, or the base model if there is none; the command
/adapter NAME switches to another. Answers appear while they are generated,
and the model sees the whole conversation. /help lists all commands.

Ctrl-C stops an answer; Ctrl-D or /quit ends the conversation. Questions can
also be piped in, one per line.

Examples:

  # talk to an adapter
  veneer chat --adapter my-adapter

  # the base model and two adapters answer side by side
  veneer chat --adapter one --adapter two --compare

  # talk to a model without an adapter
  veneer chat --model smollm2-135m-instruct --temperature 0.7
"""
COMMANDS = {
    "/adapter NAME": "let this adapter answer, or the base model (base); without NAME, list them",
    "/compare": "show all answers side by side; again: only one",
    "/system TEXT": "set the system message and start a new conversation",
    "/reset": "start a new conversation",
    "/help": "show this list",
    "/quit": "end the conversation",
}


def chat(
    adapter: Adapter = None,
    model: Model = None,
    compare: Compare = False,
    system: System = None,
    chat_template: TemplateFile = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    allow_absent: AllowAbsent = False,
) -> None:
    """Chat with a model and its adapters, one at a time or side by side."""
    from rich.console import Console

    from veneer.errors import ConfigError
    from veneer.inference.generation import Conversation, Sampling, Writer
    from veneer.model.loading import load
    from veneer.terminal import quiet, remark

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    quiet()
    console = Console(highlight=False)
    with Console(stderr=True).status("loading the model"):
        loaded = load(adapter or [], model, dtype=dtype, quantise=quantise, allow_absent=allow_absent)
        writer = Writer(loaded, sampling, template_file=chat_template)
    remark(loaded.remarks)
    if writer.template is None:
        raise ConfigError("the model has no chat template; give one with --chat-template, or use `veneer generate`")
    talk = _Talk(Conversation(writer, system), console, compare)
    talk.welcome()
    is_open = True
    while is_open:
        line = talk.listen()
        is_open = line is not None and talk.hear(line.strip())


chat.__doc__ = (chat.__doc__ or "") + "\n" + EXAMPLES


class _Talk:
    """A conversation at the terminal, or with questions from a pipe."""

    def __init__(self, conversation: Conversation, console: Any, compare: bool) -> None:
        self.conversation = conversation
        self.console = console
        self.compare = compare
        self.loaded = conversation.writer.loaded
        self.name = self.loaded.names[min(1, len(self.loaded.adapters))]  # the first adapter, else the base
        self.is_live = sys.stdin.isatty() and console.is_terminal

    def welcome(self) -> None:
        """In an interactive session, print the models and a hint on the commands."""
        if not self.is_live:
            return
        import readline  # noqa: F401 (line editing and history for input())

        self.say(" + ".join([self.loaded.base, *self.loaded.adapters]), "bold")
        self.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation", "dim")

    def listen(self) -> str | None:
        """Read the next line; None at the end of the input."""
        speaker = "all" if self.compare else self.name
        prompt = f"\n{speaker}> " if self.is_live else ""
        while True:
            try:
                return input(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self.is_live:
                    raise
                self.say("\n/quit or Ctrl-D ends the conversation", "dim")

    def hear(self, line: str) -> bool:
        """Answer a question or run a command; returns False when the conversation is over."""
        from veneer.errors import VeneerError

        if line == "/quit":
            return False
        word, _, rest = line.partition(" ")
        try:
            if word.startswith("/"):
                self.command(word)(rest.strip())
            elif line:
                self.answer(line)
        except VeneerError as error:
            self.say(str(error), "red")
        return True

    def command(self, word: str) -> Callable[[str], None]:
        """The method that runs a command such as /adapter."""
        from veneer.errors import ConfigError, nearest

        known = {usage.split()[0] for usage in COMMANDS}
        if word not in known:
            raise ConfigError(f"there is no command {word}{nearest(word, known)}; /help lists them")
        return getattr(self, f"on_{word[1:]}")

    def answer(self, question: str) -> None:
        from veneer.inference.streaming import Interrupt, note, show

        names = list(self.loaded.names) if self.compare else [self.name]
        writer = self.conversation.writer
        interrupt = Interrupt()
        prompts = self.conversation.prompts(names, question)
        with interrupt.listening() as criteria:
            answers = show(writer, prompts, self.console, criteria=criteria, headings=not self.is_live)
        self.conversation.add(question, {name: answer.text for name, answer in answers.items()})
        if self.is_live and len(answers) == 1:
            (only,) = answers.values()
            if not only.ended:
                self.say(note(only, writer.sampling.max_new_tokens), "dim")

    def on_adapter(self, name: str) -> None:
        if name:
            self.name = self.loaded.known(name)
            self.compare = False
            return
        names = [f"[{known}]" if known == self.name else known for known in self.loaded.names]
        self.say(", ".join(names), "dim")

    def on_compare(self, _: str) -> None:
        self.compare = not self.compare

    def on_system(self, text: str) -> None:
        self.conversation.system = text or None
        self.conversation.reset()

    def on_reset(self, _: str) -> None:
        self.conversation.reset()

    def on_help(self, _: str) -> None:
        for usage, about in COMMANDS.items():
            self.say(f"  {usage:<15}{about}", "dim")

    def say(self, text: str, style: str = "") -> None:
        if text:
            self.console.print(text, style=style, markup=False)
