"""A committed file that was cut or changed is named, and never used; what can safely be made again, is."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.loop import launch
from spin_ray.report.page.view import read_view
from spin_ray.report.page.write import report_page
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage, table_from_bytes
from tests.support import small_run
from tests.support.fakes import FakeEngine
from tests.support.faulty_disk import FaultyDisk, Killed
from tests.support.small_run import committed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [cut, flip]
NEEDED = {
    "prompts/part-00001.parquet": ["iter_000/generations", "iter_000/pairs", "iter_000/reference", "iter_000/model"],
    "prompts/_MANIFEST.json": [],
    "heldout/part-00000.parquet": ["sft/eval.json"],
    "sft/heldout_samples/part-00000.parquet": ["sft/eval.json"],
    "iter_000/generations/part-00001.parquet": ["iter_000/pairs", "iter_000/reference", "iter_000/model"],
    "iter_000/pairs/part-00000.parquet": ["iter_000/reference", "iter_000/model"],
    "iter_000/pairs/_MANIFEST.json": ["iter_000/reference", "iter_000/model"],
    "iter_000/reference/part-00000.parquet": ["iter_000/model"],
    "iter_000/model/model.safetensors": ["iter_000/heldout_samples"],
    "iter_000/model/config.json": ["iter_000/heldout_samples"],
    "iter_000/heldout_scores/part-00000.parquet": ["iter_000/eval.json"],
}
"""Each kind of committed file, and what must be missing for a run to need it."""


def copy_without(calm: Path, out: Path, missing: list[str]) -> Path:
    shutil.copytree(calm, out)
    for name in ["LATEST", *missing]:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    return out


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_file_is_named_and_nothing_is_made_of_it(
    tmp_path: Path, config: SpinConfig, calm: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """Restored from elsewhere, the run goes on to the very result."""
    out = copy_without(calm, tmp_path / "run", NEEDED[name])
    damage(out / name)
    before = set(out.rglob("*/_MANIFEST.json"))
    with pytest.raises(RunDirError, match=rf"{name}: .*(digest|damaged)"):
        small_run.run(config, out)
    assert set(out.rglob("*/_MANIFEST.json")) == before, "nothing was committed after it"
    shutil.copyfile(calm / name, out / name)
    small_run.run(config, out)
    assert committed(out) == committed(calm)


def blank(path: Path) -> None:
    """A lost block at the beginning: rows."""
    data = path.read_bytes()
    path.write_bytes(data[:32] + bytes(64) + data[96:])


@pytest.mark.parametrize("damage", [cut, blank])
def test_a_damaged_shard_of_an_unfinished_generation_is_generated_again(
    tmp_path: Path, config: SpinConfig, calm: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    missing = ["iter_000/generations/_MANIFEST.json", "iter_000/pairs", "iter_000/reference", "iter_000/model"]
    out = copy_without(calm, tmp_path / "run", missing)
    damage(out / "iter_000/generations/part-00001.parquet")
    small_run.run(config, out)
    assert "generations/part-00001.parquet: is damaged; it is made again" in caplog.text
    assert committed(out) == committed(calm)


def test_no_flipped_bit_changes_the_rows_of_a_shard_unseen(tmp_path: Path, calm: Path) -> None:
    """No manifest has the digest of a shard yet; the checksum within it must tell."""
    name = "part-00000.parquet"
    whole = (calm / "iter_000/generations" / name).read_bytes()
    shards = RunDir(Storage(tmp_path)).artefact("shards")
    chance, seen = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        shards.storage.replace(f"shards/{name}", bytes(data))
        opened = shards.open_sealed(name)
        if opened is None:
            seen += 1
        else:  # a bit that means nothing, say of a column's statistics
            assert opened[0].equals(table_from_bytes(whole))
    assert seen > 150


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["iter_000/eval.json", "LATEST"])
def test_what_is_cheap_to_make_is_made_again(
    tmp_path: Path, config: SpinConfig, calm: Path, name: str, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(calm, out)
    (out / "LATEST").write_text("sft\n")
    damage(out / name)
    small_run.run(config, out)
    assert (out / "LATEST").read_text() == "iter_000\n"
    if damage is cut:  # a flipped bit within a number of eval.json cannot be seen; the file feeds no other stage
        assert (out / name).read_bytes() == (calm / name).read_bytes()


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["sft/eval.json", "sft/heldout_rows.parquet", "iter_000/heldout_rows.parquet"])
def test_a_finished_run_makes_again_what_was_measured_on_any_iterate(
    tmp_path: Path, config: SpinConfig, calm: Path, name: str, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(calm, out)
    damage(out / name)
    small_run.run(config, out)
    for file in (name, "sft/eval.json", "iter_000/eval.json"):
        assert (out / file).read_bytes() == (calm / file).read_bytes()


def test_a_report_compares_with_the_initial_model_or_says_that_it_cannot(tmp_path: Path, calm: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(calm, out)
    flip(out / "sft/heldout_rows.parquet")
    assert "sft/heldout_rows.parquet is missing or damaged" in read_view(RunDir(Storage(out))).unreadable[0]
    (out / "sft/eval.json").unlink()
    view = read_view(RunDir(Storage(out)))
    caution = view.verdict()[1]
    assert "No sign of collapse" not in caution and "sft has no evaluation to compare it with" in caution
    assert view.iterates == ["iter_000"] and "sft/eval.json" in view.unreadable[0]


SIDE_FILES = {
    "quarantine/prompts.parquet": "quarantine/prompts.parquet cannot be read",
    "iter_000/pairs/_MANIFEST.json": "iter_000/pairs/_MANIFEST.json cannot be read",
    "iter_000/model/tokenizer.json": "tokenizer.json: cannot be read",
    "sft/heldout_samples/part-00000.parquet": "The examples cannot be read",
    "iter_000/eval.json": "iter_000/eval.json is missing or damaged",
}


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"\xff\x00")])
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_report_names_what_it_cannot_read(
    tmp_path: Path, calm: Path, name: str, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(calm, out)
    damage(out / name)
    assert SIDE_FILES[name] in report_page([RunDir(Storage(out))])


def test_a_report_needs_nothing_but_the_recipe(tmp_path: Path, calm: Path) -> None:
    shutil.copytree(calm, out := tmp_path / "run")
    run = RunDir(Storage(out))
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "run.json"):
        content = path.read_bytes()
        for bad in (b"", b"\xff\x00\n", b"[1]\n"):
            path.write_bytes(bad)
            assert "</html>" in report_page([run]), path
        path.write_bytes(content)


@pytest.mark.parametrize("content", ["{", "[]", '{"tensorboard": {}}', '{"tensorboard": 1}'])
def test_a_damaged_list_of_what_was_logged_ends_no_run(
    tmp_path: Path, config: SpinConfig, calm: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(calm, out := tmp_path / "run")
    (out / "tracking.json").write_text(content)
    small_run.run(config, out)
    assert "tracking.json: is damaged; every iterate is logged again" in caplog.text
    assert (out / "tracking.json").read_bytes() == (calm / "tracking.json").read_bytes()


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory, config: SpinConfig) -> Path:
    """Killed as step 3 of 4 was to be logged; a checkpoint was made after step 1."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        small_run.in_this_process(patch)
        counted = FaultyDisk()
        small_run.run(config, folder / "counted", counted)
        at = [i for i, point in enumerate(counted.points) if point.endswith("train_log.jsonl")][-1]
        with pytest.raises(Killed):
            small_run.run(config, folder / "run", FaultyDisk(at))
    return folder / "run"


