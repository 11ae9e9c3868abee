"""The lock files: every package of a serving installation with the SHA-256 of each file published for its version.

    pip install uv
    python scripts/lock.py

``requirements.lock`` has all but torch: it goes beside any build of torch (``pip install --no-deps --require-hashes``).
``requirements-cuda.lock`` is that file and torch as pip takes it by default, with NVIDIA's libraries: complete, for
``pip install --require-hashes``. Versions are those of ``constraints.txt``; torch itself pins NVIDIA's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from robuq_core.errors import UserError
from robuq_core.files import replacing

ROOT = Path(__file__).parents[1]
PLAIN, CUDA = ROOT / "requirements.lock", ROOT / "requirements-cuda.lock"
# What comes with torch's default build for Linux, and with no other.
OF_CUDA = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEAD = "# Made by scripts/lock.py from pyproject.toml and constraints.txt. {use}\n"
PLAIN_USE = "Beside torch: pip install --no-deps --require-hashes -r requirements.lock"
CUDA_USE = "With torch's default build: pip install --require-hashes -r requirements-cuda.lock"


def resolved() -> str:
    """Requirements with hashes, for every platform and every Python from 3.11 on, by uv.

    Raises:
        UserError: uv is not installed, or finds no versions that fit.
    """
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise UserError("uv is not installed: pip install uv")
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version", "3.11",
               "--generate-hashes", "--no-header", "--no-annotate", "--constraint", "constraints.txt",
               "pyproject.toml"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"uv found no versions: {done.stderr.strip()}")
    return done.stdout


def split(text: str) -> tuple[str, str]:
    """The requirements of all installations, and those of torch's default build."""
    blocks = re.findall(r"^\S.*\n(?:    .*\n)*", text, re.M)
    plain = [block for block in blocks if not OF_CUDA.match(block)]
    return "".join(plain), "".join(block for block in blocks if OF_CUDA.match(block))


def main() -> int:
    try:
        plain, cuda = split(resolved())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, content in (
        (PLAIN, HEAD.format(use=PLAIN_USE) + plain),
        (CUDA, HEAD.format(use=CUDA_USE) + f"-r {PLAIN.name}\n" + cuda),
    ):
        with replacing(path) as temporary:
            temporary.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
