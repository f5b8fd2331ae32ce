"""A stranger on this machine has no credentials and an empty environment: every port of the platform refuses him."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config

from cluster.credentials import read_s3_keys
from cluster.process import find_members
from cluster.services import GRPC_OFFSET, find_program
from cluster.state import load_state
from tests.conftest import RunningPlatform

GRPC_PORTS = tuple(range(GRPC_OFFSET, 2 * GRPC_OFFSET))
S3_CLOSED = ("AccessDenied", "403", "InvalidAccessKeyId", "Forbidden")


def _ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def _s3(platform: RunningPlatform, keys: dict[str, str] | None) -> Any:
    """An S3 client with these keys, or with none at all."""
    path_style = {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}}
    config = Config(**path_style) if keys else Config(**path_style, signature_version=UNSIGNED)
    names = {"AWS_ACCESS_KEY_ID": "aws_access_key_id", "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key"}
    arguments = {names[name]: value for name, value in (keys or {}).items()}
    endpoint = platform.environment["AWS_ENDPOINT_URL"]
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config, **arguments)


def _code(call: Any, **arguments: Any) -> str:
    """Error code of an S3 call, "ok" where it went through."""
    try:
        answer = call(**arguments)
    except botocore.exceptions.ClientError as error:
        return str(error.response["Error"]["Code"])
    return str(answer["Errors"][0]["Code"]) if answer.get("Errors") else "ok"


def _try_all(client: Any, bucket: str, key: str) -> dict[str, str]:
    """Outcome of every kind of access to one object and its folder."""
    folder = key.rpartition("/")[0]
    return {
        "read": _code(client.get_object, Bucket=bucket, Key=key),
        "list": _code(client.list_objects_v2, Bucket=bucket, Prefix=f"{folder}/"),
        "write": _code(client.put_object, Bucket=bucket, Key=f"{folder}/new", Body=b"1"),
        "copy": _code(client.copy_object, Bucket=bucket, Key=f"{folder}/copy", CopySource=f"{bucket}/{key}"),
        "delete": _code(client.delete_object, Bucket=bucket, Key=f"{folder}/new"),
        "delete many": _code(client.delete_objects, Bucket=bucket, Delete={"Objects": [{"Key": f"{folder}/new"}]}),
    }


@pytest.fixture
def kept_object(platform: RunningPlatform) -> str:
    """An object that must survive whatever a stranger tries; its bucket is tinyemo."""
    key = "runs/strangers/kept"
    _s3(platform, read_s3_keys(platform.folder, "jobs")).put_object(Bucket="tinyemo", Key=key, Body=b"kept")
    return key


def _is_kept(platform: RunningPlatform, key: str) -> bool:
    client = _s3(platform, read_s3_keys(platform.folder, "jobs"))
    return bool(client.get_object(Bucket="tinyemo", Key=key)["Body"].read() == b"kept")


def test_s3_without_keys_does_nothing(platform: RunningPlatform, kept_object: str):
    """No anonymous access, and neither does the port answer the interface that makes keys."""
    stranger = _s3(platform, None)
    outcomes = _try_all(stranger, "tinyemo", kept_object)
    outcomes["list buckets"] = _code(stranger.list_buckets)
    outcomes["delete bucket"] = _code(stranger.delete_bucket, Bucket="tinyemo")
    assert {name: code for name, code in outcomes.items() if code not in S3_CLOSED} == {}
    status, _ = _ask(platform.ports["s3"], "POST", "/?Action=CreateUser&UserName=stranger&Version=2010-05-08")
    assert status >= 400
    assert _is_kept(platform, kept_object)


def test_each_s3_identity_has_the_rights_it_needs(platform: RunningPlatform, kept_object: str):
    """MLflow reaches its folder alone; jobs reach their bucket alone and cannot remove or open it."""
    mlflow = _s3(platform, read_s3_keys(platform.folder, "mlflow"))
    jobs = _s3(platform, read_s3_keys(platform.folder, "jobs"))
    administrator = _s3(platform, read_s3_keys(platform.folder, "administrator"))
    assert set(_try_all(mlflow, "tinyemo", kept_object).values()) <= set(S3_CLOSED)
    mlflow.put_object(Bucket="tinyemo", Key="mlflow/strangers/own", Body=b"1")
    copied = _code(mlflow.copy_object, Bucket="tinyemo", Key="mlflow/x", CopySource=f"tinyemo/{kept_object}")
    assert copied in S3_CLOSED, "a copy must not carry an object into the folder that it may read"
    assert set(_try_all(mlflow, "tinyemo", "mlflow/strangers/own").values()) == {"ok"}
    assert set(_try_all(jobs, "tinyemo", kept_object).values()) == {"ok"}
    administrator.create_bucket(Bucket="not-for-jobs")
    administrator.put_object(Bucket="not-for-jobs", Key="a/b", Body=b"1")
    assert set(_try_all(jobs, "not-for-jobs", "a/b").values()) <= set(S3_CLOSED)
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    for code in (
        _code(jobs.create_bucket, Bucket="made-by-jobs"),
        _code(jobs.delete_bucket, Bucket="tinyemo"),
        _code(jobs.put_bucket_policy, Bucket="tinyemo", Policy=policy),
    ):
        assert code in S3_CLOSED
    assert _is_kept(platform, kept_object)


def test_seaweedfs_answers_nobody_past_its_gateway(platform: RunningPlatform, kept_object: str):
    """Master, volume server and filer: no list, no token, no deleted collection."""
    master, volume, filer = (platform.ports["s3"] + offset for offset in (1, 2, 3))
    asked = [
        (master, "GET", "/col/delete?collection=tinyemo"),
        (master, "POST", "/col/delete?collection=tinyemo"),
        (master, "GET", "/dir/lookup?volumeId=1&read=yes"),
        (master, "GET", "/dir/lookup?fileId=1,01637037d6&read=yes"),
        (master, "GET", "/dir/assign"),
        (master, "GET", "/vol/grow?count=1"),
        (master, "GET", "/submit"),
        (volume, "GET", "/1,01637037d6"),
        (volume, "POST", "/1,01637037d6"),
        (volume, "DELETE", "/1,01637037d6"),
        (filer, "GET", "/buckets/tinyemo/"),
        (filer, "GET", f"/buckets/tinyemo/{kept_object}"),
        (filer, "POST", "/buckets/tinyemo/runs/strangers/new"),
        (filer, "DELETE", "/buckets/tinyemo/?recursive=true"),
    ]
    answers = {item: _ask(*item) for item in asked}
    assert {item: status for item, (status, _) in answers.items() if status < 400} == {}
    assert not [item for item, (_, text) in answers.items() if "eyJ" in text], "a bearer token"
    assert _is_kept(platform, kept_object)


def test_weed_shell_without_the_key_does_nothing(platform: RunningPlatform, kept_object: str):
    """The gRPC ports list, read and delete for the holder of the state folder's key alone."""
    first = platform.ports["s3"]
    servers = ["-master", f"127.0.0.1:{first + 1}.{first + 1 + GRPC_OFFSET}"]
    servers += ["-filer", f"127.0.0.1:{first + 3}.{first + 3 + GRPC_OFFSET}"]
    commands = "lock\ncollection.delete -collection tinyemo -force\nfs.rm -rf /buckets/tinyemo\nfs.ls /buckets\n"
    key = {"WEED_GRPC_CA": "tls.crt", "WEED_GRPC_CLIENT_CERT": "tls.crt", "WEED_GRPC_CLIENT_KEY": "tls.key"}
    key = {name: str(platform.folder / "credentials" / file) for name, file in key.items()}
    outputs = {}
    for name, environment, typed in (("stranger", {}, commands), ("owner", key, "fs.ls /buckets\nexit\n")):
        process = subprocess.Popen(
            [find_program("weed"), "shell", *servers], env={"PATH": os.defpath, "HOME": "/nonexistent", **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            outputs[name] = process.communicate(typed, timeout=15 if name == "stranger" else 60)[0]
        except subprocess.TimeoutExpired:  # without the key it tries to connect for ever
            process.kill()
            outputs[name] = process.communicate()[0]
    assert "tinyemo" in outputs["owner"], "the same commands must work with the key, or this test shows nothing"
    assert "tinyemo" not in outputs["stranger"]
    assert _is_kept(platform, kept_object)


def _read_to_the_end(connection: ssl.SSLSocket) -> None:
    while connection.recv(1024):
        pass


@pytest.mark.parametrize("offset", GRPC_PORTS)
def test_every_grpc_port_wants_a_client_certificate(offset: int, platform: RunningPlatform):
    """Neither plain text nor TLS without a certificate gets an answer."""
    port = platform.ports["s3"] + offset
    context = ssl.create_default_context(cafile=str(platform.folder / "credentials" / "tls.crt"))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        encrypted = context.wrap_socket(plain)  # TLS 1.3 refuses a client only after the handshake
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            _read_to_the_end(encrypted)


def test_mlflow_wants_the_login(platform: RunningPlatform):
    """Runs, registry, artifacts through the proxy to S3, pages and accounts: 401, whoever asks how."""
    port = platform.ports["mlflow"]
    asked = [
        ("GET", "/", None),
        ("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", None),
        ("POST", "/api/2.0/mlflow/experiments/search", '{"max_results": 10}'),
        ("POST", "/api/2.0/mlflow/runs/create", '{"experiment_id": "0"}'),
        ("POST", "/api/2.0/mlflow/experiments/delete", '{"experiment_id": "0"}'),
        ("GET", "/api/2.0/mlflow/registered-models/search", None),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=1", None),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/x", None),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/x", "1"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1/x", None),
        ("GET", "/ajax-api/2.0/mlflow-artifacts/artifacts?path=", None),
        ("GET", "/get-artifact?path=x&run_uuid=1", None),
        ("POST", "/graphql", '{"query": "{ __typename }"}'),
        ("POST", "/api/2.0/mlflow/users/create", '{"username": "stranger", "password": "a long password"}'),
        ("PATCH", "/api/2.0/mlflow/users/update-password", '{"username": "tinyemo", "password": "a long password"}'),
        ("GET", "/signup", None),
        ("POST", "/v1/traces", "{}"),
        ("GET", "/metrics", None),
        ("GET", "/openapi.json", None),
        ("GET", "/docs", None),
    ]
    answers = {(method, path): _ask(port, method, path, body)[0] for method, path, body in asked}
    assert {item: status for item, status in answers.items() if status not in (401, 403, 404)} == {}
    assert _ask(port, "GET", "/health") == (200, "OK")


