"""Rows by which shards are sized, before anything is rendered."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pyarrow.fs import FileSystem, LocalFileSystem

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig, Source
from spin_ray.errors import DataError
from spin_ray.inputs import files, sources, tables
from spin_ray.inputs.check import Inputs
from spin_ray.inputs.files import filesystem
from spin_ray.loop import launch
from spin_ray.planning.rows import rows_at_start, settle
from tests.support.fakes import config_of

TURNS = [{"role": role, "content": str(turn)} for turn in range(4) for role in ("user", "assistant")]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Returns a file of 300 conversations of four turns."""
    lines = ({"messages": [{"role": "user", "content": f"{number}"}, *TURNS[1:]]} for number in range(300))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "rows.jsonl")


def shard_rows(train: Any, turns: str = "last", **generation: Any) -> int:
    config = config_of(data={"train": train, "turns": turns}, generation={"resources": {"gpus": 1}} | generation)
    inputs = cast(Inputs, SimpleNamespace(train=config.data.train, questions=None))
    return launch._settle_sizes(config, None, inputs).generation.shard_rows


def test_shards_are_sized_by_the_rows_that_a_run_makes_and_draws(rows):
    """300 conversations make 1,200 rows, and a twentieth more is expected; a source of its own gives 1,000 of them."""
    assert shard_rows(rows, replicas=2) == 150
    assert shard_rows(rows, "all", replicas=2) == 630
    assert shard_rows([{"path": rows, "rows": 1000}], "all", replicas=2) == 500
    assert shard_rows([{"path": rows, "rows": 10}], replicas=2) == 5


def test_shards_of_questions_are_sized_by_the_questions(rows, tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(f'{{"prompt": "{number}?"}}' for number in range(40)))
    questions = str(tmp_path / "questions.jsonl")
    config = config_of(
        algorithm="self_reinforcement", data={"train": rows, "questions": questions, "turns": "all"},
        generation={"resources": {"gpus": 1}, "replicas": 2, "samples_per_prompt": 3},
    )  # fmt: skip
    inputs = cast(Inputs, SimpleNamespace(train=rows, questions=questions))
    assert launch._settle_sizes(config, None, inputs).generation.shard_rows == 3 * 40 / 2


def test_a_count_that_sizes_shards_refuses_no_source(rows):
    """What is too little is told when the rows are rendered."""
    assert shard_rows([{"path": rows, "rows": 1000}], replicas=2) == 500


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> str:
    """A store's URI, below which are the files of this machine."""

    def opened(uri: str) -> tuple[FileSystem, str]:
        there = uri.startswith("s3://store")
        return (LocalFileSystem(), uri.removeprefix("s3://store")) if there else filesystem(uri)

    for module, name in ((files, "filesystem"), (sources, "_filesystem"), (tables, "filesystem")):
        monkeypatch.setattr(module, name, opened)
    monkeypatch.setattr(sources, "find_files", lambda uri: [uri])
    return "s3://store"


def test_engines_get_equal_work_of_remote_rows_too(rows, store):
    """They are estimated, which finds all of a small file."""
    assert shard_rows(f"{store}{rows}", replicas=3) == 100
    mixed = (Source(path=rows, rows=50), Source(path=f"{store}{rows}"))
    assert rows_at_start(mixed, DataConfig(train=mixed)) == 350


def test_rows_of_this_machine_are_counted_however_they_are_written(tmp_path):
    """A CSV elsewhere is not counted."""
    (tmp_path / "rows.csv").write_text("prompt,response\n" + "q,r\n" * 30)
    assert shard_rows(f"file://{tmp_path}/rows.csv", replicas=3) == 10


def test_remote_rows_that_would_be_read_whole_are_not_counted_and_plan_follows(tmp_path, store):
    path = f"{store}{tmp_path}/rows.csv"
    (tmp_path / "rows.csv").write_text("prompt,response\n" + "q,r\n" * 30)
    assert shard_rows(path, replicas=3) == 4096
    planned: SpinConfig = settle(config_of(data={"train": path}, generation={"resources": {"gpus": 1}}), 30)
    assert planned.generation.shard_rows == 4096
    local = config_of(data={"train": str(tmp_path / "rows.csv")}, generation={"resources": {"gpus": 1}})
    assert settle(local, 30).generation.shard_rows == 30


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(DataError, match=r"rows\.parquet: is not a Parquet file"):
        shard_rows(str(tmp_path / "rows.parquet"))
