"""A store that cannot be used is told at once; one that has answered before is waited for."""

from collections.abc import Callable

import pytest
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

from spin_ray.errors import ConfigError, StageError
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.object_storage import ObjectStorage, open_storage

NO_ROLE = GenericError("Error performing PUT http://169.254.169.254/latest/api/token: 403 Forbidden")


def fail(error: BaseError) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.4)
    monkeypatch.setattr(object_storage, "FIRST_DEADLINE_S", 0.1)


@pytest.mark.parametrize(
    ("error", "said"),
    [(NO_ROLE, "no credentials were found"), (PermissionDeniedError("403"), "refuses the credentials")],
)
def test_a_store_without_access_is_a_mistake_until_it_has_answered(error: BaseError, said: str) -> None:
    storage = ObjectStorage("s3://bucket/run")
    with pytest.raises(ConfigError, match=f"s3://bucket/run: {said}; give AWS_ACCESS_KEY_ID"):
        storage._insist("lease.json", fail(error))
    storage._insist("lease.json", lambda: None)
    with pytest.raises(StageError, match="the store failed for 0 s"):
        storage._insist("lease.json", fail(error))


def test_a_scheme_of_no_store_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="ftp:// is no store that can hold a run"):
        open_storage("ftp://host/run")
    assert isinstance(open_storage("gs://bucket/run"), ObjectStorage)