def checkpoint_of(out: Path) -> Path:
    (folder,) = (out / "iter_000/checkpoints").glob("*/checkpoint")
    return folder


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "spin_ray-0.json"])
def test_a_damaged_checkpoint_is_named_and_not_opened(
    tmp_path: Path, config: SpinConfig, calm: Path, half_trained: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    """Without its checkpoints the iteration is trained from its start, to the same weights."""
    out = tmp_path / "run"
    shutil.copytree(half_trained, out)
    (victim,) = checkpoint_of(out).glob(pattern)
    damage(victim)
    with pytest.raises(RunDirError, match=r"remove iter_000/checkpoints to train from the start") as raised:
        small_run.run(config, out)
    assert str(checkpoint_of(out)) in str(raised.value)
    shutil.rmtree(out / "iter_000/checkpoints")
    small_run.run(config, out)
    assert committed(out) == committed(calm)


@pytest.mark.parametrize(
    ("written", "as_if", "message"),
    [
        ('"train.workers": 1', '"train.workers": 3', r"train.workers \(was 3, now 1\)"),
        ('"learning_rate": 0.001', '"learning_rate": 0.5', r"learning_rate \(was 0.5, now 0.001\)"),
    ],
)
def test_a_checkpoint_of_another_number_of_workers_or_config_is_refused(
    tmp_path: Path, config: SpinConfig, half_trained: Path, written: str, as_if: str, message: str
) -> None:
    """As it would be if a folder were copied from another run."""
    out = tmp_path / "run"
    shutil.copytree(half_trained, out)
    seal = checkpoint_of(out) / "spin_ray-0.json"
    assert written in seal.read_text()
    seal.write_text(seal.read_text().replace(written, as_if))
    with pytest.raises(RunDirError, match=rf"was written with other values of {message}; restore them, or remove"):
        small_run.run(config, out)


def test_a_run_whose_folder_is_moved_away_says_so_and_goes_on_at_its_new_place(
    tmp_path: Path, config: SpinConfig, calm: Path
) -> None:
    def move(call: int) -> None:
        if call == 2:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(RunDirError, match=r"run: the folder is gone while the run wrote to it"):
        launch.run_spin(config, tmp_path / "run", lambda _: FakeEngine(vocabulary=60, before=move))
    assert not (tmp_path / "run").exists()
    small_run.run(config, tmp_path / "moved")
    assert committed(tmp_path / "moved") == committed(calm)
