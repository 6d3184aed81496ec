"""What doctor finds in data and template, before anything runs."""

import json
from contextlib import nullcontext
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from spin_ray.errors import DataError
from spin_ray.inputs import survey
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.findings import Finding, template_facts
from spin_ray.inputs.forms import form_of
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.survey import SAMPLE_ROWS
from spin_ray.report import doctor
from tests.support.fakes import config_of

TINY = resolve("embedded:tiny-llama")


def row(number: int, response: str = "yes") -> str:
    return json.dumps({"prompt": f"Is {number} a number?", "response": response})


def look(tmp_path, lines, every_row=False, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    short = {"sampling": {"max_tokens": 8}}
    config = config_of(model={"path": TINY, "max_length": 60}, data={"train": str(path)} | changes, generation=short)
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=str(path), heldout=None, questions=None)
    [found] = doctor.look_at_data(config, inputs, every_row=every_row)
    return found, config


def printed(show, *arguments, **options) -> str:
    console = Console(width=80, record=True, force_terminal=False, soft_wrap=True, **options)
    with console.capture() as shown:
        show(*arguments, console)
    return shown.get()


def test_each_row_is_usable_or_refused_by_a_reason_with_the_first_one_shown(tmp_path):
    """Two of six rows are of use: the second repeats the first, one is no form, one JSON, one long."""
    found, config = look(tmp_path, [row(0), row(0), '{"text": "x"}', "{", row(1, "ha " * 80), row(2)])
    assert (found.read, found.usable, found.whole) == (6, 2, True)
    assert found.refused == {"duplicate": 1, "malformed": 2, "too_long": 1}
    assert found.first["malformed"].origin.endswith("rows.jsonl:3")
    assert found.share_too_long == 1 / 6
    assert len(found.lengths) == 4
    text = printed(doctor.print_survey, found)
    assert (
        "2 of 6 usable; refused: " in text and "2 malformed" in text and "16.7% do not fit model.max_length 60" in text
    )
    with pytest.raises(DataError, match=r"4 of 6 rows cannot be used .*more than data.max_quarantine_fraction 0.05"):
        found.check(config.data)


def test_both_parts_of_a_file_are_looked_at(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(row(number) for number in range(40)))
    path = str(tmp_path / "rows.jsonl")
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=path, heldout=path, questions=None)
    for fraction, told in ((0.5, None), (0.0001, "heldout_fraction: 0.0001 holds no conversation of")):
        config = config_of(model={"path": TINY}, data={"train": path, "heldout_fraction": fraction})
        trained, held_out = surveys = doctor.look_at_data(config, inputs, every_row=False)
        assert trained.read + held_out.read == trained.usable + held_out.usable == 40
        assert held_out.source == f"{path} (held out)" and not trained.ids & held_out.ids
        with pytest.raises(DataError, match=told) if told else nullcontext():
            doctor.check_surveys(config, inputs, surveys)


def test_questions_are_looked_at_whole_and_held_out_rows_are_not_judged_alone(tmp_path):
    """Most of the held-out rows are malformed; one of 40 questions is."""
    (tmp_path / "rows.jsonl").write_text("\n".join(row(number) for number in range(40)))
    (tmp_path / "questions.jsonl").write_text("\n".join(['{"prompt": 1}', *(row(number) for number in range(39))]))
    train, questions = str(tmp_path / "rows.jsonl"), str(tmp_path / "questions.jsonl")
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=train, heldout=train, questions=questions)
    config = config_of(model={"path": TINY}, data={"train": train, "heldout_fraction": 0.5})
    _, held_out, asked = surveys = doctor.look_at_data(config, inputs, every_row=False)
    assert (asked.read, asked.usable) == (40, 39)
    held_out.refused["too_long"] = held_out.usable - 1
    doctor.check_surveys(config, inputs, surveys)


