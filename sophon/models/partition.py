"""A model's blocks from input to output, and its attention layers, found without knowing the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

# Dotted names of modules that together own a block's parameters and buffers; of a tensor itself where its module is
# shared by blocks, as a transformer's position embedding is the model's own.
Block = tuple[str, ...]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def owned(names: Iterable[str], block: Iterable[str]) -> set[str]:
    """Return those of ``names`` (of parameters, buffers or modules) that belong to ``block``."""
    exact = set(block)
    below = tuple(f"{part}." for part in exact)
    return {name for name in names if name in exact or name.startswith(below)}


def at_end(blocks: Sequence[Block], count: int, end: str) -> Iterator[str]:
    """Name what belongs to the ``first`` or the ``last`` blocks, ``count`` of them, >= 1."""
    return chain.from_iterable(blocks[:count] if end == "first" else blocks[-count:])


def attention(module: nn.Module) -> Block:
    """Name the attention layers: the modules whose class has ``Attention`` in its name."""
    return tuple(name for name, part in module.named_modules() if "Attention" in type(part).__name__)


def cross_attention(module: nn.Module) -> Block:
    """Name the attention layers that read something else than their own input, as diffusers marks them."""
    return tuple(name for name, part in module.named_modules() if getattr(part, "is_cross_attention", False))


def feed_forward(module: nn.Module) -> Block:
    """Name the parts of transformer blocks that come after attention, as diffusers and timm name their classes."""
    kinds = ("FeedForward", "Mlp")
    return tuple(name for name, part in module.named_modules() if type(part).__name__ in kinds)


def partition(module: nn.Module, head: str) -> list[Block]:
    """Divide a classifier into blocks, from input to output.

    Those that timm's ``group_matcher`` tells apart; for a model without one, its children in order of definition, where
    containers and stages give theirs. What has no matrix or kernel of its own, such as a normalisation, belongs to the
    block before it.

    Args:
        head: dotted name of its last layer, which is left out.

    Returns:
        Blocks that hold every parameter and buffer but the head's once.
    """
    state = dict(chain(module.named_parameters(), module.named_buffers()))
    places = _matched(module, state) if hasattr(module, "group_matcher") else _in_order(module, state)
    for name in owned(state, (head,)):
        del places[name]
    numbers: dict[str, int] = {}
    number = -1
    for place in sorted(set(places.values())):
        names = [name for name in state if places.get(name) == place]
        number += any(name.endswith("weight") and state[name].dim() > 1 for name in names)
        numbers |= dict.fromkeys(names, max(0, number))
    blocks: list[list[str]] = [[] for _ in range(max(numbers.values(), default=-1) + 1)]
    for index, name in _named(module, state, numbers):
        blocks[index].append(name)
    return [tuple(block) for block in blocks]


def _matched(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number every tensor's group as timm sees it."""
    from timm.models._manipulate import group_with_matcher  # only here: other libraries' models do not wait for it

    matcher = module.group_matcher(coarse=False)  # type: ignore[operator]
    return dict(group_with_matcher(iter(state.items()), matcher, reverse=True))


def _in_order(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number every tensor's part of the model, in order of definition."""
    return {name: place for place, part in enumerate(_parts(module)) for name in owned(state, (part,))}


def _parts(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, _ in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        yield prefix + name
    for name, child in module.named_children():
        below = (part for part in child.modules() if part is not child)
        if isinstance(child, _CONTAINERS) or any(_is_sequence_of_blocks(part) for part in below):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    # a residual block's shortcut is a sequence too, but of single layers
    parts = list(module.children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
    return bool(parts) and all(any(part.children()) and not isinstance(part, _CONTAINERS) for part in parts)


def _named(
    module: nn.Module, state: Mapping[str, Tensor], numbers: Mapping[str, int], prefix: str = ""
) -> Iterator[tuple[int, str]]:
    """Give each block's number with the names of the largest modules that are wholly its own."""
    for name, _ in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        if prefix + name in numbers:
            yield numbers[prefix + name], prefix + name
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inside = {numbers.get(tensor) for tensor in owned(state, (path,))}
        number = next(iter(inside)) if len(inside) == 1 else None
        # a stage of one block is called by the block's name, as in a stage of several
        if number is not None and not (isinstance(child, nn.Sequential) and len(child) == 1):
            yield number, path
        elif inside - {None}:
            yield from _named(child, state, numbers, f"{path}.")
