"""Names of models in requests.

Iterates are ``sft`` (θ_0), ``iter-0`` (θ_1), …; ``latest`` is the newest. An alias hides an iterate in a blind
comparison for a while.
"""

import time
from collections.abc import Callable, Iterable

from spin_ray.run_dir.names import LATEST, age, api_name, is_iterate, read_iterate


class UnknownModel(LookupError):
    """A name that no serving iterate has."""


class Names:
    """Names that one ingress replica knows."""

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
        self._iterates = tuple(sorted(iterates, key=age))
        self._newest = newest

    def newest(self) -> str:
        """Returns the iterate that ``latest`` means.

        Raises:
            UnknownModel: none serves as ``latest``.
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
        """Returns the iterate that ``name`` means.

        Raises:
            UnknownModel: it does not exist or does not serve.
        """
        if name == LATEST:
            return self.newest()
        number = read_iterate(name)
        plain = name if number is None else api_name(number)
        iterate, until = self._aliases.get(name, (plain, float("inf")))
        if iterate not in self._iterates or until <= self._clock():
            raise UnknownModel(self._unknown(name))
        return iterate

    def is_alias(self, name: str) -> bool:
        """Tells whether ``name`` hides an iterate."""
        return name in self._aliases

    def _unknown(self, name: str) -> str:
        served = [*self._iterates, *([LATEST] if self._newest else [])]
        return f"The model {name!r} does not exist or does not serve; these do: {', '.join(served) or 'none yet'}"
