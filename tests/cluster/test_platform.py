"""The local platform for real: one start for the session, every promise checked on it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import platform as local_platform
from cluster.credentials import S3_ACTIONS, read_mlflow_login, read_s3_keys
from cluster.environment import only_platform_s3
from cluster.plan import make_plan
from cluster.process import ProcessRecord, find_members, is_alive
from cluster.services import Service, build_services, find_program
from cluster.state import PlatformState, load_state, save_state
from orchestration.services import storage
from tests.conftest import RunningPlatform, choose_platform_ports, find_free_ports
from tinyemo.errors import PlatformError, StorageError

pytestmark = pytest.mark.server

QUICK_S = 5.0


def _tinyemo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from orchestration.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def _get(port: int, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def _secrets(platform: RunningPlatform) -> list[str]:
    environment = platform.environment
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    keys = [key for name in S3_ACTIONS for key in read_s3_keys(platform.folder, name).values()]
    return [*keys, environment["MLFLOW_TRACKING_PASSWORD"], token]


def test_status_shows_three_healthy_services(platform: RunningPlatform):
    """Addresses, processes and health, for machines; exit code 0. No secret is in it."""
    result = _tinyemo("platform", "status", "--json", TINYEMO_STATE=str(platform.folder))
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    assert status["is_up"]
    assert {service["name"] for service in status["services"]} == {"s3", "mlflow", "ray"}
    for service in status["services"]:
        assert service["is_healthy"]
        assert psutil.pid_exists(service["pid"])
    assert not [secret for secret in _secrets(platform) if secret in result.stdout + result.stderr]


def test_up_again_starts_nothing_and_is_quick(platform: RunningPlatform):
    """The same processes, within seconds, nothing printed that is secret."""
    before = load_state(platform.folder)
    start = time.monotonic()
    result = _tinyemo("platform", "up", "--json", "--state", str(platform.folder))
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < QUICK_S
    assert json.loads(result.stdout)["started"] == []
    assert load_state(platform.folder) == before
    assert not [secret for secret in _secrets(platform) if secret in result.stdout + result.stderr]


def test_up_refuses_to_move_what_runs(platform: RunningPlatform):
    """Another port than the running one: say so instead of starting a second server."""
    result = _tinyemo("platform", "up", "--state", str(platform.folder), "--mlflow-port", "5999")
    assert result.returncode == 2
    assert "--mlflow-port" in result.stderr
    assert "platform down" in result.stderr


def test_everything_listens_on_loopback_alone(platform: RunningPlatform):
    """No port of any process of ours can be reached from another machine."""
    state = load_state(platform.folder)
    assert state is not None
    addresses = set()
    for record in state.processes.values():
        for member in find_members(record):
            connections = member.net_connections("inet")
            addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_credentials_are_readable_by_the_owner_alone(platform: RunningPlatform):
    """Every file and folder is closed to group and others.

    Ray opens its folder of sessions, and SeaweedFS the descriptions of its volumes: the folders around them are closed.
    """
    state = load_state(platform.folder)
    assert state is not None
    paths = [platform.folder, state.ray_folder.parent]
    paths += [path for path in platform.folder.rglob("*") if not path.is_relative_to(state.ray_folder)]
    paths = [path for path in paths if path.suffix != ".vif"]
    paths += [socket_ for socket_ in build_services(platform.folder, state)["s3"].leftovers if socket_.exists()]
    names = {path.name for path in paths}
    assert names >= {"platform.json", "platform.env", "s3.json", "tls.key", "mlflow.ini", "ray_token", "s3.log"}
    assert names >= {"mlflow.db", "accounts.db"}
    assert any(path.suffix == ".dat" for path in paths), "SeaweedFS's volumes"
    assert any(path.suffix == ".sock" for path in paths)
    assert {path: oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o077} == {}


def test_no_secret_in_logs_database_or_command_lines(platform: RunningPlatform):
    """Neither S3 keys nor token, nor the keys between SeaweedFS's parts."""
    state = load_state(platform.folder)
    assert state is not None
    weed = psutil.Process(state.processes["s3"].pid).environ()
    signing_keys = [value for name, value in weed.items() if name.startswith("WEED_JWT_")]
    assert len(signing_keys) == 4
    assert not [name for name in weed if name.startswith(("AWS_ACCESS", "AWS_SECRET"))]
    wanted = [*_secrets(platform), *signing_keys]
    commands = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(platform.folder) in commands
    assert not [secret for secret in wanted if secret in commands]
    logs = [*(platform.folder / "logs").iterdir(), *state.ray_folder.rglob("logs/*")]
    texts = {path: path.read_text(errors="replace") for path in logs if path.is_file()}
    assert len(texts) > 3
    assert not [path for path, text in texts.items() for secret in wanted if secret in text]
    with sqlite3.connect(f"file:{platform.folder}/mlflow/mlflow.db?mode=ro", uri=True) as database:
        dump = "\n".join(database.iterdump())
    assert "experiments" in dump
    assert not [secret for secret in wanted if secret in dump]


