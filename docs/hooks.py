"""Hooks of mkdocs: some files of the project's root become pages, and links lead to pages."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""A file of the root => its page."""
LINK = re.compile(r"(\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the root."""
    for name, page in PAGES.items():
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files lead to their pages. A link to code, which has no page, becomes text."""
    here = page.file.src_uri
    origin = next((name for name, own in PAGES.items() if own == here), f"docs/{here}")

    def to_page(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, sign, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if not path or ":" in path or not (ROOT / file).exists():
            return link[0]  # an anchor, an address, or a fault, which mkdocs names
        if file not in PAGES and not file.startswith("docs/"):
            return text[1:-1]
        found = PAGES.get(file, file.removeprefix("docs/"))
        return f"{text}({posixpath.relpath(found, posixpath.dirname(here) or '.')}{sign}{anchor})"

    return LINK.sub(to_page, markdown)
