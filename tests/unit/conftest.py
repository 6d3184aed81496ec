"""Fixtures that several unit tests share."""

import sys

import pytest

from spin_ray import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the program; returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spin-ray", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        out, error = capsys.readouterr()
        return code, out, error

    return call
