"""Folders that are filled: complete or not there, and nothing stays of a process that was killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from spin_ray.errors import RunDirError
from spin_ray.run_dir.cache import filling, folder_with, new_attempt
from spin_ray.run_dir.storage import Digest

EMPTY = Digest("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0)
OTHERS_ATTEMPT = """
import sys
from pathlib import Path
from spin_ray.run_dir.cache import new_attempt
print(new_attempt(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_an_attempt_outlives_no_process_that_was_killed(tmp_path: Path) -> None:
    """Of two processes one is alive: its folder stays."""
    others = [
        subprocess.Popen([sys.executable, "-c", OTHERS_ATTEMPT, tmp_path], stdin=-1, stdout=-1, text=True)
        for _ in range(2)
    ]
    try:
        folders = [Path(other.stdout.readline().strip()) for other in others if other.stdout]
        for folder in folders:
            (folder / "weights").write_text("many bytes")
        others[0].kill()
        others[0].wait(10)
        mine = [new_attempt(tmp_path) for _ in range(2)]
        assert not folders[0].exists()
        assert all(folder.is_dir() for folder in [folders[1], *mine])
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_what_a_killed_process_left_is_filled_anew(tmp_path: Path) -> None:
    (tmp_path / "attempt-model").mkdir()
    (tmp_path / "attempt-model/half").write_text("of a file")
    with filling(tmp_path / "model") as attempt:
        assert attempt
        (attempt / "whole").touch()
    assert [path.name for path in tmp_path.glob("model/*")] == ["whole"]
    with filling(tmp_path / "model") as attempt:
        assert attempt is None


def test_a_file_that_differs_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="there/file: differs from its digest"):
        folder_with(tmp_path, {"file": EMPTY}, lambda name, to: to.write_text("other") and None, "there")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
