import base64

import pytest
import torch
from PIL import Image

from sophon.auditing.gallery import image_grid
from sophon.report.pictures import embedded

GRID = image_grid(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8))


def test_embedded_picture_is_the_file(tmp_path):
    data = GRID
    (tmp_path / "a.png").write_bytes(data)
    head, _, body = embedded(tmp_path, "a.png").partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == data


@pytest.mark.parametrize("keep", [0, 4, 50, 300])
def test_damaged_picture_is_not_embedded(tmp_path, keep):
    (tmp_path / "a.png").write_bytes(GRID[:keep])
    assert embedded(tmp_path, "a.png") is None


def test_picture_of_another_kind_is_not_embedded(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("<script>alert(1)</script>")
    (tmp_path / "folder.png").mkdir()
    assert [embedded(tmp_path, name) for name in ("a.png", "text.png", "folder.png")] == [None, None, None]


def test_picture_elsewhere_is_not_embedded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(GRID)
    for file in ("../secret.png", str(tmp_path / "secret.png"), "missing.png", "a\0b.png", ""):
        assert embedded(tmp_path / "run", file) is None
