"""Which errors start another attempt: lost processes, nodes and networks alone."""

from __future__ import annotations

import pytest
import ray.exceptions
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckTimeoutError

from orchestration.jobs.attempts import _raise_if_ours
from orchestration.services.storage import NoAnswerError
from tinyemo.errors import DataError, LostLeaseError, TrainingError

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16308")
UPLOAD = "When initiating multiple part upload for key 'runs/a' in bucket 'tinyemo': AWS Error {} during UploadPart"


def raised_by_workers(*errors: Exception) -> WorkerGroupError:
    """The error of a group whose ranks raised these."""
    return WorkerGroupError(
        "failed", {rank: UserExceptionWithTraceback(error, "Traceback") for rank, error in enumerate(errors)}
    )


@pytest.mark.parametrize(
    "error",
    [
        raised_by_workers(GLOO),
        raised_by_workers(GLOO, ray.exceptions.ActorDiedError()),
        WorkerGroupError("failed", {0: ray.exceptions.ActorDiedError(), 1: WorkerHealthCheckTimeoutError("poll")}),
        raised_by_workers(ConnectionResetError("reset")),
        raised_by_workers(OSError(UPLOAD.format("NETWORK_CONNECTION"))),
        ControllerError(OSError(UPLOAD.format("SERVICE_UNAVAILABLE"))),
        ControllerError(NoAnswerError("S3 at http://host does not answer")),
        ControllerError(ray.exceptions.ActorUnavailableError("gone", None)),
        ray.exceptions.NodeDiedError("preempted"),
    ],
    ids=[
        "peer lost",
        "rank and peer",
        "killed",
        "network",
        "s3",
        "s3 in controller",
        "our read in controller",
        "controller",
        "node",
    ],
)
def test_what_was_lost_is_tried_again(error: Exception) -> None:
    assert _raise_if_ours(error) is None  # it raises where no attempt would mend the error


@pytest.mark.parametrize(
    "error",
    [
        raised_by_workers(KeyError("colour")),
        raised_by_workers(GLOO, KeyError("colour")),
        ControllerError(KeyError("colour")),
    ],
    ids=["one rank", "its peer lost it", "controller"],
)
def test_a_defect_ends_the_run_at_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingError, match="a worker raised KeyError: 'colour'; no retry mends that") as caught:
        _raise_if_ours(error)
    assert "\n" not in str(caught.value)
    assert "failed" in caplog.text


def test_an_upload_that_s3_refuses_is_a_defect() -> None:
    with pytest.raises(TrainingError, match=r"a worker raised OSError: .* AWS Error ACCESS_DENIED"):
        _raise_if_ours(raised_by_workers(OSError(UPLOAD.format("ACCESS_DENIED")), GLOO))


def test_memory_of_a_gpu_is_a_defect_and_not_a_lost_worker() -> None:
    import torch

    with pytest.raises(TrainingError, match="a worker raised OutOfMemoryError: CUDA out of memory"):
        _raise_if_ours(raised_by_workers(torch.OutOfMemoryError("CUDA out of memory"), GLOO))


@pytest.mark.parametrize("kind", [DataError, LostLeaseError])
def test_errors_of_the_project_come_out_as_they_are(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^shard 3 is corrupt$") as caught:
        _raise_if_ours(raised_by_workers(GLOO, kind("shard 3 is corrupt\nsecond line")))
    assert type(caught.value) is kind