def test_columns_that_are_not_read_are_counted(tmp_path):
    found, _ = look(tmp_path, [row(0), json.dumps(json.loads(row(1)) | {"weight": 2})])
    assert found.ignored == {"weight": 1}
    assert "not read: weight (1 rows)" in printed(doctor.print_survey, found)


def test_the_form_of_a_usable_row_is_looked_for_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(survey, "form_of", lambda content, data: looked.append(content) or form_of(content, data))
    found, _ = look(tmp_path, [row(0), '{"text": "x"}', "{"])
    assert found.forms == {"prompt_response": 1, "unknown": 2} and looked == [{"text": "x"}]


def test_training_rows_that_are_held_out_are_counted_and_findings_shown(tmp_path):
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    train.write_text("\n".join([row(0), row(1), row(2)]))
    heldout.write_text("\n".join([row(2), row(0), row(3)]))
    config = config_of(model={"path": TINY}, data={"train": str(train), "heldout": str(heldout)})
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=str(train), heldout=str(heldout), questions=None)
    found = doctor.look_at_data(config, inputs, every_row=True)
    assert [each.leaked for each in found] == [2, 0]
    assert "2 rows are held out, too, and are not trained on" in printed(doctor.print_survey, found[0])
    train.write_text("\n".join([row(0), row(1), row(0)]))
    repeated = doctor.look_at_data(config, inputs, every_row=True)[0]
    repeated.check(config.data)
    assert (repeated.leaked, repeated.refused) == (2, {}), "a held-out row counts as one wherever it is"
    findings = [Finding("the template [b]trims[/b]", "warning")]
    text = printed(doctor.print_findings, findings, [tmp_path / "optimizer.pt"])
    assert "warning the template [b]trims[/b]\n" in text
    assert "1 files that a trainer left in the model folder are not opened: optimizer.pt" in text


def test_no_usable_row_is_an_error_whatever_fraction_is_allowed(tmp_path):
    found, config = look(tmp_path, ['{"text": "x"}'], max_quarantine_fraction=1.0)
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used \(1 malformed\); first: .*rows.jsonl:1"):
        found.check(config.data)


def test_doctor_refuses_what_a_run_would_refuse_after_reading_every_row(tmp_path):
    """Two forms behind the first rows; all rows held out; fewer rows left than a source shall give."""
    found, config = look(tmp_path, [*(row(number) for number in range(70)), '{"instruction": "a", "output": "b"}'])
    with pytest.raises(DataError, match=r"of the form prompt_response .* but .*:71 is of the form alpaca"):
        found.check(config.data)
    found, config = look(tmp_path, [row(0)])
    found.leaked = 1
    with pytest.raises(DataError, match="all rows are held out, too"):
        found.check(config.data)
    path, heldout = str(tmp_path / "rows.jsonl"), tmp_path / "heldout.jsonl"
    heldout.write_text(row(0) + "\n")
    (tmp_path / "rows.jsonl").write_text(row(0) + "\n" + row(1) + "\n")
    sources = config_of(data={"train": [{"path": path, "rows": 2}]}).data.train
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=sources, heldout=str(heldout), questions=None)
    surveys = doctor.look_at_data(config, inputs, every_row=False)
    with pytest.raises(DataError, match=r"rows\.jsonl: has 1 usable rows, data\.train asks for 2"):
        doctor.check_surveys(config, inputs, surveys)


