"""A cluster of a head without CPUs and two worker nodes, each with a loopback address of its own."""

from __future__ import annotations

import pytest
from job_runner import Jobs
from nodes import Nodes, documents

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_wait_names_the_driver_that_holds_the_cpus(nodes: Nodes) -> None:
    holder = nodes.drive(
        """
group = ray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
assert group.wait(60)
print("[]", flush=True)
import time; time.sleep(12)
"""
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "[]\n"
    (lines,) = documents(
        nodes.drive(
            """
lines = []
wait_for_resources([{"CPU": 1}], 100, "stage select", lines.append)
print(json.dumps(lines))
"""
        )
    )
    assert f"(pid {holder.pid} on " in lines[0]
    assert lines[0].endswith(" holds CPU 2")
    holder.wait(60)


GPUS = 'workers.device = "gpu" with 2 workers needs 2 GPUs, and this cluster can have 0: its node types offer '


def test_gpus_that_the_cluster_can_never_have_are_one_line(cluster_jobs: Jobs) -> None:
    error = cluster_jobs.run("train", cluster_jobs.recipe("no-gpus", '[workers]\ndevice = "gpu"')).error
    assert error.startswith(f"error: {GPUS}(CPU 1, reader 2); set workers.device")
    assert "\n" not in error
    assert [run.info.status for run in cluster_jobs.mlflow_runs("no-gpus")] == []
