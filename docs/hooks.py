"""What mkdocs calls while it builds the site: the pages that are made from the code, and the parts of the home page.

The makers are in `pages/`, one file for each section of the site.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from pages import api, architectures, command_line, home, methods, project, recipe

LANGUAGES = ("en", "zh")
PART = re.compile(r"<!-- part: (\w+) -->")
CODE = re.compile(r"(?<!<pre>)<code>(?=[^<]*[- ])([^<]{1,30})</code>")
"""Code within a line that could break, and is short enough to stay on one."""
CHINESE = "[\u3001-\u30ff\u4e00-\u9fff\uff01-\uff5e]"
CHINESE_LINE_END = re.compile(f"(?<={CHINESE})\\n *(?={CHINESE})")


def on_config(config: Any) -> Any:
    """Add the groups of methods to the navigation, once: mkdocs builds the site for each language."""
    groups = methods.navigation()
    for item in config.nav:
        if "Methods" in item and groups[0] not in item["Methods"]:
            item["Methods"] += groups
    return config


@event_priority(-200)  # after the plugin i18n, which keeps only the pages that are files in docs/
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code."""
    language = config.plugins["i18n"].current_language
    for path, text in _generated().items():
        pages = {name: _page(path, text, config, name) for name in LANGUAGES}
        chosen = pages[language]
        chosen.alternates = pages
        files.append(chosen)
    return files


def _generated() -> dict[str, str]:
    """The Markdown of each generated page by its path in docs/."""
    pages: dict[str, str] = {}
    for section in (methods, api, command_line, recipe, architectures, project):
        pages |= section.generated()
    return pages


def _page(path: str, text: str, config: Any, language: str) -> File:
    """A page as the plugin i18n wants it: in English, below zh/ for readers of the Chinese site."""
    file = File.generated(config, path, content=text)
    if language != LANGUAGES[0]:
        file.dest_uri = f"{language}/{file.dest_uri}"
    file.locale = LANGUAGES[0]
    file.locale_alternate_of = language
    file.localization = None
    file.norm_src_uri = file.src_uri
    return file


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace the comments of the home page by its parts, and join Chinese lines.

    A browser shows the end of a line as a space, which has no place between Chinese characters.
    """
    language = config.plugins["i18n"].current_language
    markdown = CHINESE_LINE_END.sub("", markdown)
    return PART.sub(lambda found: home.PARTS[found[1]](language), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Mark short code, which would otherwise break after the hyphens of an option."""
    return CODE.sub(r'<code class="short">\1</code>', html)


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Make the language links of the home page relative: the site may be served from a folder."""
    for alternate in config.extra.alternate:
        if alternate["link"].startswith("/"):
            alternate["link"] = f".{alternate['link']}"
    return context


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Mark the English text of pages that have no Chinese version, so that browsers and readers know it."""
    is_fallback = page.file.locale_alternate_of != page.file.locale
    if not is_fallback:
        return output
    return output.replace('<article class="', f'<article lang="{page.file.locale}" class="', 1)
