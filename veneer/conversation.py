"""A conversation with a model, or with several at once that each remember their own answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .generation import Message, Writer


@dataclass
class Turn:
    question: str
    answers: dict[str, str]
    """By the name of who answered."""

    def said_by(self, name: str) -> str:
        """The answer of one; of another where it was not asked."""
        return self.answers.get(name, next(iter(self.answers.values())))


@dataclass
class Conversation:
    """What was said so far."""

    writer: Writer
    system: str | None = None
    """Instructions before the first question."""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, name: str, question: str) -> list[Message]:
        """What one is asked now, with what went before."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.said_by(name)})
        return [*found, {"role": "user", "content": question}]

    def prompts(self, names: list[str], question: str) -> dict[str, list[int]]:
        """The tokens that each is given.

        Raises:
            DataError: the chat template refuses the conversation, or it has grown too long.
        """
        found = {name: self.writer.tokens(self.messages(name, question), "the conversation") for name in names}
        self.writer.check_room(max(map(len, found.values())), "the conversation")
        return found

    def add(self, question: str, answers: dict[str, str]) -> None:
        self.turns.append(Turn(question, answers))

    def reset(self) -> None:
        self.turns.clear()
