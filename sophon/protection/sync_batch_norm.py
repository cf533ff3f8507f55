"""BatchNorm over a batch that is spread over ranks: the same function of the whole batch as on one device.

`torch.nn.SyncBatchNorm` does this for CUDA alone, and by replacing modules; here the call is caught, whichever module
makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WholeBatch(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Within it, `F.batch_norm` in training mode normalises with the statistics of all ranks' slices.

    Running statistics move as torch moves them: by ``momentum``, towards the mean and the unbiased variance. Gradients
    are those of the sum of the ranks' losses. Statistics are float32, or float64 for such input.

    Args:
        stack: makes [ranks, N] of every rank's [N], differentiably.
    """

    def __init__(self, stack: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stack = stack

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, var, count = self._statistics(wide)
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                if running is not None:
                    running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = (1, -1, *[1] * (input.dim() - 2))
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(input.dtype)

    def _statistics(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean [C], biased variance [C] and the number of values behind each, of all ranks' parts."""
        # The parts' own means and variances combine without the cancellation that sums of squares suffer from.
        channels = part.shape[1]
        var, mean = torch.var_mean(part, [0, *range(2, part.dim())], correction=0)
        rows = self._stack(torch.cat([mean, var, mean.new_tensor([part.numel() // channels])]))
        means, variances, counts = torch.split(rows, [channels, channels, 1], dim=1)
        counts = counts.detach()
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        return mean, var, counts.sum()
