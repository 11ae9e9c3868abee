"""The contact sheet is laid out as it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.evaluation.sheet import contact_sheet, write_sheet


@given(count=st.integers(1, 9), columns=st.integers(1, 5), gap=st.integers(0, 3))
def test_the_contact_sheet_is_a_grid_in_reading_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, columns: int, gap: int
) -> None:
    side, path = 4, tmp_path_factory.mktemp("sheet") / "new" / "sheet.png"
    levels = torch.arange(count) * 20 + 10
    images = (levels / 127.5 - 1)[:, None, None, None].expand(count, 3, side, side)
    contact_sheet(images, columns, path, gap)
    sheet = np.asarray(Image.open(path))
    rows = -(-count // columns)
    assert sheet.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    covered = np.zeros(sheet.shape[:2], dtype=bool)
    for i in range(count):
        top, left = (gap + each * (side + gap) for each in divmod(i, columns))
        assert (sheet[top : top + side, left : left + side] == int(levels[i])).all()
        covered[top : top + side, left : left + side] = True
    assert (sheet[~covered] == 255).all()


def test_small_samples_are_enlarged_by_whole_pixels(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("sheet") / "sheet.png"
    images = torch.rand(70, 3, 8, 8) * 2 - 1
    write_sheet(images, path)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (8 * (96 + 2) + 2, 8 * (96 + 2) + 2, 3)  # 64 of 70
    first = ((images[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (sheet[2:98:12, 2:98:12] == first).all()
