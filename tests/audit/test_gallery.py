import base64
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sophon.audit.gallery import embedded, image_grid, strips, write_gallery
from sophon.errors import UserError


def pictures(count=4, channels=1, size=8, value=200):
    return torch.full((count, channels, size, size), value, dtype=torch.uint8)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def attempt(role="protected", seed=0, attack="a", samples=()):
    return {
        "id": f"{attack}-{role}-{seed}",
        "attack": attack,
        "role": role,
        "seed": seed,
        "samples": [{"step": step, "file": file} for step, file in samples],
    }


# ---- grids ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10), st.sampled_from([1, 3]), st.integers(1, 40), st.none() | st.integers(1, 12))
def test_grid_is_a_whole_picture_of_a_readable_size(count, channels, size, columns):
    image = opened(image_grid(pictures(count, channels, size), columns))
    assert image.format == "PNG"
    assert max(image.size) >= 256
    wide = min(columns or math.ceil(math.sqrt(count)), count)
    assert image.width % (wide * (size + 1) + 1 if count > 1 else size) == 0


def test_grid_keeps_pixels_as_they_are():
    image = opened(image_grid(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1) * 60, columns=2))
    factor = image.width // 5
    seen = [image.getpixel((x * factor, y * factor))[0] for y in (1, 3) for x in (1, 3)]
    assert seen == [0, 60, 120, 180]
    assert image.getpixel((0, 0)) == (255, 255, 255)


# ---- the gallery ----------------------------------------------------------------------------------------------------


def test_gallery_writes_a_file_for_each_title(tmp_path):
    titles = {"Real images of Fashion MNIST": pictures(), "released": pictures(9, 3, 16)}
    gallery = write_gallery(tmp_path, titles)
    assert gallery == [
        {"title": "Real images of Fashion MNIST", "file": "samples/real-images-of-fashion-mnist.png"},
        {"title": "released", "file": "samples/released.png"},
    ]
    assert [opened((tmp_path / entry["file"]).read_bytes()).format for entry in gallery] == ["PNG", "PNG"]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert write_gallery(tmp_path, titles) == gallery
    assert write_gallery(tmp_path, {}) == []


@settings(max_examples=20)
@given(st.lists(st.text(max_size=6) | st.sampled_from(["a", "A", "a.", "a 2", "../x", "/"]), max_size=6, unique=True))
def test_any_titles_get_files_of_their_own_below_the_folder(tmp_path_factory, titles):
    folder = tmp_path_factory.mktemp("gallery")
    gallery = write_gallery(folder, {title: pictures(1, size=1) for title in titles})
    assert [entry["title"] for entry in gallery] == titles
    assert len({entry["file"] for entry in gallery}) == len(titles)
    for entry in gallery:
        assert (folder / entry["file"]).parent == folder / "samples"
        assert embedded(folder, entry["file"])


def test_gallery_in_an_unwritable_folder(tmp_path):
    (tmp_path / "samples").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_gallery(tmp_path, {"real": pictures()})


# ---- pictures in a page ---------------------------------------------------------------------------------------------


def test_embedded_picture_is_the_file(tmp_path):
    data = image_grid(pictures())
    (tmp_path / "a.png").write_bytes(data)
    head, _, body = embedded(tmp_path, "a.png").partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == data


@pytest.mark.parametrize("keep", [0, 4, 50, 300])
def test_damaged_picture_is_not_embedded(tmp_path, keep):
    (tmp_path / "a.png").write_bytes(image_grid(pictures())[:keep])
    assert embedded(tmp_path, "a.png") is None


def test_picture_of_another_kind_is_not_embedded(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("<script>alert(1)</script>")
    (tmp_path / "folder.png").mkdir()
    assert [embedded(tmp_path, name) for name in ("a.png", "text.png", "folder.png")] == [None, None, None]


def test_picture_elsewhere_is_not_embedded(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(image_grid(pictures()))
    for file in ("../secret.png", str(tmp_path / "secret.png"), "missing.png", "a\0b.png", ""):
        assert embedded(tmp_path / "run", file) is None


# ---- strips ---------------------------------------------------------------------------------------------------------


def test_strips_have_a_row_for_each_role_and_a_column_for_each_step(tmp_path):
    (tmp_path / "p0.png").write_bytes(image_grid(pictures()))
    attempts = [
        attempt("protected", samples=[(10, "p10.png"), (0, "p0.png")]),
        attempt("scratch", samples=[(0, "s0.png")]),
        attempt("unprotected"),
        attempt("protected", attack="b"),
    ]
    found = strips(tmp_path, attempts, ["b", "a"], ["scratch", "unprotected", "protected"])
    assert list(found) == ["a"]
    strip = found["a"]
    assert strip.steps == [0, 10]
    assert list(strip.rows) == ["scratch", "protected"]
    assert strip.rows["scratch"][1] is None
    assert strip.rows["scratch"][0].uri is None
    first, second = strip.rows["protected"]
    assert (first.file, first.alt) == ("p0.png", "generated by the protected model after 0 steps of a")
    assert first.uri.startswith("data:image/png;base64,")
    assert (second.file, second.uri) == ("p10.png", None)


def test_strips_show_the_first_seed_in_any_order(tmp_path):
    attempts = [attempt(seed=seed, samples=[(0, f"{seed}.png")]) for seed in (2, 1)] + [attempt(seed=0)]
    for order in (attempts, attempts[::-1]):
        assert strips(tmp_path, order, ["a"], ["protected"])["a"].rows["protected"][0].file == "1.png"


def test_old_records_have_no_pictures(tmp_path):
    old = attempt()
    del old["samples"]
    assert strips(tmp_path, [old, attempt(seed=1) | {"samples": None}], ["a"], ["protected"]) == {}
