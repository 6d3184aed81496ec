"""The benchmark for a card: every branch with toy sizes on a CPU, and what happens when a step fails, hangs or dies."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

ON_CARDS_ONLY = (
    "No viable backend",
    "backward on CPU",
    "is for CUDA",
    "not in float32",
    "TRL not there",
)
"""Reasons that a rehearsal may give."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_takes_every_branch(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--tiny", "--out", tmp_path, "--budget-factor", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    failed = [row for row in rows if row["value"] is None and not any(why in row["note"] for why in ON_CARDS_ONLY)]
    assert not failed
    assert {row["step"] for row in rows} == {
        "machine", "probe", "attention", "parity", "step", "trl", "adapters", "job",
    }  # fmt: skip
    needed = {"id", "value", "unit", "target", "met", "card", "versions", "commit", "measured"}
    assert all(needed <= row.keys() for row in rows)
    missed = {row["id"] for row in rows if row["step"] in ("parity", "attention", "job") and row["met"] is False}
    assert not {id for id in missed if id not in {row["id"] for row in rows if row["value"] is None}}
    assert all(row["id"] in (tmp_path / "gpu.md").read_text() for row in rows)


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmarks/gpu.py`` as a module, with the folder that its steps are found in."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


BROKEN_STEP = """
import os, time
from gpu_steps.rows import Measure

def good(context):
    yield Measure(id="good", value=1.0, unit="", target=">= 1")

def raises(context):
    yield Measure(id="before", value=0.5, unit="", target=">= 1")
    raise ValueError("no kernel\\nlong story")

def dies(context):
    os._exit(7)
    yield

def hangs(context):
    time.sleep(600)
    yield

ITEMS = {"raises": raises, "dies": dies, "good": good, "hangs": hangs, "late": good}
"""


@pytest.mark.slow
def test_a_step_that_breaks_leaves_a_reason_and_the_next_item_runs(benchmark, tmp_path, monkeypatch):
    from gpu_steps import child
    from gpu_steps.rows import Results

    folder = tmp_path / "gpu_steps_more"
    folder.mkdir()
    (folder / "broken.py").write_text(BROKEN_STEP)
    import gpu_steps

    monkeypatch.setattr(gpu_steps, "__path__", [*gpu_steps.__path__, str(folder)])
    runner = tmp_path / "runner.py"
    runner.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_steps; "
        f"gpu_steps.__path__.append({str(folder)!r}); import gpu; gpu.main()"
    )
    monkeypatch.setattr(child, "PROGRAM", runner)
    monkeypatch.setattr(child, "KILL_AFTER_S", 1)
    results = Results(tmp_path / "out", {"card": "c", "versions": {}, "commit": "d"})
    benchmark.run_step("broken", child.Context(tiny=True, work=tmp_path), results, budget_s=12)
    rows = {row["id"]: row for row in results.rows}
    assert (rows["before"]["met"], rows["good"]["met"]) == (False, True)
    assert rows["raises"]["note"] == "ValueError: no kernel"
    assert "ended with 7" in rows["dies"]["note"]
    assert rows["hangs"]["note"] == "its time was up"
    assert "were spent" in rows["late"]["note"]
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"] == results.rows


def test_a_second_card_keeps_the_rows_of_the_first_and_is_not_compared_with_them(benchmark, tmp_path):
    from gpu_steps.child import Context
    from gpu_steps.rows import Measure, Results
    from gpu_steps.trl import BEST, CHAT, MODEL, _beside_ours

    ours = {"training": 30.0, "scoring": 90.0, "peak memory": 20.0}
    first, second, later = ({"card": card, "commit": commit, "versions": {}} for card, commit in ("ax", "bx", "ay"))
    results = Results(tmp_path, first)
    for name, value in ours.items():
        results.add("step", "best", Measure(id=f"{MODEL}, {CHAT}, best: {name}", value=value, unit=""))

    def beside(facts: dict) -> list:
        (tmp_path / "results.json").write_text(json.dumps({"file": str(tmp_path / "gpu.json"), "facts": facts}))
        return list(_beside_ours(Context(tiny=True, work=tmp_path), BEST, CHAT, 10.0, 40.0))

    assert [row.value for row in beside(first)] == [3.0, 0.5]
    for other in (second, later):
        [row] = beside(other)
        assert row.value is None and "gave no speed with this card, commit and versions" in row.note
    results = Results(tmp_path, second)
    results.forget("step", ["best"])
    results.add("step", "best", Measure(id=f"{MODEL}, {CHAT}, best: training", value=60.0, unit=""))
    assert [row["value"] for row in results.rows] == [30.0, 90.0, 20.0, 60.0]
    assert [row["value"] for row in results.of_this_card] == [60.0]
    assert beside(first)[0].value == 3.0


def test_without_a_card_it_is_one_line(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "--tiny" in error
