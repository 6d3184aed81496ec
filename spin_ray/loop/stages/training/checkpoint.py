"""Training checkpoints, each with a seal of digests from every rank.

The digests are checked before loading, because torch's reader unpickles the files.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from ray.exceptions import RayError
from torch.distributed.checkpoint import CheckpointException

from spin_ray.errors import RunDirError, StageError, TransientError, last_line
from spin_ray.learner.backends.base import TrainBackend
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.run_dir.artefact import FileEntry, as_json, changes, folder_entries
from spin_ray.run_dir.storage import Storage, file_digest, fsync
from spin_ray.runtime.snapshot import SNAPSHOT, is_readable, snapshot_of

logger = logging.getLogger(__name__)

WORKERS = "train.workers"
_INDEX = ".metadata"
"""File in which torch lists what the other files hold; every rank reads it."""


def save(job: TrainJob, backend: TrainBackend, step: int) -> None:
    """Writes a checkpoint beside the others of the run, and has Ray Train keep it in place of the last one.

    Raises:
        StageError: the disk is full or fails.
        TransientError: an object store fails.
    """
    folder = job.storage.new_attempt_folder()
    where, is_store = job.storage.where(job.checkpoints), not isinstance(job.storage.root, Path)
    try:
        with _writing(where, StageError):
            backend.save(folder)
            seal(folder, step, job.identity())
        with _writing(where, TransientError if is_store else StageError):
            ray.train.report(
                {"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_upload_fn=_into_place
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(where: str, kind: type[StageError]) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException, RuntimeError) as error:
        reason = _of_the_disk(error)
        if reason is None:
            raise
        raise could_not_be_written(where, reason, kind) from error


def _of_the_disk(error: BaseException) -> BaseException | None:
    """Returns what the disk said of a file that could not be written; None for other errors.

    torch gathers the errors of all ranks, and its writer names no cause.
    """
    if isinstance(error, CheckpointException):
        found = (_of_the_disk(each) for each, _ in error.failures.values())
        return next((reason for reason in found if reason is not None), None)
    if isinstance(error, RayError | ConnectionError | TimeoutError):  # of other processes
        return None
    is_of_writer = isinstance(error, RuntimeError) and any(word in str(error) for word in _WRITER)
    return error if isinstance(error, OSError) or is_of_writer else None


_WRITER = ("PytorchStreamWriter", "inline_container")
"""Words in the errors of torch's writer of files."""


