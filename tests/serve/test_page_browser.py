"""The chat page in a browser: headless Chromium against a server in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_models import SKY, SLOW

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -e '.[dev]')"
)
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)

SERVER = Path(__file__).with_name("page_models.py")
DELAY = 0.002  # seconds a token, where a test does not need to be in the middle of an answer


class Server:
    """The page's server, which can be killed and started again at the same place."""

    def __init__(self, directory: Path, delay: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.database, self.delay = directory / "chat.db", delay
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(SERVER), str(self.port), str(self.database), str(self.delay)]
        self.process = subprocess.Popen(command)
        for _ in range(400):
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/page/api{path}", timeout=5) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("page"), DELAY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("slow"), 0.01)
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # As root, in a container, Chromium's own sandbox can't be set up.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a tab; at the end nothing must have gone wrong in any, nor anything been asked of strangers."""
    contexts, problems = [], []

    def open_one(url: str, lost: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(8000)
        contexts.append(context)
        return watched(context.new_page(), url, lost)

    def watched(page: Page, url: str, lost: bool) -> Page:
        origin = "/".join(url.split("/")[:3])

        def asked(request: Any) -> None:
            if not request.url.startswith((origin, "data:", "blob:")):
                problems.append(f"asked for {request.url}")

        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("request", asked)
        if not lost:  # a server that is killed leaves errors behind
            page.on(
                "console", lambda one: problems.append(one.text) if one.type in ("error", "warning") else None
            )
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.goto(url)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    open_one.again = watched  # type: ignore[attr-defined]
    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


def say(page: Page, text: str, done: bool = True) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    if done:
        expect(page.locator(".message.assistant:not(.running)").last).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden()


def answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def texts(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".message .said").all_inner_texts()]


# Talking


