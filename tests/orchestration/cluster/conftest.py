"""A cluster of several Ray nodes on this machine, and the command line on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from job_runner import Jobs
from nodes import Nodes, running_nodes

from tests.conftest import choose_platform_ports


@pytest.fixture(scope="module")
def nodes(jobs: Jobs) -> Iterator[Nodes]:
    """A head without CPUs and two workers, each with one CPU and two places for reading tasks."""
    with running_nodes(choose_platform_ports()["ray"], [], jobs.environment) as made:
        made.start_worker(2)
        made.start_worker(3)
        yield made


@pytest.fixture(scope="module")
def cluster_jobs(jobs: Jobs, nodes: Nodes) -> Jobs:
    """The command line with the platform's S3 and MLflow, and the several nodes as its Ray cluster."""
    return replace(jobs, environment=nodes.environment, state_folder=nodes.folder)
