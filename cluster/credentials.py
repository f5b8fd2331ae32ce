"""Random credentials of the local platform, kept in files of mode 0600 in its state folder.

`platform up` makes what is missing. To replace a credential, take the platform down, delete its file, and bring the
platform up again; to replace all of them, delete the whole folder `credentials`.
"""

from __future__ import annotations

import configparser
import datetime
import json
import secrets
from pathlib import Path

from cluster.state import write_private
from tinyemo.errors import PlatformError

S3_ACTIONS = {
    "administrator": ["Admin", "Read", "Write", "List", "Tagging"],
    "jobs": [f"{action}:{{bucket}}" for action in ("Read", "Write", "List", "Tagging")],
    "mlflow": [f"{action}:{{bucket}}/mlflow/*" for action in ("Read", "Write", "List")],
}
"""Rights of each S3 identity. `platform up` uses the administrator to create the bucket; jobs never see its key."""
CERTIFICATE_DAYS = 3650


def ensure_credentials(folder: Path, bucket: str) -> None:
    """Create the credentials that the state folder lacks.

    Raises:
        PlatformError: where a credentials file is damaged.
    """
    kept = folder / "credentials"
    if not (kept / "s3.json").exists() or _read_identities(folder).keys() != S3_ACTIONS.keys():
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}],
                "actions": [action.format(bucket=bucket) for action in actions],
            }
            for name, actions in S3_ACTIONS.items()
        ]
        write_private(kept / "s3.json", json.dumps({"identities": identities}))
    if not (kept / "ray_token").exists():
        write_private(kept / "ray_token", secrets.token_hex(32))
    if not (kept / "mlflow.ini").exists():
        # MLflow stores a hash of the password when its database of accounts is new, and never reads it again.
        (folder / "mlflow" / "accounts.db").unlink(missing_ok=True)
        lines = [
            "[mlflow]",
            f"database_uri = sqlite:///{folder / 'mlflow' / 'accounts.db'}",
            "default_permission = NO_PERMISSIONS",
            "admin_username = tinyemo",
            f"admin_password = {secrets.token_hex(20)}",
            # Hashing a password takes 50 ms: without a cache every request would wait for that.
            "auth_cache_ttl_seconds = 3600",
        ]
        write_private(kept / "mlflow.ini", "\n".join(lines) + "\n")
    _write_certificate(kept)


def read_s3_keys(folder: Path, identity: str) -> dict[str, str]:
    """Return the variables of AWS clients that hold the keys of one S3 identity."""
    keys = _read_identities(folder)[identity]
    return {"AWS_ACCESS_KEY_ID": keys["accessKey"], "AWS_SECRET_ACCESS_KEY": keys["secretKey"]}


def read_mlflow_login(folder: Path) -> dict[str, str]:
    """Return the variables of MLflow's client that hold the login of the local server."""
    path = folder / "credentials" / "mlflow.ini"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        login = parser["mlflow"]
        return {
            "MLFLOW_TRACKING_USERNAME": login["admin_username"],
            "MLFLOW_TRACKING_PASSWORD": login["admin_password"],
        }
    except (OSError, configparser.Error, KeyError) as error:
        raise _damaged(path) from error


def _read_identities(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "credentials" / "s3.json"
    try:
        identities = json.loads(path.read_text())["identities"]
        return {
            identity["name"]: {name: str(identity["credentials"][0][name]) for name in ("accessKey", "secretKey")}
            for identity in identities
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> PlatformError:
    return PlatformError(f"{path} is damaged: run `tinyemo platform down`, delete the file, then run `up`")


def _write_certificate(kept: Path) -> None:
    """Write a new key and certificate; SeaweedFS's parts accept it, and nothing else, from each other."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tinyemo-platform")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(kept / "tls.key", private.decode())
    write_private(kept / "tls.crt", certificate.public_bytes(pem).decode())