def test_a_message_is_sent_with_enter_and_its_answer_is_rendered(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "Why is the sky blue?")
    expect(answer(page).locator("strong")).to_have_text("short")
    expect(answer(page).locator("table td.right").first).to_have_text("450")
    expect(answer(page).locator(".code .language")).to_have_text("python")
    expect(page.locator("#conversations .entry")).to_have_count(1)
    expect(page).to_have_title("Why is the sky blue? · Tercet")
    expect(page.locator("#status")).to_have_text("The answer is complete")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_code_is_copied_with_a_button(server: Server, open_page: Open) -> None:
    page = open_page(server.url, permissions=["clipboard-read", "clipboard-write"])
    say(page, "sky")
    answer(page).get_by_role("button", name="Copy").first.click()
    expect(answer(page).get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == SKY.split("```python\n")[1].split("```")[0]


def test_what_has_been_streamed_stays_where_it_is(slow_server: Server, open_page: Open) -> None:
    page = open_page(slow_server.url)
    say(page, "long", done=False)
    expect(page.locator(".running .said > :nth-child(3)")).to_be_visible()
    page.evaluate("() => { window.first = document.querySelector('.running .said > :first-child'); }")
    box = "() => [window.first.offsetTop, window.first.offsetHeight, window.first.isConnected]"
    before = page.evaluate(box)
    expect(page.locator(".running .said > :nth-child(5)")).to_be_visible()
    assert page.evaluate(box) == before, "the same element at the same place"
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()
    last = page.evaluate(
        "() => document.querySelector('.assistant:not(.running) .said > :first-child').offsetTop"
    )
    assert last == before[0], "nor does the end of the answer move it"


def test_who_reads_further_up_is_not_moved(slow_server: Server, open_page: Open) -> None:
    page = open_page(slow_server.url, viewport={"width": 1280, "height": 420})
    say(page, "long", done=False)
    expect(page.locator(".running .said > :nth-child(3)")).to_be_visible()
    page.locator("#thread").evaluate("(thread) => { thread.scrollTop = 0; }")
    expect(page.locator("#latest")).to_be_visible()
    expect(page.locator(".running .said > :nth-child(5)")).to_be_attached()
    assert page.locator("#thread").evaluate("(thread) => thread.scrollTop") == 0
    page.locator("#latest").click()
    expect(page.locator("#latest")).to_be_hidden()
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()


def test_an_answer_is_stopped_with_escape_and_continued(slow_server: Server, open_page: Open) -> None:
    page = open_page(slow_server.url)
    say(page, "slow", done=False)
    expect(page.locator(".running .said")).to_contain_text("word3")
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden()
    expect(answer(page)).to_contain_text("Stopped.")
    stopped = answer(page).locator(".said").inner_text()
    assert SLOW.startswith(stopped.strip())
    answer(page).get_by_role("button", name="Continue").click()
    expect(page.locator(".running .said")).to_contain_text(stopped.strip()[:30])
    page.locator("#stop").click()
    expect(answer(page)).to_contain_text("2/2")


def test_a_message_is_edited_and_both_branches_stay(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "first words")
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("other words")
    page.keyboard.press("Enter")
    expect(answer(page).locator(".said")).to_have_text("You said: other words")
    expect(page.get_by_role("group", name="Branch 2 of 2")).to_be_visible()
    page.get_by_role("button", name="Previous branch").click()
    expect(answer(page).locator(".said")).to_have_text("You said: first words")
    page.keyboard.press("Alt+ArrowRight")
    expect(answer(page).locator(".said")).to_have_text("You said: other words")


def test_an_answer_is_edited_in_place(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "hello")
    answer(page).get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("I would *rather not*.")
    page.get_by_role("button", name="Save").click()
    expect(answer(page).locator("em")).to_have_text("rather not")
    expect(answer(page)).to_contain_text("Edited by you")
    expect(answer(page)).to_contain_text("2/2")


def test_another_answer_is_a_branch_if_it_is_another(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "hello")
    page.locator("#settings-toggle").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("System prompt").fill("Be kind.")
    page.wait_for_timeout(500)  # settings are sent a moment after they were typed
    page.locator("#close-settings").click()
    answer(page).get_by_role("button", name="Another answer").click()
    expect(page.get_by_role("group", name="Branch 2 of 2")).to_be_visible()


def test_a_base_model_continues_a_text(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.locator("#model").select_option("tiny-base")
    expect(page.locator("#start")).to_contain_text("base model")
    say(page, "At night")
    expect(answer(page)).to_contain_text("a ship came in from the sea")
    page.locator("#send").click()
    expect(page.locator(".message.assistant:not(.running)")).to_have_count(2)


# Inspect


def test_tokens_show_alternatives_and_one_of_them_begins_a_branch(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "Why is the sky blue?")
    page.locator("#inspect").click()
    tokens = answer(page).locator(".said .token")
    expect(tokens.first).to_have_text("The")
    assert answer(page).locator(".said").inner_text().replace("↵", "").startswith("The sky is blue because")
    expect(answer(page).locator(".token.special").last).to_have_text("<|im_end|>")
    expect(answer(page)).to_contain_text("tokens/s")
    expect(answer(page)).to_contain_text("mean entropy")
    tokens.nth(3).click()
    card = page.get_by_role("dialog", name="Token")
    expect(card).to_contain_text("bits of surprise")
    expect(card.locator("li")).to_have_count(10)
    shares = [float(text.strip("< %")) for text in card.locator(".bar-share").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
    other = card.locator("li:not(.taken)").first
    word = other.locator(".bar-text").inner_text().replace("␣", " ").strip()
    other.locator("button").click()
    expect(answer(page)).to_contain_text("2/2")
    picked = answer(page).locator(".said .token.picked")
    expect(picked).to_have_count(1)
    assert picked.inner_text().strip() == word
    assert answer(page).locator(".said").inner_text().startswith("The sky is")


def test_the_prompt_is_shown_token_by_token_with_its_special_tokens(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.locator("#inspect").click()
    say(page, "hello")
    answer(page).get_by_text("Prompt as the model reads it").click()
    prompt = answer(page).locator(".prompt .tokens")
    expect(prompt.locator(".special")).to_have_text(["<|im_start|>", "<|im_end|>", "<|im_start|>"])
    assert "hello" in prompt.inner_text() and prompt.inner_text().replace("↵", "").endswith("assistant\n")


def test_tokens_are_walked_with_the_keyboard(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "sky")
    page.locator("#inspect").click()
    expect(answer(page)).to_contain_text("mean entropy")
    page.wait_for_timeout(300)  # until the stored answer has taken the place of the one that was streamed
    tokens = answer(page).locator(".said .tokens")
    tokens.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    card = page.get_by_role("dialog", name="Token")
    expect(card.locator("h3")).to_contain_text("␣sky")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    expect(card.locator("li button").nth(1)).to_be_focused()
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    expect(tokens).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    if card.locator("li.taken button:focus").count():
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("2/2")


# Compare


def test_two_models_are_compared_and_the_vote_is_stored(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.locator("#compare").click()
    expect(page.locator("#against")).to_have_value("tiny-tuned")
    page.get_by_label("Message", exact=True).fill("Why is the sky blue, compared?")
    page.keyboard.press("Enter")
    columns = page.locator(".columns > div")
    expect(columns.nth(0)).to_contain_text("tiny-chat")
    expect(columns.nth(1)).to_contain_text("That is all.")
    expect(page.locator("#stop")).to_be_hidden()
    left, right = (columns.nth(side).bounding_box() for side in (0, 1))
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    page.get_by_role("button", name="Second is better").click()
    expect(page.get_by_role("button", name="Second is better")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.get_by_role("button", name="Second is better")).to_have_attribute("aria-pressed", "true")
    with page.expect_download() as download:
        page.locator("#export-pairs").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    row = next(row for row in rows if row["prompt"][-1]["content"] == "Why is the sky blue, compared?")
    assert row["chosen"][0]["content"].endswith("That is all.") and row["rejected"][0]["content"] == SKY


# Tabs, reloads, restarts


def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(slow_server: Server, open_page: Open) -> None:
    page = open_page(slow_server.url)
    say(page, "slow", done=False)
    expect(page.locator(".running .said")).to_contain_text("word2")
    page.reload()
    expect(page.locator(".running .said")).to_contain_text("word0 word1 word2")
    before = page.locator(".running .said").inner_text()
    page.wait_for_timeout(300)
    assert len(page.locator(".running .said").inner_text()) > len(before)
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()


def test_a_second_tab_sees_the_answer_come_and_what_the_first_one_does(
    slow_server: Server, open_page: Open
) -> None:
    page = open_page(slow_server.url)
    say(page, "slow", done=False)
    expect(page.locator(".running .said")).to_contain_text("word2")
    second = open_page.again(page.context.new_page(), page.url, False)  # type: ignore[attr-defined]
    expect(second.locator(".running .said")).to_contain_text("word0 word1 word2")
    second.locator("#stop").click()
    for tab in (page, second):
        expect(tab.locator("#stop")).to_be_hidden()
        expect(tab.locator(".message.assistant")).to_contain_text("Stopped.")
    assert texts(page) == texts(second)
    page.bring_to_front()  # a browser draws the tabs behind only now and then
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
        expect(page.locator(".message.assistant")).to_contain_text("Interrupted", timeout=15_000)
        kept = page.locator(".message.assistant .said").inner_text().strip()
        assert SLOW.startswith(kept) and len(kept) > 20
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".running .said")).to_contain_text(kept)
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


def test_back_goes_to_the_conversation_before(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "one thing")
    page.locator("#new").click()
    expect(page.locator("#start")).to_be_visible()
    page.go_back()
    expect(answer(page).locator(".said")).to_have_text("You said: one thing")


def test_settings_belong_to_the_conversation_they_were_typed_in(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "one thing")
    first = page.url.rpartition("#")[2]
    page.locator("#settings-toggle").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.locator("#new").click()  # within the moment that settings wait for more to be typed
    say(page, "another")
    second = page.url.rpartition("#")[2]

    def system(name: str) -> object:
        with urllib.request.urlopen(f"{server.url}/page/api/conversations/{name}", timeout=5) as answer:
            return json.load(answer)["conversation"]["settings"].get("system")

    assert first != second
    assert (system(first), system(second)) == ("Be kind.", None)


def test_the_skip_link_goes_to_the_field_and_stays_in_the_conversation(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url)
    say(page, "one thing")
    before = page.url
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert page.url == before
    expect(answer(page).locator(".said")).to_have_text("You said: one thing")


def test_a_conversation_that_is_deleted_elsewhere_is_told_and_leaves_the_list(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url, lost=True)
    say(page, "soon gone")
    name = page.url.rpartition("#")[2]
    expect(page.locator(f'#conversations [data-id="{name}"]')).to_have_count(1)
    url = f"{server.url}/page/api/conversations/{name}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=5).close()
    expect(page.locator("#notice")).to_have_text("This conversation no longer exists.")
    expect(page.locator("#start")).to_be_visible()
    expect(page.locator(f'#conversations [data-id="{name}"]')).to_have_count(0)


def test_who_deletes_the_open_conversation_is_told_of_no_mistake(server: Server, open_page: Open) -> None:
    page = open_page(server.url, lost=True)
    say(page, "mine to delete")
    name = page.url.rpartition("#")[2]
    page.locator(f'#conversations [data-id="{name}"] a').focus()
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    expect(page.locator("#start")).to_be_visible()
    page.wait_for_timeout(300)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_model_that_is_not_served_any_more_is_shown_and_another_can_be_chosen(
    server: Server, open_page: Open
) -> None:
    url, body = f"{server.url}/page/api/conversations", b'{"settings": {"model": "gone"}}'
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=5) as made:
        name = json.loads(made.read())["conversation"]["id"]
    page = open_page(f"{server.url}/#{name}")
    expect(page.locator("#model")).to_have_value("gone")
    with page.expect_response(f"**/conversations/{name}"):
        page.locator("#model").select_option("tiny-chat")
    say(page, "hi")
    expect(answer(page).locator(".said")).to_have_text("You said: hi")


# What a model writes can do nothing


def test_an_answer_full_of_attacks_is_inert(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
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
        "() => [...document.querySelectorAll('.turns *')].flatMap((one) => [...one.attributes])"
        ".map(({name}) => name).filter((name) => name.startsWith('on'))"
    )
    assert handlers == []


def test_even_html_that_came_through_could_not_run_a_script(server: Server, open_page: Open) -> None:
    page = open_page(server.url, lost=True)
    page.evaluate(
        "() => { const script = document.createElement('script'); const box = document.createElement('div');"
        "try { script.textContent = 'window.stolen = 1'; document.body.append(script); } catch {}"
        "try { box.innerHTML = '<img src=x onerror=\"window.stolen = 2\">'; document.body.append(box); } catch {}"
        "try { box.setAttribute('onclick', 'window.stolen = 3'); box.click(); } catch {} }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.stolen") is None


# For everyone


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_list_is_a_drawer(
    server: Server, open_page: Open
) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    page = open_page(server.url, **phone)
    say(page, "Why is the sky blue?")
    for mode in ("reading", "inspecting"):
        wide = page.evaluate(
            "() => [...document.querySelectorAll('main, main *')].filter((one) => one.getClientRects().length && "
            "!one.closest('pre, table, .unseen') && one.getBoundingClientRect().right > innerWidth + 1)"
            ".map((one) => one.outerHTML.slice(0, 80))"
        )
        assert wide == [], mode
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        page.locator("#inspect").click()
        page.wait_for_timeout(150)
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations", exact=True).click()
    expect(page.locator("#sidebar")).to_be_in_viewport()
    page.locator("#new").click()
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    small = page.evaluate(
        "() => [...document.querySelectorAll('button, a, select, summary')].filter((one) => one.checkVisibility() && "
        "!one.matches('.skip')).filter((one) => Math.min(one.offsetWidth, one.offsetHeight) < 24).map((one) => one.id)"
    )
    assert small == [], "WCAG 2.2 asks for 24 pixels"


# Of every text that is seen: its colour over what is behind it, by WCAG's formula.
CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (one) => {
    const layers = [];
    for (let at = one; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [text, one] = [walker.currentNode.data.trim(), walker.currentNode.parentElement];
    if (!text || !one.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (one.closest('.unseen, .skip, :disabled, option, svg')) continue;
    const below = ground(one);
    const pair = [light(over(parse(getComputedStyle(one).color), below)), light(below)];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${one.className} ${text.slice(0, 30)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_asks_for(server: Server, open_page: Open, scheme: str) -> None:
    page = open_page(server.url, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    say(page, "Why is the sky blue?")
    page.locator("#settings-toggle").click()
    assert page.evaluate(CONTRAST) == []
    page.locator("#close-settings").click()
    page.locator("#inspect").click()
    answer(page).locator(".said .token").nth(5).click()
    answer(page).get_by_text("Prompt as the model reads it").click()
    assert page.evaluate(CONTRAST) == []


def test_every_control_has_a_name(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    say(page, "sky")
    page.locator("#inspect").click()
    page.locator("#settings-toggle").click()
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, a[href], input, textarea, select, summary')].filter((one) => "
        "one.checkVisibility() && !(one.ariaLabel || one.textContent.trim() || [...(one.labels ?? [])].some((label) => "
        "label.textContent.trim()))).map((one) => one.outerHTML)"
    )
    assert nameless == []


def test_the_page_is_used_with_the_keyboard_alone(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
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


def test_light_and_dark_follow_the_system_until_one_is_chosen(server: Server, open_page: Open) -> None:
    page = open_page(server.url, color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(23, 23, 21)"
    page.locator("#theme").click()
    assert page.evaluate(ground) == "rgb(251, 250, 247)"
    page.reload()
    assert page.evaluate(ground) == "rgb(251, 250, 247)"
