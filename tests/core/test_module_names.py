"""What modules are named, and what they may import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """It would take its place when a file beside it is run as a script."""
    folders = ("robuq_core", "server", "train", "bench", "scripts", "loadtest")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    modules = [path for path in found if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))]
    assert len(modules) > 100
    assert [str(path.relative_to(ROOT)) for path in modules if path.stem in sys.stdlib_module_names] == []


def test_configurations_and_the_help_of_the_programs_need_no_torch() -> None:
    """It takes seconds to import."""
    modules = "robuq_core.config, robuq_core.cli, server.cli, server.settings, train.cli"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
