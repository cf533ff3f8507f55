"""The original work in ill-conditioned coordinates: what stops an attacker who does not know of them, Adam included.

    python experiments/strength/illconditioned.py --reference runs/cifar10_objects/seed0/pretrain \
        --gains 1e4 3e3 1e3 3e2 1e2 --gains 1 1 1 1 1 --out runs/illconditioned/seed0

1.  The reference is distilled into a network whose blocks hand over linear features: behind the stem and each block no
    ReLU cuts. What reads them is blind to what all channels have in common: its weights sum to zero over the channels.
2.  What all channels have in common is then free. Each block adds to all of its channels the same random filter of its
    input, ``gain`` times as strong as a unit of variance, and a constant that keeps the ReLU open. The function stays,
    to rounding; the norms of weights before a normalisation are the reference's.

So at every interface the features are a small difference between large, nearly equal channels. Who reads them must stay
blind to one direction to one part in ``gain``, which a step of any optimizer breaks that is large enough to learn from;
and with different gains no one rate suits all blocks. Each ``--gains`` (the stem's, then each block's) gives a file of
the same function, named after them; gains of 1 are what an attacker has who undoes the coordinates.

For timm's ResNets of basic blocks. No restricted image is seen. Audit a file as any foreign checkpoint, in float32: a
gain of 30 and more does not survive bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from growth import add_options, compare, grow, original_domain
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sophon.domains import ImageSet
from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.models import ModelSpec, build
from sophon.runs import write_tensors
from sophon.tasks import ClassificationTask

OPEN = 5.0  # deviations of what is shared that the constant lies above zero: a ReLU then cuts next to nothing
STATISTICS = 2000  # images from which the normalisation behind a changed convolution gets its statistics


class Interface(NamedTuple):
    """Where features are handed over: names of the last convolution before it, of its normalisation, and of readers."""

    convolution: str
    norm: str
    readers: tuple[str, ...]


def interfaces(model: nn.Module) -> list[Interface]:
    """List the stem's interface and each block's, from input to output.

    Raises:
        UserError: the model is no ResNet of basic blocks.
    """
    if not isinstance(model, ResNet) or not all(isinstance(block, BasicBlock) for block in _blocks(model).values()):
        raise UserError("--reference: only timm's ResNets of basic blocks have interfaces that are known here")
    blocks = _blocks(model)
    stem = [f"conv1.{len(model.conv1) - 1}" if isinstance(model.conv1, nn.Sequential) else "conv1"]
    ends = [*stem, *(f"{name}.conv2" for name in blocks)]
    norms = ["bn1", *(f"{name}.bn2" for name in blocks)]
    readers = [
        (f"{name}.conv1", *([f"{name}.downsample.0"] if block.downsample is not None else []))
        for name, block in blocks.items()
    ]
    return [Interface(*each) for each in zip(ends, norms, [*readers, ("fc",)], strict=True)]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    return {f"{stage}.{name}": part for stage in stages for name, part in model.get_submodule(stage).named_children()}


class Blind(nn.Module):
    """A parametrisation: weights [outputs, inputs, ...] that do not see what all inputs have in common."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Shared(nn.Module):
    """What an interface's channels get in common: a random filter of a convolution's input, of unit variance."""

    weight: Tensor

    def __init__(self, convolution: nn.Conv2d, generator: torch.Generator) -> None:
        super().__init__()
        self.stride, self.padding = convolution.stride, convolution.padding
        drawn = torch.randn(1, *convolution.weight.shape[1:], generator=generator)
        self.register_buffer("weight", drawn / drawn[0].numel() ** 0.5)
        self.norm = nn.BatchNorm2d(1, affine=False, momentum=0.05)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.norm(F.conv2d(inputs, self.weight.to(inputs.dtype), None, self.stride, self.padding))
        return found


class PoolByShared(nn.Module):
    """What the stem's max pooling does once what is shared is large: it takes all channels where that is largest."""

    shared: Tensor

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        _, places = F.max_pool2d(
            self.shared.float(), self.pool.kernel_size, self.pool.stride, self.pool.padding, return_indices=True
        )
        count, channels = features.shape[:2]
        everywhere = places.flatten(2).expand(count, channels, -1)
        return features.flatten(2).gather(2, everywhere).view(count, channels, *places.shape[2:])


