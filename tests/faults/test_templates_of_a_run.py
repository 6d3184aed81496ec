"""Chat templates that write the date or open a thought, in a whole run."""

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.run_dir import run_dir
from tests.support import small_run
from tests.support.small_run import committed

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPENED{% endif %}"
)


def recipe(config: SpinConfig, folder: Path, template: str, rows: list[dict[str, Any]] | None = None) -> SpinConfig:
    """Returns the recipe with another chat template in the model, and other rows to train on."""
    shutil.copytree(config.model.path, folder / "model")
    (folder / "model/chat_template.jinja").write_text(template)
    data = {"heldout": None}
    if rows is not None:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data["train"] = str(folder / "train.jsonl")
    model = config.model.model_copy(update={"path": str(folder / "model")})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update=data)})


def test_a_run_goes_on_on_another_day_with_the_date_that_it_began_with(tmp_path, config, monkeypatch):
    plain = TURNS.replace("CONTENT", "m.content").replace("OPENED", "")
    dated = recipe(config, tmp_path, "{{ strftime_now('%d %b %H:%M') }}" + plain)
    small_run.run(dated, tmp_path / "run")
    begun = committed(tmp_path / "run")
    tomorrow = datetime.now() + timedelta(days=1, hours=1)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return tomorrow

    monkeypatch.setattr(run_dir, "datetime", Clock)
    small_run.run(dated.model_copy(update={"iterations": 2}), tmp_path / "run")
    after = committed(tmp_path / "run")
    assert begun.items() <= after.items() and any(name.startswith("iter_001/model") for name in after)


THINKS = TURNS.replace("CONTENT", "m.content.split('</think>')[-1]").replace("OPENED", "{{ '<think>\n' }}")


def asked(number: int, said: str) -> dict[str, str]:
    return {"prompt": f"{number} + 1 = ?", "response": said}


def test_a_thought_that_the_prompt_opens_is_learnt_and_opened_once(tmp_path, config):
    rows = [asked(n, f"<think>\nadd\n</think>\n\n{n + 1}") for n in range(12)]
    small_run.run(recipe(config, tmp_path, THINKS, rows), tmp_path / "run")
    run = run_dir.RunDir(run_dir.Storage(tmp_path / "run"))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for table in run.pairs(0).tables():
        for row in table.to_pylist():
            text = tokenizer.decode(row["prompt_ids"] + row["real_ids"])
            assert text.count("<think>") == text.count("</think>") == 1 and "<think>\nadd\n</think>\n\n" in text


def test_answers_without_the_thought_that_the_prompt_opens_stop_the_run_before_it_makes_anything(tmp_path, config):
    rows = [asked(n, str(n + 1)) for n in range(12)]
    with pytest.raises(DataError, match=r"can write none of the first 12 rows: its prompt opens a thought by '<think>"):
        small_run.run(recipe(config, tmp_path, THINKS, rows), tmp_path / "run")
    assert not committed(tmp_path / "run")
