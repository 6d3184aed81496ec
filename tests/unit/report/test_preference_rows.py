"""Pairs and votes in the forms of other trainers."""

import json
import math
import shutil
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from spin_ray.config.sections import DataConfig
from spin_ray.errors import ConfigError, RunDirError
from spin_ray.inputs.conversations import conversations_of, read_row
from spin_ray.inputs.forms import form_of
from spin_ray.inputs.model_folder import folder_entries
from spin_ray.inputs.prompt_rows import PromptTask, rows_of
from spin_ray.inputs.rendering import ChatRenderer, open_renderer
from spin_ray.inputs.sources import SourceRow
from spin_ray.report.export import export
from spin_ray.report.preference_rows import as_trl, pairs_of, preferred_of_votes, said, write_rows
from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, PROMPT_SCHEMA
from spin_ray.run_dir.storage import MANIFEST, Storage
from spin_ray.serving.arena.battles import Answer, Question
from spin_ray.serving.arena.votes import VoteStore
from tests.support.fakes import config_of
from tests.support.fakes import write_rows as write_table
from tests.support.made_up_run import TINY, TOKENIZER

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
DATA = DataConfig(train="d")


@pytest.fixture
def run(tmp_path):
    """Two pairs of the first iteration, the second cut."""
    return made_run(tmp_path / "run", {"path": TINY})


def made_run(folder, model):
    run = RunDir(Storage(folder))
    config = config_of(model=model, iterations=1)
    run.begin(config, {"inputs": {}, "start_model": TINY, "versions": {}})
    rendered = open_renderer(TINY, config.model).render([*ASKED, {"role": "assistant", "content": " 4"}])
    row = {"prompt_id": "p0", "prompt_ids": rendered.prompt_ids, "real_ids": rendered.real_ids}
    stored = json.dumps([*ASKED, {"role": "assistant", "content": " 4"}])
    write_table(run.prompts, PROMPT_SCHEMA, [row | {"messages": stored}], part_rows=1)
    said = TOKENIZER.encode("It is 5.\n", add_special_tokens=False)
    end = rendered.real_ids[-1]
    pairs = [
        row | {"pair_id": f"p0/000/{sample}", "iteration": 0, "generated_ids": ids}
        for sample, ids in enumerate(([*said, end], said))
    ]
    write_table(run.pairs(0), PAIR_SCHEMA, pairs, part_rows=1)
    folder = run.storage.path(run.model(1).path)
    shutil.copytree(TINY, folder)
    (folder / MANIFEST).write_bytes(Manifest.of(folder_entries(folder), {}, {}).to_bytes())
    return run


@pytest.mark.parametrize(("form", "named"), [("trl", "prompt_chosen_rejected"), ("sharegpt", "sharegpt_preferred")])
def test_exported_pairs_are_read_back_with_the_ids_that_were_trained_on(run, tmp_path, form, named):
    counts = Counter[str]()
    path = write_rows(pairs_of(run, "0", counts), form, str(tmp_path / "pairs.jsonl"), counts)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    [pair, cut] = [row for table in run.pairs(0).tables() for row in table.to_pylist()]
    renderer = ChatRenderer(TOKENIZER)
    assert [[row[f"{which}_finish_reason"] for which in ("chosen", "rejected")] for row in rows] == [
        ["stop", "stop"], ["stop", "length"],
    ]  # fmt: skip
    for row, has_end in zip(rows, (True, False), strict=True):
        assert form_of(row, DATA).name == named and read_row(row, DATA).has_end == [True, has_end]
        better, worse = renderer.render_all([*conversations_of(row, DATA), read_row(row, DATA).rejected])
        assert (better.prompt_ids, better.real_ids) == (pair["prompt_ids"], pair["real_ids"])
        assert worse.real_ids == pair["generated_ids"] == [*cut["generated_ids"], better.real_ids[-1]]
    assert counts == {"written": 2, "other ids": 1, "responses": 4}  # the cut response has got an end


