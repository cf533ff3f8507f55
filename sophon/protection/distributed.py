"""The processes of one run under torchrun: how they divide the work, and how their results are put together.

torchrun starts a process (a rank) for each device. All run the same loops on the same weights; each simulates its own
attackers and takes its own slice of every batch, and what they find is summed. Without torchrun there is one rank,
which has nothing to exchange, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# This module takes the group of its import for its functions' default. Imported later (torch._dynamo does so), it keeps
# the group and its threads alive past the end of Python, which then aborts. So it comes before any group.
import torch.distributed.nn.functional
from torch import Tensor

from sophon.devices import resolve_device
from sophon.domains import Batch
from sophon.errors import GuardError, UserError
from sophon.protection.sync_batch_norm import WholeBatch

T = TypeVar("T")

# A rank waits for the slowest attacker of the others, and for what the first one measures and writes. Ranks that die
# are torchrun's to notice.
_PATIENCE = timedelta(hours=6)


class Ranks:
    """The processes of a run as one of them sees them; this class is the one that is alone.

    Every method but `mine`, `require_work` and `share` is collective: all ranks call it, in the same order.

    Attributes:
        rank: this process, 0 .. size - 1; the first one writes and speaks for all.
        size: how many there are, >= 1.
    """

    rank = 0
    size = 1

    def mine(self, count: int) -> range:
        """Return which of ``count`` numbered things are this rank's: every ``size``-th, from ``rank`` on."""
        return range(self.rank, count, self.size)

    def require_work(self, count: int, key: str) -> None:
        """Raise a `UserError` that names ``key`` unless ``count`` things are enough to give every rank one."""
        if count < self.size:
            raise UserError(
                f"{key}: {count} leaves some of the {self.size} ranks without work; give at least as many, or start "
                "fewer ranks"
            )

    def share(self, batch: Batch) -> Batch:
        """Return this rank's slice of a batch of at least ``size`` images; the slices differ by at most one image."""
        start, end = (len(batch.labels) * at // self.size for at in (self.rank, self.rank + 1))
        prompts = batch.prompts and batch.prompts[start:end]
        return Batch(batch.images[start:end], batch.labels[start:end], prompts)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over the ranks of each tensor, the same bits on all of them."""
        return list(tensors)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return flag

    def gather(self, data: Any) -> list[Any]:
        """Return every rank's ``data`` (plain JSON data), by rank."""
        return [data]

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring the tensors of all ranks, under names that differ, to the first one; the others get none back."""
        return dict(tensors)

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""

    def first(self, compute: Callable[[], T]) -> T:
        """Return what ``compute`` returns on the first rank (plain JSON data); the others do not call it.

        Raises:
            UserError: it did so there; likewise GuardError.
        """
        return compute()

    def together(self) -> AbstractContextManager[None]:
        """Guard a block without collectives: a UserError or GuardError that ends it on one rank is raised on all."""
        return nullcontext()

    def whole_batch(self) -> AbstractContextManager[Any]:
        """Let BatchNorm see the whole batch in a pass over its slices; see `WholeBatch`."""
        return nullcontext()


ALONE = Ranks()


class Group(Ranks):
    """The ranks of torch.distributed's default group, which carries tensors of the CPU and of the ranks' devices."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add up in one message for each kind of tensor: dtype and device."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, tensor in enumerate(tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
        sums = [torch.empty_like(tensor) for tensor in tensors]
        for indices in kinds.values():
            flat = torch.cat([tensors[index].detach().reshape(-1) for index in indices])
            dist.all_reduce(flat)
            # copied back: a view of the message would lose the memory format that the optimizer's kernels want
            parts = torch.split(flat, [tensors[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                sums[index].copy_(part.view(tensors[index].shape))
        return sums

    def any(self, flag: bool) -> bool:
        """Count the flags."""
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def gather(self, data: Any) -> list[Any]:
        """Send the objects themselves: the ranks are one run, and nothing of it is written."""
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, data)
        return objects

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send them from the CPU, where the first rank's lie afterwards, too."""
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object({name: tensor.cpu() for name, tensor in tensors.items()}, parts)
        return {name: tensor for part in parts or () for name, tensor in part.items()}

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Send one message for each by order of name: a dict made from a set has another order in every process."""
        for name in sorted(tensors):
            dist.broadcast(tensors[name], src=0)

    def first(self, compute: Callable[[], T]) -> T:
        """Compute where the rank is 0, and tell the others."""
        value: T | None = None
        with self.together():
            if self.rank == 0:
                value = compute()
        result: T = self.gather(value)[0]
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell each other at the block's end who failed; all raise what the lowest of those ranks raises."""
        failure: list[str] | None = None
        try:
            yield
        except (UserError, GuardError) as error:
            failure = [type(error).__name__, str(error)]
        for reported in self.gather(failure):
            if reported is not None:
                raise (GuardError if reported[0] == "GuardError" else UserError)(reported[1])

    def whole_batch(self) -> AbstractContextManager[Any]:
        """Exchange the statistics of the slices."""
        return WholeBatch(lambda row: _Stacked.apply(row, self.rank, self.size))  # type: ignore[no-untyped-call]


class _Stacked(torch.autograd.Function):
    """Stack the rows of all ranks: [N] on each becomes [size, N] on all, and gradients find their way back."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank = rank
        rows = row.new_zeros(size, len(row))
        rows[rank] = row
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rank], None, None


def join(device: str) -> tuple[Ranks, torch.device]:
    """Join the processes that torchrun started, if it did, until this one ends; return the ranks and its device.

    Args:
        device: as in `Config`; of several GPUs each rank takes the one of its place on its machine.

    Raises:
        UserError: there is no such device, or the environment is not a whole one of torchrun's.
    """
    size = world_size()
    if size == 1:
        return ALONE, resolve_device(device)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several ranks with torchrun")
    if ":" in device:
        raise UserError(f"device: '{device}' is not allowed with {size} ranks; give auto, cpu or cuda")
    place = resolve_device(device)
    if place.type == "cuda":
        place = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(place)
    if not dist.is_initialized():  # a sweep comes here again; a group that was left cannot be joined again
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Group(), place


def world_size() -> int:
    """Return how many ranks torchrun started; 1 without it.

    Raises:
        UserError: WORLD_SIZE is not a number of them.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"WORLD_SIZE: '{text}' is not allowed; torchrun sets it to the number of ranks")
    return int(text)
