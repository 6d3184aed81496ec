"""Parts left by an attempt before its manifest: whole ones are kept, damaged ones made again, foreign ones refused."""

import pyarrow as pa
import pytest

from spin_ray.errors import RunDirError
from spin_ray.run_dir.artefact import Artefact, seal
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.storage import Storage

EXPECTED = [part_name(number) for number in range(3)]


def table(*values: int) -> pa.Table:
    return pa.table({"id": pa.array(values, pa.int64())})


@pytest.fixture
def parts(tmp_path) -> Artefact:
    """The first two of three parts."""
    artefact = Artefact(Storage(tmp_path), "iter_000/generations")
    for number in (0, 1):
        artefact.write_part(part_name(number), seal(table(number, number), "these inputs"))
    return artefact


def test_whole_parts_are_found_and_the_others_are_missing(parts):
    found = parts.find_parts(EXPECTED, "these inputs")
    assert found.whole == {name: parts.part_entry(name) for name in EXPECTED[:2]}
    assert (found.missing, found.damaged) == (EXPECTED[2:], 0)


def test_nothing_is_found_where_nothing_was_made(tmp_path):
    found = Artefact(Storage(tmp_path), "none").find_parts(EXPECTED, "these inputs")
    assert (found.whole, found.missing, found.damaged) == ({}, EXPECTED, 0)


@pytest.mark.parametrize("damage", ["cut", "unsealed", "changed"])
def test_a_damaged_part_is_removed_counted_told_and_missing(parts, damage, caplog):
    name = EXPECTED[0]
    whole = parts.storage.read(f"{parts.path}/{name}")
    sealed = seal(table(0, 0), "these inputs")
    if damage == "cut":
        parts.storage.replace(f"{parts.path}/{name}", whole[:-9])
    elif damage == "unsealed":
        parts.replace_part(name, table(0, 0))
    else:
        parts.replace_part(name, table(0, 7).replace_schema_metadata(sealed.schema.metadata))
    found = parts.find_parts(EXPECTED, "these inputs")
    assert (list(found.whole), found.missing, found.damaged) == ([EXPECTED[1]], [EXPECTED[0], EXPECTED[2]], 1)
    assert f"{parts.path}/{name}: is damaged; it is made again" in caplog.text
    parts.write_part(name, sealed)
    assert parts.storage.read(f"{parts.path}/{name}") == whole


def test_parts_of_other_work_are_refused_and_kept(parts):
    with pytest.raises(
        RunDirError,
        match=r"iter_000/generations/part-00000\.parquet: was made from other inputs or with other settings; restore "
        r"them, choose another --out, or remove iter_000/generations",
    ):
        parts.find_parts(EXPECTED, "other inputs")
    assert parts.part_names() == EXPECTED[:2]


def test_a_part_that_nobody_expects_is_refused(parts):
    with pytest.raises(RunDirError, match=r"part-00001\.parquet: was made from other inputs or with other settings"):
        parts.find_parts(EXPECTED[:1], "these inputs")
