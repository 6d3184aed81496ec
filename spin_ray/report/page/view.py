"""The content of a run's page, without HTML."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import yaml

from spin_ray.config.recipe import SpinConfig, flatten
from spin_ray.config.sections import name_of
from spin_ray.errors import UserError, first_line
from spin_ray.report.examples import Example, read_examples
from spin_ray.report.history import (
    is_evaluated,
    read_all_rows,
    read_benchmarks,
    read_evaluations,
    read_train_logs,
)
from spin_ray.report.judged import Judged, read_judged
from spin_ray.report.measures import Evaluation
from spin_ray.report.page.verdict import caution, rank, worth
from spin_ray.report.probe import read_probe, should_stop
from spin_ray.report.progress import read_progress
from spin_ray.report.redaction import hide, hide_in_text
from spin_ray.report.signs import all_warnings
from spin_ray.run_dir.events import Event, Span, exact_duration, of_driver, spans, stage_warnings
from spin_ray.run_dir.names import iterate_name, iterate_number, iteration_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST, table_from_bytes

EXAMPLES = 200
"""Most examples on the page."""
_DROPPED = "dropped_"
"""Start of the names of counts of rows that a stage left out."""


@dataclass(frozen=True, slots=True)
class StageTotal:
    """All attempts at one kind of stage."""

    stage: str
    attempts: int
    seconds: float
    share: float
    """Fraction of the run's wall time."""
    rows: int
    tokens: int
    speed: float | None
    """Tokens per second of the attempts that ended well; None without tokens."""
    useful: float | None
    """Fraction of useful work; None if not measured."""


