"""The chat page in a browser: messages, tokens and comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser_pages import (
    Open,
    Server,
    answer,
    expect,
    needs_chromium,
    say,
    wait_for_settings,
    wait_until_still,
)
from page_models import SKY, SLOW

pytestmark = [needs_chromium, pytest.mark.long]


# Talking


def test_a_message_is_sent_with_enter_and_its_answer_is_rendered(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url)
    say(page, "Why is the sky blue?")
    expect(answer(page).locator("strong")).to_have_text("short")
    expect(answer(page).locator("table td.right").first).to_have_text("450")
    expect(answer(page).locator(".code .language")).to_have_text("python")
    expect(page.locator("#conversations .entry")).to_have_count(1)
    expect(page).to_have_title("Why is the sky blue? · Tercet")
    expect(page.locator("#status")).to_have_text("The answer is complete")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_code_is_copied_with_a_button(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url, permissions=["clipboard-read", "clipboard-write"])
    say(page, "sky")
    answer(page).get_by_role("button", name="Copy").first.click()
    expect(answer(page).get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == SKY.split("```python\n")[1].split("```")[0]


def test_what_has_been_streamed_stays_where_it_is(slow_page_server: Server, open_page: Open) -> None:
    page = open_page(slow_page_server.url)
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


def test_who_reads_further_up_is_not_moved(slow_page_server: Server, open_page: Open) -> None:
    page = open_page(slow_page_server.url, viewport={"width": 1280, "height": 420})
    say(page, "long", done=False)
    expect(page.locator(".running .said > :nth-child(3)")).to_be_visible()
    # A piece that arrives between the scroll and its event scrolls down once more; a reader scrolls up again.
    page.wait_for_function(
        "() => { document.getElementById('thread').scrollTop = 0; return !document.getElementById('latest').hidden; }"
    )
    expect(page.locator("#latest")).to_be_visible()
    expect(page.locator(".running .said > :nth-child(5)")).to_be_attached()
    assert page.locator("#thread").evaluate("(thread) => thread.scrollTop") == 0
    page.locator("#latest").click()
    expect(page.locator("#latest")).to_be_hidden()
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()


def test_an_answer_is_stopped_with_escape_and_continued(slow_page_server: Server, open_page: Open) -> None:
    page = open_page(slow_page_server.url)
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


def test_a_message_is_edited_and_both_branches_stay(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
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


def test_an_answer_is_edited_in_place(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "hello")
    answer(page).get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("I would *rather not*.")
    page.get_by_role("button", name="Save").click()
    expect(answer(page).locator("em")).to_have_text("rather not")
    expect(answer(page)).to_contain_text("Edited by you")
    expect(answer(page)).to_contain_text("2/2")


def test_another_answer_is_a_branch_if_it_is_another(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "hello")
    page.locator("#settings-toggle").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("System prompt").fill("Be kind.")
    wait_for_settings(page, page_server, temperature=0.3, system="Be kind.")
    page.locator("#close-settings").click()
    answer(page).get_by_role("button", name="Another answer").click()
    expect(page.get_by_role("group", name="Branch 2 of 2")).to_be_visible()


def test_a_base_model_continues_a_text(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    page.locator("#model").select_option("tiny-base")
    expect(page.locator("#start")).to_contain_text("base model")
    say(page, "At night")
    expect(answer(page)).to_contain_text("a ship came in from the sea")
    page.locator("#send").click()
    expect(page.locator(".message.assistant:not(.running)")).to_have_count(2)


# Inspect


def test_tokens_show_alternatives_and_one_of_them_begins_a_branch(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url)
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


def test_the_prompt_is_shown_token_by_token_with_its_special_tokens(
    page_server: Server, open_page: Open
) -> None:
    page = open_page(page_server.url)
    page.locator("#inspect").click()
    say(page, "hello")
    answer(page).get_by_text("Prompt as the model reads it").click()
    prompt = answer(page).locator(".prompt .tokens")
    expect(prompt.locator(".special")).to_have_text(["<|im_start|>", "<|im_end|>", "<|im_start|>"])
    assert "hello" in prompt.inner_text() and prompt.inner_text().replace("↵", "").endswith("assistant\n")


def test_tokens_are_walked_with_the_keyboard(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
    say(page, "sky")
    page.locator("#inspect").click()
    expect(answer(page)).to_contain_text("mean entropy")
    wait_until_still(page)  # the stored answer replaces the streamed one
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


def test_two_models_are_compared_and_the_vote_is_stored(page_server: Server, open_page: Open) -> None:
    page = open_page(page_server.url)
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
