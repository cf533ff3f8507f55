"""Data sets, and the part that each plays in a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sophon.errors import UserError
from sophon.ranges import Arguments, limited

RESTRICTED_SPLITS = ("adapt", "query", "attack", "select")


@dataclass
class DomainConfig(Arguments):
    """A data set, or a part of one.

    Attributes:
        name: what reports call it.
        source: a key of `sophon.domains.SOURCES`: ``bundled``, ``torchvision`` or ``imagefolder``.
        dataset: which of the source's data sets; empty for ``imagefolder``.
        root: folder that torchvision's files, or the ``train/`` and ``test/`` of an image folder, lie in.
        download: fetch the data if it is not there. Nothing is ever fetched otherwise.
        skip_unreadable: leave out images that cannot be read, and say how many; else the first ends the run.
        classes: names of the classes to keep, in this order; null keeps all.
        per_class: at most this many training images of each class (drawn with ``split_seed``); null for all.
        test_per_class: the same for test images.
        split_seed: seeds the limits and the splits; not the run's seed, so that runs share their splits.
        val_fraction: part of an original domain's training images kept for ``val``.
        fractions: parts of a restricted domain's training images: ``adapt`` and ``query`` (the defender's), ``attack``
            and ``select`` (the attacker's). They sum to at most 1.
        prompt: what a text-to-image model is told with each image, such as ``"a photo of a {class}"``: ``{class}``
            stands for the class's name, ``{text}`` for the image's own caption; null for that caption alone.
    """

    name: str = MISSING
    source: str = MISSING
    dataset: str = ""
    root: str = limited("data", path=True)
    download: bool = False
    skip_unreadable: bool = False
    classes: list[str] | None = None
    per_class: int | None = limited(None, ge=1)
    test_per_class: int | None = limited(None, ge=1)
    split_seed: int = 0
    val_fraction: float = limited(0.1, gt=0, lt=1)
    fractions: dict[str, float] = limited({"adapt": 0.4, "query": 0.1, "attack": 0.4, "select": 0.1}, gt=0)
    prompt: str | None = None

    def validate(self, key: str) -> None:
        """Raise a `UserError` that names ``key`` if a value is not allowed beside the others."""
        if self.classes is not None and len(set(self.classes)) != max(1, len(self.classes)):
            raise UserError(f"{key}.classes: {self.classes} is not allowed; name each class once, or null for all")
        if set(self.fractions) != set(RESTRICTED_SPLITS):
            raise UserError(
                f"{key}.fractions: {sorted(self.fractions)} is not allowed; give exactly {list(RESTRICTED_SPLITS)}"
            )
        if not sum(self.fractions.values()) <= 1 + 1e-9:
            raise UserError(f"{key}.fractions: their sum is {sum(self.fractions.values()):g}; it must be <= 1")
        fields = set(re.findall(r"\{(.*?)\}", self.prompt or ""))
        if unknown := fields - {"class", "text"}:
            raise UserError(
                f"{key}.prompt: {{{min(unknown)}}} is not allowed; a prompt may have {{class}} and {{text}}"
            )


@dataclass
class DomainsConfig:
    """The domains of a run.

    Attributes:
        original: what the model was made for.
        restricted: what it must not be fine-tuned for, one domain or more by name. In files and on the command line it
            is the keys of one, ``domain.restricted.root=DIR``; further ones stand there under a name each,
            ``+domain@domain.restricted.people=people``.
        benign: what it may be fine-tuned for, for the audit to see that this is not harmed; null for none. Split as a
            restricted domain.
        pretrained_on: what ``pretrain`` trains on: ``original``, or ``both``, which adds the restricted domains' splits
            ``adapt`` and ``query``: a reference that has seen what is to be removed, but not the attacker's images.
        restricted_outputs: whether what was trained on ``both`` keeps its outputs (a denoiser: its class embeddings) of
            the restricted classes, after those of the original ones; else it is released without them.
        memory_gb: a data set whose decoded images take more than so many 10^9 bytes is read from disk whenever it is
            needed; a smaller one lives on the device. The results do not depend on it.
    """

    original: DomainConfig = field(default_factory=DomainConfig)
    restricted: dict[str, DomainConfig] = field(default_factory=dict, metadata={"alone": True})
    benign: DomainConfig | None = None
    pretrained_on: str = limited("original", choices=("original", "both"))
    restricted_outputs: bool = False
    memory_gb: float = limited(8.0, ge=0)

    def validate(self, key: str) -> None:
        """Raise a `UserError` that names ``key`` if a value is not allowed beside the others."""
        names = [domain.name for domain in self.restricted.values()]
        for name in names if len(names) > 1 else ():
            if names.count(name) > 1:
                raise UserError(f"{key}.restricted: the name '{name}' is given twice; names must differ")
            if not name or "/" in name or name.startswith("."):
                raise UserError(f"{key}.restricted: the name '{name}' is not allowed; among several it names a folder")


@dataclass
class ComposedDomains(DomainsConfig):
    """The domains as files and the command line give them; `sophon.validation` makes a `DomainsConfig` of them."""

    restricted: dict[str, Any] = field(default_factory=lambda: vars(DomainConfig()))