@dataclass(frozen=True, slots=True)
class RunView:
    name: str
    config: SpinConfig
    description: dict[str, Any]
    versions: list[tuple[str, dict[str, str]]]
    """Versions of packages, first those that the run began with; each with the first iterate that they made."""
    evaluations: list[Evaluation]
    rows: dict[str, pa.Table]
    """Measures by held-out row, by iterate."""
    train_logs: dict[str, list[dict[str, Any]]]
    benchmarks: dict[str, dict[str, Any]]
    spans: list[Span]
    examples: list[Example]
    no_examples: str
    """Reason for missing examples, or empty."""
    quarantine: list[tuple[str, str, int, str]]
    """(stage, reason, rows, one detail)."""
    pairs: list[tuple[str, dict[str, int]]]
    """(iteration, counts of its pairs, with the rows that were left out before them)."""
    state: str
    reason: str
    """Failure that ended the run, or the rule that stopped it; empty if neither did."""
    closest: str
    """Iterate that ``stop_when`` names as the closest to human responses, or empty."""
    last_event: str
    probe: str
    """Verdict of the run's probe, or empty."""
    judged: list[Judged]
    rows_read: bool
    warnings: list[tuple[str, str]]
    """(iterate, sentence) of each sign, the newest iterate's first."""
    stage_warnings: list[tuple[str, str]]
    """Folders and text of each warning that a stage told."""
    unreadable: list[str]
    """Sentences on parts of the run that the page leaves out, because their files are missing or damaged."""

    @property
    def iterates(self) -> list[str]:
        return [evaluation["iterate"] for evaluation in self.evaluations]

    @property
    def benchmarked(self) -> list[str]:
        """Columns of the benchmarks: all iterates that were evaluated or have some."""
        return sorted({*self.iterates, *self.benchmarks}, key=iterate_number)

    @property
    def drops(self) -> dict[str, str]:
        """Reasons for rows without a pair, in words by name; those of every algorithm first."""
        usual = {"dropped_identical": "y = y′", "dropped_empty": "empty"}
        others = [
            name for _, counts in self.pairs for name in counts if name.startswith(_DROPPED) and name not in usual
        ]
        return usual | {name: name.removeprefix(_DROPPED).replace("_", " ") for name in others}

    @property
    def started(self) -> str:
        return _utc(min(span.start for span in self.spans)) if self.spans else "not yet"

    @property
    def wall_seconds(self) -> float:
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    def facts(self) -> list[tuple[str, str]]:
        """Returns names and values of what the numbers rest on."""
        config, iterations = self.config, range(self.config.iterations)
        sampling = config.generation.sampling
        return [
            ("Started", self.started),
            ("Last event", self.last_event),
            ("Time in stages", exact_duration(self.busy_seconds)),
            ("Evaluated", ", ".join(_ends(self.iterates)) or "nothing yet"),
            *([("Closest to human responses", self.closest)] if self.closest else []),
            ("Held-out rows", self._heldout_rows()),
            ("Pairs and steps", self._pairs_and_steps()),
            ("β", _each(config.at(iteration).beta for iteration in iterations)),
            ("Learning rate", _each(config.at(iteration).learning_rate for iteration in iterations)),
            ("Temperature", f"{sampling.temperature:g}"),
            ("max_tokens", f"{sampling.max_tokens:,}"),
        ]

    def key(self) -> str:
        """Returns a sentence on the names of iterates and responses."""
        later = [f"{name} is θ_{iterate_number(name)}" for name in self.iterates if name != iterate_name(0)]
        iterates = ", ".join([f"{iterate_name(0)} is θ_0 and the base", *_ends(later)])
        return (
            f"{iterates}; the opponent of an iterate is the one before it, in tables to its left; y is the data's "
            "response, y′ the model's."
        )

    def _heldout_rows(self) -> str:
        if not self.evaluations:
            return "–"
        newest = self.evaluations[-1]
        rows = self.rows.get(newest["iterate"])
        conversations = newest["rows"] if rows is None else len(rows["conversation"].unique())
        of = f" of {conversations:,} conversations" if conversations < newest["rows"] else ""
        return f"{newest['rows']:,}{of}"

    def _pairs_and_steps(self) -> str:
        pairs = {name: counts.get("rows", 0) for name, counts in self.pairs}
        found = {}
        for name in [it for it in dict.fromkeys([*pairs, *self.train_logs]) if it != iterate_name(0)]:
            words = [f"{pairs[name]:,} pair{'s' if pairs[name] != 1 else ''}"] if name in pairs else []
            log = self.train_logs.get(name)
            found[name] = ", ".join([*words, *([f"{log[-1].get('of', len(log)):,} steps"] if log else [])])
        if len(set(found.values())) == 1:
            return f"{next(iter(found.values()))} an iteration"
        return "; ".join(_ends([f"{name}: {words}" for name, words in found.items()])) or "–"

    @property
    def busy_seconds(self) -> float:
        """Seconds in which any stage ran. Those of other commands can run beside the driver's."""
        busy, until = 0.0, -math.inf
        for span in sorted(self.spans, key=lambda span: span.start):
            busy += max(0.0, span.end - max(span.start, until))
            until = max(until, span.end)
        return busy

    @property
    def recipe(self) -> str:
        """Changed settings as YAML."""
        changed = self.config.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(hide(changed), sort_keys=False, allow_unicode=True)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name."""
        return flatten(hide(self.config.model_dump(mode="json")))

    @property
    def data(self) -> str:
        return hide_in_text(name_of(self.config.data.train))

    @property
    def changed_settings(self) -> set[str]:
        return set(flatten(self.config.model_dump(mode="json", exclude_defaults=True)))

    def stage_totals(self) -> list[StageTotal]:
        totals = []
        for stage in dict.fromkeys(span.stage for span in self.spans):
            mine = [span for span in self.spans if span.stage == stage]
            measured = [span for span in mine if "useful" in span.counted]
            useful = sum(span.counted["useful"] * span.seconds for span in measured)
            seconds = sum(span.seconds for span in mine)
            done = [span for span in mine if span.outcome == "commit" and span.counted.get("tokens")]
            tokens = sum(span.counted["tokens"] for span in done)
            totals.append(
                StageTotal(
                    stage=stage,
                    attempts=len(mine),
                    seconds=seconds,
                    share=seconds / max(self.wall_seconds, 1e-9),
                    rows=sum(span.counted.get("rows", 0) for span in mine),
                    tokens=tokens,
                    speed=tokens / max(sum(span.seconds for span in done), 1e-3) if done else None,
                    useful=useful / max(sum(span.seconds for span in measured), 1e-9) if measured else None,
                )
            )
        return totals

    def verdict(self) -> tuple[str, str]:
        """Returns two sentences: the newest iterate's worth, and its worst warning."""
        if not self.evaluations:
            if not self.config.data.holds_out:
                first = "The run has no held-out data (data.heldout), so its iterates cannot be evaluated."
            else:
                first = "Nothing has been evaluated yet."
            return first, f"The run is {self.state}."
        return worth(self.evaluations, self.rows) + rank(self.evaluations, self.rows), caution(
            self.evaluations, self.warnings
        )


def _ends(words: list[str]) -> list[str]:
    """Shortens a long list to its first and last word."""
    return words if len(words) <= 4 else [words[0], "…", words[-1]]


def _each(values: Iterable[float]) -> str:
    """Lists the values of all iterations, or the one that they share."""
    found = [f"{value:g}" for value in values]
    return ", ".join(found if len(set(found)) > 1 else found[:1])


