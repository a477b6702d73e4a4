"""Access to the service: its key, tokens made from the key, and signed download links.

Tokens and links are signed with secrets that are derived from the key. They stay valid over a
restart with the same key, and the service does not have to store them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["OWNER", "Authenticator", "DownloadLink", "Tickets", "key_path", "load_or_make_key"]

OWNER = "tml:user:local"
ORGANIZATION = "local"
TOKEN_SECONDS = 7 * 86_400
TICKET_SECONDS = 3600
KEY_PREFIX = "tml-"


def key_path(state_dir: Path) -> Path:
    """Return the file that holds the key that a service made for itself."""
    return state_dir / "key"


def load_or_make_key(state_dir: Path) -> str:
    """Read the file `key` of the state folder, or create it with a random key and mode 0600."""
    path = key_path(state_dir)
    for _ in range(2):
        try:
            key = path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            _write_new_key(path)
            continue
        if not key.startswith(KEY_PREFIX) or len(key) < 24:
            raise ConfigurationError(
                f"{path} does not hold a key; delete the file, and the next start makes a new key"
            )
        return key
    raise ConfigurationError(f"{path} cannot be read; check the permissions of its folder")


def _write_new_key(path: Path) -> None:
    temporary = path.with_name(f"key.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{KEY_PREFIX}{secrets.token_urlsafe(32)}\n")
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(temporary, path)  # fails if another process was first; its key is then used
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))


@dataclass(frozen=True)
class DownloadLink:
    """What a signed link gives access to: one file of one checkpoint folder, until a time."""

    folder: str
    file: str
    expires_at: float


class Tickets:
    """Secrets in links to the dashboard. Each signs in once, within an hour."""

    def __init__(self) -> None:
        self._expiry: dict[str, float] = {}

    def make(self) -> str:
        ticket = secrets.token_urlsafe(24)
        self._expiry[_digest(ticket)] = time.time() + TICKET_SECONDS
        return ticket

    def take(self, ticket: str) -> bool:
        """Use up a ticket; returns whether it was valid."""
        return self._expiry.pop(_digest(ticket), 0.0) > time.time()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


class Authenticator:
    """Checks keys, and makes and checks tokens and links. All comparisons take constant time."""

    def __init__(self, api_key: str) -> None:
        self._key = api_key.encode()
        self._token_secret = self._derive(b"jwt")
        self._link_secret = self._derive(b"download")
        self.status_token = _encode(self._derive(b"status"))
        """Gives access to the status and the metrics only."""
        self.tickets = Tickets()

    def _derive(self, purpose: bytes) -> bytes:
        return hmac.new(self._key, b"tinker-cookbook " + purpose, hashlib.sha256).digest()

    def accepts(self, credential: str | None) -> bool:
        """Return whether a header value is the key or a token that has not expired."""
        if not credential:
            return False
        if hmac.compare_digest(credential.encode("utf-8", "replace"), self._key):
            return True
        return credential.startswith("eyJ") and self._token_is_live(credential)

    def accepts_status(self, credential: str | None) -> bool:
        """Return whether a header value is the status token."""
        if not credential:
            return False
        return hmac.compare_digest(
            credential.encode("utf-8", "replace"), self.status_token.encode()
        )

    def make_token(self) -> str:
        """Return a JWT (HS256) with the claims that the SDK reads."""
        now = int(time.time())
        claims = {
            "iss": "passport-local",
            "sub": OWNER,
            "org_id": ORGANIZATION,
            "email": "",
            "iat": now,
            "exp": now + TOKEN_SECONDS,
        }
        head = _encode(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        signed = f"{head}.{_encode(json.dumps(claims).encode())}"
        return f"{signed}.{self._sign(self._token_secret, signed)}"

    def _sign(self, secret: bytes, text: str) -> str:
        return _encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())

    def _token_is_live(self, token: str) -> bool:
        claims = self._verified(self._token_secret, token)
        return isinstance(claims, dict) and claims.get("exp", 0) > time.time()

    def _verified(self, secret: bytes, text: str) -> object:
        """Return the JSON payload of a signed text, or None if its signature is wrong."""
        signed, _, signature = text.rpartition(".")
        expected = self._sign(secret, signed)
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), expected.encode()):
            return None
        return json.loads(_decode(signed.rpartition(".")[2]))

    def sign_link(self, link: DownloadLink) -> str:
        """Return the signed part of a download URL."""
        payload = _encode(json.dumps([link.folder, link.file, link.expires_at]).encode())
        return f"{payload}.{self._sign(self._link_secret, payload)}"

    def read_link(self, token: str) -> DownloadLink | None:
        """Return what a link gives access to, or None if it is forged or has expired."""
        values = self._verified(self._link_secret, token)
        if not isinstance(values, list):
            return None
        link = DownloadLink(*values)
        return link if link.expires_at > time.time() else None
