"""The page for everybody: names of all controls, contrast, focus, targets, and no horizontal scroll at any width."""

from __future__ import annotations

from typing import Any

import pytest
from browser_harness import WIDTHS, OpenPage, Playground
from playwright.sync_api import expect
from serving_harness import live_server

from server.fake import FakeSampler

pytestmark = pytest.mark.browser

CONTROLS = {
    *("button", "combobox", "textbox", "spinbutton", "link", "progressbar", "dialog", "image", "region"),
}
MIN_TARGET_PX = 24  # WCAG 2.2, 2.5.8

# Text that is seen, with the contrast ratio of its colour against the nearest painted background (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, below) => Object.fromEntries(
    ["r", "g", "b"].map((c) => [c, top[c] * top.a + below[c] * (1 - top.a)]).concat([["a", 1]]));
  const luminance = ({ r, g, b }) => [r, g, b].map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (node) => {
    if (!node) return { r: 255, g: 255, b: 255, a: 1 };
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour.a === 1 ? colour : over(colour, background(node.parentElement));
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const value = node.matches("input, select") && node.value;
    if (!(own || value) || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (node.matches(".visually-hidden, .skip, option, noscript *")) continue;
    const below = background(node);
    const [one, other] = [luminance(over(parse(getComputedStyle(node).color), below)), luminance(below)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([`${node.tagName}#${node.id}.${node.className}: ${node.textContent.trim().slice(0, 30)}`, ratio]);
  }
  return found;
}"""

# Of the element that has the focus: name, width of its outline, height, width.
FOCUS = """() => {
  const node = document.activeElement, style = getComputedStyle(node), box = node.getBoundingClientRect();
  const outline = style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
  return [node === document.body ? '' : node.id || node.className || node.textContent, outline, box.height, box.width];
}"""


def with_results(page: Playground) -> None:
    """A page as it looks in use: results, an error at a field, one at the form."""
    page.described()
    page.expect_status(422)
    page.draw(num_images=16, steps=2)
    page.draw(num_images=1)
    page.fill(steps=5000)
    page.find("#generate").click()
    expect(page.find("#steps-error")).not_to_be_empty()


def accessibility_tree(page: Playground) -> list[dict[str, Any]]:
    session = page.page.context.new_cdp_session(page.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [node for node in nodes if not node.get("ignored")]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_horizontal_scroll(open_page: OpenPage, width: int) -> None:
    long = "a name of many words without an end, " * 4 + "and" + "o" * 60
    with live_server(FakeSampler(class_names=(long, "tench")), max_queue_images=64) as (client, _):
        page = open_page(client.base_url, width=width)
        scrolled = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        page.described()
        assert page.page.evaluate(scrolled) == [width, width]
        page.fill(**{"class": "0"})
        with_results(page)
        assert page.page.evaluate(scrolled) == [width, width]


def test_every_control_has_a_name(open_page: OpenPage) -> None:
    with live_server(FakeSampler(), max_queue_images=64) as (client, _):
        page = open_page(client.base_url)
        with_results(page)
        nodes = accessibility_tree(page)
        controls = [node for node in nodes if node["role"]["value"] in CONTROLS]
        assert len(controls) > 30
        for node in controls:
            assert node.get("name", {}).get("value", "").strip(), node
        page.find("#key-button").click()
        names = {node["name"]["value"] for node in accessibility_tree(page) if node["role"]["value"] == "dialog"}
        assert names == {"API key"}


def test_names_are_what_is_shown_and_ids_are_unique(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        for label in page.find("form#controls label").all():
            expect(page.page.get_by_label(label.inner_text(), exact=True).first).to_be_visible()
        ids = page.page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
        assert len(ids) == len(set(ids))
        dangling = page.page.evaluate(
            "[...document.querySelectorAll('[aria-describedby], [aria-labelledby], [aria-controls], label[for]')]"
            ".flatMap((node) => ['aria-describedby', 'aria-labelledby', 'aria-controls', 'for']"
            "  .flatMap((name) => (node.getAttribute(name) ?? '').split(' ').filter(Boolean)))"
            ".filter((id) => !document.getElementById(id))"
        )
        assert dangling == []
        assert page.page.evaluate("document.documentElement.lang") == "en"
        assert page.page.title() == "RobuQ playground"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: OpenPage, scheme: str) -> None:
    with live_server(FakeSampler(), max_queue_images=64) as (client, _):
        page = open_page(client.base_url, scheme=scheme)
        with_results(page)
        ratios = page.page.evaluate(CONTRASTS)
        assert len(ratios) > 50
        assert [entry for entry in ratios if entry[1] < 4.5] == []


@pytest.mark.parametrize("width", [360, 1440])
def test_focus_is_seen_and_targets_are_large(open_page: OpenPage, width: int) -> None:
    with live_server(FakeSampler(), max_queue_images=64) as (client, _):
        page = open_page(client.base_url, width=width)
        with_results(page)
        page.find(".skip").focus()
        seen = set()
        for _ in range(60):
            page.page.keyboard.press("Tab")
            name, outline, tall, wide = page.page.evaluate(FOCUS)
            if name == "":
                break  # past the last control
            seen.add(name)
            assert outline >= 2, name
            assert min(tall, wide) >= MIN_TARGET_PX, name
        assert {"class", "class-random", "seed", "seed-lock", "generate", "download", "reuse", "copy", "frame"} <= seen
