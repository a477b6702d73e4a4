"""Which Tinker service a run uses, and the local one started for it.

`connect()` chooses in this order: an explicit `base_url` ("local" is allowed), `TINKER_BASE_URL`,
an API key (`TINKER_API_KEY`, `TINKER_CREDENTIAL_CMD` or one stored by `tinker auth login`), and
without any of them a service of its own on this machine, stopped with this process.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from tinker_cookbook.embedded_service import EmbeddedService, add_to_no_proxy, find_saved_model
from tinker_cookbook.exceptions import (
    ConfigurationError,
    TinkerCookbookError,
    TrainingError,
)
from tinker_cookbook.utils.nearest_name import did_you_mean
from tinker_cookbook.utils.sdk_sessions import SessionEnd, close_session

if TYPE_CHECKING:
    import tinker

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

ServiceKind = Literal["local", "remote", "hosted"]
HOSTED_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
PROBE_SECONDS = 10.0
_entered: list[Connection] = []


@dataclass(frozen=True)
class ServiceChoice:
    """A decision that has not been acted on."""

    kind: ServiceKind
    base_url: str | None
    """None for a local service, which gets its address when it starts."""
    reason: str
    """Why this one, as printed to the user."""

    def describe(self, model_name: str) -> str:
        """Which service, why, and the model."""
        where = {
            "local": "local, started for this run",
            "remote": f"{self.base_url}",
            "hosted": f"hosted Tinker, {self.base_url}",
        }[self.kind]
        return f"service  {where} ({self.reason})\nmodel    {model_name}"


def choose_service(base_url: str | None = None) -> ServiceChoice:
    """Decide which service to use, without contacting any.

    Raises:
        ConfigurationError: if an address is not a URL.
    """
    for url, source in ((base_url, "base_url"), (os.environ.get("TINKER_BASE_URL"), "environment")):
        if not url:
            continue
        name = "base_url" if source == "base_url" else "TINKER_BASE_URL"
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
    """The key the SDK would send: `TINKER_API_KEY`, else the stored default key.

    Returns:
        None where there is no key, or where `TINKER_CREDENTIAL_CMD` provides it per request.

    Raises:
        ConfigurationError: if the key cannot be one, or the file of stored keys is damaged.
    """
    key = os.environ.get("TINKER_API_KEY")
    if not key:
        key = None if os.environ.get("TINKER_CREDENTIAL_CMD") else _stored_key()
    if key is not None and not key.startswith(("tml-", "eyJ")):
        raise ConfigurationError(
            "TINKER_API_KEY holds no Tinker key; one starts with 'tml-' (or 'eyJ' for a JWT). "
            "Set it anew, or unset it to run on this machine."
        )
    return key


def default_model(base_url: str | None = None) -> str:
    """The model a recipe trains if none is named: that of the local service, or the only one.

    Raises:
        ConfigurationError: on a service that has several, listing them.
    """
    return resolve_model(base_url)


def resolve_model(base_url: str | None = None, model_name: str | None = None) -> str:
    """The name by which the service that will be used knows a model.

    A service on this machine offers the models of a folder by their full paths, so that the end of
    a path is another name of it only there; tokenizers, renderers and rates need the path.

    Args:
        base_url: As in `connect`.
        model_name: As the user wrote it; None means `default_model`.

    Raises:
        ConfigurationError: if the service cannot be reached, or offers no such model.
    """
    from tinker_cookbook.model_files import DEFAULT_MODEL

    if choose_service(base_url).kind == "local":
        return model_name or DEFAULT_MODEL
    with connect(base_url, model_name) as connection:
        return connection.model_name


def connect(
    base_url: str | None = None, model_name: str | None = None, *, checkpoint: str | None = None
) -> Connection:
    """Choose a service, make sure that it answers, and settle the model.

    A local service is started by this call, which does not wait for it: the first use does. It
    stops at `Connection.close`, at the end of a `with` block, or with this process, however that
    ends.

    Args:
        base_url: Address of a service, "local", or None to choose by the environment.
        model_name: A model the service can train; None means the default model on a local service,
            and the only one of another.
        checkpoint: A `tinker://` path; its model is found out if none is named.

    Raises:
        ConfigurationError: if the service cannot be reached or used, or the model is unknown there.
        TrainingError: (at the first use) if the local service stops while it starts.
    """
    choice = choose_service(base_url)
    if choice.kind == "local":
        from tinker_cookbook.model_files import DEFAULT_MODEL

        if checkpoint is not None and model_name is None:
            model_name = find_saved_model(checkpoint)
        model = model_name or DEFAULT_MODEL
        embedded = EmbeddedService.start(model)
        return Connection(choice, embedded.api_key, model_name=model, embedded=embedded)
    key = find_api_key()
    if key is None and not os.environ.get("TINKER_CREDENTIAL_CMD"):
        raise ConfigurationError(
            f"base_url={choice.base_url} needs a key and none is given; TINKER_API_KEY, "
            "TINKER_CREDENTIAL_CMD and `tinker auth login` are looked at. Set TINKER_API_KEY to "
            "the service's key (`tinker-cookbook serve` says where its own is)."
        )
    _avoid_proxy_for_loopback(choice)
    _check_reachable(choice, key)
    connection = Connection(choice, key, model_name=model_name or "")
    if checkpoint is not None and model_name is None:
        connection.model_name = connection.model_of(checkpoint)
    else:
        connection.model_name = connection.check_model(model_name)
    return connection


def current_connection() -> Connection:
    """The connection of the innermost `with connect(...)` block of this process.

    For environments that sample from another model of the service their run uses.

    Raises:
        ConfigurationError: outside such a block, as in another process.
    """
    if not _entered:
        raise ConfigurationError(
            "no connection is open in this process; use `with service.connect(...)`, or give the "
            "other model's base_url. Worker processes have none: use a thread pool instead."
        )
    return _entered[-1]


def find_served_tokenizer(model_name: str) -> Path | None:
    """The folder on this machine from which a service takes a model's tokenizer.

    Asks the connections that are open in this process, innermost first; without any, the service
    that `TINKER_BASE_URL` names.

    Returns:
        None if no service is at hand, offers the model, or names a folder that is here.
    """
    try:
        connections = list(reversed(_entered)) or _connections_of_environment()
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


class Connection:
    """A service, the key for it, and the model to train there.

    Attributes:
        kind: `local` (started here), `remote` (an address was given) or `hosted`.
        reason: Why this service.
        model_name: The model, resolved.
    """

    def __init__(
        self,
        choice: ServiceChoice,
        api_key: str | None,
        *,
        model_name: str,
        embedded: EmbeddedService | None = None,
    ) -> None:
        self.kind: ServiceKind = choice.kind
        self.reason = choice.reason
        self.model_name = model_name
        self._choice = choice
        self._api_key = api_key
        self._embedded = embedded
        self._service_clients: list[tinker.ServiceClient] = []

    @property
    def base_url(self) -> str:
        """The address; waits until a local service accepts connections."""
        if self._embedded is not None:
            return self._embedded.wait_until_ready()
        assert self._choice.base_url is not None, "only a local service starts without an address"
        return self._choice.base_url

    @property
    def api_key(self) -> str | None:
        """The key that requests carry; None where the SDK fetches one for each."""
        return self._api_key

    def describe(self) -> str:
        """Which service, why, and the model."""
        return self._choice.describe(self.model_name)

    def describe_dashboard(self) -> str | None:
        """The address of the service's dashboard, and how it opens; None where it has none."""
        if self._embedded is not None:
            return f"{self._embedded.dashboard_link()} (signs in once, while this command runs)"
        if self.kind == "hosted" or self._get_json("local/status?limit=0") is None:
            return None
        return f"{self.base_url}/ (asks for the service's key)"

    def service_client(self, **kwargs: Any) -> tinker.ServiceClient:
        """An SDK client of this service; keyword arguments go to `tinker.ServiceClient`.

        Its session ends with the `with` block of the connection.
        """
        import tinker

        # SDKs that other Tinker servers need may not know names of sessions
        if "display_name" not in inspect.signature(tinker.ServiceClient.__init__).parameters:
            kwargs.pop("display_name", None)
        client = tinker.ServiceClient(base_url=self.base_url, api_key=self._api_key, **kwargs)
        self._service_clients.append(client)
        return client

    def rest_client(self) -> Any:
        """An SDK client for runs and checkpoints, which opens no session."""
        import tinker

        if hasattr(tinker, "RestClient"):
            return tinker.RestClient(base_url=self.base_url, api_key=self._api_key)
        return self.service_client().create_rest_client()

    def capabilities(self) -> tinker.types.GetServerCapabilitiesResponse:
        """What the service says about itself and its models.

        Raises:
            ConfigurationError: if the service refuses the key or speaks another language.
        """
        import tinker

        answer = self._get_json("get_server_capabilities")
        if answer is not None:
            return tinker.types.GetServerCapabilitiesResponse.model_validate(answer)
        try:
            if hasattr(tinker, "RestClient"):
                return self.rest_client().get_server_capabilities().result()
            return self.service_client().get_server_capabilities()
        except tinker.AuthenticationError as error:
            raise _refused_key(self.base_url) from error
        except (tinker.APIStatusError, tinker.TinkerError, ValueError) as error:
            raise _not_tinker(self.base_url, error) from error

    def supported_models(self) -> list[str]:
        """Names of the models the service offers; errors as those of `capabilities`."""
        answer = self._get_json("get_server_capabilities")  # without the SDK's slow import
        if answer is None:
            models = [model.model_name for model in self.capabilities().supported_models]
        else:
            models = [model.get("model_name") for model in answer.get("supported_models") or []]
        return sorted(name for name in models if name)

    def tokenizer_folder(self, model_name: str) -> Path | None:
        """The folder of a model's tokenizer, if the service names one that is on this machine."""
        try:
            answer = self._get_json("get_server_capabilities") or {}
        except TinkerCookbookError:
            return None
        models = {model.get("model_name"): model for model in answer.get("supported_models") or []}
        found = models.get(model_name) or models.get(_offered_folder(model_name, [*models]), {})
        folder = found.get("tokenizer_id")
        return Path(folder) if folder and Path(folder).is_dir() else None

    def model_of(self, checkpoint: str) -> str:
        """The base model of a checkpoint.

        Raises:
            ConfigurationError: if there is no such checkpoint, or the service cannot tell.
        """
        import tinker

        from tinker_cookbook.utils.sdk_compat import service_message

        try:
            found = self.rest_client().get_weights_info_by_tinker_path(checkpoint).result()
        except tinker.AuthenticationError as error:
            raise _refused_key(self.base_url) from error
        except (tinker.TinkerError, ValueError) as error:
            raise ConfigurationError(
                f"{checkpoint} cannot be found on {self.base_url}: {service_message(error)}"
            ) from error
        return found.base_model

    def _get_json(self, path: str) -> dict[str, Any] | None:
        """A plain request with the key; None where the service wants the SDK's token exchange."""
        headers = {} if self._api_key is None else {"X-API-Key": self._api_key}
        request = urllib.request.Request(f"{self.base_url}/api/v1/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            error.close()
            return None
        except (OSError, ValueError) as error:
            raise _not_tinker(self.base_url, error) from error

    def check_model(self, model_name: str | None) -> str:
        """Return `model_name` if the service offers it; None means the only one it has.

        Raises:
            ConfigurationError: naming the models there are, if it has not this one, or several.
        """
        models = self.supported_models()
        if model_name is not None and model_name.partition(":")[0] in {
            name.partition(":")[0] for name in models
        }:
            return model_name
        if model_name is None and len(models) == 1:
            return models[0]
        folder = None if model_name is None else _offered_folder(model_name, models)
        if folder is not None:
            return folder
        listed = ", ".join(models) or "none"
        if model_name is None:
            raise ConfigurationError(
                f"model_name is not set and {self.base_url} has no default; its models are "
                f"{listed}. Add model_name=NAME (a recipe) or --model NAME (a command)."
            )
        raise ConfigurationError(
            f"model_name={model_name} is not offered by {self.base_url}."
            f"{did_you_mean(model_name, models)} Its models are {listed}."
        )

    def close(self, *, at_once: bool = False) -> None:
        """Stop the service if it was started here; may be called twice.

        Args:
            at_once: Do not let it finish what is in flight.
        """
        if self._embedded is not None:
            self._embedded.stop(at_once=at_once)

    def _end_sessions(self, status: SessionEnd) -> None:
        clients, self._service_clients = self._service_clients, []
        for client in clients:
            close_session(client, status)

    def __enter__(self) -> Connection:
        if self._embedded is not None:
            self._embedded.interrupt_main_thread_on_crash()
        _entered.append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self in _entered:
            _entered.remove(self)
        crash = self._embedded.crash_report() if self._embedded is not None else None
        # Ctrl-C cancels the main task of an event loop, and is raised anywhere else
        interrupted = exc_type in (KeyboardInterrupt, asyncio.CancelledError)
        status = "interrupted" if interrupted else "success" if exc_type is None else "errored"
        if crash is None:
            self._end_sessions(status)
        self.close(at_once=interrupted)
        if crash is not None and exc_value is not None:
            raise TrainingError(crash) from exc_value


def _check_url(name: str, url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{name}={url} is no address; use http://HOST:PORT, https://..., or local."
        )


def _avoid_proxy_for_loopback(choice: ServiceChoice) -> None:
    if urllib.parse.urlsplit(choice.base_url or "").hostname in ("127.0.0.1", "localhost", "::1"):
        add_to_no_proxy("127.0.0.1", "localhost", "::1")


def _check_reachable(choice: ServiceChoice, key: str | None) -> None:
    """The SDK's first request, sent once: the SDK itself would repeat it for minutes."""
    headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
    body = json.dumps({"sdk_version": version("tinker")}).encode()
    url = f"{choice.base_url}/api/v1/client/config"
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
            json.loads(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403) and key:
            raise _refused_key(choice.base_url) from error
        if error.code in (404, 405, 501):
            raise _not_tinker(choice.base_url, error) from error
    except json.JSONDecodeError as error:
        raise _not_tinker(choice.base_url, error) from error
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        cause = getattr(cause, "strerror", None) or cause
        raise ConfigurationError(
            f"base_url={choice.base_url} does not answer ({cause}); {choice.reason}. "
            "Check the address and that the service runs, or use base_url=local."
        ) from error


def _offered_folder(model_name: str, models: Sequence[str]) -> str | None:
    """The model folder that a service offers by its full path, given another form of it.

    That is a path from here, or the end of the one path that ends so.
    """
    folder = Path(model_name).expanduser()
    if folder.is_dir() and str(folder.resolve()) in models:
        return str(folder.resolve())
    ending = "/" + model_name.strip("/")
    found = [name for name in models if name.endswith(ending)]
    return found[0] if len(found) == 1 else None


def _refused_key(base_url: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"base_url={base_url} refuses the key; it must be the one this service expects. "
        "Set TINKER_API_KEY."
    )


def _not_tinker(base_url: str | None, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"base_url={base_url} does not answer like a Tinker service ({error}); give the address "
        "of one, without /api/v1."
    )


def _credentials_path() -> Path:
    return Path("~/.tinker/credentials.json").expanduser()


def _stored_key() -> str | None:
    """The default key that `tinker auth login` stored."""
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
