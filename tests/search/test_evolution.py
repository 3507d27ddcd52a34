"""The search: it ends, scores nothing twice, goes on after a kill, and works in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from optimum_flexcompress import FlexCompressError
from optimum_flexcompress.search import evolution as evolutions
from optimum_flexcompress.search.evolution import key_of
from optimum_flexcompress.search.front import Point, dominated_area, pareto
from tests.search.toys import TRIALS, evolution_of, score, space_of


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'search.db'}"


class Scorer:
    """Scores, and notes what was asked for; fails at one of the calls."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None):
        self.seen, self.fail_at, self.error = [], fail_at, error

    def __call__(self, candidate):
        if len(self.seen) == self.fail_at:
            raise self.error
        self.seen.append(candidate)
        return score(candidate)


def start_worker(url, log, delay):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."] + sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.search.toys", url, str(log), str(delay)]
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)


def logged(log, word):
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[1] for line in lines if line.startswith(word + " ")]


def test_nothing_is_scored_twice_and_the_budget_holds(url):
    scorer = Scorer()
    evolution = evolution_of(url)
    evolution.run(scorer, progress=False)
    assert len(scorer.seen) == len(set(scorer.seen)) == TRIALS
    assert scorer.seen[:5] == space_of().start(5)
    assert {candidate: score(candidate) for candidate in scorer.seen} == evolution.scores()
    again = Scorer()
    evolution_of(url).run(again, progress=False)
    assert again.seen == []
    # A larger budget goes on from there.
    evolution_of(url, trials=TRIALS + 4).run(again, progress=False)
    assert len(again.seen) == 4 and not set(again.seen) & set(scorer.seen)


def test_it_finds_more_than_its_start_and_no_dominated_point(url):
    evolution = evolution_of(url, trials=40)
    evolution.run(score, progress=False)
    points = [Point({"c": c}, s.metric, s.relative_cost, s.relative_cost) for c, s in evolution.scores().items()]
    front = pareto(points, True)
    for one in front:
        for other in points:
            assert (other.cost, -other.metric) == (one.cost, -one.metric) or (
                other.cost > one.cost or other.metric < one.metric
            )
    # Of the plane that can be beaten at a loss of at most 5 %, the most that any configurations could.
    floor = 0.95 * score(space_of().full).metric

    def area(candidates):
        return dominated_area([(score(c).relative_cost, score(c).metric) for c in candidates], (1.0, floor))

    assert area(evolution.scores()) > 0.8 * area(space_of().all()) > 1.5 * area(evolution.start)


@pytest.mark.parametrize("max_cost", [0.4, 0.6])
def test_it_looks_near_the_cost_that_is_asked_for(tmp_path, max_cost):
    def run(**options):
        evolution = evolution_of(f"sqlite:///{tmp_path / f'{len(options)}.db'}", trials=30, **options)
        evolution.run(score, progress=False)
        return evolution.scores()

    def best(scores):
        return max(one.metric for one in scores.values() if one.relative_cost <= max_cost)

    aimed, plain = run(max_cost=max_cost), run()
    near = [sum(abs(one.relative_cost / max_cost - 1) < 0.2 for one in scores.values()) for scores in (aimed, plain)]
    assert near[0] > 10 and near[0] > near[1], near
    possible = best({candidate: score(candidate) for candidate in space_of().all()})
    assert best(aimed) > 0.94 * possible and best(aimed) >= best(plain), (best(aimed), best(plain), possible)


@pytest.mark.parametrize(
    ("layers", "max_length", "trials", "patience"),
    [(1, 2, 30, 0), (1, 9, 30, 5), (1, 9, 7, 0), (2, 2, 30, 5), (2, 4, 30, 0), (2, 5, 9, 0), (2, 5, 9, 5)],
)
def test_it_ends_on_tiny_spaces(url, layers, max_length, trials, patience):
    space = space_of(layers, max_length)
    scorer = Scorer()
    evolution = evolution_of(url, space, trials=trials, patience=patience)
    evolution.run(scorer, progress=False)
    assert len(scorer.seen) == len(set(scorer.seen)) == len(evolution.scores())
    assert space.full in scorer.seen
    if space.size <= trials:
        assert set(scorer.seen) == set(space.all())
    elif not patience:
        assert len(scorer.seen) == trials


def test_it_ends_when_the_front_stands_still(url, caplog):
    scorer = Scorer()

    def flat(candidate):
        scorer(candidate)
        return score(candidate) if len(scorer.seen) <= 5 else type(score(candidate))(-1.0, 1.0, {})

    evolution = evolution_of(url, trials=1000, patience=8)
    evolution.run(flat, progress=False)
    # What loses more than the search is interested in does not move the front.
    least = score(scorer.seen[0]).metric * (1 - evolution.focus)
    last = max(place for place, candidate in enumerate(scorer.seen[:5]) if score(candidate).metric >= least)
    assert 0 < last < 4
    assert len(scorer.seen) == last + 1 + 8


