"""Simulated attackers up to their first step: scratch copies of the released model, operated on, with a head."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch, batches
from sophon.protection.context import Context
from sophon.protection.meta_gradient.first_order import first_order
from sophon.protection.simulated_surgery import Factors, start
from sophon.seeds import derive_seed, seed_torch
from sophon.surgery import Means


class Attackers:
    """Makes attackers of the released model, which itself is never run.

    Args:
        context: the released model, the domains that attackers fine-tune for, the original one for surgery that trains
            on it; the sampler's heads, and how the method keeps probed ones fitted.

    Attributes:
        probed: for each domain the defender's head, by parameter; empty where no attacker starts from one.

    Raises:
        UserError: a head is to be kept that does not fit a domain.
    """

    def __init__(self, context: Context) -> None:
        self.model = model = context.model
        self.task = task = context.task
        self.restricted = context.restricted
        self.config = context.method
        self.seed = context.seed
        self.original = context.original
        heads = set(context.sampler.config.heads)
        if "kept" in heads:
            for domain in self.restricted:
                task.start_head(model, "kept", domain.classes)
        # allocated once: one with the released head, and one for each domain's own
        self._released = copy.deepcopy(model)
        self._own = []
        if heads - {"kept"}:
            for index, domain in enumerate(self.restricted):
                seed_torch(derive_seed(self.seed, "probed head", *([index] if index else [])))
                self._own.append(copy.deepcopy(model))
                task.start_head(self._own[-1], "fresh", domain.classes)
        self.probed: list[dict[str, Tensor]] = [self._head(other) for other in self._own]

    def begin(self, strategy: FineTuneStrategy, domain: int, generator: torch.Generator) -> tuple[nn.Module, Factors]:
        """Return a scratch copy with the released weights, the strategy's surgery and its head start; and its factors.

        A head that is not released has the factor 0. The copy is overwritten by the next attacker. What is drawn comes
        from torch's global generator, and the batches of surgery that trains from ``generator``.
        """
        source = self.model
        factors: Factors = {}
        if strategy.surgery or strategy.head == "kept":
            source = self._released
            _copy(self.model, source)
        if strategy.surgery:
            classes, images = self.restricted[domain].classes, self.restricted[domain]["adapt"]
            means = Means(
                self.task, self.task.spec, classes, images, generator, self.original, batch_size=strategy.batch_size
            )
            factors |= start(source, strategy.surgery, means)
        if strategy.head == "kept":
            return source, factors
        attacker = self.scratch(strategy, domain)
        head = self.task.head_names(attacker)
        _copy(source, attacker, without=head)
        if strategy.head == "fresh":
            self.task.start_head(attacker, "fresh", self.restricted[domain].classes)
        else:
            with torch.no_grad():
                for name, value in self.probed[domain].items():
                    attacker.get_parameter(name).copy_(value)
        return attacker, factors | dict.fromkeys(head, 0.0)

    def scratch(self, strategy: FineTuneStrategy, domain: int) -> nn.Module:
        """Return the copy that `begin` would use, as the last attacker has left it."""
        return self._released if strategy.head == "kept" else self._own[domain]

    def batches(
        self, domain: int, split: str, size: int, generator: torch.Generator, augmentation: str = "none"
    ) -> Iterator[Batch]:
        """Return endless batches of a split, drawn from a generator of their own that ``generator`` seeds."""
        # its own: how many batches the attacker takes must not shift what the query sees
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return batches(self.restricted[domain][split], size, own, augmentation)

    def refresh_probe(self, domain: int, *key: object) -> None:
        """Fit the defender's head of a domain to the features as they are; ``key`` and the seed decide the draws."""
        seed = derive_seed(self.seed, "probe", domain, *key)
        seed_torch(seed)
        generator = torch.Generator().manual_seed(seed)
        probe = FineTuneStrategy(
            optimizer="adam",
            lr=self.config.probe_lr,
            steps=self.config.probe_steps,
            scope="head",
            batch_size=self.config.query_batch_size,
            head="probed",
        )
        attacker, _ = self.begin(probe, domain, generator)
        stream = self.batches(domain, "adapt", probe.batch_size, generator)
        first_order(attacker, probe, self.task, stream, iter(()), [0.0] * probe.steps)
        self.probed[domain] = self._head(attacker)

    def _head(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: model.get_parameter(name).detach().clone() for name in self.task.head_names(model)}


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, without: Collection[str] = ()) -> None:
    given = source.state_dict()
    for name, value in target.state_dict().items():
        if name not in without:
            value.copy_(given[name])
