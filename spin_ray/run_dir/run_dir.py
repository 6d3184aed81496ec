"""A run on disk.

RUN/run.json                     resolved config, date, versions of packages, digests
RUN/<artefact>/part-*.parquet    rows
RUN/<artefact>/_MANIFEST.json    commit: readers trust only the files it lists
RUN/events.jsonl                 log
RUN/LATEST                       name of the newest published iterate
"""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.bound import accept, has_learnt, without_moved
from spin_ray.run_dir.events import Event, read_events, read_json_lines, stage, was_cut_off, write_event
from spin_ray.run_dir.names import is_iterate_name, iterate_name, iterate_number, iteration_name, train_log_path
from spin_ray.run_dir.object_storage import open_storage
from spin_ray.run_dir.storage import ATTEMPTS, Storage
from spin_ray.run_dir.trained import refuse_other_values, trained_with

logger = logging.getLogger(__name__)

ADAPTER = "adapter"


def open_run(folder: str | Path) -> "RunDir":
    """Opens the run in a folder or at a store's URI for reading; a driver takes its lease first."""
    return RunDir(open_storage(folder))


class RunDir:
    """The files of a run: ``latest``, ``evaluation``, ``train_log``, ``config``, artefacts.

    ``open_run("runs/my")`` opens a finished run, or one that goes on.
    """

    def __init__(self, storage: Storage) -> None:
        """Takes the run's storage.

        Raises:
            TypeError: ``storage`` is a path, which ``open_run`` takes.
        """
        if isinstance(storage, str | Path):
            raise TypeError(f"RunDir takes a Storage; open the run by open_run({str(storage)!r})")
        self.storage = storage

    def artefact(self, path: str) -> Artefact:
        return Artefact(self.storage, path)

    @property
    def prompts(self) -> Artefact:
        return self.artefact("prompts")

    @property
    def questions(self) -> Artefact:
        """Prompts without a human response."""
        return self.artefact("questions")

    @property
    def heldout(self) -> Artefact:
        return self.artefact("heldout")

    @property
    def heldout_ids(self) -> Artefact:
        """Ids of all rows of ``data.heldout``; there if ``heldout`` holds a part of them."""
        return self.artefact("heldout/ids")

    def generations(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/generations")

    def audit_path(self, iteration: int) -> str:
        """Returns the path of a few responses with the engine's own log-probabilities, in AUDIT_SCHEMA."""
        return self.artefact(f"{iteration_name(iteration)}/engine_audit.parquet").path

    def pairs(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/pairs")

    def reference(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/reference")

    def base_scores(self, iteration: int) -> Artefact:
        """Returns the log-probabilities of the pairs under θ_0; iteration 0 has none."""
        return self.artefact(f"{iteration_name(iteration)}/base_scores")

    def preferences(self, iteration: int) -> Artefact:
        """Returns win probabilities of single responses, by SPPO's preference model."""
        return self.artefact(f"{iteration_name(iteration)}/preferences")

    def wins(self, iteration: int) -> Artefact:
        """Returns win probabilities of both responses of each SPPO pair."""
        return self.artefact(f"{iteration_name(iteration)}/wins")

    def teacher_rows(self, iteration: int) -> Artefact:
        """Returns SDFT's y′ after prompts with a demonstration."""
        return self.artefact(f"{iteration_name(iteration)}/teacher_rows")

    def teacher(self, iteration: int) -> Artefact:
        """Returns distributions of SDFT's teacher at the tokens of ``teacher_rows``."""
        return self.artefact(f"{iteration_name(iteration)}/teacher")

    def model(self, iterate: int) -> Artefact:
        """Returns θ_iterate's model folder, or its adapter; θ_0 has a folder only after a warm-up."""
        return self.adapter(iterate) if self.is_adapter(iterate) else self.whole_model(iterate)

    def is_adapter(self, iterate: int) -> bool:
        """Tells whether θ_iterate is an adapter on the frozen θ_0."""
        return iterate > 0 and self.adapter(iterate).is_committed

    def whole_model(self, iterate: int) -> Artefact:
        return self.artefact(f"{iterate_name(iterate)}/model")

    def adapter(self, iterate: int) -> Artefact:
        """Returns θ_iterate's adapter on the frozen θ_0 (``train.lora.merge: false``)."""
        return self.artefact(f"{iterate_name(iterate)}/{ADAPTER}")

    def heldout_samples(self, iterate: int) -> Artefact:
        return self.artefact(f"{iterate_name(iterate)}/heldout_samples")

    def examples(self, iterate: int) -> Artefact:
        """Returns answers of θ_iterate at ``evaluation.examples_temperature``, for people to read."""
        return self.artefact(f"{iterate_name(iterate)}/examples")

    def train_log(self, folder: str) -> list[dict[str, Any]]:
        """Returns the steps of the training whose model is in ``folder``."""
        return read_json_lines(self.storage, train_log_path(folder))

    def heldout_rows_path(self, iterate: int) -> str:
        """Returns the path of θ_iterate's measures by held-out row, in ROW_SCHEMA."""
        return f"{iterate_name(iterate)}/heldout_rows.parquet"

    def eval_path(self, iterate: int) -> str:
        return f"{iterate_name(iterate)}/eval.json"

    def evaluation(self, iterate: int) -> dict[str, Any] | None:
        """Returns θ_iterate's ``eval.json``; None if it is missing or damaged."""
        return _evaluation_in(self.storage.find(self.eval_path(iterate)))

    def update_evaluation(
        self, iterate: int, change: Callable[[dict[str, Any] | None], dict[str, Any]]
    ) -> dict[str, Any]:
        """Replaces ``eval.json`` by ``change`` of it, which may be called again; returns the new one."""

        def changed(content: bytes | None) -> bytes:
            return json.dumps(change(_evaluation_in(content)), indent=1).encode()

        return json.loads(self.storage.update(self.eval_path(iterate), changed))

    def begin(self, config: SpinConfig, facts: dict[str, Any]) -> None:
        """Writes run.json, or checks that the folder holds this run.

        A setting or input with which nothing has been made yet may differ. If only rows have been made, they are
        removed where they would differ.

        Raises:
            OtherRunError: the folder holds another run.
            RunDirError: the folder holds other files, or finished iterations were made with other values.
        """
        if self.storage.exists("run.json"):
            if differing := self.differing(config, facts):
                accept(self.storage, differing)
            refuse_other_values(self.storage.root, self.trained(), config)
            facts = facts | self._versions(facts)
        elif foreign := [name for name in self.storage.entries() if not name.startswith((".", "lease.json"))]:
            raise RunDirError(
                f"{self.storage.root}: is not a run and not empty (holds {foreign[0]}); choose another --out"
            )
        self.storage.delete(ATTEMPTS)
        content = {"config": config.model_dump(mode="json"), "date": self.date().isoformat(), **facts}
        self.storage.replace("run.json", json.dumps(content, indent=1).encode())

    def begun_config(self) -> SpinConfig | None:
        """Returns the config in run.json if the folder holds more than rows and a probe; raises as ``config``."""
        return self.config() if self.storage.exists("run.json") and has_learnt(self.storage) else None

    def differing(self, config: SpinConfig, facts: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the settings and inputs that differ from run.json's, then and now. Inputs may have moved."""
        stored = self.description()
        then = self.config().identity() | stored["inputs"]
        now = config.identity() | facts["inputs"]
        each = {key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys())}
        # A mapping that was empty, or is now, is told by the keys of the other.
        differing = {key: pair for key, pair in each.items() if pair[0] != pair[1] and {} not in pair}
        return without_moved(differing, stored["inputs"])

    def config(self) -> SpinConfig:
        """Returns the config in run.json.

        Raises:
            ConfigError: this version does not know a key or value.
            RunDirError: run.json is missing or damaged.
        """
        return parse_config(self.description()["config"], source=f"{self.storage.root}/run.json")

    def trained(self) -> dict[str, dict[str, Any]]:
        """Returns the settings that committed models were trained with, by folder; a damaged manifest tells none."""
        named = ["sft", "reviser", *(name for name in self.storage.entries() if is_iterate_name(name))]
        outside = ":" in self.description()["config"]["algorithm"]  # its objective may have a β of its own
        found = {}
        for name in dict.fromkeys(named):
            iterate = iterate_number(name) if is_iterate_name(name) else None
            model = self.artefact("reviser/model") if iterate is None else self.model(iterate)
            settings = model.readable_settings()
            if settings is not None:
                beta = None if settings["loss"] is None or outside else settings["beta"]
                if beta is None and iterate:
                    beta = (self.evaluation(iterate) or {}).get("beta")
                found[name] = trained_with(name, settings, beta)
        return found

    def _versions(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Returns ``versions``, with which the run began, and ``versions_since``, by the first iterate of later ones.

        Versions that change in the middle of an iteration count for all of it.
        """
        stored, now = self.description(), facts["versions"]
        newest = next(number for number in count() if not self.model(number + 1).is_committed)
        if not (newest or self.model(0).is_committed):
            return {}
        next_one = iterate_name(newest + 1)
        since = {name: it for name, it in stored.get("versions_since", {}).items() if iterate_number(name) <= newest}
        if now != [stored["versions"], *since.values()][-1]:
            since[next_one] = now
        return {"versions": stored["versions"]} | ({"versions_since": since} if since else {})

    def versions(self, iterate: int) -> dict[str, str]:
        """Returns the versions of packages that made θ_iterate."""
        description = self.description()
        since = description.get("versions_since", {})
        mine = [it for name, it in since.items() if iterate_number(name) <= iterate]
        return [description["versions"], *mine][-1]

    def description(self) -> dict[str, Any]:
        """Returns the content of run.json.

        Raises:
            RunDirError: run.json is missing or damaged.
            ConfigError: a store has no such bucket.
        """
        try:
            return json.loads(self.storage.read("run.json"))
        except FileNotFoundError as error:
            self.storage.refuse_missing()
            raise RunDirError(f"{self.storage.root}: is not a run (no run.json)") from error
        except ValueError as error:
            raise RunDirError(f"{self.storage.root}/run.json: is damaged; restore it") from error

    def date(self) -> datetime:
        """Returns when the run began, the only date for chat templates; now if it has not begun."""
        if not self.storage.exists("run.json"):
            return datetime.now().replace(microsecond=0)
        return datetime.fromisoformat(self.description()["date"])

    def stage(self, name: str) -> AbstractContextManager[dict[str, Any]]:
        return stage(self.storage, name)

    def was_cut_off(self, stage: str) -> bool:
        return was_cut_off(self.storage, stage)

    def event(self, event: str, stage: str, **values: Any) -> None:
        write_event(self.storage, event, stage, **values)

    def warn(self, stage: str, text: str) -> None:
        """Logs a warning and keeps it as an event."""
        logger.warning("%s: %s", stage, text)
        self.event("warning", stage, text=text)

    def events(self) -> list[Event]:
        return read_events(self.storage)

    def publish(self, iterate: int) -> None:
        """Moves LATEST forward to θ_iterate. It moves back only from a model that was removed to be made again."""
        latest = self.latest()
        newest = iterate if latest is None else max(iterate, iterate_number(latest))
        while newest > iterate and not self.model(newest).is_committed:
            newest -= 1
        name = iterate_name(newest)
        if name != latest:
            if latest is not None and newest < iterate_number(latest):
                logger.warning("LATEST: %s is not there any more; moved back to %s", latest, name)
            self.storage.replace("LATEST", f"{name}\n".encode())
            self.event("publish", name)

    def latest(self) -> str | None:
        """Returns the newest published iterate; None if LATEST is missing or damaged."""
        try:
            name = self.storage.read("LATEST").decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        if is_iterate_name(name) and name == iterate_name(iterate_number(name)):
            return name
        logger.warning("%s/LATEST: is damaged (holds %r); run the command again to mend it", self.storage.root, name)
        return None


def _evaluation_in(content: bytes | None) -> dict[str, Any] | None:
    try:
        found = json.loads(content or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
