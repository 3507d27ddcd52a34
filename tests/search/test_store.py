"""The database of a search."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

import optuna
import pytest

from optimum_flexcompress import FlexCompressError
from optimum_flexcompress.search import store as stores
from optimum_flexcompress.search.store import Score, ScoreStore, close_storage, explained, open_storage


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'search.db'}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nonsense", r"'nonsense' is no database URL: give one such as sqlite:///search.db"),
        (
            "sqlite:////nowhere/at/all/search.db",
            r"cannot be opened \(unable to open database file\): check the address",
        ),
        ("nosuch://host/name", r"cannot be opened \(Can't load plugin"),
        ("postgresql://me:secret@localhost/name", r"postgresql://me:\*\*\*@localhost/name needs a Python driver"),
    ],
)
def test_a_storage_that_cannot_be_reached(given, message):
    with pytest.raises(FlexCompressError, match=message) as caught:
        open_storage(given)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("/nowhere")


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "search.db").write_text("once upon a time there was a file" * 100)
    with pytest.raises(FlexCompressError, match="file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'search.db'}")


def test_a_database_that_goes_away(url, tmp_path):
    store = ScoreStore(open_storage(url), "a")
    store._engine.dispose()
    (tmp_path / "search.db").write_text("not a database any more" * 100)
    with pytest.raises(FlexCompressError, match="does not answer any more .* run the same search again"), explained():
        store.known()


def test_scores_are_kept_and_studies_apart(url):
    storage = open_storage(url)
    store = ScoreStore(storage, "a")
    assert store.claim("[1]") and store.claim("[2]") and not store.claim("[1]")
    assert store.known() == {"[1]", "[2]"} and store.scores() == {}
    second, first = Score(0.0, 1.0, {"macs": 3}), Score(0.5, 0.7, {})
    store.finish("[2]", second)
    store.finish("[1]", first)
    again = ScoreStore(open_storage(url), "a")
    # In the order in which they came; a score of zero is a score.
    assert list(again.scores().items()) == [("[2]", second), ("[1]", first)]
    assert not again.claim("[2]")
    again.release("[2]")
    assert again.scores() == store.scores()
    other = ScoreStore(storage, "b")
    assert other.known() == set() and other.claim("[1]")


def test_a_claim_is_given_to_one_of_many(url):
    store_of = [ScoreStore(open_storage(url), "a") for _ in range(4)]
    won, barrier = [], threading.Barrier(4)

    def work(store):
        for number in range(10):
            barrier.wait()
            if store.claim(f"[{number}]"):
                won.append(number)

    threads = [threading.Thread(target=work, args=(store,)) for store in store_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(10))


def test_claims_of_the_dead_are_taken_back_once(url, monkeypatch):
    mine, other = ScoreStore(open_storage(url), "a"), ScoreStore(open_storage(url), "a")
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = other._owner.split("/")[0] + f"/{done.stdout.strip()}/1"
    for configuration, owner in (("[1]", dead), ("[2]", "elsewhere/1/1"), ("[3]", other._owner)):
        other._owner = owner
        assert other.claim(configuration)
    # One on this machine without a process; those elsewhere and next door may well be alive.
    assert mine.take_abandoned() == ["[1]"]
    assert mine.take_abandoned() == [] and mine.known() == {"[2]", "[3]"}
    monkeypatch.setattr(stores, "SILENCE", 0.05)
    time.sleep(0.1)
    assert sorted(mine.take_abandoned()) == ["[2]", "[3]"]
    assert mine.known() == set()


def test_who_gives_signs_of_life_keeps_the_claim(url, monkeypatch):
    monkeypatch.setattr(stores, "BEAT", 0.02)
    monkeypatch.setattr(stores, "SILENCE", 1.0)
    mine, other = ScoreStore(open_storage(url), "a"), ScoreStore(open_storage(url), "a")
    other._owner = "elsewhere/1/1"
    assert other.claim("[1]")
    with other.beating("[1]"):
        time.sleep(1.3)
        assert mine.take_abandoned() == []
    time.sleep(1.1)
    assert mine.take_abandoned() == ["[1]"]


def test_two_workers_do_not_take_the_same_waiting_trial(url, monkeypatch):
    study = optuna.create_study(storage=open_storage(url), study_name="a")
    study.enqueue_trial({"x": 1})
    both = threading.Barrier(2)
    check = optuna.storages.RDBStorage.check_trial_is_updatable

    def check_and_wait(self, *args):
        # After a worker has read the state of a trial, before it writes it: let the other one read it, too.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        return check(self, *args)

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", check_and_wait)

    def take():
        storage = open_storage(url)
        taken.append(storage.set_trial_state_values(1, optuna.trial.TrialState.RUNNING))
        close_storage(storage)

    taken = []
    workers = [threading.Thread(target=take) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == [False, True]
