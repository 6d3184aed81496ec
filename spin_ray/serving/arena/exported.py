"""The votes of a run, read without its server."""

from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.app import votes_url
from spin_ray.serving.arena.votes import VoteStore


def open_votes(run: RunDir, url: str | None = None) -> VoteStore:
    """Opens the votes of a run, on this machine or at ``url``; raises UserError if there is no database."""
    return VoteStore(url or votes_url(str(run.storage.root), run.config()), new=False)
