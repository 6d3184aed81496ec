"""Keys in a file, compared without telling, and rates."""

from pathlib import Path

import pytest

from spin_ray.errors import ConfigError
from spin_ray.serving.access import Key, Rates, find_key, guard_ray_token, new_key, read_keys


def test_a_made_key_opens_and_its_line_does_not_hold_it(tmp_path: Path) -> None:
    alice, hers = new_key("alice", per_minute=3)
    _, his = new_key("bob", may_export=True)
    _, both = new_key("carol", 5, may_export=True)
    file = tmp_path / "keys"
    file.write_text(f"# who\u2028else\n\n{hers}\n{his}\n{both}\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others on this machine can read or change it"):
        read_keys(file)
    file.chmod(0o640)
    keys = read_keys(file)
    told = [(key.name, key.per_minute, key.may_export) for key in keys]
    assert told == [("alice", 3, False), ("bob", None, True), ("carol", 5, True)]
    found = find_key(keys, f"Bearer {alice}".encode())
    assert found and found.name == "alice"
    assert alice not in file.read_text()


@pytest.mark.parametrize("name", ["alice smith", "team/app", "", "a" * 65])
def test_no_key_is_made_that_a_server_would_not_read(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a key; use up to 64 letters, digits"):
        new_key(name)


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic x", b"Bearer \xff", b"Bearer sr-no"])
def test_nothing_else_opens(header: bytes | None) -> None:
    assert find_key([Key("alice", new_key("alice")[1].split()[1], None)], header) is None


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice 12ab",
        "alice " + "g" * 64,
        "alice " + "a" * 64 + " 0",
        "# nobody",
        "alice " + "a" * 64 + " export 5",
        "alice " + "a" * 64 + " exports",
    ],
)
def test_a_file_that_cannot_lock_is_an_error_that_says_where(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(line + "\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=str(file)):
        read_keys(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_bucket_refills_at_its_rate() -> None:
    """Two a minute: two at once, then one every 30 s."""
    now = 0.0
    rates = Rates(lambda: now)
    assert [rates.wait_s("alice", 2) for _ in range(3)] == [0, 0, 30]
    assert rates.wait_s("bob", 2) == 0
    now = 29.0
    assert rates.wait_s("alice", 2) == pytest.approx(1)
    now = 30.0
    assert rates.wait_s("alice", 2) == 0
    now = 1000.0
    assert [rates.wait_s("alice", 2) for _ in range(3)][:2] == [0, 0]


@pytest.mark.parametrize("exists", [False, True])
def test_rays_token_is_its_owners(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes the file readable by others; a cluster's token is not made up."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / ".ray" / "auth_token"
    if exists:
        file.parent.mkdir()
        file.write_text("its own")
        file.chmod(0o644)
    guard_ray_token(embedded=False)
    assert file.exists() == exists
    guard_ray_token(embedded=True)
    assert file.stat().st_mode & 0o777 == 0o600
    assert (file.read_text() == "its own") == exists and len(file.read_text()) > 6
