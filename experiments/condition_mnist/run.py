"""Condition numbers of linear features on the 90 ordered pairs of MNIST digits (arXiv 2505.23760, table 2).

python experiments/condition_mnist/run.py [--pairs 90]    # goes on from results.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sophon.config import DomainConfig
from sophon.domains.bundled import bundled_set
from sophon.losses import ill_conditioning, well_conditioning
from sophon.seeds import derive_seed

HERE = Path(__file__).parent
# 30 epochs are the paper's; the batch, Adam and its rate are those of the authors' code (the paper: descent at 0.005)
EPOCHS, BATCH, RATE, GROUP = 30, 64, 1e-3, 100
Regulariser = Callable[[Tensor], Tensor]
YARDSTICKS = ("code", "whole", "groups")


def eigenvalues(features: Tensor) -> Tensor:
    """Return the eigenvalues of X^T X that are not zero for want of images, rising."""
    wide = len(features) < features.shape[1]
    return torch.linalg.eigvalsh(features @ features.T if wide else features.T @ features)


def ill(features: Tensor) -> Tensor:
    """Return R_ill, equation 12 of the paper; in a batch smaller than the dimension k is its size."""
    spectrum = eigenvalues(features)
    return 2 / (spectrum.square().mean() - spectrum[0].square())


def well(features: Tensor) -> Tensor:
    """Return R_well, equation 3 of the paper, p being the number of features."""
    spectrum = eigenvalues(features)
    return (spectrum[-1].square() - spectrum.square().sum() / features.shape[1]) / 2


ROWS: dict[str, tuple[Regulariser, Regulariser | None]] = {
    "paper's R_ill only": (ill, None),
    "paper's R_ill and R_well": (ill, well),
    "sophon's condition": (ill_conditioning, well_conditioning),
}


def digits() -> list[Tensor]:
    """Return the bundled digits, float64 [500, 784] in [0, 1] each."""
    images: list[list[np.ndarray]] = [[] for _ in range(10)]
    for part in bundled_set(DomainConfig(source="bundled", dataset="mnist"), "domain"):
        for index, label in enumerate(part.labels):
            images[label].append(np.asarray(part.read(index)))
    return [torch.from_numpy(np.stack(each)).flatten(1).double() / 255 for each in images]


def batches(harmful: Tensor, primary: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all epochs' pairs of batches."""
    for _ in range(EPOCHS):
        orders = [torch.randperm(len(x), generator=generator).split(BATCH) for x in (harmful, primary)]
        for first, second in zip(*orders, strict=True):
            if len(first) == BATCH:
                yield harmful[first], primary[second]


def immunise(harmful: Tensor, primary: Tensor, row: str, seed: int) -> Tensor:
    """Return theta, [D, D], trained from the identity; the terms' weights make their first gradients equally long."""
    generator = torch.Generator().manual_seed(seed)
    worsen, improve = ROWS[row]
    theta = torch.eye(harmful.shape[1], requires_grad=True)
    optimizer, weight = torch.optim.Adam([theta], lr=RATE), 0.0
    for restricted, original in batches(harmful.float(), primary.float(), generator):
        (gradient,) = torch.autograd.grad(worsen(restricted @ theta), theta)
        if improve:
            (other,) = torch.autograd.grad(improve(original @ theta), theta)
            weight = weight or float(gradient.norm() / other.norm())
            gradient = gradient + weight * other
        theta.grad = gradient
        optimizer.step()
    return theta.detach().double()


