"""S3 through a real server: what works, and one clear line for what does not."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestration.services import storage
from tinyemo.errors import StorageError


def assert_is_one_clear_line(error: BaseException, environment: dict[str, str]) -> None:
    """One line, and the secret is not in it."""
    assert "\n" not in str(error)
    assert environment["AWS_SECRET_ACCESS_KEY"] not in str(error)


@pytest.mark.parametrize("uri", ["bucket/key", "http://bucket/key", "s3://", "s3:///key", ""])
def test_an_address_that_is_not_s3_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="s3://bucket/key"):
        storage.parse_s3_uri(uri)


def test_an_address_has_a_bucket_and_a_key() -> None:
    assert storage.parse_s3_uri("s3://bucket/a/b.parquet") == ("bucket", "a/b.parquet")
    assert storage.parse_s3_uri("s3://bucket/") == ("bucket", "")


def test_objects_come_back_whole_and_by_range(s3_root: str) -> None:
    uri = f"{s3_root}/folder/object"
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"0123456789")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, start=2, length=3) == b"234"
    assert storage.read_bytes(uri, start=7) == b"789"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_write_if_absent_happens_once(s3_root: str) -> None:
    uri = f"{s3_root}/claim"
    assert storage.write_bytes_if_absent(uri, b"first")
    assert not storage.write_bytes_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_a_conditional_write_replaces_only_what_its_writer_has_read(s3_root: str) -> None:
    uri = f"{s3_root}/lease"
    assert storage.write_bytes_if_match(uri, b"nobody wrote this yet", '"0"') is None
    storage.write_bytes(uri, b"first")
    content, etag = storage.read_with_etag(uri)
    assert content == b"first"
    newer = storage.write_bytes_if_match(uri, b"second", etag)
    assert storage.read_with_etag(uri) == (b"second", newer)
    assert storage.write_bytes_if_match(uri, b"third", etag) is None
    assert storage.read_bytes(uri) == b"second"
    # The answer to a write was lost and boto3 sent it again: its content tells that it came through.
    assert storage.write_bytes_if_match(uri, b"second", etag) == newer


def test_one_of_many_writers_replaces_an_object(s3_root: str) -> None:
    storage.write_bytes(f"{s3_root}/lease", b"first")
    _, etag = storage.read_with_etag(f"{s3_root}/lease")
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda i: storage.write_bytes_if_match(f"{s3_root}/lease", b"%d" % i, etag), range(8))
    assert sum(answer is not None for answer in answers) == 1


def test_a_folder_is_deleted_and_its_neighbour_stays(
    s3_root: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_KEYS_PER_DELETE", 2)
    for name in ("run/a", "run/b/c", "run/d", "run-other"):
        storage.write_bytes(f"{s3_root}/{name}", b"1")
    assert storage.delete_prefix(f"{s3_root}/run") == 3
    assert storage.delete_prefix(f"{s3_root}/run") == 0
    assert list(storage.list_prefix(s3_root)) == [f"{s3_root}/run-other"]
    with pytest.raises(StorageError, match="whole bucket"):
        storage.delete_prefix("s3://tests/")


def test_fetched_bytes_counts_every_way_to_read(s3_root: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_root}/small", b"0123456789")
    (tmp_path / "large").write_bytes(bytes(17 * 2**20))
    storage.upload_file(tmp_path / "large", f"{s3_root}/large")
    before = storage.fetched_bytes()
    storage.read_bytes(f"{s3_root}/small", start=4)
    storage.download_file(f"{s3_root}/large", tmp_path / "copy")  # several ranges, in threads
    assert storage.fetched_bytes() - before == 6 + 17 * 2**20


@pytest.mark.parametrize("name", ["/etc/passwd", "../beside", "a/../../beside", "link/inside"])
def test_no_key_leads_out_of_the_download_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # AWS stores such keys; SeaweedFS cleans or refuses them, so the listing is made up here.
    monkeypatch.setattr(storage, "list_prefix", lambda uri: {f"{uri}/{name}": 1})
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="would be written outside"):
        storage.download_folder("s3://bucket/model", tmp_path / "target")


def test_json_comes_back_and_other_bytes_are_an_error(s3_root: str) -> None:
    uri = f"{s3_root}/document.json"
    storage.write_json(uri, {"b": 1, "a": [1, 2]})
    assert storage.read_json(uri) == {"a": [1, 2], "b": 1}
    storage.write_bytes(uri, b"\xff{")
    with pytest.raises(StorageError, match="holds no JSON"):
        storage.read_json(uri)


def test_a_folder_goes_up_and_comes_down_the_same(s3_root: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"a" * 10)
    # Larger than one part of a multipart upload (8 MiB).
    (source / "inner" / "b.bin").write_bytes(bytes(range(256)) * (9 * 4096))
    root = f"{s3_root}/model"
    assert storage.upload_folder(source, root) == 2
    storage.write_bytes(f"{s3_root}/model-other", b"a neighbour with the same beginning")
    assert storage.list_prefix(root) == {f"{root}/a.bin": 10, f"{root}/inner/b.bin": 9 * 4096 * 256}
    assert storage.download_folder(root, target) == 2
    assert (target / "inner" / "b.bin").read_bytes() == (source / "inner" / "b.bin").read_bytes()
    assert sorted(path.name for path in target.rglob("*") if path.is_file()) == ["a.bin", "b.bin"]


def test_pyarrow_reads_the_same_objects_without_carrying_the_secret(
    s3_root: str, s3_environment: dict[str, str]
) -> None:
    storage.write_bytes(f"{s3_root}/object", b"0123456789")
    pickled = pickle.dumps(storage.filesystem())
    assert s3_environment["AWS_SECRET_ACCESS_KEY"].encode() not in pickled
    with pickle.loads(pickled).open_input_file(f"{s3_root}/object".removeprefix("s3://")) as file:
        assert file.read_at(3, 4) == b"456"


def test_a_missing_object_names_its_address(s3_root: str, s3_environment: dict[str, str]) -> None:
    uri = f"{s3_root}/nothing"
    with pytest.raises(storage.MissingObjectError, match=uri) as caught:
        storage.read_bytes(uri)
    assert_is_one_clear_line(caught.value, s3_environment)
    with pytest.raises(storage.MissingObjectError, match="nothing is stored under"):
        storage.download_folder(uri, Path("unused"))


@pytest.mark.parametrize("action", [storage.read_bytes, storage.exists, storage.list_prefix])
def test_a_missing_bucket_is_named(action: Callable[[str], object], s3_environment: dict[str, str]) -> None:
    # Writing is left out: SeaweedFS creates the bucket of a put by an administrator. AWS answers NoSuchBucket.
    with pytest.raises(StorageError, match=r"bucket 'no-such-bucket' does not exist .*create it") as caught:
        action("s3://no-such-bucket/key")
    assert not isinstance(caught.value, storage.MissingObjectError)
    assert_is_one_clear_line(caught.value, s3_environment)


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_one_clear_line(
    variable: str, s3_root: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong" * 4)
    for action in (storage.read_bytes, storage.exists, storage.list_prefix):
        with pytest.raises(StorageError, match=r"refuses the credentials.*AWS_SECRET_ACCESS_KEY") as caught:
            action(f"{s3_root}/key")
        assert_is_one_clear_line(caught.value, s3_environment)
        assert "wrongwrong" not in str(caught.value)


@pytest.mark.parametrize(("hours", "said"), [(-1, "is 60 minutes behind that of S3"), (1, "is 60 minutes ahead of")])
def test_a_clock_that_is_wrong_by_an_hour_is_said(
    hours: int, said: str, s3_root: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import botocore.auth

    def wrong(*_: object) -> datetime:
        return datetime.now(UTC) + timedelta(hours=hours)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: wrong().replace(tzinfo=None))
    monkeypatch.setattr(storage, "_now", wrong)
    for action in (storage.read_bytes, storage.exists, storage.list_prefix, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(StorageError, match=said) as caught:
            action(f"{s3_root}/key")
        assert_is_one_clear_line(caught.value, s3_environment)


def test_an_endpoint_that_is_no_address_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:8333")
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL is '127\.0\.0\.1:8333'"):
        storage.read_bytes("s3://bucket/key")


@pytest.mark.timeout(60)  # a hang, not a timing
def test_s3_gone_is_said(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=rf"S3 at {endpoint} does not answer.*tinyemo platform up") as caught:
            storage.read_bytes("s3://bucket/key")
    assert_is_one_clear_line(caught.value, s3_environment)


@pytest.mark.timeout(60)
def test_a_server_that_takes_connections_and_hangs_up_is_said(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        stopped = threading.Event()

        def hang_up() -> None:
            while not stopped.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
            with pytest.raises(StorageError, match="does not answer") as caught:
                storage.write_bytes("s3://bucket/key", b"data")
        finally:
            stopped.set()
            thread.join()
    assert_is_one_clear_line(caught.value, s3_environment)
