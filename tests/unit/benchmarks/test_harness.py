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


def test_what_rows_cost_needs_two_sizes_and_takes_no_more(monkeypatch, capsys, tmp_path):
    """3 more seconds for 1000 more rows in one stage, 1 in each of the others; no real stage runs."""
    import harness
    import size

    monkeypatch.setattr(sys, "argv", ["size.py", "--rows", "1000", "1000"])
    with pytest.raises(SystemExit):
        size.main()
    assert "--rows: give two sizes or more" in capsys.readouterr().err
    program = tmp_path / "size.py"
    program.write_text(
        "import json, sys; rows = int(sys.argv[2]) / 1000;"
        'print(json.dumps({"rows": rows * 1000, "prompts": rows * 3, "generation": rows, "pairs": rows,'
        ' "driver_mib": 5.0}))'
    )
    monkeypatch.setattr(size, "__file__", str(program))
    monkeypatch.setattr(size, "tokenizer_rows_per_s", lambda: 1000.0)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["size.py", "--rows", "2000", "1000"])
    size.main()
    rows = {row["id"]: row["value"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert rows["8 prompts, rows/s more rows cost"] == 333
    assert rows["8 pairs, rows/s more rows cost"] == 1000
    assert "8 all three, cost of a row, times that at smaller sizes" not in rows


def test_what_was_measured_without_git_is_of_an_unknown_commit(monkeypatch):
    from where import commit

    monkeypatch.setenv("PATH", "/nonexistent")
    assert commit() == "unknown"
