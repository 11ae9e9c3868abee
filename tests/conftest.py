"""Shared by all tests: hypothesis without deadlines (CI machines stall), one torch thread, as tests share their cores,
and which tests `make test` skips."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")
torch.set_num_threads(1)

TESTS = Path(__file__).parent
# Files and folders whose tests need a package of the extra `dev-all`. They count as slow.
NEEDS = {
    "core/benchmarks/test_bench_peers.py": "torchao",
    "core/kernels/test_triton_attention.py": "triton",
    "core/kernels/test_triton_budgets.py": "triton",
    "core/kernels/test_triton_layers.py": "triton",
    "core/kernels/test_triton_tuning.py": "triton",
    "core/models/test_adapters_diffusers.py": "diffusers",
    "core/test_decode.py": "diffusers",
    "core/test_diffusers_pipeline.py": "diffusers",
    "core/test_hub.py": "huggingface_hub",
    "documentation/test_site.py": "mkdocs",
    "documentation/test_wheel.py": "build",
    "load/test_locustfile.py": "locust",
    "load/test_scenarios.py": "locust",
    "ptx/test_mutations.py": "triton",
    "serving/deploy": "promql_parser",
    "serving/test_latent_serving.py": "diffusers",
    "serving/test_openai_api.py": "openai",
    "serving/test_openapi_conformance.py": "schemathesis",
    "serving/test_ray_app.py": "ray",
    "serving/test_ray_support.py": "ray",
    "serving/test_tracing.py": "opentelemetry.sdk",
    "serving/web": "playwright",
    "tools/test_gpu_run.py": "triton",
    "training/data/test_latents.py": "diffusers",
    "training/data/test_parquet.py": "pyarrow",
    "training/stages/test_pretrained.py": "diffusers",
}


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


_MISSING = {name: package for name, package in NEEDS.items() if not _is_installed(package)}
collect_ignore = list(_MISSING)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        if f"{path}/".startswith(tuple(f"{name}/" for name in NEEDS)) and not item.get_closest_marker("browser"):
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _MISSING:
        packages = ", ".join(sorted(set(_MISSING.values())))
        terminalreporter.write_line(f"Not collected: files that need {packages} (make test-all).")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser per module, since Playwright's event loop runs until it is closed, and tests that follow start their
    own. Skips the test where there is none."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: install Chromium (apt install chromium) or Chrome")
    # No sandbox: tests run as root in containers. The rest keeps Chromium from calling home.
    arguments = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync"),
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()
