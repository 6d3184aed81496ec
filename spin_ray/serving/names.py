"""Names of models in requests: ``sft`` (θ_0), ``iter-0`` (θ_1), …, and ``latest``, the newest."""

from collections.abc import Iterable

from spin_ray.run_dir.names import LATEST, api_spelling, iterate_number


class UnknownModel(LookupError):
    """A name that no serving iterate has."""


class Names:
    def __init__(self) -> None:
        self._iterates: tuple[str, ...] = ()
        self._newest: str | None = None

    @property
    def iterates(self) -> tuple[str, ...]:
        """The iterates that serve, oldest first."""
        return self._iterates

    def serve_now(self, iterates: Iterable[str], newest: str | None) -> None:
        self._iterates = tuple(sorted(iterates, key=iterate_number))
        self._newest = newest

    def newest(self) -> str:
        """Returns the iterate that ``latest`` means; raises UnknownModel if there is none."""
        if self._newest is None:
            raise UnknownModel(f"no model serves as {LATEST!r}")
        return self._newest

    def resolve(self, name: str) -> str:
        """Returns the iterate that ``name`` means; raises UnknownModel if it does not serve."""
        if name == LATEST:
            return self.newest()
        name = api_spelling(name)
        if name not in self._iterates:
            raise UnknownModel(self._unknown(name))
        return name

    def _unknown(self, name: str) -> str:
        served = [*self._iterates, *([LATEST] if self._newest else [])]
        return f"The model {name!r} does not exist or does not serve; these do: {', '.join(served) or 'none yet'}"
