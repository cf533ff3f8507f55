"""What the loops need to know of a model kind. No other room asks whether a model classifies or denoises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sophon.arguments import named
from sophon.domains import Batch, ImageSet
from sophon.errors import UserError
from sophon.models import ModelAdapter, ModelSpec, adapter_of
from sophon.models.partition import Block, at_end, attention, cross_attention, owned


@dataclass(frozen=True)
class Metric:
    """A task's primary metric: its name, its unit, and whether more of it is better for the attacker."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def sign(self) -> int:
        """Return +1 where higher is better for the attacker, -1 where lower is."""
        return 1 if self.higher_is_better else -1

    @property
    def limits(self) -> tuple[float, float]:
        """Return the least and the greatest value that there can be: 0 to 100 of percentages, 0 upwards of errors."""
        return (0.0, 100.0) if self.unit == "%" else (-math.inf if self.higher_is_better else 0.0, math.inf)


class Measured(NamedTuple):
    """A primary metric with its sampling error.

    Attributes:
        value: the metric.
        standard_error: of ``value``, in its unit: how much it would move with other images of the same kind; > 0
            wherever it can be told, NaN where ``value`` is not finite.
        images: how many were measured.
    """

    value: float
    standard_error: float
    images: int


class Task(Protocol):
    """A model kind, as the loops see it; the base class of all. Losses are scalars to minimise for whoever calls them.

    What a loss draws at random (noise, dropout) comes from torch's global generator, which the loops seed.

    Args:
        spec: of the model.
        suppression_loss: a key of ``suppression_losses``, or a dotted path; None where nothing is protected.
        distillation: weight of the reference's distillation in `original_loss`, >= 0.
        amp: autocast passes to bfloat16; what they return, and so every loss, is float32. May be switched off for a
            while where more precision is needed.

    Attributes:
        kind: a key of `sophon.tasks.TASKS`.
        metric: the primary metric.
        adapter: what is particular to the model's library.
        reads_labels: whether the suppression loss means nothing for images without a class.
        suspects: what is usually wrong with the input of a trained model that does no better than `chance`.
        evaluation_batch_size: how many images a pass takes that trains nothing.

    Raises:
        UserError: the suppression loss is not known, or the model is of another kind.
    """

    kind: ClassVar[str]
    suppression_losses: ClassVar[Mapping[str, Callable[[Tensor, Tensor], Tensor]]]
    metric: Metric
    spec: ModelSpec
    adapter: ModelAdapter
    distillation: float
    amp: bool
    reads_labels: bool
    suspects: str
    evaluation_batch_size: int
    _suppression: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, spec: ModelSpec, suppression_loss: str | None, distillation: float, amp: bool) -> None:
        self.adapter = adapter_of(spec)
        if (kind := self.adapter.kind) != self.kind:
            raise UserError(f"task.name: '{self.kind}' does not fit a model of library {spec.library}; allowed: {kind}")
        self.spec, self.distillation, self.amp = spec, distillation, amp
        if suppression_loss is not None:
            self._suppression = named("method.suppression_loss", suppression_loss, self.suppression_losses)

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what an attacker minimises while it fine-tunes."""

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the defender minimises on an attacker's fine-tuned model."""

    def original_loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None, labels: float = 1.0) -> Tensor:
        """Return what the defender minimises on the original domain.

        Args:
            model: what is trained.
            batch: of the original domain.
            reference: is distilled from if the task is to.
            labels: weight of what the images themselves teach: their classes, or of a denoiser their noise.
        """

    def imitation_loss(self, model: nn.Module, batch: Batch, reference: nn.Module) -> Tensor:
        """Return what a student minimises to answer as ``reference`` does; the classes of the images teach nothing."""

    def erasure_loss(
        self, model: nn.Module, batch: Batch, reference: nn.Module, base: Batch, guidance: float
    ) -> Tensor:
        """Return what is minimised to answer a batch as if it were asked what ``base`` is, or guided further away.

        Args:
            model: what is trained.
            batch: images with the classes or prompts that are to mean nothing.
            reference: gives the target: its output for ``base``, less ``guidance`` times what the batch's own classes
                or prompts add to that.
            base: the same images with other classes or prompts.
            guidance: >= 0.

        Raises:
            UserError: the model is not asked for anything.
        """
        raise UserError(f"method.stages.unlearn.by: 'negative_guidance' is not for task.name={self.kind}")

    def chance_loss(self, model: nn.Module) -> float:
        """Return the attacker's loss of who can do no better than guess."""

    def watching(self, model: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """Collect what `features` returns, of every pass inside; nothing if the kind has none."""
        return nullcontext([])

    def features(self, model: nn.Module, images: Tensor) -> Tensor | None:
        """Return what the model's head sees of uint8 images [B, C, H, W]: float [B, D]; None if its kind has none."""
        return None

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the primary metric, not a finite number if an output is none.

        Leaves the model, its modes and the global generator as they were.
        """

    def chance(self, images: ImageSet) -> Measured:
        """Return the metric of the best guess that does not look at the images."""

    def measure(self, model: nn.Module, images: ImageSet) -> Measured:
        """Return the primary metric with its sampling error, under the same promises as `evaluate`."""

    def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Return further measurements by name, of the same images, under the same promises as `evaluate`."""

    def warm(self, batch: Batch) -> None:
        """Make what all later passes over a batch use and none of them should be charged for, such as latents."""
        return

    def sample(self, model: nn.Module, count: int, seed: int, prompts: Sequence[str] = ()) -> Tensor | None:
        """Return images that the model generates, uint8 [count, C, H, W] on the CPU; None if its kind does not.

        One that is told texts gets ``prompts`` in turn.
        """
        return None

    def train_mode(self, model: nn.Module, scope: str, blocks: int = 1) -> dict[str, nn.Parameter]:
        """Put the model in the mode that training ``scope`` needs; return the parameters of that scope by name.

        Args:
            model: changed in its modes only.
            scope: one of `sophon.attacker.SCOPES`.
            blocks: how many the scopes ``first_blocks`` and ``last_blocks`` train.

        Raises:
            UserError: the model has nothing of that scope, or fewer blocks.
        """

    def blocks(self, model: nn.Module) -> list[Block]:
        """Return the model's blocks from input to output, the head left out.

        Each is a tuple of dotted names of modules (of tensors, where a module is shared by blocks) that together own
        the block's parameters and buffers: `sophon.models.partition.owned` says which. Everything outside the head is
        in exactly one.
        """
        return self.adapter.blocks(model)

    def head_names(self, model: nn.Module) -> set[str]:
        """Name the parameters that belong to the domain rather than to the features."""

    def start_head(self, model: nn.Module, head: str, classes: Sequence[str]) -> None:
        """Make the model's head ready for ``classes``: checked when ``kept``, newly initialised otherwise."""

    def _suppress(self, output: Tensor, wanted: Tensor) -> Tensor:
        assert self._suppression is not None  # only a protection asks for it, and its task was given one
        loss: object = self._suppression(output, wanted)
        if isinstance(loss, Tensor) and loss.ndim == 0:
            return loss
        returned = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        function = f"{self._suppression.__module__}.{getattr(self._suppression, '__name__', 'function')}"
        raise UserError(
            f"method.suppression_loss: {function} returned {returned}; it must return a tensor of one number"
        )

    def _require_classes(self, count: int, classes: Sequence[str]) -> None:
        """Refuse to keep a head of another number of classes."""
        if count != len(classes):
            raise UserError(
                f"head: 'kept' needs as many classes as the model has, but the model has {count} and the restricted "
                f"domain {len(classes)}; use head fresh or probed, or choose {count} of its classes"
            )


ATTENTION = {"attention": attention, "cross_attention": cross_attention}


def within_scope(task: Task, model: nn.Module, scope: str, blocks: int) -> set[str]:
    """Name the parameters that a scope trains besides the head, whatever the model kind.

    Args:
        scope: one of `sophon.attacker.SCOPES`; ``head`` has none besides, ``all`` names the head's too.
        blocks: how many the scopes ``first_blocks`` and ``last_blocks`` train.

    Raises:
        UserError: the model has fewer blocks, or no adapters where the scope is ``lora``.
    """
    names = {name for name, _ in model.named_parameters()}
    if scope == "all":
        return names
    if scope in ("first_blocks", "last_blocks"):
        parts = task.blocks(model)
        if not 1 <= blocks <= len(parts):
            raise UserError(
                f"blocks: {blocks} is not allowed with scope '{scope}' of this model; it must be 1 to {len(parts)}"
            )
        return owned(names, at_end(parts, blocks, scope.removesuffix("_blocks")))
    if scope in ATTENTION:
        return owned(names, ATTENTION[scope](model))
    if scope == "head":
        return set()
    adapters = {name for name in names if ".lora_" in name}
    if not adapters:
        raise UserError("scope: 'lora' trains nothing of this model; it has no adapters, which only an audit adds")
    return adapters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without gradients, and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            if module.training != training:  # setting an attribute of a module is slow
                module.training = training
