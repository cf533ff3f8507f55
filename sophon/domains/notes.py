"""Notes on how a data set was read: images left out, resized or streamed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sophon.domains.names import few, in_natural_order


@dataclass
class Notes:
    """What was noticed while a data set was read.

    Attributes:
        size: height and width in pixels that images are stretched to.
        left_out: how many files or images are not used, by the reason.
        unreadable: says of the first image that was left out as unreadable why; empty for none.
        order: class names whose order is not that of the numbers in them; empty for none.
        read: how many images were decoded.
        resized: how many of them had another size.
        stretched: how many of them had another aspect ratio.
        streamed: the size of the decoded images in 10^9 bytes where they are not kept, else 0.
    """

    size: int
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: str = ""
    order: tuple[str, ...] = ()
    read: int = 0
    resized: int = 0
    stretched: int = 0
    streamed: float = 0.0

    def saw(self, size: tuple[int, int]) -> None:
        """Count an image that was decoded, by its own width and height."""
        self.read += 1
        self.resized += size != (self.size, self.size)
        self.stretched += size[0] != size[1]

    def saw_unreadable(self, why: str) -> None:
        """Count an image that cannot be read and is left out."""
        self.left_out["unreadable"] += 1
        self.unreadable = self.unreadable or why

    def saw_classes(self, names: tuple[str, ...]) -> None:
        """Look at the order of the class names that a data set has of itself."""
        if list(names) == sorted(names) and list(names) != in_natural_order(names):
            self.order = names

    def texts(self) -> list[str]:
        """Return what there is to say, a phrase each."""
        texts = []
        if self.left_out:
            counts = [f"{count} {reason}" for reason, count in self.left_out.most_common()]
            texts.append(f"left out: {few(counts, 6)}" + (f" (first: {self.unreadable})" if self.unreadable else ""))
        if self.resized:
            shape = f", the aspect ratio of {self.stretched} changed" if self.stretched else ", aspect ratios kept"
            texts.append(f"{self.resized} of {self.read} resized to {self.size}x{self.size}{shape}")
        if self.order:
            texts.append(
                f"classes in the order of their characters, as torchvision's ImageFolder: {few(self.order)}; "
                f"by number it would be {few(in_natural_order(self.order))}"
            )
        if self.streamed:
            texts.append(f"decoded as they are read: {self.streamed:.3g} GB are more than domain.memory_gb")
        return texts
