"""BatchNorm over slices against torch's over the whole."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.protection.sync_batch_norm import WholeBatch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (7, 3, 4, 4)])
def test_batch_norm_of_one_slice_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output, gradients and running statistics, far from zero too, where sums of squares would lose everything."""
    images = (torch.randn(shape, dtype=torch.float64) + 1000 * torch.arange(3).view(3, *[1] * (len(shape) - 2))).to(
        dtype
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for mode in (WholeBatch(lambda row: row[None]), nullcontext()):
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
        layer = kind(3, momentum=0.4, dtype=wide)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
        given = images.clone().requires_grad_()
        with mode:
            found = layer(given)
        (found.float() ** 3).sum().backward()
        results.append([found, given.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    loose = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=loose, atol=loose * 10)


def test_batch_norm_in_evaluation_is_left_alone() -> None:
    def never(row: Tensor) -> Tensor:
        raise AssertionError

    layer, images = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)
    expected = layer(images)
    with WholeBatch(never):
        assert torch.equal(layer(images), expected)
        assert torch.equal(F.batch_norm(images, layer.running_mean, layer.running_var), F.batch_norm(
            images, layer.running_mean, layer.running_var, None, None, False
        ))  # fmt: skip
