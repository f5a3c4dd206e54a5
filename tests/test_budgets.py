"""The shape of the house: small methods, a core that names none, and one public name for each."""

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
LONGER = {
    "lora": "its config holds the fields of all its variants, and composes them",
    "adalora": "a method and a schedule: the allocation of ranks is an algorithm of its own",
    "shadow": "a second network: how it is made, how it rides along, its cache and its loss",
    "adamss": "a method and a schedule: which subspaces go on learning is an algorithm of its own",
    "bottleneck": "the common ground of eight methods: places, starts and scalings of their small networks",
    "xlora": "experts, a gate and its pass over the model",
}


def functions(path: Path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def code_lines(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    text = path.read_text()
    strings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and i not in strings and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_is_a_small_file(path: Path):
    limit = 180 if path.stem in LONGER else 120
    assert len(path.read_text().splitlines()) <= limit


def test_the_core_is_small():
    """Some 150 lines of it are quantised layers, one small class a library; its layers choose the fast road."""
    assert sum(code_lines(path) for path in CORE) <= 2650


def test_functions_are_short():
    long = [
        f"{path.relative_to(HOUSE)}:{f.name} {f.end_lineno - f.lineno + 1}"
        for path in HOUSE.rglob("*.py")
        for f in functions(path)
        if f.end_lineno - first_line(path, f) + 1 - docstring_lines(f) > 40
    ]
    assert not long


def first_line(path: Path, f) -> int:
    """Where counting starts: a verb of the command line has its flags for a signature, which is a table."""
    return f.body[0].lineno if path.parent.name == "cli" else f.lineno


def docstring_lines(f) -> int:
    first = f.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if is_docstring else 0


def test_functions_are_short_by_habit():
    sizes = sorted(f.end_lineno - f.lineno + 1 for path in HOUSE.rglob("*.py") for f in functions(path))
    assert 3 <= sizes[len(sizes) // 2] <= 16


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
others = ("transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "peft")
heavy = [m for m in others if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)
