from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.serve.web.render import BlockStream, render, sanitize


class Seen(HTMLParser):
    """The elements, attributes and text that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parse_rendered(markdown: str) -> Seen:
    return Seen("".join(render(markdown)))


# Markdown


def test_each_top_level_block_is_an_element_of_its_own() -> None:
    blocks = render("# Title\n\ntext *soft* **loud** ~~gone~~\n\n- a\n- b\n\n> quote\n\n1. x\n\n---\n")
    assert blocks == [
        "<h1>Title</h1>",
        "<p>text <em>soft</em> <strong>loud</strong> <s>gone</s></p>",
        "<ul>\n<li>a</li>\n<li>b</li>\n</ul>",
        "<blockquote>\n<p>quote</p>\n</blockquote>",
        "<ol>\n<li>x</li>\n</ol>",
        "<hr>",
    ]


def test_tables_align_by_class_since_the_policy_allows_no_style() -> None:
    (table,) = render("| a | b |\n|:--|--:|\n| 1 | 2 |\n")
    assert '<th class="left">a</th>' in table and '<td class="right">2</td>' in table and "style" not in table


def test_tasks_become_boxes_that_say_what_they_are() -> None:
    boxes = [
        attributes
        for tag, attributes in parse_rendered("- [ ] open\n- [x] done\n- [link] no\n").elements
        if tag == "span"
    ]
    assert boxes == [
        {"class": "box", "role": "img", "aria-label": "to do"},
        {"class": "box done", "role": "img", "aria-label": "done"},
    ]


def test_code_is_highlighted_and_says_its_language() -> None:
    (block,) = render('```python title="x"\ndef f(): return "<b>"\n```\n')
    rendered = Seen(block)
    assert ("span", {"class": "language"}) in rendered.elements and (
        "span",
        {"class": "k"},
    ) in rendered.elements
    assert rendered.text == 'pythondef f(): return "<b>"\n'


@pytest.mark.parametrize("language", ["", "nosuchlanguage", "<script>", "../../etc", "python\u0000"])
def test_code_in_an_unknown_language_is_shown_as_it_is(language: str) -> None:
    rendered = parse_rendered(f"```{language}\n\n  <i>x</i> \n\n```\n")
    assert rendered.text.endswith("\n  <i>x</i> \n\n")
    assert {tag for tag, _ in rendered.elements} == {"div", "span", "pre", "code"}


def test_very_long_code_is_not_highlighted() -> None:
    rendered = parse_rendered("```python\n" + "x = 1\n" * 20_000 + "```")
    assert sum(tag == "span" for tag, _ in rendered.elements) == 1


def test_links_open_elsewhere_and_tell_nothing() -> None:
    ((_, attributes),) = [
        element for element in parse_rendered("[a](https://example.org/x?y=1)").elements if element[0] == "a"
    ]
    assert attributes["href"] == "https://example.org/x?y=1" and attributes["target"] == "_blank"
    assert attributes["rel"] == "noopener noreferrer nofollow"


# Inert content

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext></mtext><mglyph><style><img src onerror=alert(1)></style></mglyph></math>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>",
    "<style>*{background:url(https://evil.example/)}</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example/>",
    "<form action=https://evil.example><input name=key><button>go</button></form>",
    "<object data=https://evil.example></object><embed src=https://evil.example>",
    "<template><script>alert(1)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<a id=marked name=body>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](/page/api/conversations)",
    "[x](//evil.example)",
    "[x](file:///etc/passwd)",
    "[x]( <javascript:alert(1)> )",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    "![x](https://evil.example/pixel.png)",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "![<img src=x onerror=alert(1)>](x)",
    '![x](https://e.example/"onerror="alert(1))',
    '[x](https://e.example/"onmouseover="alert(1))',
    "[x](https://e.example '\"><script>alert(1)</script>')",
    "```<img/src=x/onerror=alert(1)>\ncode\n```",
    '```"><script>alert(1)</script>\ncode\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<script>alert(1)</script>`",
    "    <script>alert(1)</script>",
    "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
    "- [x] <img src=x onerror=alert(1)>",
    "# <script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php echo 1 ?><script>alert(1)</script>",
    "\u202e<scr\u0000ipt>alert(1)</scr\u0000ipt>",
]
ALLOWED = {
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "pre", "code", "span",
    "div", "em", "strong", "s", "a", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


def assert_inert(html: str) -> None:
    for tag, attributes in Seen(html).elements:
        assert tag in ALLOWED
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in (
                "style",
                "src",
                "srcset",
                "id",
                "name",
                "action",
            )
            assert name != "href" or (value or "").startswith(("https://", "http://", "mailto:"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_text_or_nothing(attack: str) -> None:
    assert_inert("".join(render(attack)))
    stream = BlockStream()
    for end in range(len(attack) + 1):
        stream.update(attack[:end])
        assert_inert("".join(stream.blocks))


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_markdown_library_might_let_through_is_cleaned(attack: str) -> None:
    assert_inert(sanitize(attack))


def test_an_image_is_a_link_so_that_nothing_is_loaded() -> None:
    rendered = parse_rendered("![a cat](https://example.org/cat.png)")
    assert [tag for tag, _ in rendered.elements] == ["p", "a"] and rendered.text == "a cat"


# Streaming

PIECES = st.sampled_from(
    ["# ", "- ", "1. ", "> ", "```\n", "~~~py\n", "---", "===", "\n", "\n\n", "    ", "  ", "| a | b |\n", "|---|---|\n",
     "**", "*", "`", "word ", "text", "[x](https://e.org)", "[r]: https://e.org\n",
     "[r]", "<b>", "\t", "\r\n", "\\", "- [ ] ",
     "2) ", "+ ", "&amp;", "日本"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=30), st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_blocks_that_are_finished_never_change_and_the_end_equals_the_whole(
    pieces: list[str], step: int
) -> None:
    text = "".join(pieces)
    stream = BlockStream()
    shown: list[str] = []
    for end in range(0, len(text), step):
        settled, before = stream.blocks[: stream.finished], list(shown)
        keep = stream.update(text[:end])
        assert stream.blocks[: len(settled)] == settled
        shown = before[:keep] + stream.blocks[keep:]
        assert shown == stream.blocks, "what the page shows when it keeps the first and takes the rest"
    stream.update(text, whole=True)
    assert stream.blocks == render(text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("foo\n- bar", "<h2>"), ("foo\n\n# Title", "<h1></h1>"), ("a\n\n---\n", "---"), ("so **bold** it is", "**"),
     ("use `code` now", "`"), ("one\n\n1. two", "1.")],
)  # fmt: skip
def test_markup_that_is_half_there_does_not_flash(text: str, wrong: str) -> None:
    stream = BlockStream()
    for end in range(len(text)):
        stream.update(text[:end])
        assert wrong not in "".join(stream.blocks)


def test_a_long_answer_is_not_parsed_from_its_beginning_each_time() -> None:
    stream = BlockStream()
    paragraph = "word " * 20 + "\n\n"
    for number in range(200):
        stream.update(paragraph * (number + 1))
    assert stream.finished >= 198 and len(paragraph * 200) - stream._begin < 3 * len(paragraph)
