"""``spin-ray compare`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.paths import ROOT
from tests.support.served import ANSWER_S, START_S, Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(START_S + 2 * ANSWER_S)]


def test_a_file_is_compared_as_a_server_compares_it(served: Served, tmp_path: Path) -> None:
    """The command's engines say what the server's say: the same seeds, and greedy."""
    rows = [
        {"prompt": "2 + 3?"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]},
    ]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [
        sys.executable, "-m", "spin_ray", "compare", str(served.run.storage.root), "--prompts", "f.jsonl",
        "--models", "sft,latest", "--out", "out.jsonl", "--max-tokens", "6", "--temperature", "0", "--logprobs",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=START_S + ANSWER_S, check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 prompts compared" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [line["messages"][0]["content"] for line in lines] == ["2 + 3?", "hi"]
    for seed, line in enumerate(lines):
        assert [answer["iterate"] for answer in line["answers"]] == ["sft", "iter-0"]
        ((margin,), beta) = line["engine_margins"], 0.5
        (q, p) = line["answers"]
        own, other = p["logps"]["iter-0"] - p["logps"]["sft"], q["logps"]["iter-0"] - q["logps"]["sft"]
        assert margin["value"] == pytest.approx(beta * (own - other))
        body = {"models": ["sft", "latest"], "max_tokens": 6, "temperature": 0, "seed": seed, "logprobs": True}
        asked = body | {"messages": line["messages"]}
        served_line = httpx.post(f"{served.url}/v1/compare", json=asked, timeout=ANSWER_S).raise_for_status().json()
        assert [answer["content"] for answer in served_line["answers"]] == [answer["content"] for answer in (q, p)]
        given = [{key: answer[key] for key in ("content", "finish_reason")} for answer in (q, p)]
        scored = httpx.post(
            f"{served.url}/v1/compare", json=asked | {"answers": given}, timeout=ANSWER_S
        ).raise_for_status()
        assert len(scored.json()["engine_margins"]) == 1
