"""The pages that are files in the root of the repository: how to contribute, and what changed."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def generated() -> dict[str, str]:
    """The Markdown of each page by its path in docs/."""
    return {page: read(name) for page, name in FILES.items()}


def read(name: str) -> str:
    """A file of the root with its links to docs/ as they are inside docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](")
