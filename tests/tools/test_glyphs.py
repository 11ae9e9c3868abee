"""The glyph data set: which faces are used, how their characters are drawn, and who is held out.

The fonts are matplotlib's: two families of letters, TeX's, and faces of symbols alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
from scripts_loaded import script

from train.data import load_dataset

ROOT = Path(__file__).parents[2]
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# By the first word of their family's name and a share of one half, DejaVu is trained on and STIXGeneral is held out.
TRAINED = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf"]
HELD_OUT = ["STIXGeneral.ttf", "STIXGeneralItalic.ttf"]
LACKING, SYMBOLS = "STIXSizOneSymReg.ttf", "cmsy10.ttf"


@pytest.fixture(scope="module")
def glyphs() -> ModuleType:
    return script("glyphs")


@pytest.fixture(scope="module")
def made(glyphs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some of the faces, one of them twice."""
    root = tmp_path_factory.mktemp("glyphs")
    copy = root / "copy.ttf"
    copy.write_bytes((FONTS / TRAINED[0]).read_bytes())
    (root / "broken.ttf").write_bytes(b"no font")
    paths = [FONTS / name for name in (*TRAINED, *HELD_OUT, LACKING, SYMBOLS)]
    glyphs.make([*paths, root], root / "data", 32, 0.5)
    return root / "data"


def test_every_face_has_its_outcome(made: Path) -> None:
    table = json.loads((made / "faces.json").read_text())
    outcomes = {Path(path).name: face["outcome"] for path, face in table["faces"].items()}
    # Of the same face twice the one whose path comes later goes.
    first, second = sorted([FONTS / TRAINED[0], made.parent / "copy.ttf"])
    assert outcomes.pop(first.name) == "train"
    assert str(first) in outcomes.pop(second.name)
    assert {outcomes.pop(name) for name in TRAINED[1:]} == {"train"}
    assert {outcomes.pop(name) for name in HELD_OUT} == {"test"}
    assert outcomes.pop(LACKING).startswith("lacks")
    assert outcomes.pop(SYMBOLS).startswith("unlike")
    assert outcomes.pop("broken.ttf").startswith("cannot")
    assert not outcomes
    assert table["faces"][str(FONTS / HELD_OUT[0])]["family"] == "STIXGeneral"


def test_training_reads_both_splits(made: Path) -> None:
    train, test = (load_dataset(made, 32, 62, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (62 * len(TRAINED), 62 * len(HELD_OUT))
    assert train.labels.bincount().tolist() == [len(TRAINED)] * 62


def test_characters_are_black_on_white_whole_and_on_one_baseline(glyphs: ModuleType) -> None:
    face = glyphs.draw_face(FONTS / "DejaVuSans.ttf", 32)
    assert face.images.shape == (62, 32, 32)
    assert (face.family, face.group) == ("DejaVu Sans", "dejavu")
    ink = face.images < 255
    # Nothing touches the edge, and together they fill the height.
    assert not ink[:, [0, -1]].any()
    assert not ink[:, :, [0, -1]].any()
    rows = np.flatnonzero(ink.any(axis=(0, 2)))
    assert rows[-1] - rows[0] >= 24
    assert all(image.min() < 64 for image in face.images)

    def box(character: str) -> np.ndarray:
        return np.flatnonzero(ink[glyphs.CHARACTERS.index(character)].any(axis=1))[[0, -1]]

    assert abs(box("H")[1] - box("x")[1]) <= 1
    assert box("p")[1] > box("x")[1] + 2
    assert box("H")[0] < box("x")[0] - 2
    # Centred: as much white on the left as on the right of a symmetrical letter.
    columns = np.flatnonzero(ink[glyphs.CHARACTERS.index("H")].any(axis=0))
    assert abs(columns[0] - (31 - columns[-1])) <= 1


def test_the_same_fonts_give_the_same_bytes(glyphs: ModuleType, made: Path, tmp_path: Path) -> None:
    glyphs.make([FONTS / name for name in (*TRAINED, *HELD_OUT)], tmp_path, 32, 0.5)
    glyphs.make([FONTS / name for name in reversed([*TRAINED, *HELD_OUT])], tmp_path / "again", 32, 0.5)
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_command_takes_a_list_of_paths(
    glyphs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "fonts.txt"
    names.write_text("\n".join(str(FONTS / name) for name in (*TRAINED, *HELD_OUT)) + "\n")
    options = ["--out", str(tmp_path / "data"), "--side", "16", "--held-out", "0.5", f"@{names}"]
    monkeypatch.setattr(sys, "argv", ["glyphs.py", *options])
    glyphs.main()
    assert "train 5" in capsys.readouterr().out
    assert load_dataset(tmp_path / "data", 16, 62).images.shape == (62 * 5, 3, 16, 16)


@pytest.mark.parametrize(
    ("fonts", "named"),
    [("absent", "absent"), ("empty", "empty"), (str(FONTS / "DejaVuSans.ttf"), "held-out"), ("broken", "train")],
)
def test_unusable_fonts_end_in_one_line(
    glyphs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fonts: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "broken"):
        Path(folder).mkdir()
    Path("broken/a.ttf").write_bytes(b"no font")
    monkeypatch.setattr(sys, "argv", ["glyphs.py", "--out", "out", fonts])
    with pytest.raises(SystemExit, match=named) as caught:
        glyphs.main()
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
