"""The database of blind comparisons, one row for each."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, get_args

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from spin_ray.errors import UserError
from spin_ray.serving.arena.battles import BATTLE_TTL_S, Answer, Battle, Question, Side, Tally, Verdict, Vote
from spin_ray.serving.errors import Refusal

EXPORT_ROWS = 256
"""Votes that an export reads at a time."""
_RETRY_S = 5
_LOCKED_MS = 2500
"""Longest wait for a locked SQLite, in milliseconds; shorter than that of ``VoteThreads``."""

_battles = Table(
    "battles",
    MetaData(),
    Column("id", String(24), primary_key=True),
    Column("created", Double, nullable=False),  # Float is single precision on MySQL and MariaDB
    Column("seed", Integer, nullable=False),
    Column("model_a", String(64), nullable=False),
    Column("model_b", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("answer_a", JSON(none_as_null=True)),
    Column("answer_b", JSON(none_as_null=True)),
    Column("digest_a", String(128)),
    Column("digest_b", String(128)),
    Column("verdict", String(8)),
    Column("voted", Double),
    Column("voter", String(64)),
)
_by_time = Index("battles_by_time", _battles.c.created)
_by_vote = Index("battles_by_vote", _battles.c.voted, _battles.c.id)


class VoteStore:
    """A database of comparisons and votes; only processes of *one machine* may share SQLite.

    Raises:
        UserError: the URL names no usable database, or no file although it is not ``new``.
    """

    def __init__(self, url: str | URL, clock: Callable[[], float] = time.time, *, new: bool = True) -> None:
        self._clock = clock
        try:
            self._engine = create_engine(url, pool_pre_ping=True)
            self.where = self._engine.url.render_as_string(hide_password=True)
            file = self._engine.url.database or ""
            is_sqlite = self._engine.dialect.name == "sqlite"
            if is_sqlite and not new and not file.startswith("file:") and not os.path.isfile(file):
                raise UserError(
                    f"{file}: there are no votes; spin-ray serve collects them at /, on its own machine or in the "
                    "database of its --serving.votes; give that option here, too"
                )
            if is_sqlite:
                _make_private(self._engine.url.database)
                event.listen(self._engine, "connect", _make_durable)
            with self._engine.begin() as connection:
                connection.execute(CreateTable(_battles, if_not_exists=True))
                known = {index["name"] for index in inspect(connection).get_indexes(_battles.name)}
                for index in (_by_time, _by_vote):
                    if index.name not in known:
                        connection.execute(_creation(index, connection.dialect))
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UserError(
                f"votes: not a database URL that works here ({error}); e.g. sqlite:////data/votes.sqlite"
            ) from error
        except SQLAlchemyError as error:
            raise UserError(f"votes: {self.where} cannot be used: {_reason(error)}") from error

    def close(self) -> None:
        self._engine.dispose()

    def start(self, model_a: str, model_b: str, question: Question) -> Battle:
        """Adds a comparison; deletes those that were not voted on in time."""
        battle = Battle(secrets.token_hex(12), model_a, model_b, question)
        now = self._clock()
        with self._transaction() as connection:
            connection.execute(
                delete(_battles).where(_battles.c.verdict.is_(None), _battles.c.created < now - BATTLE_TTL_S)
            )
            connection.execute(
                insert(_battles).values(
                    id=battle.id, created=now, seed=question.sampling["seed"], model_a=model_a, model_b=model_b,
                    request=asdict(question),
                )
            )  # fmt: skip
        return battle

    def drop_unanswered(self, battle: str) -> None:
        """Deletes a comparison that lacks an answer, on which nobody can vote."""
        lacks_one = or_(_battles.c.digest_a.is_(None), _battles.c.digest_b.is_(None))
        with self._transaction() as connection:
            connection.execute(delete(_battles).where(_battles.c.id == battle, lacks_one))

    def record(self, battle: str, side: Side, answer: Answer) -> None:
        """Stores a side's first complete answer if there is no vote yet."""
        kept = {"text": answer.text, "finish_reason": answer.finish_reason}
        first = and_(_battles.c.id == battle, _battles.c[f"digest_{side}"].is_(None), _battles.c.verdict.is_(None))
        with self._transaction() as connection:
            connection.execute(
                update(_battles).where(first).values({f"answer_{side}": kept, f"digest_{side}": answer.digest})
            )

    def vote(self, battle: str, verdict: Verdict, voter: str | None = None) -> Vote:
        """Records the verdict; the same verdict again changes nothing.

        Args:
            voter: name of the voter's key; None without keys.

        Raises:
            Refusal: the comparison does not exist (404) or is too old (410), or an answer is missing or another
                verdict exists (409).
        """
        open_still = and_(_battles.c.id == battle, _battles.c.verdict.is_(None))
        with self._transaction() as connection:
            row = connection.execute(select(_battles).where(_battles.c.id == battle)).one_or_none()
            if row is None:
                raise Refusal(404, "This comparison does not exist; start a new one")
            if row.verdict is None:
                self._check_votable(row)
                connection.execute(
                    update(_battles).where(open_still).values(verdict=verdict, voted=self._clock(), voter=voter)
                )  # the first of two simultaneous votes counts
                row = connection.execute(select(_battles).where(_battles.c.id == battle)).one()
            if row.verdict != verdict:
                raise Refusal(409, f"This comparison was voted on before, with {row.verdict!r}")
        return Vote(battle, row.model_a, row.model_b, row.digest_a, row.digest_b, verdict)

    def _check_votable(self, row: Row) -> None:
        if row.created < self._clock() - BATTLE_TTL_S:
            raise Refusal(410, "This comparison is too old; start a new one")
        missing = [side for side in get_args(Side) if row._mapping[f"answer_{side}"] is None]
        if missing:
            raise Refusal(409, f"Answer {' and '.join(missing)} has not been streamed to its end")

    def tallies(self) -> list[Tally]:
        columns = [_battles.c[name] for name in ("model_a", "digest_a", "model_b", "digest_b", "verdict")]
        with self._transaction() as connection:
            rows = connection.execute(
                select(*columns, func.count())
                .where(_battles.c.verdict.is_not(None))
                .group_by(*columns)
                .order_by(*columns)
            ).all()
        return [
            Tally((a, a_digest), (b, b_digest), verdict, count) for a, a_digest, b, b_digest, verdict, count in rows
        ]

    def export(self) -> Iterator[dict[str, Any]]:
        """Yields one row per vote that prefers a side, oldest first.

        ``chosen`` and ``rejected`` are whole conversations, as ``data.train`` and TRL (implicit prompt) read them.
        ``identical`` tells whether they are equal.
        """
        after = _battles.c.verdict.in_(("a", "b"))
        while True:
            with self._transaction() as connection:
                rows = connection.execute(
                    select(_battles).where(after).order_by(_battles.c.voted, _battles.c.id).limit(EXPORT_ROWS)
                ).all()
            yield from map(_pair, rows)
            if len(rows) < EXPORT_ROWS:
                return
            last = rows[-1]
            after = and_(
                _battles.c.verdict.in_(("a", "b")),
                or_(_battles.c.voted > last.voted, and_(_battles.c.voted == last.voted, _battles.c.id > last.id)),
            )

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise unavailable(_reason(error)) from error


