"""The shape of the house: plain statements, a core that names no method, and one public name for each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import veneer
from veneer.core.config import Config, all_methods

HOUSE = Path(veneer.__file__).parent
METHODS = sorted(p for p in (HOUSE / "methods").glob("*.py") if p.stem != "__init__")
CORE = sorted((HOUSE / "core").glob("*.py"))
MEAN, NINE_TENTHS, COMPREHENSIONS = 8.8, 15, 3
"""How much a simple statement says at most, in nodes of its syntax tree (mean, and 90th percentile), and comprehensions
per 100 lines of code. PEFT has 7.6, 14 and 0.9, TRL 8.9, 16 and 2.1, pydantic 7.0, 13 and 1.1."""
TABLE = 40
"""A statement counts as this much at most: a table is long, not dense."""


def code_lines(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    text = path.read_text()
    strings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and i not in strings and not line.strip().startswith("#"))


SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Raise, ast.Assert, ast.Delete)
SIMPLE += (ast.Pass, ast.Break, ast.Continue, ast.Global, ast.Nonlocal)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CONTEXT = (ast.Load, ast.Store, ast.Del)


def statement_sizes(path: Path) -> list[int]:
    """The nodes of each simple statement; docstrings are none."""
    sizes = []
    for node in ast.walk(ast.parse(path.read_text())):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, SIMPLE) and not is_docstring:
            nodes = sum(not isinstance(part, CONTEXT) for part in ast.walk(node))
            sizes.append(min(nodes, TABLE))
    return sizes


def comprehensions(path: Path) -> int:
    return sum(isinstance(node, COMPREHENSION) for node in ast.walk(ast.parse(path.read_text())))


def densest(files: list[Path], density) -> str:
    """The ten densest files, for the message of a failure."""
    ranked = sorted(files, key=density, reverse=True)[:10]
    return "".join(f"\n  {density(path):5.1f}  {path.relative_to(HOUSE)}" for path in ranked)


def test_a_line_does_one_thing():
    """A cap on the lines of a file is met by packing; what is measured is how much a statement says."""
    files = [path for path in HOUSE.rglob("*.py") if statement_sizes(path)]
    sizes = sorted(size for path in files for size in statement_sizes(path))
    mean, nine_tenths = sum(sizes) / len(sizes), sizes[len(sizes) * 9 // 10]
    worst = densest(files, lambda path: sum(statement_sizes(path)) / len(statement_sizes(path)))
    assert mean <= MEAN and nine_tenths <= NINE_TENTHS, f"{mean:.2f}, {nine_tenths}:{worst}"


def test_a_comprehension_is_simple():
    """One `for`, at most one `if`, and no assignment inside."""
    wrong = []
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, COMPREHENSION):
                conditions = sum(len(generator.ifs) for generator in node.generators)
                assigns = any(isinstance(part, ast.NamedExpr) for part in ast.walk(node))
                if len(node.generators) > 1 or conditions > 1 or assigns:
                    wrong.append(f"{path.relative_to(HOUSE)}:{node.lineno}")
    assert not wrong


def test_comprehensions_are_few():
    files = [path for path in HOUSE.rglob("*.py") if code_lines(path)]
    share = 100 * sum(map(comprehensions, files)) / sum(map(code_lines, files))
    worst = densest(files, lambda path: 100 * comprehensions(path) / code_lines(path))
    assert share <= COMPREHENSIONS, f"{share:.2f}:{worst}"


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_names_no_method(path: Path):
    """Neither imports one nor asks for one by name; words in docstrings that explain a concept are free."""
    tree = ast.parse(path.read_text())
    names = {m.stem for m in METHODS}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert "methods." not in (node.module or "") and "inits" not in (node.module or "")
        if isinstance(node, ast.Name):
            assert node.id.lower() not in names, node.id
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[A-Za-z_0-9]+", node.value)
        ):
            assert node.value.lower() not in names, node.value


def test_exports_files_and_registry_agree():
    registered = all_methods()
    assert set(registered) == {m.stem for m in METHODS}
    exported = {name: getattr(veneer, name) for name in veneer.__all__}
    configs = {c for c in exported.values() if isinstance(c, type) and issubclass(c, Config) and c is not Config}
    assert configs == set(registered.values())
    for name, config in registered.items():
        assert config.__module__.endswith(f".methods.{name}")
        assert config.peft_type.lower() == name or issubclass(config, registered[config.peft_type.lower()])


def test_every_public_name_can_be_had():
    for name in veneer.__all__:
        assert getattr(veneer, name) is not None
    assert set(veneer.__all__) <= set(dir(veneer))


def test_every_field_and_method_is_explained():
    for name, config in all_methods().items():
        module = sys.modules[config.__module__]
        paper = re.search(r"arXiv:\d{4}\.\d{4,5}|OpenReview:\w+|doi:\S+", module.__doc__ or "")
        assert paper or name == "trainable_tokens", name
        source = ast.parse(Path(module.__file__).read_text())
        for cls in (n for n in source.body if isinstance(n, ast.ClassDef) and n.name == config.__name__):
            for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                if (
                    isinstance(field, ast.AnnAssign)
                    and len(list(config.__mro__))
                    and field.target.id not in ("use_dora",)
                ):
                    assert isinstance(after, ast.Expr), f"{config.__name__}.{field.target.id} has no docstring"


def test_importing_is_cheap():
    """`import veneer` brings neither torch nor transformers; a config and a model class bring torch alone."""
    script = """
import sys, veneer
assert "torch" not in sys.modules
veneer.LoraConfig, veneer.get_peft_model, veneer.PeftModel
others = "transformers datasets accelerate safetensors huggingface_hub peft rich pydantic pandas".split()
heavy = [m for m in others if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)
