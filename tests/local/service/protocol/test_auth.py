"""Keys, tokens and download links."""

import base64
import json
import os
import stat
import time

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.service.protocol.auth import (
    Authenticator,
    DownloadLink,
    load_or_make_key,
)

KEY = "tml-0123456789abcdef0123"


def test_the_key_and_its_tokens_are_accepted_and_nothing_else_is() -> None:
    auth = Authenticator(KEY)
    token = auth.make_token()
    assert auth.accepts(KEY)
    assert auth.accepts(token)
    assert Authenticator(KEY).accepts(token), "a token must survive a restart"
    for other in (None, "", "tml-", KEY + "x", KEY[:-1], token[:-2], "eyJ.eyJ.x", "ключ"):
        assert not auth.accepts(other)
    assert not Authenticator(KEY + "x").accepts(token)


def test_an_altered_or_expired_token_is_refused() -> None:
    auth = Authenticator(KEY)
    head, payload, signature = auth.make_token().split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    claims["exp"] += 1
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    assert not auth.accepts(f"{head}.{forged}.{signature}")
    assert claims["exp"] - claims["iat"] > 86_400
    assert claims["sub"].startswith("tml:")


def test_links_allow_one_file_until_they_expire() -> None:
    auth = Authenticator(KEY)
    link = DownloadLink("folder", "adapter_model.safetensors", time.time() + 60)
    token = auth.sign_link(link)
    assert auth.read_link(token) == link
    assert auth.read_link(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
    assert auth.read_link("") is None
    assert auth.read_link("a.b.c") is None
    assert Authenticator(KEY + "x").read_link(token) is None
    assert auth.read_link(auth.sign_link(DownloadLink("f", "x", time.time() - 1))) is None


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path) -> None:
    key = load_or_make_key(tmp_path)
    assert key.startswith("tml-")
    assert len(key) > 40
    assert load_or_make_key(tmp_path) == key
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_damaged_key_file_is_named(tmp_path) -> None:
    (tmp_path / "key").write_text("nonsense")
    with pytest.raises(ConfigurationError, match="does not hold a key"):
        load_or_make_key(tmp_path)
