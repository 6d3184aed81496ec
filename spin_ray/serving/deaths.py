"""Causes of engines' deaths, which dying engines leave for the keeper in Ray's key-value store."""

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put


def leave_cause(app: str, cause: str) -> None:
    """Notes why an engine of the application ``app`` has died; ``cause`` is empty if that is unknown."""
    _internal_kv_put(_key(app), cause)


def cause_of_death(app: str) -> str:
    """Returns the cause that the last engine of ``app`` to die left; empty if it left none."""
    return (_internal_kv_get(_key(app)) or b"").decode(errors="replace")


def forget_cause(app: str) -> None:
    _internal_kv_del(_key(app))


def _key(app: str) -> str:
    return f"spin_ray.cause_of_death.{app}"
