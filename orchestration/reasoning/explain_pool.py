"""Explanations of many images, by actors on Ray Data that hold the model for as long as they live."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from orchestration.reasoning.explain import Explainer, Explanation, read_image
from orchestration.services.ray_cluster import connect
from orchestration.streaming.unordered_tasks import MAX_RETRIES, guarded, run_unordered
from tinyemo.projector import MetricProjector


class ExplainActor:
    """A Ray Data actor; the model is opened with its first image."""

    def __init__(
        self,
        folder: Path,
        projector: MetricProjector | None,
        words: tuple[str, ...],
        label: str | None,
        max_new_tokens: int,
    ) -> None:
        self.folder, self.projector, self.words, self.label = folder, projector, words, label
        self.max_new_tokens = max_new_tokens
        self.explainer: Explainer | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The explanation of each place as JSON."""
        return guarded(self._explain, batch)

    def _explain(self, batch: pa.Table) -> pa.Table:
        if self.explainer is None:
            self.explainer = Explainer(self.folder, self.projector)
        rows = [
            self.explainer.explain(
                read_image(place), self.words, source=place, label=self.label, max_new_tokens=self.max_new_tokens
            )
            for place in batch["place"].to_pylist()
        ]
        return pa.table({"explanation": [json.dumps(asdict(row)) for row in rows]})


def explain_many(
    folder: Path,
    projector: MetricProjector | None,
    places: Sequence[str],
    words: tuple[str, ...],
    label: str | None,
    max_new_tokens: int,
    num_actors: int,
) -> list[Explanation]:
    """The explanations, in the order of the places. Folder and local files must be there on every node.

    Raises:
        TinyEmoError: what an actor ended with.
    """
    import ray.data

    connect()
    done = run_unordered(
        [{"place": place} for place in places],
        ExplainActor,
        worker="an actor",
        advice="run the same command again",
        fn_constructor_args=(folder, projector, words, label, max_new_tokens),
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(places))),
        num_cpus=1,
        max_restarts=MAX_RETRIES,
        max_task_retries=MAX_RETRIES,
    )
    found = [Explanation(**json.loads(text)) for table in done for text in table["explanation"].to_pylist()]
    by_place = {item.image: item for item in found}
    return [by_place[place] for place in places]
