"""Results in a real browser: kept over visits within bounds, reused, downloaded, and drawn again by the curl line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_harness import OpenPage, Playground
from PIL import Image
from playwright.sync_api import expect
from serving_harness import live_server

from server.fake import FakeSampler
from server.keys import create_key

pytestmark = pytest.mark.browser

STORED = "Object.values(localStorage).join('')"


def download(page: Playground) -> bytes:
    with page.page.expect_download() as started:
        page.find("#download").click()
    return Path(started.value.path()).read_bytes()


def copied_line(page: Playground) -> str:
    page.page.evaluate("window.setTimeout = () => 0")  # the word stays
    page.find("#copy").click()
    expect(page.find("#copy")).to_have_text("Copied")
    line = str(page.page.evaluate("navigator.clipboard.readText()"))
    assert line == page.find("#curl").text_content()
    return line


def run_in_shell(line: str, folder: Path, **environment: str) -> Path:
    """Run a line as a person would who pastes it; the one file that it leaves."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    subprocess.run(["bash", "-c", line], cwd=folder, check=True, timeout=60, env={**os.environ, **environment})
    (made,) = folder.iterdir()
    return made


def pixels(encoded: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_copied_line_draws_the_same_picture(open_page: OpenPage, tmp_path: Path, image_format: str) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        page.find("#format").select_option(image_format)
        page.find("#sampler").select_option("ddpm")
        page.draw(**{"class": "goldfish"}, num_images=3, steps=5, guidance_scale=2.5, seed=2**32 - 2)
        page.find(".frame").nth(2).click()
        expect(page.find(".edge").nth(2)).to_have_text("0")  # seeds wrap around
        kept = download(page)
        made = run_in_shell(copied_line(page), tmp_path)
        assert made.name == f"robuq-1-0.{'jpg' if image_format == 'jpeg' else image_format}"
        assert made.read_bytes() == kept
        np.testing.assert_array_equal(pixels(made.read_bytes()), pixels(kept))


def test_results_are_kept_over_visits(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        page.draw(**{"class": "tench"}, num_images=2, seed=1)
        page.draw(**{"class": "goldfish"}, num_images=1, seed=9, steps=7)
        before, line = download(page), page.find("#curl").text_content()
        page.page.reload()
        expect(page.find(".strip h3")).to_have_text(["goldfish", "tench"])
        expect(page.find(".frame")).to_have_count(3)
        expect(page.find("#loupe-state")).to_have_text("From an earlier visit")
        assert download(page) == before
        expect(page.find("#curl")).to_have_text(line or "", use_inner_text=False)
        page.find("#clear").click()
        expect(page.find(".strip")).to_have_count(0)
        expect(page.find("#loupe-title")).to_have_text("No image yet")
        expect(page.find("#sheet-title")).to_be_focused()
        page.page.reload()
        page.described()
        expect(page.find(".strip")).to_have_count(0)


def test_use_these_settings(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.described()
        page.find("#sampler").select_option("dpmsolver++")
        page.find("#format").select_option("webp")
        page.draw(**{"class": "4"}, num_images=2, steps=9, guidance_scale=3.5, seed=70)
        page.find(".frame").nth(1).click()
        first = download(page)
        page.fill(**{"class": "tench"}, num_images=5, steps=2, guidance_scale=1, seed=0)
        page.find("#reuse").click()
        expect(page.find("#generate")).to_be_focused()
        wanted = {"class": "4", "seed": "71", "num_images": "1", "steps": "9", "guidance_scale": "3.5"}
        for name, value in {**wanted, "sampler": "dpmsolver++", "format": "webp"}.items():
            expect(page.find(f"#{name}")).to_have_value(value)
        expect(page.find("#seed-lock")).to_have_attribute("aria-pressed", "true")
        page.draw()
        assert download(page) == first


@pytest.mark.slow
def test_what_is_kept_is_bounded_in_size(open_page: OpenPage) -> None:
    with live_server(FakeSampler(image_size=136)) as (client, _):  # noise: the text of a file has 75,000 characters
        page = open_page(client.base_url)
        page.described()
        page.fill(num_images=8, steps=1)
        for _ in range(4):
            page.draw()
        assert page.find("#loupe-image").evaluate("image => getComputedStyle(image).imageRendering") == "auto"
        kept = page.page.evaluate(STORED)
        assert len(kept) < 1_600_000
        assert len(json.loads(kept)) == 2
        before = download(page)
        page.page.reload()
        expect(page.find(".strip")).to_have_count(2)
        assert download(page) == before


def test_storage_of_another_version_or_none_at_all(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        page = open_page(client.base_url)
        page.page.evaluate("localStorage.setItem('robuq.sheet.2', '[{\"request\": 3}]')")
        page.page.reload()
        page.described()
        page.draw()
        page.page.add_init_script(
            "for (const name of ['localStorage', 'sessionStorage'])"
            "  Object.defineProperty(window, name, { get() { throw new DOMException('blocked', 'SecurityError'); } });"
        )
        page.page.reload()
        page.described()
        page.draw()


def test_a_server_with_keys(open_page: OpenPage, tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    key = create_key(keys_file, "somebody")
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, _):
        page = open_page(client.base_url)
        page.expect_status(401)
        dialog, field = page.find("#key-dialog"), page.find("#key")
        expect(dialog).to_be_visible()
        expect(field).to_be_focused()
        expect(page.find("#key-reason")).to_contain_text("send an API key")
        expect(page.find("#queue-text")).to_have_text("needs a key")
        field.fill("robuq_wrong")
        field.press("Enter")
        expect(page.find("#key-reason")).to_contain_text("invalid API key")
        field.fill(key)
        field.press("Enter")
        expect(dialog).to_be_hidden()
        page.described()
        expect(page.find("#queue-text")).to_contain_text("ready")
        page.draw(num_images=1)
        kept = download(page)
        assert key not in page.page.evaluate(STORED)
        assert key in page.page.evaluate("Object.values(sessionStorage).join('')")
        line = copied_line(page)
        assert key not in line
        folder = tmp_path / "shell"
        folder.mkdir()
        assert run_in_shell(line, folder, ROBUQ_API_KEY=key).read_bytes() == kept
        page.page.reload()  # the tab remembers it
        page.described()
        expect(dialog).to_be_hidden()


def test_without_a_key_one_may_look_and_try_again(open_page: OpenPage, tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    key = create_key(keys_file, "somebody")
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, _):
        page = open_page(client.base_url)
        page.expect_status(401)
        dialog = page.find("#key-dialog")
        expect(dialog).to_be_visible()
        page.page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(page.find("#form-error")).to_contain_text("API key")
        page.fill(**{"class": "1"})
        page.find("#generate").click()
        expect(dialog).to_be_visible()
        page.find("#key").fill(key)
        page.find("#key").press("Enter")
        expect(page.find("#loupe")).to_have_attribute("data-state", "done")
        expect(page.find("#facts")).to_contain_text("fake")