def read_view(run: RunDir, only_prompts: list[str] | None = None) -> RunView:
    """Reads what the page shows; ``only_prompts`` picks examples."""
    config = run.config()
    events = run.events()
    description = run.description()
    evaluations = read_evaluations(run, config)
    rows = read_all_rows(run, evaluations)
    examples, no_examples = _examples(run, config, only_prompts)
    probe = read_probe(run)
    state, reason, closest = _state(run, config, events, probe)
    unreadable = list(_not_evaluated(run, config))
    return RunView(
        name=run.storage.name,
        config=config,
        description=hide(description),
        versions=_versions(description, config),
        evaluations=evaluations,
        rows=rows,
        train_logs=read_train_logs(run, config),
        benchmarks=read_benchmarks(run, config),
        spans=spans(events, read_progress(run).get("time", 0.0)),
        examples=examples,
        no_examples=no_examples,
        quarantine=_quarantine(run, unreadable),
        pairs=_pairs(run, config, events, unreadable),
        state=state,
        reason=reason,
        closest=closest,
        last_event=_utc(events[-1]["time"]) if events else "none",
        probe=" ".join(probe["sentences"]) if probe else "",
        judged=read_judged(run, unreadable),
        rows_read=run.prompts.is_committed or run.heldout.is_committed,
        warnings=sorted(
            all_warnings(evaluations, rows, config.generation.sampling.max_tokens),
            key=lambda warning: -iterate_number(warning[0]),
        ),
        stage_warnings=[(", ".join(folders), hide_in_text(text)) for text, folders in stage_warnings(events).items()],
        unreadable=unreadable,
    )


def _examples(run: RunDir, config: SpinConfig, only: list[str] | None) -> tuple[list[Example], str]:
    try:
        found = read_examples(run, config, limit=EXAMPLES, spread=True, only=only)
    except (UserError, OSError, ValueError) as error:
        return [], f"The examples cannot be read: {hide_in_text(str(error))}"
    return found, "" if found else "No held-out prompt has been answered yet."


def _state(run: RunDir, config: SpinConfig, events: list[Event], probe: dict[str, Any] | None) -> tuple[str, str, str]:
    """Returns the state, its reason and the closest iterate. Events of other commands tell nothing of the run."""
    latest = run.latest()
    if latest == iterate_name(config.iterations):
        return "finished", "", ""
    own = of_driver(events)
    stops = [event for event in own if event["event"] == "stop" and event["folder"] == latest]
    if stops:
        return "stopped by its rule", stops[-1].get("reason", ""), stops[-1].get("closest", "")
    if latest is None and should_stop(config, probe):
        return "stopped by its probe", "", ""
    if not own or own[-1]["event"] != "failure":
        return "unfinished", "", ""
    error, stage = own[-1].get("error", ""), own[-1]["stage"]
    if error.startswith(("KeyboardInterrupt", "SystemExit")):
        return "interrupted", f"during {stage}; the same command goes on", ""
    return "failed", hide_in_text(f"{stage}: {error}"), ""


def _versions(description: dict[str, Any], config: SpinConfig) -> list[tuple[str, dict[str, str]]]:
    """Leaves out those of calls that found nothing left to make."""
    since = description.get("versions_since", {}).items()
    later = [(name, versions) for name, versions in since if iterate_number(name) <= config.iterations]
    return [("", description["versions"]), *later]


def _not_evaluated(run: RunDir, config: SpinConfig) -> Iterator[str]:
    latest = run.latest()
    if config.data.holds_out and latest is not None:
        for iterate in range(iterate_number(latest) + 1):
            if not is_evaluated(run, iterate):
                file = run.heldout_rows_path(iterate) if run.evaluation(iterate) else run.eval_path(iterate)
                yield f"{file} is missing or damaged; run the command again to make it."


def _quarantine(run: RunDir, unreadable: list[str]) -> list[tuple[str, str, int, str]]:
    found = []
    for name in run.storage.entries("quarantine"):
        try:
            rows = table_from_bytes(run.storage.read(f"quarantine/{name}")).select(["reason", "detail"]).to_pylist()
        except (pa.ArrowException, OSError, KeyError, UserError) as error:
            unreadable.append(f"quarantine/{name} cannot be read ({hide_in_text(first_line(error))}).")
            continue
        details = {row["reason"]: row["detail"] for row in reversed(rows)}
        for reason, count in Counter(row["reason"] for row in rows).most_common():
            found.append((name.removesuffix(".parquet"), reason, count, hide_in_text(details[reason] or "")))
    return found


def _pairs(
    run: RunDir, config: SpinConfig, events: list[Event], unreadable: list[str]
) -> list[tuple[str, dict[str, int]]]:
    found = []
    for iteration in range(config.iterations):
        pairs = run.pairs(iteration)
        if not pairs.is_committed:
            continue
        try:
            counts = pairs.manifest().counts
        except UserError:
            unreadable.append(f"{pairs.path}/{MANIFEST} cannot be read; restore it.")
            continue
        before = _dropped_before(events, iteration_name(iteration))
        names = dict.fromkeys([*counts, *before])
        found.append((iteration_name(iteration), {name: int(counts.get(name, 0)) + before[name] for name in names}))
    return found


def _dropped_before(events: list[Event], folder: str) -> Counter[str]:
    """Counts the rows that an iteration's other stages left out, by the newest commit of each."""
    commits = {
        event["kind"]: event
        for event in events
        if event["event"] == "commit" and event["folder"] == folder and event["kind"] != "pairs"
    }
    dropped = Counter[str]()
    for event in commits.values():
        dropped.update({key: int(count) for key, count in event.items() if key.startswith(_DROPPED)})
    return dropped


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