def kappas(features: Tensor) -> dict[str, Tensor]:
    """Return log kappa by three yardsticks; of ``groups`` one a group.

    ``whole``: largest by smallest eigenvalue of all images, but for those that are zero to rounding (the paper's
    pseudo-inverse). ``code``: as the authors' code has it, which adds 1e-6 to all and takes the smallest above that.
    ``groups``: of 100 images at a time, whose Gram matrix has full rank.
    """
    spectrum = torch.linalg.eigvalsh(features.T @ features)
    largest = spectrum[-1]
    loaded = spectrum[spectrum > 0] + 1e-6
    nonzero = spectrum[spectrum > largest * len(spectrum) * torch.finfo(spectrum.dtype).eps]
    groups = torch.stack([eigenvalues(part) for part in features.split(GROUP)])
    return {
        "code": ((largest + 1e-6) / loaded[0]).log(),
        "whole": (largest / nonzero[0]).log(),
        "groups": (groups[:, -1] / groups[:, 0]).log(),
    }


def measure(harmful: Tensor, primary: Tensor, seed: int) -> dict[str, dict[str, list[float]]]:
    """Return, by row and yardstick, (i), (ii) and RIR of equation 15."""
    live = (harmful.sum(0) + primary.sum(0)) > 0  # the other pixels' weights have no gradient and no effect
    sides = harmful[:, live], primary[:, live]
    before = [kappas(images) for images in sides]
    found: dict[str, dict[str, list[float]]] = {}
    for row in ROWS:
        theta = immunise(*sides, row, seed)
        after = [kappas(images @ theta) for images in sides]
        found[row] = {}
        for name in YARDSTICKS:
            up, down = ((new[name] - old[name]).exp() for new, old in zip(after, before, strict=True))
            found[row][name] = [float(f"{x.mean():.4g}") for x in (up, down, up / down)]
    return found


def limit(digit: list[Tensor]) -> np.ndarray:
    """Return log RIR, [harmful, primary], of features that know but the harmful digit's leading direction.

    RIR being that of largest eigenvalues alone: 1 by the share of the primary digit's largest one that is left.
    """
    leading = [torch.linalg.svd(images, full_matrices=False)[2][0] for images in digit]
    largest = [(images @ v).square().sum() for images, v in zip(digit, leading, strict=True)]
    shares = [[(x @ v).square().sum() / top for x, top in zip(digit, largest, strict=True)] for v in leading]
    return -torch.tensor(shares).log().numpy()


def main() -> None:
    """Print what figure 2 comes from, then a table of means over the pairs; write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=90)
    count = parser.parse_args().pairs
    torch.set_num_threads(1)
    digit, off = digits(), ~np.eye(10, dtype=bool)
    published, predicted = json.loads((HERE / "figure_2.json").read_text()), limit(digit)[off]
    for name, values in published.items():
        figure = np.array(values)[off]
        match, error = np.corrcoef(predicted, figure)[0, 1], np.abs(predicted - figure).mean()
        print(
            f"{name}: mean RIR {np.exp(figure).mean():.2f}; with the limit r = {match:.2f}, mean difference {error:.2f}"
        )
    print(f"the limit: mean RIR {np.exp(predicted).mean():.2f}")
    file = HERE / "results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    # in an order of which any ten in a row have every digit on both sides
    pairs = [(harmful, (harmful + step) % 10) for step in range(1, 10) for harmful in range(10)]
    for harmful, primary in pairs[:count]:
        if (pair := f"{harmful} {primary}") not in found:
            found[pair] = measure(digit[harmful], digit[primary], derive_seed(0, harmful, primary))
            file.write_text("{\n" + ",\n".join(f'"{key}": {json.dumps(each)}' for key, each in found.items()) + "\n}\n")
    print(f"{len(found)} pairs\n")
    print("| trained on | yardstick | (i) | (ii) | RIR, mean | median | above 1 |\n|---|---|---|---|---|---|---|")
    for row, name in itertools.product(ROWS, YARDSTICKS):
        up, down, rir = zip(*(each[row][name] for each in found.values()), strict=True)
        means = " | ".join(f"{x:.3g}" for x in (*map(statistics.mean, (up, down, rir)), statistics.median(rir)))
        print(f"| {row} | {name} | {means} | {sum(value > 1 for value in rir)} of {len(rir)} |")


if __name__ == "__main__":
    main()
