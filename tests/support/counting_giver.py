"""A giver of model folders that counts what it is asked for."""

from collections import Counter
from typing import Any

from spin_ray.runtime.model_sharing import _Giver


class CountingGiver(_Giver):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._asked: Counter[tuple[str, int]] = Counter()

    def part(self, name: str, number: int, size: int) -> list[Any]:
        self._asked[name, number] += 1
        return super().part(name, number, size)

    def asked(self) -> dict[tuple[str, int], int]:
        """Returns how often each part of each file was asked for."""
        return dict(self._asked)