def _into_place(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Moves this rank's files into the checkpoint's folder; to an object store, uploads them.

    Ray Train would copy them on a file system, too, from a disk of the node that has room for all of them.
    """
    storage = ray.train.get_context().get_storage()
    if not isinstance(storage.storage_filesystem, LocalFileSystem):
        return storage.persist_current_checkpoint(checkpoint, name)
    source, target = Path(checkpoint.path), Path(storage.build_checkpoint_path_from_name(name))
    for file in [path for path in source.rglob("*") if path.is_file()]:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        fsync(file)  # torch syncs FSDP2's files itself, and nobody DeepSpeed's and the seals
        file.rename(place)
    for folder in [*(path for path in target.rglob("*") if path.is_dir()), target, target.parent]:
        fsync(folder)
    return ray.train.Checkpoint(str(target), storage.storage_filesystem)


def restore(job: TrainJob, backend: TrainBackend) -> int:
    """Loads the newest checkpoint, if any, and returns the next step.

    Raises:
        RunDirError: the checkpoint is damaged, or of other work or another number of workers.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        return 0
    with _readable(newest, job.storage) as folder:
        step = _agreed(
            lambda: check(
                Path(folder), job.identity(), _else_do(job), any_workers=job.elastic, share=_share_of_rank(newest)
            )
        )
        backend.load(Path(folder))
    return step


def could_not_be_written(where: str, error: BaseException, kind: type[StageError] = StageError) -> StageError:
    return kind(
        f"{where}: could not be written ({last_line(error)}); see to that and run the command again, everything "
        "committed is kept"
    )


@contextmanager
def _readable(checkpoint: ray.train.Checkpoint, storage: Storage) -> Iterator[str]:
    """Yields a folder with the files of all ranks. On a store it is a copy for each node, and this is a collective.

    Ray downloads into Python's temporary folder. The cache takes its place, on a disk that has room for such files. The
    folder there belongs to one process of the node, after whose death the next one removes it.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield checkpoint.path
        return
    context = ray.train.get_context()
    node, told = context.get_node_rank(), [("", 0)] * dist.get_world_size()
    mine = str(storage.new_attempt_folder()) if context.get_local_rank() == 0 else ""
    dist.all_gather_object(told, (mine, node))
    before, tempfile.tempdir = tempfile.tempdir, next(path for path, on in told if path and on == node)
    try:
        with checkpoint.as_directory() as folder:
            yield folder
    finally:
        tempfile.tempdir = before


def _share_of_rank(checkpoint: ray.train.Checkpoint) -> tuple[int, int]:
    """Returns this rank's number among those that read the same files, and how many they are.

    A store's files are downloaded once for each node.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        return dist.get_rank(), dist.get_world_size()
    context = ray.train.get_context()
    return context.get_local_rank(), context.get_local_world_size()


def _agreed(check_own: Callable[[], int]) -> int:
    """Returns what ``check_own`` does, or raises the first rank's RunDirError on every rank; a collective."""
    step, mine = 0, None
    try:
        step = check_own()
    except RunDirError as error:
        mine = str(error)
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    if first := next(filter(None, told), None):
        raise RunDirError(first)
    return step


def refuse_other_settings(job: TrainJob, name: str) -> None:
    """Refuses to begin anew beside a checkpoint of the same inputs and other settings.

    Other inputs are no reason: pairs or a start model that were made again belong to another training.

    Args:
        name: the folder of this job's own checkpoints in ``job.checkpoints``.

    Raises:
        RunDirError: names the settings that differ.
    """
    folders = {each: _sealed(job, each) for each in job.storage.entries(job.checkpoints)}
    if folders.get(name):
        return
    inputs, now = job.inputs(), as_json(job.identity())
    for path, then in (sealed for found in folders.values() for sealed in found.items()):
        same_inputs = all(then.get(key) == value for key, value in inputs.items())
        if same_inputs and (changed := changes(then, now | {WORKERS: then.get(WORKERS)})):
            raise RunDirError(
                f"{job.storage.where(path)}: a training that began with other values of {', '.join(changed)} is not "
                f"finished; restore them, {_else_do(job)}"
            )


def _sealed(job: TrainJob, name: str) -> dict[str, dict[str, Any]]:
    """Returns the checkpoints under ``name`` that have a readable seal of rank 0, with their identity."""
    found = {}
    for each in job.storage.entries(f"{job.checkpoints}/{name}"):
        path = f"{job.checkpoints}/{name}/{each}"
        with suppress(ValueError, KeyError, TypeError):
            found[path] = json.loads(job.storage.find(f"{path}/{_seal_name(0)}") or b"")["identity"]
    return found


def _else_do(job: TrainJob) -> str:
    return f"or remove {job.checkpoints} to train from the start"


def mend_snapshot(storage: Storage, folder: str) -> None:
    """Makes Ray Train's snapshot in ``folder`` anew if a crash or a full disk cut it.

    Ray writes it over in place, and no controller begins with a cut one. The newest whole checkpoint counts. Without
    any, the snapshot goes and training starts from its beginning.
    """
    path, names = f"{folder}/{SNAPSHOT}", storage.entries(folder)
    content = storage.find(path)
    if content is None or is_readable(content, names):
        return
    steps = {name: step for name in names if (step := _step_if_whole(storage, f"{folder}/{name}")) is not None}
    if not steps:
        logger.warning("%s: is damaged, and no whole checkpoint is there; training starts anew", storage.where(path))
        storage.delete(path)
        return
    newest = max(steps, key=lambda name: (steps[name], name))
    logger.warning("%s: is damaged; made again from %s, step %d", storage.where(path), newest, steps[newest])
    storage.replace(path, snapshot_of(newest, {"step": steps[newest]}))


def _step_if_whole(storage: Storage, path: str) -> int | None:
    """Returns the step of a checkpoint that has the seals of all ranks and all that they list, else None."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        seals = [json.loads(storage.read(f"{path}/{_seal_name(0)}"))]
        others = range(1, seals[0]["identity"][WORKERS])
        seals += [json.loads(storage.read(f"{path}/{_seal_name(rank)}")) for rank in others]
        files = {name: FileEntry(**entry) for seal in seals for name, entry in seal["files"].items()}
        if all(storage.digest(f"{path}/{name}") == (entry.sha256, entry.bytes) for name, entry in files.items()):
            return seals[0]["step"]
    return None


def seal(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """Writes the digests of this rank's files."""
    files = {name: entry.model_dump() for name, entry in folder_entries(folder).items()}
    content = {"step": step, "identity": {WORKERS: dist.get_world_size(), **identity}, "files": files}
    _seal_of(folder, dist.get_rank()).write_text(json.dumps(content))


def check(
    folder: Path,
    identity: dict[str, Any],
    else_do: str,
    *,
    any_workers: bool = False,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Checks a checkpoint and returns its step; ``any_workers`` accepts another number of workers.

    Of n readers each checks the files of every n-th writer, and the index. As many readers as writers thus check
    their own files, which they read next anyway.

    Args:
        share: number of this reader, and how many there are.

    Raises:
        RunDirError: a file is damaged, or of other work; the message ends with ``else_do``.
    """
    seals = [_read(_seal_of(folder, 0), else_do)]
    then, now = seals[0]["identity"], {WORKERS: dist.get_world_size(), **as_json(identity)}
    writers = then[WORKERS]
    if any_workers:
        now[WORKERS] = writers
    if changed := changes(then, now):
        raise RunDirError(f"{folder}: was written with other values of {', '.join(changed)}; restore them, {else_do}")
    seals += [_read(_seal_of(folder, rank), else_do) for rank in range(1, writers)]
    files = {name: entry for seal in seals[share[0] :: share[1]] for name, entry in seal["files"].items()}
    for name, entry in (files | {_INDEX: seals[0]["files"].get(_INDEX)}).items():
        if entry is not None and not _is_whole(folder / name, FileEntry(**entry)):
            raise RunDirError(f"{folder / name}: is missing or differs from its digest; restore it, {else_do}")
    return seals[0]["step"]


def _is_whole(path: Path, entry: FileEntry) -> bool:
    try:
        return file_digest(path) == (entry.sha256, entry.bytes)
    except FileNotFoundError:
        return False


def _seal_of(folder: Path, rank: int) -> Path:
    return folder / _seal_name(rank)


def _seal_name(rank: int) -> str:
    return f"spin_ray-{rank}.json"


def _read(path: Path, else_do: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: is missing or damaged; restore it, {else_do}") from error
