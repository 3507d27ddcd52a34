"""The search itself: NSGA-II over the configurations of a space, by any number of workers on one database."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from ..errors import FlexCompressError
from .front import dominated_area
from .store import Score, ScoreStore, explained, optuna


logger = logging.getLogger(__name__)

Candidate = tuple
"""A configuration in whole numbers: equal ones are the same configuration."""

MUTATION = 0.5
"""Share of the children that come from one parent, and of the genes that change in them."""
ATTEMPTS = 50
NEAR = 0.2
GAIN = 1e-3
POLL = 0.5


class Space(Protocol):
    """What can be searched.

    Attributes:
        kind: Name of its candidates in the file of the front.
        size: How many different candidates there are.
        full: The candidate that takes nothing away.
        distributions: The genes, as Optuna knows them.
    """

    kind: str
    size: int
    full: Candidate
    distributions: dict[str, optuna.distributions.BaseDistribution]

    def start(self, count: int) -> list[Candidate]:
        """At most `count` candidates to start from, the full one first."""

    def all(self) -> Iterator[Candidate]:
        """Every candidate, the full one first."""

    def genes(self, candidate: Candidate) -> dict[str, Any]:
        """The genes of a candidate."""

    def decode(self, genes: Mapping[str, Any]) -> Candidate:
        """The candidate that genes stand for."""

    def mutate(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """A candidate like another one, each gene changed with probability `MUTATION`."""

    def cross(self, first: Candidate, second: Candidate) -> Candidate:
        """The candidate between two others."""

    def random(self, rng: np.random.Generator) -> Candidate:
        """Any candidate."""


def check_counts(least: int = 1, **values: Any) -> None:
    """Raises [`FlexCompressError`] unless all values are whole numbers of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            option = name.replace("_", "-")
            raise FlexCompressError(f"{name} (--{option}) is {value!r}: give a whole number of at least {least}.")