def test_lower_can_be_better(url):
    def loss(candidate):
        result = score(candidate)
        return type(result)(-result.metric, result.relative_cost, {})

    falling = evolution_of(url, greater_is_better=False)
    falling.run(loss, progress=False)
    rising = evolution_of(url.replace("search.db", "rising.db"))
    rising.run(score, progress=False)
    assert list(falling.scores()) == list(rising.scores())


@pytest.mark.parametrize(
    ("error", "fail_at"),
    [(KeyboardInterrupt(), 0), (FlexCompressError("no"), 3), (KeyboardInterrupt(), 8), (MemoryError(), 13)],
)
def test_an_interrupted_search_ends_as_if_it_had_not_been(url, error, fail_at):
    whole = Scorer()
    evolution_of(url.replace("search.db", "whole.db")).run(whole, progress=False)
    first, second = Scorer(fail_at, error), Scorer()
    with pytest.raises(type(error)):
        evolution_of(url).run(first, progress=False)
    resumed = evolution_of(url)
    resumed.run(second, progress=False)
    assert not set(first.seen) & set(second.seen)
    assert set(first.seen + second.seen) == set(whole.seen)
    assert resumed.scores() == {candidate: score(candidate) for candidate in whole.seen}


def test_a_killed_worker_loses_nothing(url, tmp_path):
    log = tmp_path / "log"
    worker = start_worker(url, log, 2)
    limit = time.monotonic() + 120
    # While it scores, which is where a worker spends its time.
    while len(logged(log, "start")) < 5:
        assert worker.poll() is None and time.monotonic() < limit, worker.stderr.read()
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    before = evolution_of(url).scores()
    assert len(before) == 4
    scorer = Scorer()
    evolution = evolution_of(url)
    evolution.run(scorer, progress=False)
    assert not set(scorer.seen) & set(before)
    whole = Scorer()
    evolution_of(url.replace("search.db", "whole.db")).run(whole, progress=False)
    assert set(evolution.scores()) == set(whole.seen)


def test_two_workers_share_one_search(url, tmp_path):
    logs = [tmp_path / "one", tmp_path / "two"]
    workers = [start_worker(url, log, 0.05) for log in logs]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    scored = [key for log in logs for key in logged(log, "end")]
    assert max(Counter(scored).values()) == 1
    # Both look at the budget before they claim: one may go over it by one.
    assert TRIALS <= len(scored) <= TRIALS + 1
    assert all(logged(log, "end") for log in logs)
    assert {key_of(candidate) for candidate in evolution_of(url).scores()} == set(scored)
    assert {key_of(candidate) for candidate in space_of().start(5)} <= set(scored)


def test_a_second_worker_does_not_wait_for_the_first_generation(url):
    """What others are still at counts as known, and the next children come from what is there."""
    first = evolution_of(url, population=5)
    first._enqueue_start()
    busy = [first._next()[1] for _ in range(5)]
    assert busy == space_of().start(5) and all(first.store.claim(key_of(candidate)) for candidate in busy)
    second = Scorer()
    other = evolution_of(url, population=5, trials=9)
    first.store.finish(key_of(busy[0]), score(busy[0]))
    other.run(second, progress=False)
    assert len(second.seen) == 4 and not set(second.seen) & set(busy)


def test_the_full_model_is_scored_whatever_happens(url, monkeypatch):
    """The worker that was at it dies after the others have used up the budget."""
    monkeypatch.setattr(evolutions, "POLL", 0.01)
    evolution = evolution_of(url, trials=5)
    evolution.store._owner = "elsewhere/1/1"
    assert evolution.store.claim(key_of(space_of().full))
    evolution.store._owner = "me"
    scorer = Scorer()

    def slow(candidate):
        if len(scorer.seen) == 3:
            monkeypatch.setattr("optimum_flexcompress.search.store.SILENCE", 0.0)
        return scorer(candidate)

    evolution.run(slow, progress=False)
    assert scorer.seen[-1] == space_of().full and space_of().full in evolution.scores()


@pytest.mark.parametrize(
    "options", [{"population": 1}, {"trials": 0}, {"patience": -1}, {"trials": 2.5}, {"population": True}]
)
def test_bad_numbers(url, options):
    with pytest.raises(FlexCompressError, match=f"{next(iter(options))} .* is .* whole number of at least"):
        evolution_of(url, **options)


def test_the_start_is_the_first_generation(url):
    """Optuna by itself counts what comes from its queue to no generation, and would breed from random candidates."""
    evolution = evolution_of(url, trials=12)
    evolution.run(score, progress=False)
    trials = evolution._study.get_trials(deepcopy=False)
    generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in trials]
    assert generations == [0] * 5 + [1] * 5 + [2] * 2