def test_the_dashboard_refuses_strangers(platform: RunningPlatform):
    """401 without a token, 403 with a wrong one, 200 with the right one."""
    port = platform.ports["dashboard"]
    token = Path(platform.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert _get(port, "/api/jobs/") == http.client.UNAUTHORIZED
    assert _get(port, "/api/jobs/", Authorization=f"Bearer {'0' * len(token)}") == http.client.FORBIDDEN
    assert _get(port, "/api/jobs/", Authorization=f"Bearer {token}") == http.client.OK


def test_s3_refuses_a_wrong_secret(platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """The right one writes and reads; a wrong one does neither; a bucket does not appear by a typing mistake."""
    uri = "s3://tinyemo/tests/probe"
    storage.write_bytes(uri, b"1")
    assert storage.read_bytes(uri) == b"1"
    with pytest.raises(StorageError, match="tinyem0"):
        storage.write_bytes("s3://tinyem0/tests/probe", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refuses the credentials"):
        storage.read_bytes(uri)


def test_mlflow_refuses_unknown_hosts(platform: RunningPlatform):
    """A web page that points its own name at loopback gets nothing."""
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    login = ":".join(platform.environment[f"MLFLOW_TRACKING_{name}"] for name in ("USERNAME", "PASSWORD"))
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    assert _get(platform.ports["mlflow"], path, **headers) == http.client.OK
    assert _get(platform.ports["mlflow"], path, Host="evil.example", **headers) == http.client.FORBIDDEN


def test_mlflow_passes_artifacts_through_to_s3(platform_environment: dict[str, str], tmp_path: Path):
    """The client holds no S3 keys: the server stores what it sends."""
    script = (
        "import mlflow\n"
        "with mlflow.start_run() as run:\n"
        "    mlflow.log_text('hello', 'note.txt')\n"
        "print(run.info.artifact_uri)"
    )
    client = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=client, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    key = result.stdout.strip().splitlines()[-1].removeprefix("mlflow-artifacts:/").strip("/")
    assert storage.read_bytes(f"s3://tinyemo/mlflow/{key}/note.txt") == b"hello"


def test_a_driver_connects_and_workers_inherit_the_services(platform: RunningPlatform, tmp_path: Path):
    """A plain `ray.init()` with the platform's variables; a task sees S3 and MLflow, but the driver need not."""
    script = (
        "import os, ray\n"
        "ray.init(log_to_driver=False)\n"
        "names = ['AWS_ENDPOINT_URL', 'AWS_SECRET_ACCESS_KEY', 'MLFLOW_TRACKING_URI', 'TINYEMO_BUCKET']\n"
        "look = lambda: ([os.environ[name] for name in names], os.nice(0))\n"
        "seen, niceness = ray.get(ray.remote(look).remote())\n"
        "assert niceness <= os.nice(0), 'a rank must not wait for every other process'\n"
        "assert ray.cluster_resources()['CPU'] == 2\n"
        "print(seen)"
    )
    ray_variables = {name: value for name, value in platform.environment.items() if name.startswith("RAY_")}
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=bare | ray_variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    names = ("AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "TINYEMO_BUCKET")
    assert result.stdout.strip() == str([platform.environment[name] for name in names])


def test_a_taken_port_names_port_and_option(platform: RunningPlatform, tmp_path: Path):
    """For each server; nothing is left running and no record is left behind."""
    free = choose_platform_ports()
    taken = [("--s3-port", "s3", 0), ("--s3-port", "s3", 3), ("--mlflow-port", "mlflow", 0), ("--ray-port", "ray", 0)]
    for option, name, offset in taken:
        port = platform.ports[name] + offset
        wanted = {**free, name: platform.ports[name]}
        if offset:
            with socket.socket() as listener:
                wanted[name] = find_free_ports(8, 29_000)
                port = wanted[name] + offset
                listener.bind(("127.0.0.1", port))
                listener.listen()
                with pytest.raises(PlatformError, match=rf"port {port} .*{option}"):
                    local_platform.up(tmp_path, storage.ensure_bucket, storage.write_bytes, ports=wanted)
        else:
            with pytest.raises(PlatformError, match=rf"port {port} .*{option}"):
                local_platform.up(tmp_path, storage.ensure_bucket, storage.write_bytes, ports=wanted)
    assert load_state(tmp_path) is None


def test_ports_wanted_twice_are_named(tmp_path: Path):
    """Two servers on one port would fail much later and less clearly."""
    free = choose_platform_ports()
    plan = make_plan(tmp_path, {**free, "mlflow": free["dashboard"]}, num_cpus=1, object_store_gb=0.1)
    services: list[Service] = list(build_services(tmp_path, plan).values())
    with pytest.raises(PlatformError, match=rf"port {free['dashboard']} .* too: .*--dashboard-port"):
        local_platform.check_ports(services)
    plan.ray_folder.parent.rmdir()


def test_a_damaged_credentials_file_is_named(tmp_path: Path):
    """The line names the file and the way on; new keys must not lock anybody out in silence."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "s3.json").write_text('{"identities": [')
    with pytest.raises(PlatformError, match=r"s3\.json is damaged: run `tinyemo platform down`, delete the file"):
        make_plan(tmp_path, choose_platform_ports(), num_cpus=1, object_store_gb=0.1)


def test_a_deleted_login_gets_a_new_password_and_a_new_account(tmp_path: Path):
    """MLflow stores the password's hash when its accounts are new: both change together."""
    make_plan(tmp_path, choose_platform_ports(), num_cpus=1, object_store_gb=0.1).ray_folder.parent.rmdir()
    before = read_mlflow_login(tmp_path)
    accounts = tmp_path / "mlflow" / "accounts.db"
    accounts.write_text("hash of the old password")
    make_plan(tmp_path, choose_platform_ports(), num_cpus=1, object_store_gb=0.1).ray_folder.parent.rmdir()
    assert read_mlflow_login(tmp_path) == before
    assert accounts.exists()
    (tmp_path / "credentials" / "mlflow.ini").unlink()
    make_plan(tmp_path, choose_platform_ports(), num_cpus=1, object_store_gb=0.1).ray_folder.parent.rmdir()
    assert read_mlflow_login(tmp_path) != before
    assert not accounts.exists()


def test_status_and_down_find_a_platform_whose_environment_is_sourced(platform: RunningPlatform, tmp_path: Path):
    """From any folder: `platform.env` names the state folder."""
    command = f". {platform.folder}/platform.env && {find_program('tinyemo')} platform status --json"
    bare = {name: value for name, value in os.environ.items() if name != "TINYEMO_STATE"}
    result = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["is_up"]


def test_a_half_start_is_undone(tmp_path: Path):
    """S3 is up when the bucket fails: it is stopped again, and the error stays the first one."""
    states: list[PlatformState | None] = []

    def fail(bucket: str) -> None:
        states.append(load_state(tmp_path))
        raise StorageError(f"no {bucket} today")

    with pytest.raises(StorageError, match="no tinyemo today"):
        local_platform.up(tmp_path, fail, storage.write_bytes, ports=choose_platform_ports())
    (state,) = states
    assert state is not None
    assert not is_alive(state.processes["s3"])
    assert load_state(tmp_path) is None
    assert not state.ray_folder.is_relative_to(tmp_path), "pytest's folders are too long for Ray's sockets"
    assert not state.ray_folder.parent.exists()


def test_a_server_that_ends_at_once_shows_its_last_words(tmp_path: Path):
    """The error carries the end of the log, where the reason stands."""
    keys = [{"accessKey": "", "secretKey": ""}]
    identities = [{"credentials": keys, "name": name, "actions": 1} for name in S3_ACTIONS]
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "s3.json").write_text(json.dumps({"identities": identities}))
    with pytest.raises(PlatformError, match=r"(?s)SeaweedFS S3 ended while starting; the end of .*s3\.log.*\n"):
        local_platform.up(tmp_path, storage.ensure_bucket, storage.write_bytes, ports=choose_platform_ports())


def test_down_spares_a_process_that_got_a_recorded_pid(tmp_path: Path):
    """After a reboot the recorded pids belong to others."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sockets: tuple[Path, ...] = ()
    try:
        plan = make_plan(tmp_path, choose_platform_ports(), num_cpus=1, object_store_gb=0.1)
        sockets = build_services(tmp_path, plan)["s3"].leftovers
        for socket_ in sockets:
            socket_.touch()
        record = ProcessRecord(pid=bystander.pid, started="another boot:1", marker=f"{plan.platform_id}:ray")
        processes = {"s3": record, "mlflow": record, "ray": record}
        save_state(tmp_path, plan.model_copy(update={"processes": processes}))
        assert local_platform.down(tmp_path) == []
        assert bystander.poll() is None
        assert load_state(tmp_path) is None
        assert sockets
        assert all(socket_.exists() for socket_ in sockets), "another server may listen there by now"
    finally:
        for socket_ in sockets:
            socket_.unlink(missing_ok=True)
        bystander.kill()
        bystander.wait()


JOB = """
import os, ray, subprocess, sys, time
ray.init()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
actor = ray.remote(lambda: time.sleep(600)).remote()
print(os.getpid(), child.pid, file=open(sys.argv[1], "w"))
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crash_is_mended_and_down_leaves_nothing_but_data(tmp_path: Path):
    """Ray's head is killed: `up` starts it alone. With a job running, `down` ends everything; the objects stay."""
    ports = choose_platform_ports()
    uri = "s3://tinyemo/kept"
    try:
        local_platform.up(tmp_path, storage.ensure_bucket, storage.write_bytes, ports=ports, object_store_gb=0.1)
        crashed = load_state(tmp_path)
        assert crashed is not None
        with only_platform_s3(crashed.environment):
            storage.write_bytes(uri, b"kept" * 1_000_000)
        head = psutil.Process(crashed.processes["ray"].pid)
        orphans = head.children(recursive=True)
        head.kill()
        head.wait(30)
        assert local_platform.up(tmp_path, storage.ensure_bucket, storage.write_bytes) == ["ray"]
        assert not [orphan for orphan in orphans if orphan.is_running()]
        mended = load_state(tmp_path)
        assert mended is not None
        assert mended.environment == crashed.environment
        assert mended.processes["s3"] == crashed.processes["s3"]

        job_pids = _submit_job(mended, tmp_path)
        members = {member for record in mended.processes.values() for member in find_members(record)}
        assert job_pids <= {member.pid for member in members}
        assert local_platform.down(tmp_path) == ["ray", "mlflow", "s3"]
        assert not [member for member in members if member.is_running()]
        assert local_platform.down(tmp_path) == []
        assert (tmp_path / "logs" / "ray" / "raylet.out").exists()
    finally:
        local_platform.down(tmp_path)
    kept: list[bytes] = []

    def look(bucket: str) -> None:
        # `up` hands over a server that knows its volumes, also after SIGKILL.
        kept.append(storage.read_bytes(uri))
        raise StorageError("seen enough")

    with pytest.raises(StorageError, match="seen enough"):
        local_platform.up(tmp_path, look, storage.write_bytes, ports=ports)
    assert kept == [b"kept" * 1_000_000]


def _submit_job(state: PlatformState, folder: Path) -> set[int]:
    """Pids of a running job's driver and of a child that it started in another session."""
    (folder / "job.py").write_text(JOB)
    entrypoint = ["python", str(folder / "job.py"), str(folder / "pids")]
    command = [find_program("ray"), "job", "submit", "--no-wait", "--", *entrypoint]
    subprocess.run(command, env={**os.environ, **state.environment}, check=True, capture_output=True, timeout=240)
    deadline = time.monotonic() + 240
    while not ((folder / "pids").exists() and (folder / "pids").read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.1)
    return {int(pid) for pid in (folder / "pids").read_text().split()}


def test_down_without_a_platform_is_harmless(tmp_path: Path):
    """Exit code 0, twice."""
    for _ in range(2):
        result = _tinyemo("platform", "down", "--state", str(tmp_path / "absent"))
        assert result.returncode == 0, result.stderr
    assert _tinyemo("platform", "status", "--state", str(tmp_path)).returncode == 1
