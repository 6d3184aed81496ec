"""The parts that benchmarks share, and what a benchmark refuses before it measures."""

import json
import sys

import pytest

from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_row_may_hold_any_sign_that_ends_a_line_of_text(tmp_path):
    """JSON allows U+2028 and U+0085 as they are."""
    from harness import json_lines

    said = ["one\u2028two", "three\u0085four", "five"]
    (tmp_path / "rows.jsonl").write_text(
        "\r\n".join(json.dumps(text, ensure_ascii=False) for text in said), encoding="utf-8", newline=""
    )
    assert [json.loads(line) for line in json_lines(tmp_path / "rows.jsonl")] == said


def test_a_batch_that_trl_would_cut_is_refused(monkeypatch, capsys):
    """TRL would train on 8 of 12 pairs a step."""
    import training_against_trl

    monkeypatch.setattr(sys, "argv", ["training_against_trl.py", "--data", "rows.jsonl", "--batch", "12"])
    with pytest.raises(SystemExit):
        training_against_trl.main()
    assert "--batch 12: TRL takes 8 pairs at a time; give a multiple of that" in capsys.readouterr().err