def test_trls_form_has_the_columns_of_its_conversational_preference_rows(run, tmp_path):
    """Lists of role and content, loaded by ``datasets`` with no column of mixed type."""
    datasets = pytest.importorskip("datasets")
    path = write_rows(pairs_of(run, "0", Counter()), "trl", str(tmp_path / "pairs.jsonl"), Counter())
    loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    finish = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    assert loaded.column_names == ["prompt", "chosen", "rejected", *finish]
    assert loaded[0] == {
        "prompt": ASKED,
        "chosen": [{"role": "assistant", "content": " 4"}],
        "rejected": [{"role": "assistant", "content": "It is 5.\n"}],
        **finish,
    }


@pytest.mark.parametrize("form", ["trl", "sharegpt"])
def test_rows_bring_the_variables_of_the_chat_template_by_which_a_plain_reader_finds_the_prompt(tmp_path, form):
    """ShareGPT's form has no place for them: each response then has other token ids, and is told."""
    template = "{{ mode }}" + TOKENIZER.chat_template
    (tmp_path / "mode.jinja").write_text(template)
    model = {"path": TINY, "chat_template": str(tmp_path / "mode.jinja"), "chat_template_kwargs": {"mode": "brief"}}
    run = made_run(tmp_path / "run", model)
    counts = Counter[str]()
    path = write_rows(pairs_of(run, "0", counts, form), form, str(tmp_path / "pairs.jsonl"), counts)
    row = json.loads(Path(path).read_text().splitlines()[0])
    assert row.get("chat_template_kwargs") == ({"mode": "brief"} if form == "trl" else None)
    assert counts["other ids"] == (1 if form == "trl" else 4)
    if form == "trl":  # as TRL does
        (pair, *_) = next(iter(run.pairs(0).tables())).to_pylist()
        asked = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
        assert (
            TOKENIZER.apply_chat_template(row["prompt"], **asked, **row["chat_template_kwargs"]) == pair["prompt_ids"]
        )
        read_row(row, DATA)


def test_votes_bring_the_variables_of_the_chat_template(votes):
    (vote,) = preferred_of_votes(votes.export(), Counter(), {"mode": "brief"})
    assert as_trl(vote)["chat_template_kwargs"] == {"mode": "brief"}


