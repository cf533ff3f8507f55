"""Unlearning: the model answers the restricted domain no better than a guess, and the original one as before.

The usual methods are settings of this stage:

| method | settings |
|---|---|
| MaxEnt, KL from uniform; the first step of UNDO (arXiv 2506.06278) | ``suppression_loss=klu``; denoisers ``dos`` |
| gradient difference: ascent on restricted, descent on original ones | ``negative_ce``, or ``mlac``, which is bounded |
| random labels, one for each image | ``by=random_labels`` |
| ESD (arXiv 2303.07345), on noised images in place of generated ones | ``by=negative_guidance`` |
| ascent, with KL to the reference on original images | ``mlac``, ``labels=0`` and ``distillation`` above 0 |

It suppresses what the model *shows*: fine-tuning brings it back within few steps, unless more is done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sophon.domains import Batch, ImageSet, batches
from sophon.errors import UserError
from sophon.finetune import Loss
from sophon.protection.context import Context
from sophon.protection.descent import Term
from sophon.protection.stage import Information, Remembered, Row, under
from sophon.protection.training import Training
from sophon.ranges import limited
from sophon.seeds import derive_seed, seed_torch
from sophon.surgery.batch_norm_statistics import held
from sophon.tasks import evaluating


@dataclass
class UnlearnConfig:
    """What is unlearnt by.

    Attributes:
        by: what is minimised on the restricted domains: ``suppression_loss``, the method's; ``random_labels``, the
            cross-entropy to labels drawn once for each image among the model's own classes; or ``negative_guidance``,
            of a denoiser the distance to the reference's answer to the empty prompt (to one of the original classes
            where it is told classes), guided away from the image's own.
        guidance: how far away by ``negative_guidance``, >= 0; 0 ends at that answer itself.
        weight: of that loss, > 0; that of the original domain's loss is 1.
        labels: weight of the labels' loss on the original domain (of a denoiser the noise's), >= 0; the reference's
            answers are learnt there with the weight ``method.distillation``.
        head: what the suppression loss is read from: ``kept``, the model's own outputs; or ``probed``, a head for the
            restricted classes that the defender fits to the features (``method.probe_steps``, ``probe_lr``) in every
            round, and does not release. A loss that reads labels needs ``probed`` unless the classes are as many.
    """

    by: str = limited("suppression_loss", choices=("suppression_loss", "random_labels", "negative_guidance"))
    guidance: float = limited(1.0, ge=0)
    weight: float = limited(1.0, gt=0)
    labels: float = limited(1.0, ge=0)
    head: str = limited("kept", choices=("kept", "probed"))


class Unlearn(Training):
    """A step descends on both domains; half of its restricted images are from ``adapt``, half from ``query``."""

    Config = UnlearnConfig
    mechanism = "removal"
    summary = "unlearning: on restricted images it was trained to answer no better than a guess"
    limits = ("Unlearning suppresses what the model shows; fine-tuning finds what it still holds within few steps.",)

    def check(self, context: Context) -> None:
        """Raise a `UserError` if the head does not fit a domain, or nothing is asked on the original one."""
        if self.config.labels == 0 and context.method.distillation == 0:
            raise UserError(
                "method.stages.unlearn.labels: 0 is not allowed with method.distillation=0, which asks nothing on the "
                "original domain; raise either"
            )
        model, random = copy.deepcopy(context.model), self.config.by == "random_labels"
        if random and (self.config.head != "kept" or not context.task.head_names(model)):
            raise UserError("method.stages.unlearn.by: 'random_labels' needs a model with a head, and head=kept")
        if random and context.task.features(model, context.original["val"].first(1).images) is None:
            raise UserError("method.stages.unlearn.by: 'random_labels' is for classifiers; give suppression_loss")
        if self.config.by == "negative_guidance" and (self.config.head != "kept" or not _asked(context)):
            raise UserError(
                "method.stages.unlearn.by: 'negative_guidance' needs head=kept and a denoiser that is told prompts, or "
                "restricted classes (domain.pretrained_on=both, domain.restricted_outputs=true); give suppression_loss"
            )
        if self.config.head == "kept" and context.task.reads_labels and not random:
            for domain in context.restricted:
                context.task.start_head(model, "kept", domain.classes)
        if self.config.head == "probed" and not context.task.head_names(model):
            raise UserError("method.stages.unlearn.head: 'probed' is not allowed for a model without a head; give kept")
        self._probes = self._fresh_probes(context)
        super().check(context)

    def prepare(self, context: Context) -> None:
        """Make the loop, and the probed heads."""
        self._probes = self._fresh_probes(context)
        super().prepare(context)

    def terms(self, context: Context) -> Sequence[Term]:
        """Return the original domain's loss, and that of each half of each restricted domain's images."""
        method, task, config = context.method, context.task, self.config
        kept = partial(task.original_loss, reference=context.reference, labels=config.labels)
        losses: dict[str, Loss] = {
            "random_labels": task.attacker_loss,
            "negative_guidance": partial(self._erased, context),
        }
        loss = losses.get(config.by, task.suppression_loss)
        terms = [Term(context.original["train"], method.ntr_batch_size, "method.ntr_batch_size", kept)]
        half, weight = (method.query_batch_size + 1) // 2, config.weight / (2 * len(context.restricted))
        for index in range(len(context.restricted)):

            def suppressed(model: nn.Module, batch: Batch, index: int = index) -> Tensor:
                # as users run it; and the statistics stay those of original images
                with self._headed(context, model, index), held(model):
                    return loss(model, batch).mul(weight)

            for split in ("adapt", "query"):
                images = self._labelled(context, index, split)
                terms.append(Term(images, half, "method.query_batch_size", suppressed))
        return terms

    def step(self, context: Context, number: int) -> Row:
        """Fit the probed heads to the features, then take the steps of a round."""
        for index in range(len(self._probes)):
            self._refresh(context, index, number)
        return super().step(context, number)

    def information(self, context: Context) -> Information:
        """Return what was read: of the restricted domains labels only where the loss, or a probed head, reads them."""
        read = {"suppression_loss": context.task.reads_labels, "random_labels": False, "negative_guidance": True}
        labelled = self.config.head == "probed" or read[self.config.by]
        return Information(
            original=("images", "labels") if self.config.labels else ("images",),
            restricted=("images", "labels") if labelled else ("images",),
            teacher="reference" if context.method.distillation or self.config.by == "negative_guidance" else "none",
        )

    def state(self, context: Context) -> Remembered:
        """Return the optimizers' states and the probed heads."""
        tensors, data = super().state(context)
        heads = {
            f"probe/{index}/{name}": value.detach()
            for index, head in enumerate(self._probes)
            for name, value in head.state_dict().items()
        }
        return Remembered({**tensors, **heads}, data)

    def restore(self, context: Context, remembered: Remembered) -> None:
        """Take them up again."""
        super().restore(context, remembered)
        for index, head in enumerate(self._probes):
            head.load_state_dict(under(f"probe/{index}", remembered.tensors))

    def _fresh_probes(self, context: Context) -> list[nn.Module]:
        """Return a new head for the classes of each restricted domain; none where the model's own is kept."""
        if self.config.head == "kept":
            return []
        heads = []
        for index, domain in enumerate(context.restricted):
            model = copy.deepcopy(context.model)
            seed_torch(derive_seed(context.seed, "probed head", index))
            context.task.start_head(model, "fresh", domain.classes)
            heads.append(model.get_submodule(str(context.task.adapter.head)))
        return heads

    @contextmanager
    def _headed(self, context: Context, model: nn.Module, index: int) -> Iterator[None]:
        """Put a restricted domain's probed head in the place of the model's own for a while, if there is one."""
        if not self._probes:
            yield
            return
        name = str(context.task.adapter.head)
        own = model.get_submodule(name)
        model.set_submodule(name, self._probes[index])
        try:
            yield
        finally:
            model.set_submodule(name, own)

    def _labelled(self, context: Context, index: int, split: str) -> ImageSet:
        """Return a split; where its labels are not read, with ones that the head can have, at random if asked for."""
        domain = context.restricted[index]
        images = domain[split]
        sizes = [len(context.model.get_parameter(name)) for name in context.task.head_names(context.model)]
        if self.config.by == "random_labels":
            generator = torch.Generator().manual_seed(derive_seed(context.seed, "random labels", domain.name, split))
            drawn = torch.randint(sizes[0], (len(images),), generator=generator).to(images.labels.device)
            return images.relabelled(drawn, images.classes)
        if self._probes or context.task.reads_labels or not sizes:
            return images
        before = (context.original, *context.restricted[:index])  # in the order of a model that was trained on both
        start = sum(len(domain.classes) for domain in before)
        return images.relabelled((images.labels + start) % sizes[0], images.classes)

    def _erased(self, context: Context, model: nn.Module, batch: Batch) -> Tensor:
        """Return ESD's loss: away from the batch's classes or prompts, from original classes or the empty prompt."""
        count = len(batch.labels)
        labels = torch.randint(len(context.original.classes), (count,), device=batch.labels.device)
        base = batch._replace(labels=labels, prompts=("",) * count)
        return context.task.erasure_loss(model, batch, context.reference, base, self.config.guidance)

    def _refresh(self, context: Context, index: int, number: int) -> None:
        """Fit a probed head to the features as they are, which stay."""
        seed, method = derive_seed(context.seed, "unlearn", "probe", index, number), context.method
        seed_torch(seed)
        stream = batches(
            context.restricted[index]["adapt"], method.query_batch_size, torch.Generator().manual_seed(seed)
        )
        head = self._probes[index]
        adam = torch.optim.Adam(head.parameters(), lr=method.probe_lr)
        with self._headed(context, context.model, index), evaluating(context.model), torch.enable_grad():
            for _ in range(method.probe_steps):
                loss = context.task.attacker_loss(context.model, next(stream))
                for parameter, gradient in zip(
                    head.parameters(), torch.autograd.grad(loss, list(head.parameters())), strict=True
                ):
                    parameter.grad = gradient
                adam.step()


def _asked(context: Context) -> bool:
    """Whether the model is told what restricted images show: prompts, or classes of theirs."""
    if (frozen := context.task.adapter.frozen) is not None and frozen.reads_prompts:
        return True
    classes = sum(len(domain.classes) for domain in (context.original, *context.restricted))
    return (context.task.adapter.classes_in(context.model) or 0) >= classes
