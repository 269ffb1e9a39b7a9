"""The text of a page: its paragraphs, without navigation, scripts and forms."""

from __future__ import annotations

import re
from typing import Any

# What is not read by a person as the page's text.
_LEFT_OUT = (
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "form", "button",
    "select", "nav", "aside", "footer", "dialog", "head",
)  # fmt: skip
# Elements that stand in lines of their own; those of the second row have space around them.
_LINES = frozenset(("li", "dt", "dd", "div", "option", "summary", "figcaption", "caption", "address", "tr"))
_PARAGRAPHS = frozenset((
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "section", "article",
    "main", "header", "figure", "hr", "details", "fieldset",
))  # fmt: skip
_GAPS = ("", "  ", "\n", "\n\n")  # between cells, lines, paragraphs; the widest of those that meet counts
_SPACES = re.compile(r"[ \t\r\f\v\n\u00a0]+")


def html_text(page: str) -> str:
    """The text of an HTML page, a line an element and a blank line between paragraphs; ``pre`` as it is.

    The page's ``<main>`` where it has exactly one, else its body, parsed as browsers do (HTML5).
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page)
    tree.strip_tags(list(_LEFT_OUT), recursive=True)
    mains = tree.css("main")
    root = mains[0] if len(mains) == 1 else tree.body
    if root is None:
        return ""
    pieces: list[str] = []
    gap = ""  # owed before the next text
    # A stack of its own, not recursion: pages nest thousands of elements deep.
    stack: list[tuple[Any, bool]] = [
        (root, False)
    ]  # a node and whether it is in <pre>; or a gap that closes one
    while stack:
        node, kept = stack.pop()
        if isinstance(node, str):
            gap = max(gap, node, key=_GAPS.index)
            continue
        tag = node.tag
        if tag == "-text":
            text = node.text_content or ""
            text = text if kept else _SPACES.sub(" ", text)
            if gap in ("\n", "\n\n") and not kept:
                text = text.lstrip()
            if not text:
                continue
            if text.isspace() and not kept and (gap or not pieces):
                continue
            pieces += [gap if pieces else "", text]
            gap = ""
            continue
        if tag == "br":
            gap = "\n\n" if gap == "\n" else max(gap, "\n", key=_GAPS.index)
            continue
        mark = (
            "\n\n" if tag in _PARAGRAPHS else "\n" if tag in _LINES else "  " if tag in ("td", "th") else ""
        )
        gap = max(gap, mark, key=_GAPS.index)
        if mark:
            stack.append((mark, False))
        children = list(node.iter(include_text=True))
        stack += [(child, kept or tag == "pre") for child in reversed(children)]
    return "\n".join(line.rstrip() for line in "".join(pieces).split("\n")).strip("\n ")
