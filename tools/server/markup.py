"""HTML and SVG from values: what isn't markup already is escaped, so that nothing can be forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is markup, and isn't escaped again."""

    __slots__ = ()


Child = str | int | Iterable["Child"] | None
"""What can be within a tag: text, markup, several of them, nothing."""


def _render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int):
        return escape(str(child))
    return "".join(map(_render, child))


def join(*children: Child) -> Markup:
    """One after the other."""
    return Markup(_render(children))


def tag(name: str, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element; of an attribute's name ``_`` at the end goes, others are ``-``. None leaves it out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{_render(children)}</{name}>")


def table(heads: Iterable[str], rows: Iterable[Iterable[Child]], empty: str) -> Markup:
    """A table that scrolls by itself where it is too wide; `empty` stands for one without rows."""
    body = [tag("tr", [tag("td", cell) for cell in row]) for row in rows]
    if not body:
        return tag("p", empty, class_="empty")
    head = tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads]))
    return tag("div", tag("table", head, tag("tbody", body)), class_="wide")
