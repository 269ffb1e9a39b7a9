"""The chat page in a browser: tabs, reloads, restarts and the list of conversations."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from browser_pages import DELAY, Open, Server, answer, expect, needs_chromium, say, texts
from page_models import SLOW

pytestmark = [needs_chromium, pytest.mark.long]


# Tabs, reloads, restarts


def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(
    slow_page_server: Server, open_page: Open
) -> None:
    page = open_page(slow_page_server.url)
    say(page, "slow", done=False)
    expect(page.locator(".running .said")).to_contain_text("word2")
    page.reload()
    expect(page.locator(".running .said")).to_contain_text("word0 word1 word2")
    before = page.locator(".running .said").inner_text()
    page.wait_for_function(
        "(length) => document.querySelector('.running .said').innerText.length > length", arg=len(before)
    )
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()


def test_a_second_tab_sees_the_answer_come_and_what_the_first_one_does(
    slow_page_server: Server, open_page: Open
) -> None:
    page = open_page(slow_page_server.url)
    say(page, "slow", done=False)
    expect(page.locator(".running .said")).to_contain_text("word2")
    second = open_page.again(page.context.new_page(), page.url, False)  # type: ignore[attr-defined]
    expect(second.locator(".running .said")).to_contain_text("word0 word1 word2")
    second.locator("#stop").click()
    for tab in (page, second):
        expect(tab.locator("#stop")).to_be_hidden()
        expect(tab.locator(".message.assistant")).to_contain_text("Stopped.")
    assert texts(page) == texts(second)
    page.bring_to_front()  # a browser seldom redraws background tabs
    page.locator(".entry[aria-current=true]").hover()
    page.locator(".entry[aria-current=true]").get_by_role("button", name="Rename").click()
    page.keyboard.insert_text("Two tabs")
    page.keyboard.press("Enter")
    expect(second.locator("h1")).to_have_text("Two tabs")


def test_a_server_that_is_killed_in_the_middle_of_an_answer_has_kept_what_came(
    tmp_path: Path, open_page: Open
) -> None:
    server = Server(tmp_path, 0.02)
    try:
        page = open_page(server.url, lost=True)
        say(page, "slow", done=False)
        expect(page.locator(".running .said")).to_contain_text("word12")
        server.kill()
        page.wait_for_timeout(300)
        expect(page.locator(".running .said")).to_contain_text("word0")
        server.start()
        expect(page.locator(".message.assistant")).to_contain_text("Interrupted")
        text = page.locator(".message.assistant .said").inner_text().strip()
        assert SLOW.startswith(text) and len(text) > 20
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".running .said")).to_contain_text(text)
    finally:
        server.close()


# Conversations


def test_conversations_are_found_renamed_deleted_and_brought_back(tmp_path: Path, open_page: Open) -> None:
    server = Server(tmp_path, DELAY)
    try:
        page = open_page(server.url)
        say(page, "about Lisbon")
        page.locator("#new").click()
        say(page, "about Porto")
        entries = page.locator("#conversations .entry")
        expect(entries).to_have_count(2)
        page.keyboard.press("Control+k")
        page.keyboard.insert_text("lisb")
        expect(entries).to_have_count(1)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("F2")
        page.keyboard.insert_text("The trip")
        page.keyboard.press("Enter")
        expect(entries.first.locator("a")).to_contain_text("The trip")
        page.keyboard.press("Delete")
        expect(entries).to_have_count(0)
        page.get_by_role("button", name="Undo").click()
        expect(entries).to_have_count(1)
        expect(page.locator("h1")).to_have_text("The trip")
        page.close()  # a page whose server has stopped logs an error
    finally:
        server.close()


def test_back_goes_to_the_conversation_before(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "one thing")
    page.locator("#new").click()
    expect(page.locator("#start")).to_be_visible()
    page.go_back()
    expect(answer(page).locator(".said")).to_have_text("You said: one thing")


def test_settings_belong_to_the_conversation_they_were_typed_in(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "one thing")
    first = page.url.rpartition("#")[2]
    page.locator("#settings-toggle").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.locator("#new").click()  # before the page has sent the settings
    say(page, "another")
    second = page.url.rpartition("#")[2]

    def system(name: str) -> object:
        with urllib.request.urlopen(f"{page_server.url}/page/api/conversations/{name}", timeout=30) as answer:
            return json.load(answer)["conversation"]["settings"].get("system")

    assert first != second
    assert (system(first), system(second)) == ("Be kind.", None)


def test_the_skip_link_goes_to_the_field_and_stays_in_the_conversation(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url)
    say(page, "one thing")
    before = page.url
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert page.url == before
    expect(answer(page).locator(".said")).to_have_text("You said: one thing")


def test_a_conversation_that_is_deleted_elsewhere_is_told_and_leaves_the_list(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url, lost=True)
    say(page, "soon gone")
    name = page.url.rpartition("#")[2]
    expect(page.locator(f'#conversations [data-id="{name}"]')).to_have_count(1)
    url = f"{page_server.url}/page/api/conversations/{name}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=30).close()
    expect(page.locator("#notice")).to_have_text("This conversation no longer exists.")
    expect(page.locator("#start")).to_be_visible()
    expect(page.locator(f'#conversations [data-id="{name}"]')).to_have_count(0)


def test_who_deletes_the_open_conversation_is_told_of_no_mistake(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url, lost=True)
    say(page, "mine to delete")
    name = page.url.rpartition("#")[2]
    page.locator(f'#conversations [data-id="{name}"] a').focus()
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    expect(page.locator("#start")).to_be_visible()
    page.wait_for_timeout(300)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_model_that_is_not_served_any_more_is_shown_and_another_can_be_chosen(
    page_server: Server, open_page: Open
) -> None:
    url, body = f"{page_server.url}/page/api/conversations", b'{"settings": {"model": "gone"}}'
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        name = json.loads(response.read())["conversation"]["id"]
    page = open_page(f"{page_server.url}/#{name}")
    expect(page.locator("#model")).to_have_value("gone")
    with page.expect_response(f"**/conversations/{name}"):
        page.locator("#model").select_option("tiny-chat")
    say(page, "hi")
    expect(answer(page).locator(".said")).to_have_text("You said: hi")
