"""Muon (Jordan et al., 2024) for attackers: torch's own for the matrices of a model, Adam for all else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Steps of parameters of two dimensions or more by torch's Muon, of others by AdamW.

    A convolution's filters are the rows of a matrix. Its momentum is made orthogonal, so that a step goes as far in
    every direction of the matrix; that does depend on the coordinates that the matrix is in.

    Args:
        lr: Muon's rate.
        weight_decay: of both, decoupled.
        adam_lr: AdamW's rate, >= 0.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.01, weight_decay: float = 0.0, adam_lr: float = 1e-3
    ) -> None:
        owned = list(params)
        weights = [weight for weight in owned if weight.ndim > 1]
        rest = [weight for weight in owned if weight.ndim < 2]
        # copies, for filters may lie in memory as channels_last, where a matrix of them is no view
        self._matrices = [(weight, nn.Parameter(weight.detach().flatten(1).clone())) for weight in weights]
        self._inner: list[torch.optim.Optimizer | None] = [
            torch.optim.Muon([matrix for _, matrix in self._matrices], weight_decay=weight_decay) if weights else None,
            torch.optim.AdamW(rest, weight_decay=weight_decay) if rest else None,
        ]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": rest, "lr": adam_lr}]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step of both."""
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for group, optimizer in zip(self.param_groups, self._inner, strict=True):
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = group["lr"]
                optimizer.step()
        for weight, matrix in self._matrices:
            weight.copy_(matrix.view(weight.shape))
