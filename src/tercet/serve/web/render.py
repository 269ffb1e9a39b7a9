"""Markdown of a model as safe HTML, block by block.

The text of a model is untrusted. HTML in it is shown as text, images become links, and nh3 cleans the output of
the Markdown library with a short list of tags and attributes.

An answer is a list of top-level blocks. While it is streamed, only the last block changes: a block is finished
when the next one has begun on a complete line, and no later text can alter it (link definitions, which could,
are disabled).
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

HIGHLIGHT_LIMIT = 40_000  # characters; highlighting longer code takes more than a second

_TAGS = {
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "pre", "code", "span",
    "div", "em", "strong", "s", "a", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
_ATTRIBUTES = {
    "a": {"href", "title"},
    "ol": {"start"},
    "li": {"class"},
    "div": {"class"},
    "span": {"class", "role", "aria-label"},
    "th": {"class"},
    "td": {"class"},
    "pre": {"tabindex"},
    "table": set[str](),
}
_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
_CLASSES = re.compile(r"[a-z0-9 -]{1,40}")
_TASK = re.compile(r"\[([ xX])\] ")
_BOLD, _OPEN = re.compile(r"\*\*\S.*?\*\*"), re.compile(r"\*\*(?=\S)")
# The beginning of a line that may still become a list, a heading, a rule, a table or a fence.
_UNDECIDED = re.compile(r"[\s\-=#>*+_`~|:.)0-9]*")


def _attribute(tag: str, name: str, value: str) -> str | None:
    if name == "href":
        return value if _LINK.match(value) else None
    if name == "class":
        return value if _CLASSES.fullmatch(value) else None
    if name == "role":
        return value if value == "img" else None
    return value


def sanitize(dirty: str) -> str:
    """Return HTML with only the tags and attributes that Markdown needs."""
    return nh3.clean(
        dirty,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def highlight(code: str, language: str) -> str:
    """Return code as HTML, with the class names of pygments where it knows the language."""
    lexer = _lexer(language.lower()) if language and len(code) <= HIGHLIGHT_LIMIT else None
    if lexer is None:
        return html.escape(code, quote=False)
    from pygments import highlight as colour
    from pygments.formatters.html import HtmlFormatter

    return str(colour(code, lexer, HtmlFormatter(nowrap=True)))


@functools.lru_cache(maxsize=64)
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _code(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    words = token.info.split()
    language = words[0] if words else ""
    label = html.escape(language[:24] or "text")
    return (
        f'<div class="code"><div class="code-head"><span class="language">{label}</span></div>'
        f'<pre tabindex="0"><code>{highlight(token.content, language)}</code></pre></div>\n'
    )


def _image(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Return a link instead of the image: loading it would tell its server that, and when, it was read."""
    token = tokens[index]
    source = html.escape(str(token.attrs.get("src", "")))
    return f'<a href="{source}">{html.escape(token.content or "image")}</a>'


def _tasks(state: StateCore) -> None:
    """Replace the brackets of a task (``- [x] done``) by a box."""
    for number, token in enumerate(state.tokens):
        if token.type != "inline" or number < 2 or state.tokens[number - 2].type != "list_item_open":
            continue
        first = token.children[0] if token.children else None
        brackets = _TASK.match(first.content) if first is not None and first.type == "text" else None
        if first is None or brackets is None or token.children is None:
            continue
        first.content = first.content[brackets.end() :]
        box = Token("html_inline", "", 0)
        name, label = ("box", "to do") if brackets[1] == " " else ("box done", "done")
        box.content = f'<span class="{name}" role="img" aria-label="{label}"></span> '
        token.children.insert(0, box)
        state.tokens[number - 2].attrSet("class", "task")


def _align_by_class(state: StateCore) -> None:
    """Align tables by a class: the security policy of the page allows no style attribute."""
    for token in state.tokens:
        style = token.attrs.pop("style", None) if token.type in ("th_open", "td_open") else None
        if style is not None:
            token.attrSet("class", str(style).removeprefix("text-align:"))


@functools.cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.disable(["reference", "html_block", "html_inline"])
    markdown.core.ruler.push("tasks", _tasks)
    markdown.core.ruler.push("align_by_class", _align_by_class)
    markdown.renderer.rules |= {"fence": _code, "code_block": _code, "image": _image}  # type: ignore[attr-defined]
    return markdown


def _parse(text: str) -> list[list[Token]]:
    """Return the tokens of each top-level block."""
    groups: list[list[Token]] = []
    for token in _markdown().parse(text):
        if token.level == 0 and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    return groups


def _html(group: list[Token]) -> str:
    markdown = _markdown()
    return sanitize(markdown.renderer.render(group, markdown.options, {})).strip()


def render(text: str) -> list[str]:
    """Return the HTML of each top-level block of a whole text."""
    return [_html(group) for group in _parse(_lines(text))]


def _lines(text: str) -> str:
    """Normalise line ends as markdown-it counts them; a CR at the end may still become CR LF."""
    return text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")


class BlockStream:
    """The blocks of a growing text.

    Attributes:
        blocks: the HTML of each block.
        finished: how many of the first blocks will not change any more.
    """

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.finished = 0
        self._begin = 0  # the index in the text where the unfinished blocks begin

    def update(self, text: str, whole: bool = False) -> int:
        """Render the text so far; return the index of the first changed block (``len(blocks)``: none).

        With ``whole`` the text is complete.
        """
        text = _lines(text)
        rest = text[self._begin :]
        groups = _parse(rest if whole else _settled(rest))
        if not whole and groups:
            closed = _closed(rest, groups[-1])
            groups = _parse(closed) if closed is not None else groups
        first = self.finished
        before = self.blocks[first:]
        self.blocks[first:] = [_html(group) for group in groups]
        complete = rest.count("\n")
        starts = [group[0].map[0] if group[0].map else 0 for group in groups]
        last = max((number for number, line in enumerate(starts) if line < complete), default=0)
        if last:
            self.finished += last
            self._begin += _offset(rest, starts[last])
        same = 0
        for old, new in zip(before, self.blocks[first:], strict=False):
            if old != new:
                break
            same += 1
        return first + same


def _offset(text: str, line: int) -> int:
    """Return the index of the first character of a line."""
    position = 0
    for _ in range(line):
        position = text.index("\n", position) + 1
    return position


def _settled(text: str) -> str:
    """Return ``text`` without a last line whose kind is not decided yet."""
    head, newline, line = text.rpartition("\n")
    return head + newline if _UNDECIDED.fullmatch(line) else text


def _closed(text: str, last: list[Token]) -> str | None:
    """Return ``text`` with the open emphasis or code of its last line closed; None if none is open."""
    leaf = next((token for token in reversed(last) if token.type in ("inline", "fence", "code_block")), None)
    line = text.rpartition("\n")[2]
    if leaf is None or leaf.type != "inline" or not line.strip():
        return None
    if line.count("`") % 2:
        return text[:-1] if line.endswith("`") else text + "`"
    bare = line.rstrip("*")
    head = text[: len(text) - len(line)]
    if _OPEN.search(_BOLD.sub("", bare)):
        return head + bare.rstrip() + "**"
    return head + bare if line != bare and not _BOLD.search(line) else None
