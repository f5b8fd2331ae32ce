"""The gates before an alias moves, on a real MLflow registry and a real S3."""

from __future__ import annotations

import json
import secrets
import threading
from pathlib import Path

import pytest
from made_models import MadeModel, bias, evaluation, finding, make_run

from orchestration.report import promotion
from orchestration.report.policy import Policy, load_policy
from orchestration.report.promotion import Decision, check_alias, find_version, promote, promote_first
from orchestration.services import storage, tracking
from tinyemo.errors import ConfigError, DataError, TrainingError

pytestmark = pytest.mark.usefixtures("server")


class Registry:
    """One registered model of its own, and the runs that its versions come from."""

    def __init__(self, runs: str) -> None:
        self.runs, self.name = runs, f"made-{secrets.token_hex(4)}"

    def model(self, run: str, accuracy: float = 0.7, **options: int) -> MadeModel:
        """A version with an evaluation, and a bias report with nothing in it."""
        made = make_run(self.runs, run, model=self.name)
        evaluation(made, accuracy, **options)
        bias(made, [], {})
        return made

    def champion(self) -> str | None:
        found = tracking.model_version(self.name, "@champion")
        return found.version if found else None

    def first(self, accuracy: float = 0.7) -> MadeModel:
        made = self.model("first", accuracy)
        decision = promote(made.version, load_policy(), runs=self.runs)
        assert (decision.outcome, self.champion()) == ("promoted", "1")
        return made

    def judge(self, made: MadeModel, policy: Policy | None = None) -> Decision:
        return promote(made.version, policy or load_policy(), runs=self.runs)


@pytest.fixture
def registry(s3_root: str) -> Registry:
    return Registry(f"{s3_root}/runs")


def failures(decision: Decision) -> dict[str, list[str]]:
    """The sentences that stopped a promotion, by gate."""
    found = {gate.name: [text for is_good, text in gate.lines if not is_good] for gate in decision.gates}
    return {name: texts for name, texts in found.items() if texts}


def test_a_better_model_becomes_champion_and_both_versions_hold_the_decision(registry: Registry) -> None:
    first = registry.first()
    better = registry.model("better", 0.8)
    decision = registry.judge(better)
    assert (decision.outcome, decision.champion, registry.champion()) == ("promoted", "1", "2")
    (accuracy,) = [gate for gate in decision.gates if gate.name == "accuracy"]
    assert "80.0 % against 70.0 % of 400 images, difference +10.0 points [" in accuracy.lines[0][1]
    stored = [tracking.model_version(registry.name, version) for version in ("2", "1")]
    tags = [version.tags for version in stored if version]
    assert json.loads(tags[0]["promotion.champion"])["outcome"] == "promoted"
    assert tags[0]["promotion.champion"] == tags[1]["promotion.champion.successor"]
    assert check_alias(registry.name, runs=registry.runs).state == "verified"
    again = registry.judge(better)
    assert (again.outcome, registry.champion()) == ("unchanged", "2")
    assert find_version("first", registry.runs).version == first.version.version == "1"
    assert find_version(f"models:/{registry.name}@champion", registry.runs).version == "2"
    other = f"{registry.name}-other"
    unregistered = find_version("first", registry.runs, other, is_dry_run=True)
    assert (unregistered.version, tracking.model_version(other, "1")) == ("new", None)
    assert promote(unregistered, load_policy(), runs=registry.runs, is_dry_run=True).outcome == "passed"
    assert find_version("first", registry.runs, other).version == "1"


def test_a_worse_model_is_refused_with_the_difference(registry: Registry) -> None:
    registry.first(0.7)
    worse = registry.model("worse", 0.6)
    decision = registry.judge(worse)
    assert (decision.outcome, registry.champion()) == ("refused", "1")
    (text,) = failures(decision)["accuracy"]
    assert "60.0 % against 70.0 %" in text
    assert "difference -10.0 points" in text
    assert text.endswith("below the champion")
    champion = tracking.model_version(registry.name, "1")
    assert champion is not None
    assert json.loads(champion.tags["promotion.champion.challenger"])["version"] == "2"


def test_a_loss_that_cannot_be_excluded_is_refused_at_a_small_margin(registry: Registry) -> None:
    """One image of 400 fewer: the interval reaches 0 and a little below."""
    registry.first(0.7)
    below = registry.model("below", 0.6975)
    (text,) = failures(registry.judge(below, Policy.model_validate({"accuracy": {"margin": 0.001}})))["accuracy"]
    assert text.endswith("a loss of more than 0.1 points cannot be excluded")
    assert promote(below.version, load_policy(), runs=registry.runs, is_dry_run=True).outcome == "passed"
    assert registry.champion() == "1"
    assert registry.judge(below).outcome == "promoted"


def test_a_better_but_more_biased_model_is_refused_with_the_gap(registry: Registry) -> None:
    first = registry.first()
    bias(first, [finding(1, -0.04)], {"groups-1": "confirmed"})
    better = registry.model("better", 0.8)
    bias(better, [finding(1, -0.22), finding(2, 0.3)], {"groups-1": "confirmed", "groups-2": "explained"})
    decision = registry.judge(better)
    assert (decision.outcome, registry.champion()) == ("refused", "1")
    assert failures(decision) == {
        "bias": [
            "confirmed gap -0.220 [-0.270, -0.170] in recall of theme 1 against the rest, limit 0.100, "
            f"0.040 of {first.version}"
        ]
    }
    bias(better, [finding(1, -0.22), finding(2, 0.3)], {"groups-1": "dismissed", "groups-2": "explained"})
    assert registry.judge(better).outcome == "promoted"