def unavailable(reason: str) -> Refusal:
    return Refusal(503, f"Votes cannot be stored or read now ({reason})", retry_s=_RETRY_S)


def _pair(row: Row) -> dict[str, Any]:
    pair: dict[str, Any] = {
        "battle": row.id, "voted": row.voted, "voter": row.voter, "sampling": row.request["sampling"],
    }  # fmt: skip
    for role, side in zip(("chosen", "rejected"), "ab" if row.verdict == "a" else "ba", strict=True):
        answer = row._mapping[f"answer_{side}"]
        pair |= {
            role: [*row.request["messages"], {"role": "assistant", "content": answer["text"]}],
            f"{role}_model": row._mapping[f"model_{side}"],
            f"{role}_digest": row._mapping[f"digest_{side}"],
            f"{role}_finish_reason": answer["finish_reason"],
        }
    return pair | {"identical": pair["chosen"] == pair["rejected"]}


def _creation(index: Index, dialect: Dialect) -> CreateIndex:
    """Returns a statement that lets another process come first, except on MySQL, which has none."""
    return CreateIndex(index, if_not_exists=dialect.name != "mysql")


def _make_private(file: str | None) -> None:
    """Keeps the database to its owner; SQLite gives its log the same mode."""
    if file and file != ":memory:" and not file.startswith("file:"):
        with suppress(OSError):  # the connection says what is wrong
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
            os.chmod(file, 0o600)


def _make_durable(connection: Any, _record: object) -> None:
    """Sets the wait for locks first, as the others can meet a lock."""
    for pragma in (f"busy_timeout={_LOCKED_MS}", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _reason(error: SQLAlchemyError) -> str:
    return str(error.orig if isinstance(error, DBAPIError) else error).splitlines()[0]
