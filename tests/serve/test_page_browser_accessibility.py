"""The chat page in a browser: inert model output, small screens, contrast and the keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from browser_pages import Open, Server, answer, expect, needs_chromium, say, wait_until_still

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [needs_chromium, pytest.mark.long]


# Model output is inert


def test_an_answer_full_of_attacks_is_inert(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "attack me")
    page.wait_for_timeout(200)
    expect(answer(page)).to_contain_text("<script>window.stolen = 1</script>")
    assert_inert(page)
    page.locator("#inspect").click()
    expect(page.locator(".said .token").first).to_be_visible()
    assert_inert(page)


def assert_inert(page: Page) -> None:
    assert page.evaluate("() => window.stolen") is None
    assert page.locator(".turns :is(script, img, iframe, object, form, style, link)").count() == 0
    handlers = page.evaluate(
        "() => [...document.querySelectorAll('.turns *')].flatMap((element) => [...element.attributes])"
        ".map(({name}) => name).filter((name) => name.startsWith('on'))"
    )
    assert handlers == []


def test_even_html_that_came_through_could_not_run_a_script(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url, lost=True)
    page.evaluate(
        "() => { const script = document.createElement('script'); const box = document.createElement('div');"
        "try { script.textContent = 'window.stolen = 1'; document.body.append(script); } catch {}"
        "try { box.innerHTML = '<img src=x onerror=\"window.stolen = 2\">'; document.body.append(box); } catch {}"
        "try { box.setAttribute('onclick', 'window.stolen = 3'); box.click(); } catch {} }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.stolen") is None


# Accessibility


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_list_is_a_drawer(
    page_server: Server, open_page: Open
) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    page = open_page(page_server.url, **phone)
    say(page, "Why is the sky blue?")
    for mode in ("reading", "inspecting"):
        wide = page.evaluate(
            "() => [...document.querySelectorAll('main, main *')].filter((element) => "
            "element.getClientRects().length && !element.closest('pre, table, .unseen') && "
            "element.getBoundingClientRect().right > innerWidth + 1)"
            ".map((element) => element.outerHTML.slice(0, 80))"
        )
        assert wide == [], mode
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        page.locator("#inspect").click()
        wait_until_still(page)
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations", exact=True).click()
    expect(page.locator("#sidebar")).to_be_in_viewport()
    page.locator("#new").click()
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    small = page.evaluate(
        "() => [...document.querySelectorAll('button, a, select, summary')].filter((element) => "
        "element.checkVisibility() && !element.matches('.skip') && "
        "Math.min(element.offsetWidth, element.offsetHeight) < 24).map((element) => element.id)"
    )
    assert small == [], "WCAG 2.2 requires 24 pixels"


# The contrast of every visible text with its background, by WCAG's formula.
CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const failures = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [text, element] = [walker.currentNode.data.trim(), walker.currentNode.parentElement];
    if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest('.unseen, .skip, :disabled, option, svg')) continue;
    const below = ground(element);
    const pair = [light(over(parse(getComputedStyle(element).color), below)), light(below)];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) failures.push(`${ratio.toFixed(2)} ${element.className} ${text.slice(0, 30)}`);
  }
  return failures;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_asks_for(
    page_server: Server, open_page: Open, scheme: str
) -> None:
    page = open_page(page_server.url, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    say(page, "Why is the sky blue?")
    page.locator("#settings-toggle").click()
    assert page.evaluate(CONTRAST) == []
    page.locator("#close-settings").click()
    page.locator("#inspect").click()
    answer(page).locator(".said .token").nth(5).click()
    answer(page).get_by_text("Prompt as the model reads it").click()
    assert page.evaluate(CONTRAST) == []


def test_every_control_has_a_name(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "sky")
    page.locator("#inspect").click()
    page.locator("#settings-toggle").click()
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, a[href], input, textarea, select, summary')].filter((element) => "
        "element.checkVisibility() && !(element.ariaLabel || element.textContent.trim() || "
        "[...(element.labels ?? [])].some((label) => label.textContent.trim()))).map((element) => element.outerHTML)"
    )
    assert nameless == []


def test_the_page_is_used_with_the_keyboard_alone(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    page.keyboard.type("hello keyboard")  # the message field has the focus
    page.keyboard.press("Enter")
    expect(answer(page).locator(".said")).to_have_text("You said: hello keyboard")
    page.keyboard.press("Tab")
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type("hello again")
    page.keyboard.press("Enter")
    expect(answer(page).locator(".said")).to_have_text("You said: hello again")
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("Shift+?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.get_by_label("Single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(answer(page).locator(".said")).to_have_text("You said: hello again")


def test_light_and_dark_follow_the_system_until_one_is_chosen(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url, color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(23, 23, 21)"
    page.locator("#theme").click()
    assert page.evaluate(ground) == "rgb(251, 250, 247)"
    page.reload()
    assert page.evaluate(ground) == "rgb(251, 250, 247)"
