"""Drawing in a real browser: by keyboard, with live previews, cancelled, refused."""

from __future__ import annotations

import pytest
from browser_harness import OpenPage
from playwright.sync_api import expect
from serving_harness import WAIT_S, WatchedSampler, live_server, until

from server.fake import FakeSampler

pytestmark = pytest.mark.browser


def test_by_keyboard_alone(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        keyboard = page.page.keyboard
        keyboard.press("Tab")
        expect(page.find(".skip")).to_be_focused()
        keyboard.press("Enter")
        assert page.focused() == "class"
        keyboard.press("Control+A")
        keyboard.type("great white shark")
        page.tab_to("#num_images")
        keyboard.type("3")
        keyboard.press("Enter")
        expect(page.find("#loupe")).to_have_attribute("data-state", "done")
        expect(page.find("#loupe-title")).to_have_text("great white shark")
        expect(page.find("#status")).to_have_text("great white shark is done")
        page.tab_to(".frames li:nth-child(2) button")
        keyboard.press("Enter")
        second = page.find(".frames .frame").nth(1)
        expect(second).to_have_attribute("aria-pressed", "true")
        seed = int(page.find(".edge").first.inner_text())
        expect(page.find("#loupe-facts")).to_contain_text(f"seed{(seed + 1) % 2**32}", use_inner_text=False)


def test_the_class_field_offers_names_and_takes_numbers(open_page: OpenPage) -> None:
    names = ("tench", "goldfish", "<img src=x onerror=alert(1)>", "crane", "crane")
    with live_server(FakeSampler(class_names=names)) as (client, _):
        page = open_page(client.base_url)
        page.described()
        offered = page.find("#class-list option")
        # A name is text, whatever it says; one that two classes have does not decide.
        values = offered.evaluate_all("options => options.map(({ value }) => value)")
        assert values == [*names[:3], "3", "4"]
        assert offered.nth(4).get_attribute("label") == "crane 4"
        page.draw(**{"class": "4"})
        expect(page.find("#loupe-title")).to_have_text("crane")
        expect(page.find("#loupe-facts")).to_contain_text("4 crane")
        page.fill(**{"class": ""})
        page.find("#class-random").click()
        assert page.find("#class").input_value() in values


def test_previews_and_progress_are_live(open_page: OpenPage) -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, _):
        page = open_page(client.base_url)
        page.described()
        sampler.hold()
        page.fill(**{"class": "goldfish"}, num_images=2, steps=6)
        page.find("#generate").click()
        expect(page.find("#loupe-state")).to_have_text("Waiting for its first step")
        expect(page.find("#queue-text")).to_contain_text("running")
        seen = {page.find("#loupe-image").get_attribute("src")}
        for step in (1, 2, 3):
            sampler.permit()
            expect(page.find("#loupe-state")).to_have_text(f"Step {step} of 6")
            for bar in page.find(".strip progress").all():
                expect(bar).to_have_js_property("value", step)
            until(lambda: page.find("#loupe-image").get_attribute("src") not in seen)
            seen.add(page.find("#loupe-image").get_attribute("src"))
        assert len(seen) == 4
        sampler.release()
        expect(page.find("#loupe")).to_have_attribute("data-state", "done")
        expect(page.find("#loupe-state")).to_contain_text("Generated in")
        expect(page.find(".strip progress").first).to_be_hidden()


def test_cancel_frees_the_rows(open_page: OpenPage) -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        page = open_page(client.base_url)
        page.described()
        sampler.hold()
        page.fill(steps=500)
        page.find("#generate").click()
        sampler.permit(2)
        expect(page.find("#loupe-state")).to_have_text("Step 2 of 500")
        page.find("#cancel").click()
        expect(page.find("#loupe-state")).to_have_text("Cancelled at step 2 of 500")
        expect(page.find("#status")).to_have_text("cancelled")
        sampler.release()
        until(lambda: engine.idle)
        page.draw(steps=3)
        expect(page.find("#form-error")).to_be_empty()


def test_several_requests_at_once_and_no_more_than_the_browser_can_hold(open_page: OpenPage) -> None:
    sampler = WatchedSampler()
    with live_server(sampler, max_batch_rows=16) as (client, _):
        page = open_page(client.base_url)
        page.described()
        sampler.hold()
        page.fill(num_images=1)
        for count in range(1, 5):
            page.find("#generate").click()
            expect(page.find(".strip")).to_have_count(count)
        expect(page.find("#generate")).to_have_text("4 running")
        page.find("#generate").press("Enter")
        expect(page.find(".strip")).to_have_count(4)
        sampler.release()
        expect(page.find(".strip[data-state=done]")).to_have_count(4)
        expect(page.find("#generate")).to_have_text("Generate")
        seeds = {edge.inner_text() for edge in page.find(".edge").all()}
        assert len(seeds) == 4


