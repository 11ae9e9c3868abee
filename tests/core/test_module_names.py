"""A module named like one of the standard library takes its place when a file beside it is run as a script."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    folders = ("robuq_core", "server", "train", "bench", "scripts", "loadtest")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    modules = [path for path in found if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))]
    assert len(modules) > 100
    assert [str(path.relative_to(ROOT)) for path in modules if path.stem in sys.stdlib_module_names] == []
