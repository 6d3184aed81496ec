"""Streams in fewer pieces: nothing lost, nothing late that need not be, and closing reaches the source."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from spin_ray.serving.bursts import in_bursts
from spin_ray.serving.engines import Item


async def pieces(items: list[Item], pause_s: float = 0.0) -> AsyncIterator[Item]:
    for item in items:
        yield item
        await asyncio.sleep(pause_s)


def test_the_first_piece_goes_alone_and_the_rest_together() -> None:
    """b to d come within 20 ms of a; the interval is 10 s, but the stream ends before it."""

    async def check() -> list[Item]:
        return [burst async for burst in in_bursts(pieces(["a", "b", "c", "d"], 0.005), 10)]

    assert asyncio.run(asyncio.wait_for(check(), 5)) == ["a", "bcd"]


def test_a_slow_stream_is_passed_on_piece_by_piece() -> None:
    async def check() -> list[Item]:
        return [burst async for burst in in_bursts(pieces(["a", "b", "c"], 0.05), 0.001)]

    assert asyncio.run(check()) == ["a", "b", "c"]


def test_objects_stay_apart_from_text() -> None:
    async def check() -> list[Item]:
        return [burst async for burst in in_bursts(pieces(["a", "b", {"error": 1}, "c"]), 10)]

    said = asyncio.run(asyncio.wait_for(check(), 5))
    assert [piece for piece in said if isinstance(piece, dict)] == [{"error": 1}]
    assert "".join(str(piece) for piece in said) == "ab{'error': 1}c"


def test_what_the_source_fails_of_comes_after_what_it_said() -> None:
    async def fails() -> AsyncIterator[Item]:
        yield "a"
        raise ValueError("broken")

    async def check() -> list[Item]:
        bursts = in_bursts(fails(), 10)
        said = [await anext(bursts)]
        with pytest.raises(ValueError, match="broken"):
            await anext(bursts)
        return said

    assert asyncio.run(asyncio.wait_for(check(), 5)) == ["a"]


def test_closing_in_the_middle_closes_the_source() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncIterator[Item]:
        try:
            while True:
                yield "a"
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    async def check() -> None:
        bursts = in_bursts(endless(), 0.01)
        assert await anext(bursts) == "a"
        await bursts.aclose()
        assert closed == [True]

    asyncio.run(asyncio.wait_for(check(), 5))
