import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophon import files
from sophon.errors import UserError
from sophon.tensor_files import read_tensors, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["fsync", "replace"])
def full_disk(request, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, request.param, refuse)


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match=r"cannot read .*none: no such file"):
        files.sha256_file(tmp_path / "none")


def test_json_round_trip_keeps_order_and_makes_folders(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"b": [1, 2.5, None], "a": "ü"})
    assert list(files.read_json(path)) == ["b", "a"]
    assert files.read_json(path) == {"b": [1, 2.5, None], "a": "ü"}
    assert names(path.parent) == ["a.json"]


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, full_disk):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"^cannot write .*a\.txt: No space left on device$"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"^cannot write [^\n]*$"):
        files.write_text(tmp_path / "a" / "b", "x")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: it is truncated or not JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "none.json")


def test_tensors_round_trip(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "view": base[3:9],
        "same": base,
        "transposed": base.view(3, 4).t(),
        "images": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(3),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"round": 3, "nested": {"x": [1.5]}})
    loaded, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"round": 3, "nested": {"x": [1.5]}}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()


@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_tensors_are_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    write_tensors(path, {"a": torch.ones(20)}, {})
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(UserError, match=r"a\.safetensors: it is truncated or not a safetensors file"):
        read_tensors(path)


def test_missing_tensors_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        read_tensors(tmp_path)


def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "out"
    for content in ("one", "two"):
        with files.atomic_directory(target) as folder:
            files.write_text(folder / content, content)
            assert folder.parent == target.parent
            assert not (target / content).exists()
        assert names(target) == [content]
        assert names(target.parent) == ["out"]


def test_a_failing_block_keeps_the_old_directory(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def fail_halfway():
        with files.atomic_directory(target) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failing_swap_restores_the_old_directory(tmp_path, monkeypatch, failing_call):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    replace, calls = os.replace, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == failing_call:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_once)
    with (
        pytest.raises(UserError, match=r"cannot write .*out: Permission denied"),
        files.atomic_directory(target) as folder,
    ):
        (folder / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_directory_does_not_replace_a_file_and_follows_links(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not a folder"), files.atomic_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.atomic_directory(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]
