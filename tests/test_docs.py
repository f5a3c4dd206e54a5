"""The documentation builds without a warning, in both languages, and holds everything that it should."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import veneer
from veneer import all_methods
from veneer.cli import app
from veneer.train.recipe import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built in English and in Chinese; a warning is an error."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return place


def read(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_the_site_has_a_page_for_every_method(site):
    for name in all_methods():
        assert (site / "methods" / name / "index.html").exists(), name
    page = read(site, "methods/vera")
    assert "arXiv:2310.11454" in page and "d_initial" in page


def test_the_pages_need_no_network(site):
    """No page and no style names a script, a style, a font or a picture of another host."""
    fetched = re.compile(
        r"""(?:src|href)="(https?:)?//[^"]*\.(?:js|css|woff2?|png|svg|webp)"|url\(["']?(?:https?:)?//"""
    )
    files = [path for kind in ("html", "css", "svg") for path in site.rglob(f"*.{kind}")]
    assert len(files) > 100
    for file in files:
        found = fetched.search(file.read_text(encoding="utf-8"))
        assert not found, f"{file}: {found[0]}"


def test_the_navigation_holds_each_page_once(site):
    """Each page that is built is linked once from the navigation of its language."""
    for language in ("", "zh/"):
        pages = {path.parent.relative_to(site).as_posix() for path in (site / language).rglob("index.html")}
        pages = {page for page in pages if (page == "zh" or page.startswith("zh/")) == bool(language)}
        linked = navigation(site, language)
        assert len(pages) > 100 and sorted(linked) == sorted(pages), set(linked) ^ pages


def navigation(site: Path, language: str) -> list[str]:
    """The pages of the navigation, in order: each links to the next at its foot."""
    page, order = language.rstrip("/") or ".", []
    while page is not None:
        order.append(page)
        assert len(order) < 1000, "the pages link in a circle"
        following = re.search(r'<a href="([^"]*)" class="md-footer__link md-footer__link--next"', read(site, page))
        page = os.path.normpath(os.path.join(page, following[1])) if following else None
    return order


def test_files_that_are_no_page_are_parts_of_one():
    """A Markdown file that the site leaves out is a table that a benchmark writes."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    left_out = re.search(r"exclude_docs: \|\n((?:  .*\n)+)", config)[1].split()
    markdown = [pattern for pattern in left_out if pattern.endswith(".md")]
    assert markdown == ["performance-*.md"]
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    assert "performance-" in written


def test_the_reference_has_every_public_name(site):
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference" / "api").rglob("index.html"))
    documented = set(re.findall(r'id="veneer\.(\w+)"', pages))
    missing = set(veneer.__all__) - documented
    assert not missing, missing


def test_the_command_line_page_has_every_verb_and_option(site):
    page = html.unescape(read(site, "reference/command-line"))
    group = typer.main.get_command(app)
    assert len(group.commands) > 10
    for name, command in group.commands.items():
        section = re.search(rf'<h2 id="veneer-{name}">.*?(?=<h2|</article>)', page, re.DOTALL)
        assert section, name
        text = re.sub(r"<[^>]+>", "", section[0])
        examples = [line.strip() for line in command.help.splitlines() if line.startswith("  ")]
        assert all(line in text for line in examples), name
        for option in command.params:
            assert all(word in section[0] for word in option.opts), f"{name}: {option.opts}"


def test_the_recipe_page_has_every_key(site):
    page = read(site, "reference/recipe")
    for name in Recipe.model_fields:
        assert f"<code>{name}</code>" in page, name


@pytest.mark.parametrize("language", ["", "zh"])
def test_the_speed_on_the_home_page_is_the_benchmarks(site, language):
    page = read(site, language or ".")
    cases = json.loads((ROOT / "docs" / "performance-train.json").read_text())["cases"]
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 3
    for name, figure in zip(("drop", "nodrop", "gpt2"), figures, strict=True):
        for pace in cases[name]["tokens_per_second"]:
            assert f"<b>{pace['median']:.0f}</b>" in figure, name
        assert f"{cases[name]['speed']['median']:.1f}" in figure, name
        for size in cases[name]["peak_bytes"]:
            assert f"{size / 1e9:.1f} GB" in figure, name


@pytest.mark.parametrize("name", ["index.md", "index.zh.md"])
def test_no_measured_number_is_typed_on_the_home_page(name):
    source = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for part in ("speed", "answers", "count"):
        assert source.count(f"<!-- part: {part} -->") == 1, part
    assert not re.search(r"\d+ ?(?:GB|tokens|%|×|times|倍|种方法)", source)


def test_the_chinese_pages_are_chinese(site):
    """A page with a Chinese version shows it below zh/, with the same headings, code and pictures."""
    sources = list((ROOT / "docs").rglob("*.zh.md"))
    assert {"index.zh.md", "start.zh.md", "tutorial.zh.md", "fine-tune.zh.md"} <= {path.name for path in sources}
    for source in sources:
        english = source.with_name(source.name.replace(".zh.md", ".md")).read_text(encoding="utf-8")
        chinese = source.read_text(encoding="utf-8")
        assert shape(english) == shape(chinese), source.name
        page = source.relative_to(ROOT / "docs").as_posix().removesuffix(".zh.md").removesuffix("index")
        assert len(re.findall("[\u4e00-\u9fff]", read(site, f"zh/{page}"))) > 200, source.name


def test_the_language_switch_leads_to_the_same_page(site):
    for page in (".", "guides/fine-tune", "methods/lora"):
        for here, there in ((page, f"zh/{page}"), (f"zh/{page}", page)):
            links = re.findall(r'<a href="([^"]*)" hreflang="(\w+)"', read(site, here))
            found = {language: os.path.normpath(os.path.join(here, link)) for link, language in links}
            wanted = {"zh" if there.startswith("zh") else "en": os.path.normpath(there)}
            assert found | wanted == found, here


def shape(page: str) -> dict[str, list[str]]:
    """What a page has in every language: its levels of headings, its code without comments, its pictures."""
    blocks = re.findall(r"^```(?:python|sh|text)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return {
        "headings": re.findall(r"^#+ ", prose, re.MULTILINE),
        "code": [re.sub(r" *# .*", "", block) for block in blocks],
        "pictures": re.findall(r"!\[.*?\]\((.*?)\)", prose),
    }


def test_the_pictures_are_small():
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "img").iterdir()]
    assert len(sizes) > 5 and sum(sizes) < 1_500_000


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
