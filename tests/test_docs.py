"""The documentation builds without a warning, and has a page for every method."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from veneer import all_methods

ROOT = Path(__file__).parent.parent


def test_the_site_builds_with_a_page_for_every_method(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    for name in all_methods():
        assert (tmp_path / "methods" / name / "index.html").exists(), name
    page = (tmp_path / "methods" / "vera" / "index.html").read_text()
    assert "arXiv:2310.11454" in page and "d_initial" in page
    fetched = [part for part in page.split('"') if part.startswith("http") and part.endswith((".js", ".css", ".woff2"))]
    assert not fetched, "the pages need no network"


def test_what_the_guides_name_exists():
    """Every `method` in the tables of choosing.md is one, or a setting of one."""
    rows = [line for line in (ROOT / "docs" / "choosing.md").read_text().splitlines() if line.startswith("| ")]
    named = {word for row in rows[1:] for word in row.split("|")[2].split("`")[1::2]}
    methods = {word for word in named if word.islower() and word.isidentifier()} - {"trainable_token_indices"}
    assert len(methods) > 40 and methods <= set(all_methods())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_the_page_shows_the_order_of_packages():
    """The diagram and the table of architecture.md are the contract's, and name every package and module there is."""
    import tomllib

    page = (ROOT / "docs" / "architecture.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "order")
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert shown == [layer.replace("veneer.", "") for layer in layers]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page.split("## The interface of a method")[0], re.MULTILINE)
    explained = set(re.findall(r"\w+", " ".join(rows)))
    house = ROOT / "src" / "veneer"
    packages = {path.parent.name for path in house.glob("*/__init__.py")}
    modules = {path.stem for path in house.glob("*.py")} - {"__init__", "__main__", "as_peft"}
    assert explained == packages | modules
    assert len(list(house.glob("*.py"))) <= 6


def test_the_pages_name_files_that_exist():
    for page in (ROOT / "docs" / "architecture.md", ROOT / "docs" / "versions.md", ROOT / "CONTRIBUTING.md"):
        for path in re.findall(r"`((?:src/veneer/)?[a-z_]+/[\w/]+\.py)", page.read_text()):
            assert any((ROOT / base / path).exists() for base in ("", "src/veneer")), f"{page.name}: {path}"
