"""The database of a search: Optuna's study, and the scores of all workers, each configuration once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import FlexCompressError, MissingExtraError


try:
    import optuna
    import sqlalchemy as sql
except ImportError as error:
    raise MissingExtraError("optuna", "search") from error


BEAT = 10.0
"""Seconds between the signs of life of a worker that scores a configuration."""
SILENCE = 90.0
"""Seconds without one after which another worker takes the configuration over."""
_OPENING = 4

_owners: set[str] = set()

_TABLES = sql.MetaData()
_SCORES = sql.Table(
    "flexcompress_scores",
    _TABLES,
    sql.Column("study", sql.String(80), primary_key=True),
    sql.Column("configuration", sql.String(400), primary_key=True),
    sql.Column("owner", sql.String(190), nullable=False),
    sql.Column("beat", sql.Float, nullable=False),
    sql.Column("finished", sql.Float),
    sql.Column("score", sql.Text),
)


@dataclass(frozen=True)
class Score:
    """What scoring a configuration gave.

    Attributes:
        metric: On the held-out examples.
        relative_cost: Cost over that of the full model.
        details: What else is worth keeping, in JSON types.
    """

    metric: float
    relative_cost: float
    details: dict[str, Any]


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Connects to the database of a search and makes its tables.

    Args:
        url: A database URL of SQLAlchemy, such as `sqlite:////tmp/search.db` or `postgresql://host/name`.

    Raises:
        FlexCompressError: It cannot be reached, or is no database URL.
    """
    try:
        shown = sql.engine.make_url(url).render_as_string(hide_password=True)
        sqlite = url.startswith("sqlite")
    except (sql.exc.ArgumentError, AttributeError) as error:
        raise FlexCompressError(
            f"The storage {url!r} is no database URL: give one such as sqlite:///search.db or "
            "postgresql://user:password@host/name."
        ) from error
    options = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return _connect(url, options)
    except ImportError as error:
        raise FlexCompressError(
            f"The storage {shown} needs a Python driver for its database that is not installed: install it (psycopg2 "
            "for PostgreSQL, pymysql for MySQL), or use sqlite:///FILE."
        ) from error
    except (sql.exc.SQLAlchemyError, optuna.exceptions.OptunaError, OSError, RuntimeError) as error:
        raise FlexCompressError(
            f"The storage {shown} cannot be opened ({_reason(error)}): check the address and that the database runs, or "
            "leave the storage out to keep the search in its output folder."
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _connect(url: str, options: dict[str, Any]) -> optuna.storages.RDBStorage:
    # Workers that start together may all find the tables missing: the slower ones see them on a second look.
    for attempt in range(_OPENING):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
            if url.startswith("sqlite"):
                sql.event.listen(storage.engine, "connect", _set_up_sqlite)
                sql.event.listen(storage.engine, "begin", _begin_alone)
                storage.engine.dispose()
            _TABLES.create_all(storage.engine)
            return storage
        except sql.exc.SQLAlchemyError as error:
            raced = isinstance(error, sql.exc.IntegrityError) or "exists" in str(error)
            if attempt == _OPENING - 1 or not raced:
                raise
            time.sleep(0.5 * (attempt + 1))
    raise AssertionError


def close_storage(storage: optuna.storages.RDBStorage) -> None:
    """Closes its connections, which also tidies up beside an SQLite file."""
    storage.remove_session()
    storage.engine.dispose()


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Survives a killed process as before without waiting for the disk; a power cut may cost the last scores."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    # Or else the driver begins a transaction at its first change, after what was read to decide on it.
    connection.isolation_level = None


def _begin_alone(connection: sql.Connection) -> None:
    """Lets no other worker in between what a transaction reads and what it writes.

    Optuna takes a waiting trial by reading its state with a row lock, which SQLite does not have: without this, two
    workers could take the same one.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns a database that goes away in the middle into one sentence."""
    try:
        yield
    except (sql.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise FlexCompressError(
            f"The storage of the search does not answer any more ({_reason(error)}): what was scored is kept there; run "
            "the same search again to go on when it is back."
        ) from error


def _reason(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause
    text = " ".join(str(cause).split())
    return text[:200] or type(cause).__name__


class ScoreStore:
    """Scores by configuration. A configuration is claimed before it is scored, so that no two workers score it.

    A claim is an insert under a primary key, which every database makes atomic. While its owner scores, it leaves
    signs of life; the claim of an owner that died can be taken back.

    Args:
        storage: What [`open_storage`] returned.
        study: Name of the search.
    """

    def __init__(self, storage: optuna.storages.RDBStorage, study: str):
        self._engine = storage.engine
        self._study = study
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{time.time_ns()}"
        _owners.add(self._owner)

    def _mine(self, configuration: str) -> Any:
        return (_SCORES.c.study == self._study) & (_SCORES.c.configuration == configuration)

    def _rows(self, *conditions: Any) -> list[Any]:
        query = sql.select(_SCORES).where(_SCORES.c.study == self._study, *conditions)
        with self._engine.connect() as connection:
            return list(connection.execute(query.order_by(_SCORES.c.finished, _SCORES.c.configuration)))

    def known(self) -> set[str]:
        """Configurations that were scored or are being scored."""
        return {row.configuration for row in self._rows()}

    def scores(self) -> dict[str, Score]:
        """Scores in the order in which they came."""
        rows = self._rows(_SCORES.c.score.is_not(None))
        return {row.configuration: Score(**json.loads(row.score)) for row in rows}

    def claim(self, configuration: str) -> bool:
        """Whether this worker is to score a configuration; `False` where it was scored or another worker is at it."""
        values = {"study": self._study, "configuration": configuration, "owner": self._owner, "beat": time.time()}
        try:
            with self._engine.begin() as connection:
                connection.execute(sql.insert(_SCORES).values(**values))
        except sql.exc.IntegrityError:
            return False
        return True

    @contextlib.contextmanager
    def beating(self, configuration: str) -> Iterator[None]:
        """Leaves signs of life for a claim while the block runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                # A sign that does not get through is no reason to stop: the next one may.
                with contextlib.suppress(sql.exc.SQLAlchemyError), self._engine.begin() as connection:
                    connection.execute(sql.update(_SCORES).where(self._mine(configuration)).values(beat=time.time()))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def finish(self, configuration: str, score: Score) -> None:
        """Keeps a score."""
        text = json.dumps({"metric": score.metric, "relative_cost": score.relative_cost, "details": score.details})
        with self._engine.begin() as connection:
            connection.execute(
                sql.update(_SCORES).where(self._mine(configuration)).values(score=text, finished=time.time())
            )

    def release(self, configuration: str) -> None:
        """Gives a claim back unscored."""
        with self._engine.begin() as connection:
            connection.execute(sql.delete(_SCORES).where(self._mine(configuration), _SCORES.c.score.is_(None)))

    def take_abandoned(self) -> list[str]:
        """Removes the claims of workers that died, and returns their configurations. Each goes to one caller."""
        taken = []
        for row in self._rows(_SCORES.c.score.is_(None), _SCORES.c.owner != self._owner):
            if not _dead(row.owner) and time.time() - row.beat < SILENCE:
                continue
            with self._engine.begin() as connection:
                same = self._mine(row.configuration) & (_SCORES.c.beat == row.beat) & (_SCORES.c.owner == row.owner)
                if connection.execute(sql.delete(_SCORES).where(same, _SCORES.c.score.is_(None))).rowcount:
                    taken.append(row.configuration)
        return taken


def _dead(owner: str) -> bool:
    """Whether a worker ran on this machine and its process is gone."""
    host, process, _ = owner.rsplit("/", 2)
    if host != socket.gethostname() or os.name == "nt":
        return False
    if int(process) == os.getpid():
        # The number of a process that is gone was given out again, unless the worker is a thread next door.
        return owner not in _owners
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
