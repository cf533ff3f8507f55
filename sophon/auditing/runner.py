"""The audit: every job of a plan, each result a file, so that an audit can go on later and in several processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.attacks import Outcome, attack
from sophon.auditing.gallery import image_grid
from sophon.auditing.plan import ORACLE_SPLITS, Attempt, Job, Plan, Search, oracle_data
from sophon.auditing.reuse import Reused
from sophon.auditing.scene import Scene, unfit
from sophon.auditing.words import ORACLE, format_value
from sophon.config import AttackConfig
from sophon.domains import LoadedDomain, joined
from sophon.files import read_json, write_bytes, write_json
from sophon.held_out import exposure, fields_outside
from sophon.models import build
from sophon.paths import exists
from sophon.seeds import derive_seed, seed_all

SCHEMA_VERSION = 2
Record = dict[str, Any]


class Frechet(NamedTuple):
    """How generated images are measured.

    Attributes:
        network: whose features.
        distance: of generated images, uint8 [N, C, H, W], to the restricted domain's.
        concept_rate: percentage of them that show a restricted class; None not to say.
    """

    network: str
    distance: Callable[[Tensor], float]
    concept_rate: Callable[[Tensor], float] | None = None


class Runner:
    """Runs the jobs of an audit; a job is done when its file is there.

    Args:
        frechet: how to measure generated images; None not to.

    Raises:
        UserError: an attack is not well formed, none fits the models, or an audit to reuse is not there.
    """

    def __init__(
        self,
        scene: Scene,
        config: AttackConfig,
        seed: int,
        folder: Path,
        frechet: Frechet | None = None,
    ) -> None:
        self.scene = scene
        self.config = config
        self.seed = seed
        self.folder = folder
        self.reused = Reused(config.reuse, folder, lambda plain: self._exposure(FineTuneStrategy.of(plain)))
        self.plan = Plan(config, scene)
        self.measure_with(frechet)

    def measure_with(self, frechet: Frechet | None) -> None:
        """Change how generated images are measured, and with it what the jobs' files are called."""
        self.frechet = frechet
        self.jobs = {self._path(job): job for job in self.plan.jobs}

    def _path(self, job: Job) -> Path:
        kind = "attempts" if isinstance(job, Attempt) else "searches"
        return self.folder / kind / f"{job.identifier(self._provenance(job))}.json"

    def _provenance(self, job: Job) -> str:
        """Say what decides a job's result besides itself: the same job of another audit then has the same name."""
        scene, config = self.scene, self.config
        domain = scene.benign if isinstance(job, Attempt) and job.domain == "benign" else scene.restricted
        others = (scene.original, scene.benign) if isinstance(job, Search) or job.strategy.surgery else ()
        role = "unprotected" if job.role == ORACLE else job.role
        # distances in the features of two networks do not compare
        measured = [config.eval_points, config.samples, self.frechet and [self.frechet.network, config.frechet_samples]]
        hashes = [sorted(loaded.hashes.items()) for loaded in (domain, *others) if loaded is not None]
        relative = [scene.provenance["relative"]] if others and scene.relative is not None else []
        return repr([scene.provenance.get(role, role), hashes, self.seed, measured, *relative])

    def missing(self) -> list[Path]:
        """Return the files of this shard's jobs that are not there yet, after taking over what other audits have."""
        paths = list(self.jobs)[self.config.shard :: self.config.shards]
        for path in paths:
            if not exists(path):
                self.reused.take_over(path)
        return [path for path in paths if not exists(path)]

    def run(
        self,
        path: Path,
        on_trial: Callable[[str], None] = lambda note: None,
        on_point: Callable[[str], None] = lambda note: None,
    ) -> str:
        """Run the job whose file is ``path``, telling of each trial and point; return a line on what came of it."""
        job = self.jobs[path]
        if isinstance(job, Attempt):
            return self._write(path, job, self._attempt(path.stem, job, on_point))
        return self._write(path, job, self._search(path.stem, job, on_trial))

    def _write(self, path: Path, job: Job, record: Record) -> str:
        write_json(path, record)
        if isinstance(job, Attempt):
            value = record["test"]
            result = "not finite" if value is None else format_value(value, self.scene.task.metric)
            return f"{job.attack} on {job.role}: {result}"
        return f"{job.name} on {job.role}: {len(record['trials'])} trials"

    def records(self) -> tuple[list[Record], list[Record]]:
        """Return what all jobs have written: the attempts, the winners' among them, and the searches."""
        records = {path: read_json(path) for path in self.jobs}
        searches = [record for path, record in records.items() if isinstance(self.jobs[path], Search)]
        attempts = [record for path, record in records.items() if isinstance(self.jobs[path], Attempt)]
        winners = [read_json(self.folder / "attempts" / f"{name}.json") for s in searches for name in s["attempts"]]
        return [*attempts, *winners], searches

    def _search(self, key: str, job: Search, on_trial: Callable[[str], None]) -> Record:
        """Search for the strategy that does best on ``select``, then run it on several seeds and read ``test``."""
        from sophon.auditing import search  # optuna takes a second to import

        task, config = self.scene.task, job.config
        seed = derive_seed(self.seed, "search", job.name)

        def evaluate(strategy: FineTuneStrategy, report: Callable[[int, float], None]) -> float | None:
            if unfit(strategy, self.scene, self.scene.restricted):  # choices that each fit, but not together
                return None
            outcome = self._attack(
                self._victim(job.role, seed),
                strategy,
                self.scene.restricted,
                seed=seed,
                eval_points=config.eval_points,
                read_test=False,
                at_point=lambda model, step, value: report(step, value),
            )
            return outcome.curve[-1][1] if outcome.finished else None

        trials = search.run_search(
            config,
            storage=self.folder / "searches" / f"{key}.trials",
            seed=seed,
            higher_is_better=task.metric.higher_is_better,
            evaluate=evaluate,
            on_trial=lambda trial: on_trial(f"{job.name} on {job.role}: trial {trial.number} {trial.state}"),
        )
        best = search.best(trials, task.metric.higher_is_better)
        winners = []
        for number in range(config.seeds if best else 0):
            assert best is not None  # the range says so
            attempt = Attempt(job.name, best.strategy, job.role, number, search=job.name)
            path = self._path(attempt)
            if not exists(path):
                facts = {"name": job.name, "sampler": config.sampler, "trials": len(trials)}
                write_json(path, self._attempt(path.stem, attempt) | {"search": facts})
                on_trial(f"{job.name} on {job.role}: the winner, seed {number}")
            winners.append(path.stem)
        return {
            "schema_version": SCHEMA_VERSION,
            "id": key,
            "name": job.name,
            "role": job.role,
            **asdict(config),
            "budget": config.trials,
            "trials": [{**vars(trial), "strategy": trial.strategy.plain()} for trial in trials],
            "best": best and best.number,
            "attempts": winners,
        }

    def _attack(self, victim: nn.Module, strategy: FineTuneStrategy, domain: LoadedDomain, **options: Any) -> Outcome:
        scene = self.scene
        return attack(
            victim,
            strategy,
            scene.task,
            domain,
            spec=scene.spec,
            original=scene.original,
            benign=scene.benign,
            relative=scene.relative,
            **options,
        )

    def _attempt(self, key: str, attempt: Attempt, on_point: Callable[[str], None] = lambda note: None) -> Record:
        # The role is not part of the seed: all roles face the same head, data order and augmentation.
        seed = derive_seed(self.seed, "attempt", attempt.attack, attempt.seed)

        def at_point(model: nn.Module, step: int, value: float) -> None:
            on_point(f"{attempt.attack} on {attempt.role}: step {step} of {attempt.strategy.steps}")
            if attempt.seed == 0 and self.config.samples:  # one seed's pictures are enough to look at
                self._draw(model, key, step)

        outcome = self._attack(
            self._victim(attempt.role, seed),
            attempt.strategy,
            self._domain(attempt),
            seed=seed,
            eval_points=self.config.eval_points,
            at_point=at_point,
        )
        pictures = {step: _picture(key, step) for step, _ in outcome.curve}
        details = self._details(outcome.model, self._domain(attempt))
        record = {
            "schema_version": SCHEMA_VERSION,
            "id": key,
            "attack": attempt.attack,
            "role": attempt.role,
            "domain": attempt.domain,
            "seed": attempt.seed,
            "strategy": attempt.strategy.plain(),
            **self._exposure(attempt.strategy),
            "metric": asdict(self.scene.task.metric),
            "curve": [{"step": step, "select": _finite(value)} for step, value in outcome.curve],
            "test": _finite(outcome.test.value),
            "test_images": outcome.test.images,
            "standard_error": _finite(outcome.test.standard_error),
            "details": {name: _finite(value) for name, value in details.items()},
            "samples": [{"step": at, "file": name} for at, name in pictures.items() if exists(self.folder / name)],
            "search": None,
            "finished": outcome.finished,
            "seconds": outcome.seconds,
            "flops": outcome.flops,
            "prepared_flops": outcome.prepared_flops,
            "steps": attempt.strategy.steps,
        }
        if attempt.role == ORACLE:
            record["data_ratio"] = oracle_data(self.plan.named[attempt.attack], self.scene.restricted)[1]
        return record

    def _exposure(self, strategy: FineTuneStrategy) -> Record:
        support = self.scene.support
        outside = None if support is None else fields_outside(support, strategy)
        return {"exposure": exposure(outside), "outside": list(outside or ())}

    def _domain(self, attempt: Attempt) -> LoadedDomain:
        scene = self.scene
        if attempt.role == ORACLE:
            return with_more_data(scene.restricted)
        if attempt.domain == "benign":
            assert scene.benign is not None  # the plan has benign attempts only if there is one
            return scene.benign
        return scene.restricted

    def _details(self, model: nn.Module, domain: LoadedDomain) -> dict[str, float]:
        details = self.scene.task.details(model, domain["test"])
        if self.frechet is not None and domain is self.scene.restricted:
            images = self._sample(model, self.config.frechet_samples, "frechet")
            if images is not None:
                details["Frechet distance"] = self.frechet.distance(images)
                if self.frechet.concept_rate is not None:
                    details["concept rate"] = self.frechet.concept_rate(images)
        return details

    def _sample(self, model: nn.Module, count: int, purpose: str) -> Tensor | None:
        """Let a model generate images; one that reads prompts gets those of the restricted domain's test images."""
        prompts = self.scene.restricted["test"].spread(count).prompts or ()
        return self.scene.task.sample(model, count, derive_seed(self.seed, purpose), prompts)

    def _draw(self, model: nn.Module, key: str, step: int) -> None:
        """Write a grid of what the model generates, if it does; the same noise for every role, attack and step."""
        images = self._sample(model, self.config.samples, "samples")
        if images is not None:
            write_bytes(self.folder / _picture(key, step), image_grid(images))

    def _victim(self, role: str, seed: int) -> nn.Module:
        models: Mapping[str, nn.Module] = self.scene.models
        if role != "scratch":
            return copy.deepcopy(models["unprotected" if role == ORACLE else role])
        seed_all(derive_seed(seed, "scratch"))
        device = next(next(iter(models.values())).parameters()).device
        return build(self.scene.spec).to(device)


def _picture(key: str, step: int) -> str:
    return f"samples/{key}-{step}.png"


def with_more_data(restricted: LoadedDomain) -> LoadedDomain:
    """Return the domain with the defender's images added to the attacker's."""
    attack = joined(*(restricted[split] for split in ORACLE_SPLITS))
    return replace(restricted, splits={**restricted.splits, "attack": attack})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
