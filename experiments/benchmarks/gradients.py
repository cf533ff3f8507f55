"""How far cheaper meta-gradients are from the exact one, of a trained model on real images.

    sophon pretrain experiment=quickstart
    python experiments/benchmarks/gradients.py --reference runs/quickstart/seed0/pretrain --domain fashion_shoes_bags

Each draw takes other batches, for the attacker (SGD) and for the queries, as many of each as there are steps. Beside
the methods that approximate stands the exact gradient with other query batches: how far apart two draws are anyway.
Results: gradients_<device>.json, a cell for each setting, and the table of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cases import CONF, SUPPRESSION, Bench
from measure import OTHER, Runner, approximations, clock_of, flat
from methods import METHODS
from omegaconf import OmegaConf
from records import machine, machines, markdown, put_cell

from sophon.config import DomainConfig
from sophon.devices import resolve_device
from sophon.domains import Batch, Domain, batches, load_restricted
from sophon.errors import UserError
from sophon.export import read_checkpoint
from sophon.files import write_text
from sophon.tasks import TASKS, kind_of

HERE = Path(__file__).parent
CHEAPER = [name for name, method in METHODS.items() if not method.exact]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the cosine and the difference of each method in each draw."""
    device = resolve_device(options.device)
    reference = read_checkpoint(options.reference, "--reference")
    spec, kind = reference.spec, kind_of(reference.spec)
    settings = OmegaConf.merge(
        OmegaConf.structured(DomainConfig), OmegaConf.load(CONF.parent / "domain" / f"{options.domain}.yaml")
    )
    config: Any = OmegaConf.to_object(settings)
    domain = load_restricted(config, image_size=spec.image_size, channels=spec.channels, where="--domain").to(device)
    task = TASKS[kind](spec, suppression_loss=options.loss or SUPPRESSION[kind])
    task.start_head(reference.model, "kept", domain.classes)
    model = reference.model.to(device)
    draws = [beside(Bench(model, task, *_drawn(domain, options, seed)), options) for seed in range(options.draws)]
    return {"draws": draws, "machine": machine(device)}


def _drawn(domain: Domain, options: argparse.Namespace, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Draw an attacker's batches, and twice as many for queries."""
    generators = (torch.Generator().manual_seed(2 * seed + role) for role in range(2))
    adapt, query = (
        batches(domain[split], options.batch, generator)
        for split, generator in zip(("adapt", "query"), generators, strict=True)
    )
    return list(islice(adapt, options.k)), list(islice(query, 2 * options.k))


def beside(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compare the gradients of one draw; its second half of query batches are the other ones."""
    halves = (replace(bench, query=bench.query[: options.k]), replace(bench, query=bench.query[options.k :]))
    found = {}
    for name in ("ours_first", *CHEAPER, OTHER):
        runner = Runner("ours_first" if name == OTHER else name, halves[name == OTHER], options.k)
        runner.strategy = replace(runner.strategy, lr=options.lr)
        _, outcome = runner.once(clock_of(bench.adapt[0].images.device), seed=int(name == OTHER))
        found[name] = flat(outcome, bench.model)
    return approximations(found)


def page(cells: dict[str, Any]) -> str:
    """Return all settings as a Markdown table."""

    def text(draws: list[dict[str, Any]], name: str) -> str:
        cosines, differences = ([draw[name][what] for draw in draws] for what in ("cosine", "difference"))
        return f"{statistics.median(cosines):.3f} ({statistics.median(differences):.3f})"

    names = [*CHEAPER, OTHER]
    rows = [[setting, *(text(cell["draws"], name) for name in names)] for setting, cell in cells.items()]
    lines = "".join(f"Measured on {line}.\n" for line in machines(cells))
    about = (
        "Beside the exact first-order one: cosine, and (norm of the difference by its norm); medians over the draws."
    )
    return f"# Cheaper gradients\n\n{lines}\n{about}\n\n{markdown(['setting', *names], rows)}"


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="a checkpoint's folder")
    parser.add_argument("--domain", required=True, help="restricted: a file of conf/domain; as many classes")
    parser.add_argument("--loss", help="suppression loss (ice of classifiers, dos of denoisers)")
    parser.add_argument("--k", type=int, default=20, help="steps of an attacker (20)")
    parser.add_argument("--batch", type=int, default=64, help="images a step, and a query (64)")
    parser.add_argument("--lr", type=float, default=0.01, help="of the attacker (0.01)")
    parser.add_argument("--draws", type=int, default=5, help="of all batches (5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="the results' file")
    options = parser.parse_args(arguments)
    options.out = options.out or HERE / f"gradients_{options.device}.json"
    return options


def main(arguments: list[str]) -> None:
    """Measure one setting and put it into the results."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    name = f"{options.domain}, K {options.k}, batches of {options.batch}, lr {options.lr:g}, {options.draws} draws"
    text = page(put_cell(options.out, name, measure(options)))
    write_text(options.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
