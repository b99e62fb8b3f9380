"""Writes what a program found between two markers of a page, and leaves the rest of it alone."""

from collections.abc import Iterable
from pathlib import Path


def replace_between(page: Path, name: str, lines: Iterable[str]) -> None:
    """Replace the lines between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises ValueError if the page does not have both markers once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: needs the lines {begin} and {end}, once and in this order")
    before, after = text.split(begin)[0], text.split(end)[1]
    middle = "\n".join((begin, "", *lines, "", end))
    page.write_text(f"{before}{middle}{after}", encoding="utf-8")
