"""Which model a request means.

An iterate is called as the API calls it: ``sft`` (θ_0), ``iter-0`` (θ_1), ``iter-1``, …. ``latest`` is the newest one
that serves. An alias is a short-lived other name for an iterate, e.g. ``battle-7f3c-a``: a blind comparison asks for
it, and nothing in the answer tells which iterate it stands for.
"""

import time
from collections.abc import Callable, Iterable

from spin_ray.run_dir.names import LATEST, age, is_iterate


class UnknownModel(LookupError):
    """No iterate that serves has this name; the message says which have."""


class Names:
    """Names of one ingress replica.

    What serves is told by ``serve_now`` (every replica hears the same); aliases are known to the replica that
    registered them only (``arena.recall_side`` registers those of others).

    Example::

        names = Names()
        names.serve_now(["sft", "iter-0"], newest="iter-0")
        names.register_alias("battle-7f3c-a", "sft", ttl_s=600)
        names.resolve("battle-7f3c-a"), names.resolve("latest")    # ("sft", "iter-0")
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._iterates: tuple[str, ...] = ()
        self._newest: str | None = None
        self._aliases: dict[str, tuple[str, float]] = {}

    @property
    def iterates(self) -> tuple[str, ...]:
        """The iterates that serve, oldest first."""
        return self._iterates

    def serve_now(self, iterates: Iterable[str], newest: str | None) -> None:
        """Replaces what serves; requests that are being answered stay with the engine that they have."""
        self._iterates = tuple(sorted(iterates, key=age))
        self._newest = newest

    def newest(self) -> str:
        """What ``latest`` stands for now.

        Raises:
            UnknownModel: nothing that follows LATEST serves yet.
        """
        if self._newest is None:
            raise UnknownModel(f"no model serves as {LATEST!r}")
        return self._newest

    def register_alias(self, alias: str, iterate: str, ttl_s: float) -> None:
        """Lets ``alias`` stand for ``iterate`` for ``ttl_s`` seconds.

        Raises:
            UnknownModel: ``iterate`` does not serve.
            ValueError: ``alias`` is the name of an iterate.
        """
        if is_iterate(alias) or alias == LATEST:
            raise ValueError(f"{alias!r} is the name of an iterate")
        if iterate not in self._iterates:
            raise UnknownModel(self._unknown(iterate))
        now = self._clock()
        self._aliases = {name: kept for name, kept in self._aliases.items() if kept[1] > now}
        self._aliases[alias] = (iterate, now + ttl_s)

    def resolve(self, name: str) -> str:
        """The iterate that ``name`` means now.

        Raises:
            UnknownModel: none, or one that does not serve.
        """
        if name == LATEST:
            return self.newest()
        iterate, until = self._aliases.get(name, (name, float("inf")))
        if iterate not in self._iterates or until <= self._clock():
            raise UnknownModel(self._unknown(name))
        return iterate

    def is_alias(self, name: str) -> bool:
        """Whether ``name`` hides an iterate: then nothing in the answer may tell which."""
        return name in self._aliases

    def _unknown(self, name: str) -> str:
        served = [*self._iterates, *([LATEST] if self._newest else [])]
        return f"The model {name!r} does not exist or does not serve; these do: {', '.join(served) or 'none yet'}"