def test_doctor_refuses_rows_that_lack_what_the_algorithm_needs(tmp_path):
    path, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    path.write_text(row(0) + "\n" + json.dumps(json.loads(row(1)) | {"answer": "yes"}) + "\n")
    heldout.write_text(row(2))
    inputs = SimpleNamespace(
        model=SimpleNamespace(path=TINY), train=str(path), heldout=str(heldout), questions=str(heldout)
    )
    of_grades = {"algorithm": "self_reinforcement", "sft": {}, "generation": {"samples_per_prompt": 2}}
    for sections, said in (
        ({"algorithm": "dpo"}, r"2 of 2 rows cannot be used \(2 no_rejected\); first: .*train\.jsonl:1: no_rejected"),
        ({"algorithm": "sppo", "scorer": {"kind": "grade", "path": "multiple_choice"}},
         r"train\.jsonl: no row has an answer that scorer\.path multiple_choice can grade by"),
        (of_grades | {"self_filter": {"grade": "exact"}}, r"heldout\.jsonl: no row .* that self_filter\.grade"),
        ({"evaluation": {"grade": "exact"}}, r"heldout\.jsonl: no row .* that evaluation\.grade exact can"),
        ({"evaluation": {"answer_extractor": "equals"}}, r"heldout\.jsonl: no .* that evaluation\.answer_extractor"),
    ):  # fmt: skip
        config = config_of(model={"path": TINY}, data={"train": str(path), "heldout": str(heldout)}, **sections)
        surveys = doctor.look_at_data(config, inputs, every_row=False)
        with pytest.raises(DataError, match=said):
            doctor.check_surveys(config, inputs, surveys)
    config = config_of(data={"train": str(path)}, algorithm="sppo", scorer={"kind": "grade", "path": "exact"})
    doctor.check_surveys(config, inputs, surveys)


@pytest.mark.parametrize("grade", ["number", "exact"])
def test_doctor_takes_answers_of_a_column_of_decimals(tmp_path, grade):
    asked = ["1 + 0.5 = ?", "6 + 6 = ?"]
    answers = pa.array([Decimal("1.50"), Decimal("12.00")], pa.decimal128(9, 2))
    pq.write_table(pa.table({"prompt": asked, "response": asked, "answer": answers}), tmp_path / "h.parquet")
    train, heldout = tmp_path / "train.jsonl", str(tmp_path / "h.parquet")
    train.write_text(row(0) + "\n")
    inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=str(train), heldout=heldout, questions=None)
    config = config_of(
        model={"path": TINY}, data={"train": str(train), "heldout": heldout},
        evaluation={"grade": grade, "answer_extractor": "equals" if grade == "number" else "none"},
    )  # fmt: skip
    surveys = doctor.look_at_data(config, inputs, every_row=True)
    doctor.check_surveys(config, inputs, surveys)
    assert surveys[1].answers == ["1.5", "12"]


@pytest.mark.parametrize(("rows", "fits"), [(19, True), (18, False)])
def test_doctor_counts_bad_rows_beside_all_that_are_there(tmp_path, rows, fits):
    """One bad row of 20 is as many as may be, one of 19 is more, however few a run takes."""
    found, config = look(tmp_path, [*map(row, range(rows)), "{"], max_rows=2)
    inputs = SimpleNamespace(train=found.source, heldout=None, questions=None)
    error = r"1 of 19 rows .*, more than .*fraction 0\.05; first: .*:19"
    with nullcontext() if fits else pytest.raises(DataError, match=error):
        doctor.check_surveys(config, inputs, [found])


def test_a_sample_says_that_it_is_one_and_all_reads_every_row(tmp_path):
    lines = [row(number) for number in range(SAMPLE_ROWS + 1)]
    found, _ = look(tmp_path, lines)
    assert (found.read, found.whole) == (SAMPLE_ROWS, False)
    assert f"first {SAMPLE_ROWS:,} rows read; --all reads every row" in printed(doctor.print_survey, found)
    every, _ = look(tmp_path, lines, every_row=True)
    assert (every.read, every.whole) == (SAMPLE_ROWS + 1, True)


def test_what_fits_is_what_a_run_takes(tmp_path):
    """The limit is moved to the very length of the row, and below."""
    found, config = look(tmp_path, [row(0)])
    [length] = found.lengths
    for limit, usable in ((length, 1), (length - 1, 0)):
        inputs = SimpleNamespace(model=SimpleNamespace(path=TINY), train=found.source, heldout=None, questions=None)
        changed = config.model_copy(update={"model": config.model.model_copy(update={"max_length": limit})})
        assert doctor.look_at_data(changed, inputs, every_row=True)[0].usable == usable


