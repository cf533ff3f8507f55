"""Simulated attackers up to their first step: scratch copies of the released model, operated on, with a head."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.config import MethodConfig
from sophon.domains import Batch, LoadedDomain, batches
from sophon.protect.first_order import first_order
from sophon.protect.starts import Factors, start
from sophon.seeds import derive_seed
from sophon.surgery import Means
from sophon.tasks import Task


class Attackers:
    """Makes attackers of the released model, which itself is never run.

    Args:
        model: the released model.
        task: the model kind.
        restricted: the domains that attackers fine-tune for.
        heads: the head starts that there will be.
        config: how the probed heads are kept fitted.
        seed: the run's.
        original: for surgery that trains on it.

    Attributes:
        probed: for each domain the defender's head, by parameter; empty where no attacker starts from one.

    Raises:
        UserError: a head is to be kept that does not fit a domain.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        restricted: Sequence[LoadedDomain],
        heads: set[str],
        config: MethodConfig,
        seed: int,
        original: LoadedDomain | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.restricted = restricted
        self.config = config
        self.seed = seed
        self.original = original
        if "kept" in heads:
            for domain in restricted:
                task.start_head(model, "kept", domain.classes)
        # allocated once: one with the released head, and one for each domain's own
        self._released = copy.deepcopy(model)
        self._own = []
        if heads - {"kept"}:
            for index, domain in enumerate(restricted):
                torch.manual_seed(derive_seed(seed, "probed head", *([index] if index else [])))
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

    def copies(self) -> list[nn.Module]:
        """Return every scratch copy, for who would compile them."""
        return [self._released, *self._own]

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
        torch.manual_seed(seed)
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
