"""Names of models in requests: ``sft`` (θ_0), ``iter-0`` (θ_1), …, and ``latest``, the newest."""

from collections.abc import Iterable

from spin_ray.run_dir.names import LATEST, api_spelling, iterate_number, read_iterate


class UnknownModel(LookupError):
    """A name that no serving iterate has."""


class ModelStarts(UnknownModel):
    """A name whose engine starts."""


class Names:
    def __init__(self) -> None:
        self._iterates: tuple[str, ...] = ()
        self._newest: str | None = None
        self._starting: frozenset[str] = frozenset()
        self._settled = False

    @property
    def iterates(self) -> tuple[str, ...]:
        """The iterates that serve, oldest first."""
        return self._iterates

    @property
    def may_grow(self) -> bool:
        """Tells whether an iterate that does not serve yet may start by itself."""
        return not self._settled or not self._starting <= set(self._iterates)

    def serve_now(
        self, iterates: Iterable[str], newest: str | None, starting: Iterable[str] = (), *, settled: bool = True
    ) -> None:
        """Takes the iterates that serve and start. ``settled``: no other will start by itself."""
        self._iterates = tuple(sorted(iterates, key=iterate_number))
        self._newest, self._starting, self._settled = newest, frozenset(starting), settled

    def newest(self) -> str:
        """Returns the iterate that ``latest`` means; raises as ``resolve``."""
        if self._newest is None:
            raise self._missing(LATEST)
        return self._newest

    def resolve(self, name: str) -> str:
        """Returns the iterate that ``name`` means.

        Raises:
            ModelStarts: its engine starts.
            UnknownModel: it does not serve.
        """
        if name == LATEST:
            return self.newest()
        name = api_spelling(name)
        if name not in self._iterates:
            raise self._missing(name)
        return name

    def _missing(self, name: str) -> UnknownModel:
        may_come = name == LATEST or (not self._iterates and read_iterate(name) is not None)
        if name in self._starting or (may_come and not self._settled):
            return ModelStarts(f"The model {name!r} starts; ask again in a moment")
        return UnknownModel(self._unknown(name))

    def _unknown(self, name: str) -> str:
        served = [*self._iterates, *([LATEST] if self._newest else [])]
        return f"The model {name!r} does not exist or does not serve; these do: {', '.join(served) or 'none yet'}"