def test_a_finding_that_nobody_decided_on_stops_a_promotion(registry: Registry) -> None:
    registry.first()
    better = registry.model("better", 0.8)
    harmless = finding(3, 0.4) | {"explained_by": "brightness"}
    bias(better, [finding(1, 0.02), finding(2, 0.02, is_significant=False), harmless], {})
    (text,) = failures(registry.judge(better))["bias"]
    assert text.startswith("1 findings wait for a decision in s3://")
    assert "review.toml: recall of theme 1" in text
    unreviewed = Policy.model_validate({"bias": {"needs_review": False}})
    assert registry.judge(better, unreviewed).outcome == "promoted"


def test_a_model_whose_test_data_leaked_is_refused(registry: Registry) -> None:
    registry.first()
    leaky = registry.model("leaky", 0.9, leaked=3)
    assert failures(registry.judge(leaky)) == {
        "leakage": ["emotion6: test data are in the training data (3 same image)"]
    }


def test_documents_about_other_files_do_not_count(registry: Registry) -> None:
    registry.first()
    changed = registry.model("changed", 0.9)
    storage.write_bytes(f"{changed.version.source}/projector.safetensors", b"other weights")
    found = failures(registry.judge(changed))
    assert set(found) == {"leakage", "accuracy", "bias"}
    assert "no evaluation (2 documents are about other files); make one with `tinyemo evaluate" in found["leakage"][0]
    storage.delete(f"{changed.version.source}/label_embeddings.safetensors")
    assert "lacks label_embeddings.safetensors" in failures(registry.judge(changed))["export"][0]


def test_two_promotions_at_once_end_with_one_champion_that_passed_against_the_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read the same champion before either writes; the loser is judged again, against the winner."""
    registry.first(0.6)
    models = [registry.model("left", 0.8), registry.model("right", 0.9)]
    both_read = threading.Barrier(2, timeout=60)
    judged = promotion.judge
    waiting = {threading.get_ident()}

    def judge_together(*arguments: object) -> object:
        if threading.get_ident() not in waiting:  # only before the first write
            waiting.add(threading.get_ident())
            both_read.wait()
        return judged(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "judge", judge_together)
    decisions: dict[str, Decision] = {}

    def run(made: MadeModel) -> None:
        decisions[made.version.version] = registry.judge(made)

    threads = [threading.Thread(target=run, args=(made,)) for made in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    found = check_alias(registry.name, runs=registry.runs)
    assert found.state == "verified"
    assert decisions["3"].outcome == "promoted"
    assert registry.champion() == "3"
    # Version 2 either came first and was followed by 3, or was judged against 3 and refused.
    first_came = decisions["2"].outcome == "promoted"
    assert decisions["3"].champion == ("2" if first_came else "1")
    assert first_came or decisions["2"].champion == "3"


def test_an_alias_moved_by_hand_is_found_and_moved_back(registry: Registry) -> None:
    registry.first()
    other = registry.model("other", 0.9)
    tracking.move_alias(registry.name, "champion", "2")
    found = check_alias(registry.name, runs=registry.runs)
    assert (found.state, found.points_to, found.promoted, found.is_reverted) == ("unverified", "2", "1", False)
    with pytest.raises(TrainingError, match="points to version 2, but version 1 was promoted last"):
        registry.judge(other)
    assert check_alias(registry.name, runs=registry.runs, is_reverted=True).is_reverted
    assert registry.champion() == "1"
    assert check_alias(registry.name, runs=registry.runs).state == "verified"


def test_files_that_changed_after_the_promotion_are_found(registry: Registry) -> None:
    first = registry.first()
    storage.write_bytes(f"{first.version.source}/projector.safetensors", b"other weights")
    found = check_alias(registry.name, runs=registry.runs)
    assert found.state == "unverified"
    assert "have changed since its promotion" in found.text


def test_only_the_first_version_of_a_name_is_promoted_without_documents(registry: Registry) -> None:
    for number, outcome in ((1, "promoted"), (2, None)):
        made = make_run(registry.runs, f"run-{number}", model=registry.name)
        decision = promote_first(registry.name, made.version.version, runs=registry.runs)
        assert (decision.outcome if decision else None) == outcome
    assert registry.champion() == "1"
    assert check_alias("nobody", runs=registry.runs).state == "none"


def test_a_champion_of_before_records_is_compared_with(registry: Registry) -> None:
    """An alias that was moved before promotions were recorded stays the champion to compare with."""
    registry.model("old", 0.7)
    tracking.move_alias(registry.name, "champion", "1")
    assert check_alias(registry.name, runs=registry.runs).state == "unverified"
    assert registry.judge(registry.model("worse", 0.5)).outcome == "refused"
    assert registry.judge(registry.model("better", 0.8)).outcome == "promoted"


def test_what_cannot_be_promoted_is_named(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: give models:/NAME/VERSION"):
        find_version("models:/nobody/7", registry.runs)
    with pytest.raises(DataError, match="no finished run"):
        find_version("nobody", registry.runs)
    policy = tmp_path / "policy.toml"
    policy.write_text('gates = ["export", "beauty"]\n[accuracy]\nmargin = -1\n')
    with pytest.raises(ConfigError) as error:
        load_policy(policy)
    assert "gates.1" in str(error.value)
    assert "accuracy.margin" in str(error.value)
