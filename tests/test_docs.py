"""The documentation builds without a warning, and has a page for every method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
