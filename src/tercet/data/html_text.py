"""The text of an HTML page: its paragraphs, without navigation, scripts and forms."""

from __future__ import annotations

import re
from typing import Any

# Elements whose content is not part of the page's text.
_LEFT_OUT = (
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "form", "button",
    "select", "nav", "aside", "footer", "dialog", "head",
)  # fmt: skip
# Elements that begin a line; those in _PARAGRAPHS have a blank line around them.
_LINES = frozenset(("li", "dt", "dd", "div", "option", "summary", "figcaption", "caption", "address", "tr"))
_PARAGRAPHS = frozenset((
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "section", "article",
    "main", "header", "figure", "hr", "details", "fieldset",
))  # fmt: skip
_GAPS = ("", "  ", "\n", "\n\n")  # between cells, lines, paragraphs; of adjacent gaps the widest is used
_SPACES = re.compile(r"[ \t\r\f\v\n\u00a0]+")


def html_text(page: str) -> str:
    """Return the text of an HTML page: a line per element, a blank line between paragraphs, ``pre`` verbatim.

    It is the text of the page's ``<main>`` if there is exactly one, else of its body, parsed as browsers
    do (HTML5).
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page)
    tree.strip_tags(list(_LEFT_OUT), recursive=True)
    mains = tree.css("main")
    root = mains[0] if len(mains) == 1 else tree.body
    if root is None:
        return ""
    pieces: list[str] = []
    gap = ""  # to be written before the next text
    # An explicit stack instead of recursion: pages nest thousands of elements deep. An entry is a node and
    # whether it is verbatim (in <pre>), or the gap after an element.
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, verbatim = stack.pop()
        if isinstance(node, str):
            gap = max(gap, node, key=_GAPS.index)
            continue
        tag = node.tag
        if tag == "-text":
            text = node.text_content or ""
            text = text if verbatim else _SPACES.sub(" ", text)
            if gap in ("\n", "\n\n") and not verbatim:
                text = text.lstrip()
            if not text:
                continue
            if text.isspace() and not verbatim and (gap or not pieces):
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
        stack += [(child, verbatim or tag == "pre") for child in reversed(children)]
    return "\n".join(line.rstrip() for line in "".join(pieces).split("\n")).strip("\n ")