def test_trl_opens_an_exported_folder_and_reads_its_pairs_with_the_ids_of_the_run(run, tmp_path):
    """TRL prepares the rows itself and makes a step; the template writes a line break behind the end of turn."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: make peers has it")
    datasets = pytest.importorskip("datasets")
    folder = export(run, "0", str(tmp_path / "model"))
    path = write_rows(pairs_of(run, "0", Counter()), "trl", str(tmp_path / "pairs.jsonl"), Counter())
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    settings = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "max_length": None, "max_steps": 1}
    trainer = trl.DPOTrainer(model=folder, args=trl.DPOConfig(**settings, report_to=[]), train_dataset=rows)
    (pair, *_) = next(iter(run.pairs(0).tables())).to_pylist()
    for row in trainer.train_dataset:
        assert row["prompt_ids"] == pair["prompt_ids"]
        for theirs, ours in (("chosen_ids", "real_ids"), ("rejected_ids", "generated_ids")):
            ids = pair[ours]
            assert row[theirs][: len(ids)] == ids and TOKENIZER.decode(row[theirs][len(ids) :]).strip() == ""
    assert trainer.train().training_loss == pytest.approx(math.log(2), rel=1e-3)  # the policy is its own reference


@pytest.fixture
def votes(tmp_path):
    """Two votes, the second between equal answers; the rejected answer of the first was cut."""
    store = VoteStore(f"sqlite:///{tmp_path / 'votes.sqlite'}", count(1.0).__next__)
    for a, b in ((Answer("It is", "length", "d0"), Answer("4", "stop", "d1")), (Answer("4", "stop", "d"),) * 2):
        battle = store.start("sft", "iter-0", Question(ASKED, {"seed": 7}))
        store.record(battle.id, "a", a)
        store.record(battle.id, "b", b)
        store.vote(battle.id, "b", "alice")
    yield store
    store.close()


@pytest.mark.parametrize("target", ["s3://bucket/rows.jsonl", "hub:me/rows"])
def test_rows_are_written_to_files_of_this_machine_alone(run, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no file of this machine; write rows to one"):
        write_rows(pairs_of(run, "0", Counter()), "trl", target, Counter())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_row_makes_no_file_and_home_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"none.jsonl: there is nothing to write: 0 rows written"):
        write_rows([], "trl", str(tmp_path / "none.jsonl"), Counter())
    assert write_rows(pairs_of(run, "0", Counter()), "trl", "~/rows.jsonl", Counter()) == str(tmp_path / "rows.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run"]


@pytest.mark.parametrize("form", ["trl", "sharegpt"])
def test_votes_become_the_same_rows_with_what_is_known_of_them(votes, tmp_path, form):
    counts = Counter[str]()
    path = write_rows(preferred_of_votes(votes.export(), counts), form, str(tmp_path / "votes.jsonl"), counts)
    row = json.loads(Path(path).read_text())
    assert said(counts) == "1 rows written; 1 left out: chosen and rejected are identical"
    told = {name: row.pop(name) for name in list(row) if name not in _COLUMNS}
    assert row == {
        "trl": {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "4"}],
                "rejected": [{"role": "assistant", "content": "It is"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}], "system": "Be brief.",
                     "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "It is"}},
    }[form]  # fmt: skip
    assert len(told.pop("battle")) == 24 and told.pop("voted") > 1
    assert told == {
        "voter": "alice", "sampling": {"seed": 7}, "chosen_model": "iter-0", "chosen_digest": "d1",
        "chosen_finish_reason": "stop", "rejected_model": "sft", "rejected_digest": "d0",
        "rejected_finish_reason": "length",
    }  # fmt: skip


_COLUMNS = ("prompt", "chosen", "rejected", "conversations", "system")


@pytest.mark.parametrize("form", [None, "trl", "sharegpt"])
def test_a_cut_answer_of_a_vote_gets_no_end_of_turn_in_training(votes, tmp_path, form):
    """None: a line of the HTTP export."""
    if form is None:
        row = next(votes.export())
    else:
        path = write_rows(preferred_of_votes(votes.export(), Counter()), form, str(tmp_path / "v.jsonl"), Counter())
        row = json.loads(Path(path).read_text())
    task = PromptTask(tokenizer=TINY, chat_template=None, trust_remote_code=False, max_length=512, data=DATA,
                      needs_rejected=True)  # fmt: skip
    unread = []
    ((made,),) = rows_of([SourceRow("here:1", row, b"")], task, lambda source, found, names: unread.extend(names))
    ends = TOKENIZER.decode(made["real_ids"]), TOKENIZER.decode(made["rejected_ids"])
    assert ends == ("4" + ChatRenderer(TOKENIZER).end_of_turn, "It is")
    assert not [name for name in unread if "finish_reason" in name]


def test_the_command_says_what_it_wrote_and_what_differs(call, run, tmp_path):
    file = tmp_path / "new" / "pairs.jsonl"
    code, out, told = call("export", run.storage.root, "--what", "pairs", "--form", "sharegpt", "--iterate", "0",
                           "--to", file)  # fmt: skip
    assert (code, out.strip()) == (0, str(file))
    assert "2 rows written; 1 of 4 responses have other token ids" in told


@pytest.mark.parametrize(
    ("what", "option", "read_by"),
    [("votes", ["--iterate", "latest"], "model and pairs"), ("model", ["--form", "trl"], "pairs and votes")],
)
def test_an_option_that_is_not_read_is_refused(call, run, tmp_path, what, option, read_by):
    code, _, error = call("export", run.storage.root, "--what", what, *option, "--to", tmp_path / "new")
    assert (code, error) == (2, f"error: {option[0]}: is for --what {read_by}, not {what}\n")


def test_nothing_is_written_over_and_nothing_invented(run, tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError, match=r"there: exists"):
        write_rows([], "trl", str(tmp_path / "there"), Counter())
    with pytest.raises(RunDirError, match="sft was not trained on pairs"):
        list(pairs_of(run, "sft", Counter()))
