"""Shared by all tests: hypothesis without deadlines (CI machines stall), one torch thread, as tests share their cores,
and which tests `make test` skips."""

from __future__ import annotations

import shutil
from collections import Counter
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
    "core/kernels/test_triton_compile.py": "triton",
    "core/kernels/test_triton_layers.py": "triton",
    "core/kernels/test_triton_tuning.py": "triton",
    "core/models/test_adapters_diffusers.py": "diffusers",
    "core/test_decode.py": "diffusers",
    "core/test_diffusers_pipeline.py": "diffusers",
    "core/test_diffusers_schedulers.py": "diffusers",
    "core/test_hub.py": "huggingface_hub",
    "core/test_hub_online.py": "huggingface_hub",
    "core/test_model_card.py": "huggingface_hub",
    "documentation/test_site.py": "mkdocs",
    "documentation/test_wheel.py": "build",
    "load/test_locustfile.py": "locust",
    "load/test_scenarios.py": "locust",
    "ptx/test_mutations.py": "triton",
    "serving/deploy": "promql_parser",
    "serving/test_kserve_client.py": "tritonclient",
    "serving/test_latent_serving.py": "diffusers",
    "serving/test_openai_api.py": "openai",
    "serving/test_openapi_conformance.py": "schemathesis",
    "serving/test_ray_app.py": "ray",
    "serving/test_ray_metrics.py": "ray",
    "serving/test_ray_routing.py": "ray",
    "serving/test_ray_scaling.py": "ray",
    "serving/test_tracing.py": "opentelemetry.sdk",
    "serving/web": "playwright",
    "tools/test_gpu_run.py": "triton",
    "tools/test_licences.py": "cyclonedx_py",
    "training/data/test_latents.py": "diffusers",
    "training/data/test_parquet.py": "pyarrow",
    "training/stages/test_pretrained.py": "diffusers",
}
COMMANDS = {
    "slow": "slow tests (make test-all)",
    "browser": "tests of a browser (make test-all with Chromium)",
    "gpu": "tests of a GPU (pytest -m gpu)",
}


def package_of(path: Path) -> str | None:
    names = path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""
    return next((package for key, package in NEEDS.items() if names == key or names.startswith(f"{key}/")), None)


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


class NotRun:
    """Counts tests that this run skips; a worker of pytest-xdist sends its counts to the process that reports."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.packages: set[str] = set()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        package = package_of(collection_path)
        if package is None or is_installed(package):
            return None
        self.packages.add(package)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if package_of(item.path) and not item.get_closest_marker("browser"):
                item.add_marker("slow")

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        for item in items:
            marks = [name for name in ("gpu", "browser", "slow") if item.get_closest_marker(name)]
            self.counts[marks[0] if marks else "fast"] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["not_run"] = (dict(self.counts), sorted(self.packages))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        counts, packages = getattr(node, "workeroutput", {}).get("not_run", ({}, []))
        self.counts |= Counter(counts)  # each worker collects all tests
        self.packages |= set(packages)

    @staticmethod
    def skipped(terminalreporter: Any) -> list[Any]:
        return [report for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        parts = [f"{self.counts[name]} {text}" for name, text in COMMANDS.items() if self.counts[name]]
        if self.counts["fast"]:
            parts.append(f"{self.counts['fast']} fast tests (make test)")
        skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in self.skipped(terminalreporter))
        parts += [f"{count} skipped: {reason}" for reason, count in skipped.most_common()]
        if self.packages:
            parts.append(f"files that need {', '.join(sorted(self.packages))} (make test-all)")
        if parts:
            terminalreporter.write_line(f"Not run: {'; '.join(parts)}.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NotRun(), "not-run")


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
