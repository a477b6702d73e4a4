"""The Tinker service that a program uses: choose it, start a local one if needed, connect.

`connect()` is the way in. `choice` decides which service, `connection` talks to it, and `embedded`
runs a local service as a child process of the program.
"""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.service.choice import ServiceChoice, choose_service, find_api_key
from tinker_cookbook.service.connection import (
    Connection,
    check_reachable,
    current_connection,
    open_connections,
)
from tinker_cookbook.service.embedded import EmbeddedService, add_to_no_proxy, find_saved_model

__all__ = [
    "Connection",
    "ServiceChoice",
    "choose_service",
    "connect",
    "current_connection",
    "default_model",
    "find_api_key",
    "find_served_tokenizer",
    "resolve_model",
]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def connect(
    base_url: str | None = None, model_name: str | None = None, *, checkpoint: str | None = None
) -> Connection:
    """Choose a service, check that it answers, and resolve the model.

    This call starts a local service and does not wait for it: the first use does. The service
    stops at `Connection.close`, at the end of a `with` block, or when this process ends.

    Args:
        base_url: Address of a service, "local", or None to choose by the environment.
        model_name: A model that the service can train; None means the default model of a local
            service, or the only model of another.
        checkpoint: A `tinker://` path, whose base model is used if no model is named.

    Raises:
        ConfigurationError: if the service cannot be reached or used, or the model is unknown there.
        TrainingError: (at the first use) if the local service stops while it starts.
    """
    choice = choose_service(base_url)
    if choice.kind == "local":
        return _start_local(choice, model_name, checkpoint)
    key = find_api_key()
    if key is None and not os.environ.get("TINKER_CREDENTIAL_CMD"):
        raise ConfigurationError(
            f"base_url={choice.base_url} needs a key and none is given; TINKER_API_KEY, "
            "TINKER_CREDENTIAL_CMD and `tinker auth login` were checked. Set TINKER_API_KEY to "
            "the service's key (`tinker-cookbook serve` says where its key is)."
        )
    _avoid_proxy_for_loopback(choice)
    check_reachable(choice, key)
    connection = Connection(choice, key, model_name=model_name or "")
    if checkpoint is not None and model_name is None:
        connection.model_name = connection.model_of(checkpoint)
    else:
        connection.model_name = connection.check_model(model_name)
    return connection


def _start_local(
    choice: ServiceChoice, model_name: str | None, checkpoint: str | None
) -> Connection:
    from tinker_cookbook.model_files import DEFAULT_MODEL

    if checkpoint is not None and model_name is None:
        model_name = find_saved_model(checkpoint)
    model = model_name or DEFAULT_MODEL
    embedded = EmbeddedService.start(model)
    return Connection(choice, embedded.api_key, model_name=model, embedded=embedded)


def default_model(base_url: str | None = None) -> str:
    """Return the model that a recipe trains if none is named: the default or the only one.

    Raises:
        ConfigurationError: if the service is not local and has several models; lists them.
    """
    return resolve_model(base_url)


def resolve_model(base_url: str | None = None, model_name: str | None = None) -> str:
    """Return the name by which the service that will be used offers a model.

    A service on this machine offers model folders by their full paths and accepts the end of a
    path. Tokenizers, renderers and learning rates need the full path.

    Args:
        base_url: As in `connect`.
        model_name: As the user wrote it; None means `default_model`.

    Raises:
        ConfigurationError: if the service cannot be reached, or does not offer the model.
    """
    from tinker_cookbook.model_files import DEFAULT_MODEL

    if choose_service(base_url).kind == "local":
        return model_name or DEFAULT_MODEL
    with connect(base_url, model_name) as connection:
        return connection.model_name


def find_served_tokenizer(model_name: str) -> Path | None:
    """Return the folder on this machine from which a service loads a model's tokenizer.

    Asks the connections that are open in this process, innermost first; without any, the service
    that `TINKER_BASE_URL` names.

    Returns:
        None if no service is known, or if none of them offers the model from a folder here.
    """
    try:
        connections = open_connections() or _connections_of_environment()
    except TinkerCookbookError:
        return None
    found = (connection.tokenizer_folder(model_name) for connection in connections)
    return next((folder for folder in found if folder is not None), None)


def _connections_of_environment() -> list[Connection]:
    choice = choose_service()
    if choice.kind != "remote":
        return []
    _avoid_proxy_for_loopback(choice)
    return [Connection(choice, find_api_key(), model_name="")]


def _avoid_proxy_for_loopback(choice: ServiceChoice) -> None:
    if urllib.parse.urlsplit(choice.base_url or "").hostname in LOOPBACK:
        add_to_no_proxy(*LOOPBACK)
