"""The votes of a run, read without its server."""

from collections.abc import Iterator
from typing import Any

from spin_ray.errors import UserError
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.app import votes_url
from spin_ray.serving.arena.votes import VoteStore


def exported_votes(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yields the votes that prefer a side; raises UserError if the run has no database of votes."""
    config, file = run.config(), run.storage.path("votes.sqlite")
    if config.serving.votes is None and not file.is_file():
        raise UserError(f"{file}: there are no votes; spin-ray serve collects them at /")
    store = VoteStore(votes_url(str(run.storage.root), config))
    try:
        yield from store.export()
    finally:
        store.close()