@pytest.mark.parametrize(
    ("control", "value", "message"),
    [
        ("steps", "5000", "steps must be an integer from 1 to 1000"),
        ("guidance_scale", "-1", "guidance_scale must be a number from 0 to 20"),
        ("num_images", "17", "num_images must be an integer from 1 to 16"),
        ("seed", "-2", "seed must be an integer from -1 to 9007199254740991"),
        ("class", "goldfisch", "did you mean: goldfish"),
        ("class", "99", "class_id must be an integer from 0 to 4"),
        ("class", "", "give class_id or class_name"),
    ],
)
def test_an_error_is_shown_at_its_field(open_page: OpenPage, control: str, value: str, message: str) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.expect_status(422)
        page.described()
        page.fill(**{control: value})
        page.find("#generate").click()
        field, error = page.find(f"#{control}"), page.find(f"#{control}-error")
        expect(error).to_contain_text(message)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        assert f"{control}-error" in (field.get_attribute("aria-describedby") or "")
        expect(page.find(".strip")).to_have_count(0)
        field.press("1")
        expect(error).to_be_empty()
        expect(field).not_to_have_attribute("aria-invalid", "true")


def test_a_full_queue_and_a_fault_of_the_model_are_told(open_page: OpenPage) -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {13}
    with live_server(sampler, max_batch_rows=2) as (client, _):
        page = open_page(client.base_url)
        page.described()
        page.expect_status(429)
        page.expect_status(500)
        sampler.hold()
        page.fill(num_images=16, guidance_scale=1)
        page.find("#generate").click()
        assert sampler.entered.acquire(timeout=WAIT_S)
        page.find("#generate").click()
        expect(page.find("#form-error")).to_contain_text("the queue is full; try again in")
        sampler.release()
        expect(page.find(".strip[data-state=done]")).to_have_count(1)
        page.fill(num_images=1, seed=13)
        page.find("#generate").click()
        expect(page.find("#form-error")).to_contain_text("the model failed on this request")
        expect(page.find("#seed")).to_have_value("13")


def test_a_server_that_is_gone_is_told(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
    page.expected_faults.append("Failed to load resource: net::ERR_")
    page.find("#generate").click()
    expect(page.find("#form-error")).to_contain_text("the server cannot be reached")
    expect(page.find("#queue")).to_have_attribute("data-state", "down")


def test_seeds_are_new_unless_they_are_kept(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        seed, lock = page.find("#seed"), page.find("#seed-lock")
        offered = seed.input_value()
        page.draw(num_images=1)
        expect(page.find(".edge").first).to_have_text(offered)  # what is offered is what is drawn
        expect(seed).not_to_have_value(offered)
        lock.click()
        expect(lock).to_have_attribute("aria-pressed", "true")
        kept = seed.input_value()
        page.draw()
        page.draw()
        expect(seed).to_have_value(kept)
        page.find("#seed-random").click()
        expect(seed).not_to_have_value(kept)
        lock.click()
        page.draw(seed=7)  # typing one keeps it
        expect(page.find(".edge").first).to_have_text("7")
        expect(seed).to_have_value("7")
        expect(lock).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("typed", ["", "-1"])
def test_a_seed_that_the_server_chose_is_shown(open_page: OpenPage, typed: str) -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, _):
        page = open_page(client.base_url)
        page.described()
        page.draw(num_images=1, seed=typed)
        ((seed, _),) = sampler.batches[-1]
        expect(page.find(".edge").first).to_have_text(str(seed))
        expect(page.find("#curl")).to_contain_text(f'"seed":{seed},')


def test_the_page_follows_a_swapped_checkpoint(open_page: OpenPage) -> None:
    other = FakeSampler(image_size=64, class_names=("abacus", "banjo"))
    other.checkpoint_name = "other"
    with live_server(FakeSampler()) as (client, engine):
        page = open_page(client.base_url)
        page.described()
        page.draw(**{"class": "1"})
        expect(page.find("#loupe-facts")).to_contain_text("fake")
        engine.swap("other", [other])
        page.draw(**{"class": "1"})
        expect(page.find("#loupe-title")).to_have_text("banjo")
        expect(page.find("#loupe-facts")).to_contain_text("other")
        expect(page.find("#facts")).to_contain_text("64 × 64")
        page.find(".strip").nth(1).locator(".frame").first.click()
        expect(page.find("#loupe-facts")).to_contain_text("fake")
