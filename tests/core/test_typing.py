"""The package is typed for those who import it: mypy knows what a snippet of theirs gets, and sees their mistakes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]

# What lies beneath the public names is left out: the promise is told without it, in a fraction of the time.
CONFIG = """\
[mypy]
python_version = 3.11
disallow_untyped_calls = True
[mypy-torch.*,numpy.*,pydantic.*,safetensors.*,robuq_core.kernels.*,robuq_core.models.*,robuq_core.quant.*]
follow_imports = skip
follow_imports_for_stubs = True
"""

SNIPPET = """\
from pathlib import Path
from robuq_core import RobuQPipeline, RowSpec, Sampler

sampler = Sampler.from_checkpoint(Path("x.safetensors"), decoder="vae", threads=2)
reveal_type(sampler.generate(class_ids=[207, "goldfish"], seed=0))
reveal_type(sampler.image_size)
reveal_type(sampler.timings)
row = sampler.start(RowSpec(class_id=1, seed=0, steps=4, guidance_scale=1.5, sampler="ddim"))
reveal_type(row.done)
pipe = RobuQPipeline.from_pretrained("owner/name").to("cpu")
reveal_type(pipe.get_label_ids(["tench"]))
reveal_type(pipe.labels)
sampler.generate(class_ids=207)
RowSpec(class_id=1, seed=0, steps=4, guidance_scale=1.5, sampler="plms")
RobuQPipeline.from_pretrained("owner/name", custom_pipeline="x")
"""

REVEALED = (
    '"list[PIL.Image.Image]"',
    '"int"',
    '"robuq_core.pipeline.Timings | None"',
    '"bool"',
    '"list[int]"',
    '"dict[str, int]"',
)


def test_the_package_says_that_it_is_typed() -> None:
    assert (resources.files("robuq_core") / "py.typed").is_file()


def test_what_a_caller_gets_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    said, errors, _ = api.run(["--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"), "snippet.py"])
    assert not errors, errors
    lines = [line for line in said.splitlines() if line.startswith("snippet.py")]
    revealed = [line.split("Revealed type is ")[1] for line in lines if "Revealed type is" in line]
    assert revealed == list(REVEALED), said
    mistakes = [line for line in lines if ": error:" in line]
    assert len(mistakes) == 3, said
    for mistake, (number, told) in zip(
        mistakes, ((13, "class_ids"), (14, "sampler"), (15, "custom_pipeline")), strict=True
    ):
        assert mistake.startswith(f"snippet.py:{number}: ")
        assert told in mistake