def test_ray_wants_the_token_on_every_port(platform: RunningPlatform, tmp_path: Path):
    """Jobs, logs, nodes and actors of the dashboard; a driver and a client without the token are refused."""
    dashboard = platform.ports["dashboard"]
    job = json.dumps({"entrypoint": "touch /tmp/stranger-was-here"})
    asked = [
        ("GET", "/api/jobs/", None),
        ("POST", "/api/jobs/", job),
        ("GET", "/nodes?view=summary", None),
        ("GET", "/logical/actors", None),
        ("GET", "/api/v0/logs", None),
        ("GET", "/api/v0/tasks", None),
        ("GET", "/api/serve/applications/", None),
        ("GET", "/api/packages/protocol/gcs/a.zip", None),
        ("PUT", "/api/packages/protocol/gcs/a.zip", "x"),
        ("DELETE", "/api/jobs/a", None),
    ]
    answers = {(method, path): _ask(dashboard, method, path, body)[0] for method, path, body in asked}
    assert {item: status for item, status in answers.items() if status not in (401, 403)} == {}
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", f"import ray; ray.init({address!r}); print('connected', ray.nodes())"],
            env=bare, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for address in (f"LOCALHOST:{platform.ports['ray']}", f"ray://127.0.0.1:{platform.ports['ray'] + 1}")
    ]  # fmt: skip
    for driver in drivers:  # each tries for half a minute
        output, _ = driver.communicate(timeout=200)
        assert driver.returncode != 0
        assert "connected" not in output


