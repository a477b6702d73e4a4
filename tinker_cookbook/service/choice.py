"""Which service a run uses: an address, the hosted one, or a local one; and the key for it."""

from __future__ import annotations

import json
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["ServiceChoice", "ServiceKind", "choose_service", "find_api_key"]

ServiceKind = Literal["local", "remote", "hosted"]
HOSTED_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
KEY_STARTS = ("tml-", "eyJ")
"""Keys of a Tinker service, and JSON web tokens."""


@dataclass(frozen=True)
class ServiceChoice:
    """The service to use; nothing has been started or contacted yet."""

    kind: ServiceKind
    base_url: str | None
    """None for a local service, which gets its address when it starts."""
    reason: str
    """Why this service was chosen, as printed to the user."""

    def describe(self, model_name: str) -> str:
        """Return two lines that name the service, the reason and the model."""
        where = {
            "local": "local, started for this run",
            "remote": f"{self.base_url}",
            "hosted": f"hosted Tinker, {self.base_url}",
        }[self.kind]
        return f"service  {where} ({self.reason})\nmodel    {model_name}"


def choose_service(base_url: str | None = None) -> ServiceChoice:
    """Decide which service to use, without contacting any.

    The first of these decides: `base_url` ("local" is allowed), `TINKER_BASE_URL`, an API key
    (`TINKER_API_KEY`, `TINKER_CREDENTIAL_CMD` or one stored by `tinker auth login`). Without any of
    them a local service is used.

    Raises:
        ConfigurationError: if an address is not a URL.
    """
    for name, url in (("base_url", base_url), ("TINKER_BASE_URL", os.getenv("TINKER_BASE_URL"))):
        if not url:
            continue
        if url == "local":
            return ServiceChoice("local", None, f"{name}=local")
        _check_url(name, url)
        return ServiceChoice("remote", url.rstrip("/"), f"{name} is set")
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD"):
        if os.environ.get(name):
            return ServiceChoice("hosted", HOSTED_URL, f"{name} is set")
    if _stored_key() is not None:
        return ServiceChoice("hosted", HOSTED_URL, f"a key is stored in {_credentials_path()}")
    return ServiceChoice("local", None, "no base_url and no API key is given")


def find_api_key() -> str | None:
    """Return the key that the SDK would send: `TINKER_API_KEY`, else the stored default key.

    Returns:
        None without a key, or if `TINKER_CREDENTIAL_CMD` provides one per request.

    Raises:
        ConfigurationError: if the key is malformed, or the file of stored keys is damaged.
    """
    key = os.environ.get("TINKER_API_KEY")
    if not key:
        key = None if os.environ.get("TINKER_CREDENTIAL_CMD") else _stored_key()
    if key is not None and not key.startswith(KEY_STARTS):
        raise ConfigurationError(
            "TINKER_API_KEY does not hold a Tinker key; one starts with 'tml-' (or 'eyJ' for a "
            "JWT). Set it again, or unset it to run on this machine."
        )
    return key


def _check_url(name: str, url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{name}={url} is not an address; use http://HOST:PORT, https://..., or local."
        )


def _credentials_path() -> Path:
    return Path("~/.tinker/credentials.json").expanduser()


def _stored_key() -> str | None:
    """Return the default key that `tinker auth login` stored."""
    path = _credentials_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        default = stored.get("default")
        return None if default is None else stored.get("keys", {}).get(default, {}).get("key")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as stored Tinker keys ({error}). Run `tinker auth login` "
            "again, delete the file, or set base_url."
        ) from error