def linearised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with linear interfaces and blind readers, which carries along what is to be shared.

    Args:
        model: a ResNet of basic blocks; it stays as it is.
        generator: on the CPU; draws the filters.
    """
    found, changed = interfaces(model), copy.deepcopy(model)
    assert isinstance(changed, ResNet)
    changed.shared = nn.ModuleList(  # type: ignore[assignment] # a place for what is needed until the release
        Shared(_convolution(changed, each.convolution), generator).to(next(model.parameters()).dtype) for each in found
    )
    changed.act1 = nn.Identity()  # type: ignore[assignment]
    for block in _blocks(changed).values():
        block.act2 = nn.Identity()
    if isinstance(changed.maxpool, nn.MaxPool2d):
        changed.maxpool = PoolByShared(changed.maxpool)  # type: ignore[assignment]
    for reader in (reader for each in found for reader in each.readers):
        parametrize.register_parametrization(changed.get_submodule(reader), "weight", Blind())
    for index, each in enumerate(found):

        def before(layer: nn.Module, inputs: tuple[Tensor, ...], index: int = index) -> None:
            shared = changed.shared[index](inputs[0].detach())  # type: ignore[index]
            if index == 0:
                changed.maxpool.shared = shared

        changed.get_submodule(each.convolution).register_forward_pre_hook(before)
    return changed


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


@torch.no_grad()
def released(
    trained: nn.Module,
    reference: nn.Module,
    spec: ModelSpec,
    task: ClassificationTask,
    gains: Sequence[float],
    images: ImageSet,
) -> nn.Module:
    """Return the trained function as an ordinary model of the spec, in evaluation mode, in its new coordinates.

    Args:
        trained: what `linearised` returned, trained.
        reference: gives the norms of layers before a normalisation.
        spec: of both.
        task: prepares images.
        gains: one for each interface, > 0.
        images: of the original domain; the changed normalisations get their statistics from the first of them.
    """
    model = build(spec).to(next(trained.parameters()).dtype).eval()
    state = {name.replace("parametrizations.weight.original", "weight"): each for name, each in _state(trained)}
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    for each in interfaces(model):
        for reader in each.readers:
            layer = model.get_submodule(reader)
            layer.weight.copy_(Blind()(layer.weight))
            if reader != "fc":
                norm = reader.replace("conv1", "bn1").replace("downsample.0", "downsample.1")
                _rescale(layer, model.get_submodule(norm), _norm(reference, reader) / layer.weight.norm())
    for gain, shared, each in zip(gains, trained.shared, interfaces(model), strict=True):  # type: ignore[call-overload]
        convolution, norm = _convolution(model, each.convolution), model.get_submodule(each.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        shared_deviation = (shared.norm.running_var.double() + shared.norm.eps).sqrt()
        # what normalisation and convolution did together, and gain times what is shared
        slope = norm.weight.double() / deviation
        whole = convolution.weight.double() * slope.view(-1, 1, 1, 1) + gain * shared.weight / shared_deviation
        level = norm.bias - norm.running_mean * slope
        level = level + gain * (OPEN - shared.norm.running_mean / shared_deviation)
        scale = _norm(reference, each.convolution) / whole.norm()
        convolution.weight.copy_(scale * whole)
        _restate(model, task, convolution, norm, images)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() / scale)
        norm.bias.copy_(level + norm.running_mean / scale)
    return model


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return iter(model.state_dict().items())


def _norm(reference: nn.Module, name: str) -> Tensor:
    return reference.get_parameter(f"{name}.weight").norm()


def _rescale(layer: nn.Module, norm: nn.Module, scale: Tensor) -> None:
    """Scale a convolution; its normalisation takes the scale out again, epsilon included."""
    layer.weight.mul_(scale)
    norm.running_mean.mul_(scale)
    norm.running_var.copy_((norm.running_var + norm.eps) * scale.square() - norm.eps)


def _restate(
    model: nn.Module, task: ClassificationTask, convolution: nn.Conv2d, norm: nn.BatchNorm2d, images: ImageSet
) -> None:
    """Give a normalisation the statistics of the convolution before it."""
    seen: list[Tensor] = []
    hook = convolution.register_forward_hook(lambda layer, inputs, output: seen.append(output.double()))
    for part in images.images[:STATISTICS].split(500):
        model(task.prepare(part))
    hook.remove()
    outputs = torch.cat(seen)
    norm.running_mean.copy_(outputs.mean((0, 2, 3)))
    norm.running_var.copy_(outputs.var((0, 2, 3)))


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=10000, lr=0.05)
    parser.add_argument("--gains", nargs="+", type=float, action="append", required=True, help="one per interface")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state dicts to write")
    options = parser.parse_args(arguments)
    if not all(0 < gain < float("inf") for gains in options.gains for gain in gains):
        parser.error("--gains: a gain is not allowed; each must be > 0 and finite")
    return options


def main(options: argparse.Namespace) -> None:
    """Train once, write a file for each choice of gains; print their accuracies beside the reference's.

    Raises:
        UserError: the reference or the images are not there, or do not fit.
    """
    torch.set_num_threads(1)
    reference = read_checkpoint(options.reference, "--reference")
    count = len(interfaces(reference.model))
    for gains in options.gains:
        if len(gains) != count:
            raise UserError(f"--gains: {len(gains)} gains are not allowed; the reference has {count} interfaces")
    original = original_domain(options.original, reference.spec)
    task = ClassificationTask(reference.spec, distillation=1.0, amp=options.amp)
    torch.manual_seed(options.seed)
    model = linearised(reference.model, torch.Generator().manual_seed(options.seed))
    grow(model, reference.model, task, original["train"], options)
    exact = ClassificationTask(reference.spec)
    compare(exact, original, {"reference": reference.model, "linear": model})
    options.out.mkdir(parents=True, exist_ok=True)
    for gains in options.gains:
        name = "-".join(f"{gain:g}" for gain in gains)
        made = released(model.eval(), reference.model, reference.spec, exact, gains, original["train"])
        compare(exact, original, {name: made})
        write_tensors(options.out / f"{name}.safetensors", made.state_dict())


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"illconditioned: {error}")