def test_no_port_of_the_platform_was_forgotten(platform: RunningPlatform):
    """Whatever listens, the ports that Ray chose included, gives a stranger health, metrics and empty pages alone."""
    state = load_state(platform.folder)
    assert state is not None
    ports: dict[int, str] = {}
    for name, record in state.processes.items():
        for member in find_members(record):
            listening = [c for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            ports |= {connection.laddr.port: name for connection in listening}
    assert len(ports) > 10
    secrets = [*read_s3_keys(platform.folder, "jobs").values(), platform.environment["MLFLOW_TRACKING_PASSWORD"]]
    served = {}
    for port in sorted(ports):
        for path in ("/", "/logs/", "/api/jobs/", "/debug/pprof/", "/api/local_raylet_healthz", "/worker/traceback"):
            try:
                status, text = _ask(port, "GET", path)
            except (OSError, http.client.HTTPException):
                continue  # gRPC, or a protocol of Ray's own
            assert not [secret for secret in secrets if secret in text]
            if status < 400 and text.strip():
                served[port - platform.ports["s3"], ports[port], path] = text[:80]
    # A page with the master's version and addresses; the dashboard's program, which then asks for the token.
    pages = {(1, "s3", "/"), (platform.ports["dashboard"] - platform.ports["s3"], "ray", "/")}
    assert {item for item, text in served.items() if not text.startswith(("# HELP", "success"))} == pages