def test_a_row_is_shown_with_its_special_tokens_and_cannot_steer_the_terminal(tmp_path):
    found, _ = look(tmp_path, [row(0, "a \u001b[31m b")])
    tokenizer = load_tokenizer(TINY)
    text = printed(doctor.print_example, found, tokenizer)
    assert "<|im_start|>user\nIs 0 a number?<|im_end|>" in text
    assert "\u001b" not in text and r"\x1b[31m" in text
    assert f"response, {len(found.example['real_ids'])} tokens" in text
    coloured = Console(force_terminal=True, color_system="standard", no_color=False, _environ={})
    with coloured.capture() as shown:
        doctor.print_example(found, tokenizer, coloured)
    assert "\u001b[36m" in shown.get() and "\u001b[32m" in shown.get()


def test_a_histogram_fits_80_columns_and_counts_every_row():
    lines = doctor.histogram([*range(1, 100_000, 7), 5])
    assert max(map(len, lines)) <= 77
    assert sum(int(line.rsplit(maxsplit=1)[1].replace(",", "")) for line in lines) == len(range(1, 100_000, 7)) + 1
    assert doctor.histogram([3]) == [f"      3 to       3 {'█' * 40} 1"]


def test_a_template_tells_what_it_adds_and_takes():
    tokenizer = load_tokenizer(TINY)
    assert template_facts(ChatRenderer(tokenizer).template).strips == ()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nToday is {{ strftime_now('%d %b') }}.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] | trim }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    facts = template_facts(ChatRenderer(tokenizer).template)
    assert facts.default_system.startswith("Today is ")
    assert facts.writes_date
    assert facts.strips == ("blanks before it", "blanks after it", "line breaks at its end", "a thought in <think>")
    assert facts.after == "<|im_end|>\n<|im_start|>assistant\n"


def test_the_precision_says_where_it_comes_from():
    chosen = config_of(train={"precision": "fp32"})
    assert doctor.precision_and_reason(chosen, None) == ("fp32", "the recipe says so (train.precision)")
    assert doctor.precision_and_reason(config_of(train={"precision": "auto"}), chosen) == (
        "fp32",
        "the run began with it",
    )


def test_a_source_that_limits_a_mixture_is_told_once_every_row_is_read(tmp_path):
    for name, count in (("chat", 40), ("maths", 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(row(number, name) for number in range(count)))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("chat", "maths")]
    config = config_of(model={"path": TINY}, data={"train": sources})
    inputs = SimpleNamespace(
        model=SimpleNamespace(path=TINY), train=config.data.train, heldout=None, questions=None
    )  # fmt: skip
    surveys = doctor.look_at_data(config, inputs, every_row=False)
    [warning] = doctor.check_surveys(config, inputs, surveys)
    assert "maths.jsonl: its 2 usable rows limit" in warning
    surveys[0].whole = False
    assert not doctor.check_surveys(config, inputs, surveys)


def test_doctor_refuses_held_out_sources_that_give_fewer_rows_than_they_shall(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(row(0) + "\n" + row(1))
    heldout = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "rows": 1}]
    config = config_of(model={"path": TINY}, data={"train": "embedded:arithmetic-train", "heldout": heldout})
    train = resolve("embedded:arithmetic-train")
    inputs = SimpleNamespace(
        model=SimpleNamespace(path=TINY), train=train, heldout=config.data.heldout, questions=None
    )  # fmt: skip
    with pytest.raises(DataError, match=r"b\.jsonl: has 0 usable rows, data\.heldout asks for 1"):
        doctor.check_surveys(config, inputs, doctor.look_at_data(config, inputs, every_row=True))
