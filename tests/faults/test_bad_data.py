"""Whatever the data or the recipe holds: every row is accounted for, and nobody sees a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spin_ray import __main__ as cli
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage, table_from_bytes

FUZZ = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
text = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\x00", "\ud800", "<|im_end|>", "<|im_start|>assistant", "</s>", "a" * 20_000, "1 + 1 = ?"]
)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | scalar, "content": text}
)
chats = st.fixed_dictionaries({"messages": st.lists(turn, max_size=4) | anything})
exchanges = st.fixed_dictionaries({"prompt": text, "response": text, "answer": anything})
raw_line = st.binary(min_size=1, max_size=30).map(lambda data: b"x" + data.replace(b"\n", b"").replace(b"\r", b""))
GOOD = json.dumps({"prompt": "2 + 2 = ?", "response": "4"}).encode()
GOOD_CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "2 + 2 = ?"}, {"role": "assistant", "content": "4"}]}
).encode()
LONG_CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}] * 3000}
).encode()


def lines_of(good: bytes, rows: st.SearchStrategy[Any]) -> st.SearchStrategy[list[bytes]]:
    """A good row and others, which are of its form or of none."""
    line = (anything | rows).map(lambda content: json.dumps(content).encode()) | raw_line
    return st.lists(line, max_size=8).map(lambda lines: [good, *lines])


def accounted_for(config: SpinConfig, source: Path, folder: Path) -> tuple[int, int] | str:
    """Rows that became prompts and rows in quarantine; or the one-line error."""
    shutil.rmtree(folder, ignore_errors=True)
    data = config.data.model_copy(update={"max_quarantine_fraction": 1.0})
    run = RunDir(Storage(folder))
    try:
        config = config.model_copy(update={"data": data})
        prompts.run(run, config, config.model.path, prompts.RowsOf.training(run, config, str(source)))
    except DataError as error:
        return str(error)
    quarantined = table_from_bytes(run.storage.read("quarantine/prompts.parquet"))
    assert all(reason for reason in quarantined["reason"].to_pylist())
    return run.prompts.manifest().rows, quarantined.num_rows


@FUZZ
@given(lines_of(GOOD, exchanges) | lines_of(GOOD_CHAT, chats))
@example([GOOD_CHAT, LONG_CHAT])
@example([GOOD] * 6)
@example([GOOD_CHAT, json.dumps({"messages": [{"role": "system", "content": "only me"}]}).encode()])
@example([GOOD, b"[" * 100_000])
def test_every_line_is_a_prompt_or_in_quarantine(tmp_path: Path, config: SpinConfig, lines: list[bytes]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    found = accounted_for(config, source, tmp_path / "run")
    assert isinstance(found, tuple) and sum(found) == len(lines) and found[0] >= 1


column = st.sampled_from(
    [pa.string(), pa.int64(), pa.binary(), pa.list_(pa.string()), pa.struct([("role", pa.string())]), pa.date32()]
)


@FUZZ
@given(column, column, st.integers(0, 4))
def test_columns_of_any_type_are_accounted_for(
    tmp_path: Path, config: SpinConfig, first: pa.DataType, second: pa.DataType, nulls: int
) -> None:
    """Wrong types are malformed rows, not a crash."""
    values: dict[Any, Any] = {
        pa.string(): "text", pa.int64(): 2**60, pa.binary(): b"\xff\x00", pa.list_(pa.string()): ["a", None],
        pa.struct([("role", pa.string())]): {"role": "user"}, pa.date32(): 12345,
    }  # fmt: skip
    arrays = [pa.array([values[kind], *[None] * nulls], kind) for kind in (first, second)]
    pq.write_table(pa.table(arrays, names=["prompt", "response"]), tmp_path / "rows.parquet")
    found = accounted_for(config, tmp_path / "rows.parquet", tmp_path / "run")
    if isinstance(found, str):
        assert "\n" not in found and f"{nulls + 1} of {nulls + 1} rows cannot be used" in found
    else:
        assert sum(found) == nulls + 1


@FUZZ
@given(st.integers(1, 2000), st.integers(0, 7))
def test_a_damaged_parquet_file_is_a_data_error_or_holds_its_rows(
    tmp_path: Path, config: SpinConfig, position: int, bit: int
) -> None:
    table = pa.table({"prompt": [f"{n} + 1 = ?" for n in range(20)], "response": [str(n + 1) for n in range(20)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    data[position % len(data)] ^= 1 << bit
    (tmp_path / "rows.parquet").write_bytes(data)
    found = accounted_for(config, tmp_path / "rows.parquet", tmp_path / "run")
    assert isinstance(found, str) or sum(found) <= 20


value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
tree = st.recursive(value, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
known = st.sampled_from(sorted(SpinConfig.model_fields))


@FUZZ
@given(
    st.binary(max_size=60) | st.dictionaries(known, tree, max_size=4).map(lambda content: yaml.dump(content).encode())
)
def test_no_recipe_gives_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spin-ray", "run", str(recipe), "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: ")
