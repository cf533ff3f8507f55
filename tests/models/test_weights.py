"""Weights from outside are what a training left, or are refused in one line that leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sophon.errors import UserError
from sophon.models.weights import FLOATS, find_weights, load_state, read_state
from sophon.pickles import refuse_pickle
from tests.tiny import TinyNet, assert_same_state, state_of, tiny_model

State = dict[str, Tensor]
DOCS = Path(__file__).parents[2] / "docs/models.md"


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_floating_precision_becomes_the_models_own(dtype: torch.dtype) -> None:
    model, source = TinyNet(), tiny_model(3)
    given = {name: part.to(dtype) if part.is_floating_point() else part for name, part in source.state_dict().items()}
    load_state(model, given, "x")
    assert all(part.dtype in (torch.float32, torch.int64) for part in model.state_dict().values())
    assert_same_state(model, {name: part.to(model.state_dict()[name].dtype) for name, part in given.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (changed("fc.weight", lambda t, d=dtype: t.to(d)), f"weight 'fc.weight' is of type {name}, not floating")
            for dtype, name in [
                (torch.int8, "int8"),
                (torch.int64, "int64"),
                (torch.bool, "bool"),
                (torch.complex64, "complex64"),
                (torch.float8_e4m3fn, "float8_e4m3fn"),
                (torch.float8_e5m2, "float8_e5m2"),
            ]
        ),
        (changed("bn1.running_mean", lambda t: t.int()), "weight 'bn1.running_mean' is of type int32"),
        (changed("fc.bias", lambda t: t / 0), "weight 'fc.bias' holds NaN or infinite numbers"),
        (changed("conv1.weight", lambda t: t.double() * 0 + 1e300), "'conv1.weight' holds NaN or infinite numbers"),
        (changed("bn2.running_var", lambda t: -t), "weight 'bn2.running_var' is a variance and holds negative"),
        (changed("bn1.num_batches_tracked", lambda t: t.float()), "is of type float32, not whole numbers"),
        (changed("bn1.num_batches_tracked", lambda t: t.bool()), "is of type bool, not whole numbers"),
        (changed("bn1.num_batches_tracked", lambda t: t - 99), "is a counter and is negative"),
        (changed("fc.bias", lambda t: t[:1]), r"does not fit the model: fc.bias \(1,\), not \(3,\)"),
        (changed("fc.bias", lambda t: t[None]), r"does not fit the model: fc.bias \(1, 3\), not \(3,\)"),
        (without("fc.bias"), "does not fit the model: it lacks fc.bias"),
        (lambda state: {**state, "ema.decay": torch.ones(1)}, "does not fit the model: the model has no ema.decay"),
        (lambda state: {}, "it lacks conv1.weight, bn1.weight, bn1.bias and .* more"),
        *(
            (prefixed(p), rf"its names begin with '{p}', the model's do not; give model.strip_prefix='{p}'")
            for p in ("module.", "_orig_mod.", "model.", "_orig_mod.module.", "state.net.")
        ),
    ],
)
def test_what_no_training_leaves_is_refused_and_changes_nothing(change: Callable[[State], State], message: str) -> None:
    model = TinyNet()
    before = state_of(model)
    with pytest.raises(
        UserError, match=f"^key: file{':' if message.startswith('weight') else ''}.*{message}"
    ) as caught:
        load_state(model, change(state_of(tiny_model(3).float())), "key: file")
    assert "\n" not in str(caught.value)
    assert_same_state(model, before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_is_taken_away_where_it_stands(tmp_path: Path, prefix: str) -> None:
    state = state_of(TinyNet())
    save_file(prefixed(prefix)(state), tmp_path / "w.safetensors")
    read = read_state(tmp_path / "w.safetensors", "model.weights", prefix)
    assert read.keys() == state.keys()
    with pytest.raises(UserError, match=r"^model.strip_prefix: 'net.' does not fit the names in .*: "):
        read_state(tmp_path / "w.safetensors", "model.weights", "net.")
    save_file({"a": torch.ones(1), f"{prefix}a": torch.ones(1)}, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match="strip_prefix"):
        read_state(tmp_path / "twice.safetensors", "model.weights", prefix)


@pytest.mark.parametrize("library", ["timm", "diffusers"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, b"") for name in ("net.pth", "net.pth.tar", "a b.CKPT")),
        *(("net.safetensors", head + b"...") for head in (b"PK\x03\x04", b"\x80\x02")),
    ],
)
def test_a_pickle_is_refused_with_code_that_converts_it(
    tmp_path: Path, name: str, content: bytes, library: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^reference: .* is a pickle, which can run any code") as caught:
        refuse_pickle(path, "reference", library)
    code = str(caught.value).split("convert it first: ")[1]
    compile(code, "snippet", "exec")
    if library == "diffusers":
        assert "safe_serialization=True" in code
    else:  # the documentation's
        documented = re.search(r"```python\n(from safetensors.*?)\n```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        assert documented
        places = [repr(str(path)), code.split(", ")[-1].rstrip(")")]
        lines = "; ".join(line for line in documented[1].splitlines() if line)
        assert code == lines.replace('"mine.pth"', places[0]).replace('"mine.safetensors"', places[1])


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_header_as_long_as_a_pickle_is_numbered_is_none(tmp_path: Path, version: int) -> None:
    length = 256 * version + 0x80
    header = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    refuse_pickle(tmp_path / "a.safetensors", "reference")
    assert list(read_state(tmp_path / "a.safetensors", "reference")) == ["a"]


def test_the_code_that_converts_a_pickle_does(tmp_path: Path) -> None:
    model = TinyNet()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError) as caught:
        find_weights(tmp_path / "net.pth", "model.safetensors", "checkpoint", "torchvision")
    exec(str(caught.value).split("convert it first: ")[1], {})
    again = TinyNet()
    load_state(again, read_state(tmp_path / "net.safetensors", "checkpoint"), "checkpoint")
    assert_same_state(again, state_of(model))


def test_a_folder_without_the_file_says_what_it_lacks_or_what_lies_there_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^k: '.*' holds no unet/w.safetensors; save it again"):
        find_weights(tmp_path, "unet/w.safetensors", "k", "diffusers")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model.bin' is a pickle.*model.safetensors"):
        find_weights(tmp_path, "model.safetensors", "k", "timm")


def test_whole_numbers_of_any_width_count() -> None:
    model = TinyNet()
    load_state(model, {**state_of(model), "bn1.num_batches_tracked": torch.tensor(7, dtype=torch.int32)}, "x")
    assert model.bn1.num_batches_tracked == 7


def test_a_bool_buffer_takes_nothing_else() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    load_state(model, {"mask": torch.tensor([True, False])}, "x")
    with pytest.raises(UserError, match="'mask' is of type uint8, not bool"):
        load_state(model, {"mask": torch.tensor([1, 0], dtype=torch.uint8)}, "x")