class Evolution:
    """A search on a database, which it goes on with where there is one.

    The first generation is the start of the space; a child of a later one is the mutation of a parent or lies between
    two, parents being those that Optuna's NSGA-II selects. What was scored, or is being scored by another worker,
    is not proposed again. A space that is no larger than the budget is scored as a whole.

    Args:
        space: What to search.
        storage: What [`optimum_flexcompress.search.store.open_storage`] returned.
        study: Name of the search: the same for workers on the same search, another one for any other.
        greater_is_better: Direction of the metric.
        population: Size of a generation, at least 2.
        trials: How many configurations are scored in all, by all workers and runs.
        patience: The search also ends when so many configurations in a row have not moved the front; 0: never.
        focus: Configurations that lose more than this share of the full model's metric are not bred from, and do not
            count as moving the front, as long as there are others.
        max_cost: What the pick may cost, as a share of the full model's cost. Then the configurations that cost about
            as much are bred from, whatever they lose, and `focus` is without effect.
        seed: Of everything random.
    """

    def __init__(
        self,
        space: Space,
        storage: optuna.storages.RDBStorage,
        study: str,
        *,
        greater_is_better: bool = True,
        population: int = 20,
        trials: int = 150,
        patience: int = 40,
        focus: float = 0.05,
        max_cost: float | None = None,
        seed: int = 42,
    ):
        check_counts(2, population=population)
        check_counts(trials=trials)
        check_counts(0, patience=patience)
        self.space, self.population, self.patience, self.seed = space, population, patience, seed
        self.focus, self.max_cost = focus, max_cost
        self.trials = min(trials, space.size)
        self._sign = 1 if greater_is_better else -1
        with explained(), _quiet():
            self.store = ScoreStore(storage, study)
            sampler = optuna.samplers.NSGAIISampler(
                population_size=population, seed=seed, child_generation_strategy=self._propose
            )
            directions = ["minimize", "maximize" if greater_is_better else "minimize"]
            self._study = optuna.create_study(
                storage=storage, study_name=study, sampler=sampler, directions=directions, load_if_exists=True
            )
        self.start = list(space.all()) if space.size <= trials else space.start(min(population, trials))

    def run(self, score: Callable[[Candidate], Score], progress: bool = True) -> None:
        """Scores configurations until the budget is used up, or the front does not move any more.

        Args:
            score: Scores one configuration.
            progress: Whether to show a progress bar.

        Raises:
            FlexCompressError: The storage does not answer; or whatever `score` raises. The configuration at hand
                is then given back, for the next run or another worker.
        """
        with explained(), _quiet():
            self._enqueue_start()
            finished = len(self.store.scores())
            with tqdm(
                total=self.trials, initial=finished, desc="Searching", unit="configuration", disable=not progress
            ) as bar:
                while self._goes_on():
                    trial, candidate = self._next()
                    if not self.store.claim(key_of(candidate)):
                        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                        continue
                    self._score(candidate, score, trial)
                    bar.update(len(self.store.scores()) - bar.n)
            # Without the full model there is nothing to compare with; another worker may still be at it.
            while self.space.full not in self.scores():
                self._bring_back_abandoned()
                if self.store.claim(key_of(self.space.full)):
                    self._score(self.space.full, score)
                else:
                    time.sleep(POLL)

    def scores(self) -> dict[Candidate, Score]:
        """All scores, in the order in which they came."""
        with explained():
            return {tuple(json.loads(key)): score for key, score in self.store.scores().items()}

    # Steps

    def _enqueue_start(self) -> None:
        """Queues what is still to be scored of the start."""
        self._bring_back_abandoned()
        known = self.store.known() | {key_of(candidate) for candidate in self._waiting()}
        for candidate in self.start:
            if key_of(candidate) not in known:
                self._study.enqueue_trial(self.space.genes(candidate))

    def _bring_back_abandoned(self) -> None:
        """Queues what workers that died had at hand."""
        for key in self.store.take_abandoned():
            self._study.enqueue_trial(self.space.genes(tuple(json.loads(key))))

    def _waiting(self) -> list[Candidate]:
        trials = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        return [self.space.decode(trial.system_attrs["fixed_params"]) for trial in trials]

    def _goes_on(self) -> bool:
        self._bring_back_abandoned()
        if len(self.store.known()) >= self.trials:
            return False
        return bool(self._waiting()) or not self._stands_still()

    def _stands_still(self) -> bool:
        scores = list(self.store.scores().values())
        if not self.patience or len(scores) <= max(self.patience, len(self.start)):
            return False
        points = [(score.relative_cost, self._sign * score.metric) for score in scores]
        floors = (self._least_quality(self.scores()), min(quality for _, quality in points))
        for floor in filter(np.isfinite, floors):
            worst = (max(cost for cost, _ in points), floor)
            area, before = dominated_area(points, worst), dominated_area(points[: -self.patience], worst)
            if area - before > GAIN * area:
                return False
            if area:
                break
        logger.info("The front has not moved over the last %d configurations: the search ends.", self.patience)
        return True

    def _least_quality(self, scores: Mapping[Candidate, Score]) -> float:
        """What a configuration must reach to be of interest."""
        full = scores.get(self.space.full)
        return (
            -np.inf
            if full is None or self.max_cost is not None
            else self._sign * full.metric - self.focus * abs(full.metric)
        )

    def _next(self) -> tuple[optuna.Trial, Candidate]:
        scored = list(self.scores())
        if len(scored) < self.population and not self._waiting():
            # Other workers are still at the first generation, of which Optuna would draw the rest at random.
            self._study.enqueue_trial(self.space.genes(self._child(scored or self.start)))
        trial = self._study.ask(self.space.distributions)
        # Optuna counts a trial to a generation when it is asked for these, which it is not for one from the queue.
        trial.relative_params  # noqa: B018
        return trial, self.space.decode(trial.params)

    def _score(
        self, candidate: Candidate, score: Callable[[Candidate], Score], trial: optuna.Trial | None = None
    ) -> None:
        key = key_of(candidate)
        try:
            with self.store.beating(key):
                result = score(candidate)
            self.store.finish(key, result)
        except BaseException:
            # Also after Ctrl-C: nothing is lost, and nobody waits for a claim that nobody is working on. The database
            # itself may be what failed, and then the first error is the one to report.
            with contextlib.suppress(Exception):
                self.store.release(key)
                self._study.enqueue_trial(self.space.genes(candidate))
                if trial is not None:
                    self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        if trial is not None:
            self._study.tell(trial, [result.relative_cost, result.metric])

    # Children

    def _propose(self, study: optuna.Study, search_space: dict, parents: list[optuna.trial.FrozenTrial]) -> dict:
        """What NSGA-II calls for the genes of a child."""
        return self.space.genes(self._child([self.space.decode(trial.params) for trial in parents]))

    def _child(self, parents: Sequence[Candidate]) -> Candidate:
        known = self.store.known()
        # The number of configurations so far makes a search that was resumed draw what it would have drawn.
        rng = np.random.default_rng([self.seed, len(known)])
        parents = self._of_interest(sorted(set(parents)), self.scores())
        child = self._breed(parents, rng)
        for _ in range(ATTEMPTS):
            if key_of(child) not in known:
                return child
            child = self.space.mutate(child, rng)
        while key_of(child) in known and len(known) < self.space.size:
            child = self.space.random(rng)
        return child

    def _of_interest(self, parents: Sequence[Candidate], scores: Mapping[Candidate, Score]) -> Sequence[Candidate]:
        """Those of the parents that lead to what is asked for, if there are two of them."""
        known = [parent for parent in parents if parent in scores]
        if self.max_cost is None:
            least = self._least_quality(scores)
            good = [parent for parent in known if self._sign * scores[parent].metric >= least]
        else:
            distance = {parent: abs(scores[parent].relative_cost / self.max_cost - 1) for parent in known}
            near = sum(value <= NEAR for value in distance.values())
            good = sorted(sorted(known, key=distance.get)[: max(near, 2)])
        return good if len(good) > 1 else parents

    def _breed(self, parents: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
        if len(parents) < 2 or rng.random() < MUTATION:
            return self.space.mutate(parents[rng.integers(len(parents))], rng)
        first, second = rng.choice(len(parents), size=2, replace=False)
        return self.space.cross(parents[first], parents[second])


def key_of(candidate: Candidate) -> str:
    """A candidate as it stands in the database."""
    return json.dumps(list(candidate), separators=(",", ":"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines, one for every trial, and its notes on interfaces that may still change."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
