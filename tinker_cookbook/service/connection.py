"""A connection to a service: its address and key, SDK clients, what it offers, and its end."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError, TrainingError
from tinker_cookbook.service.choice import ServiceChoice, ServiceKind
from tinker_cookbook.service.embedded import EmbeddedService
from tinker_cookbook.utils.nearest_name import did_you_mean
from tinker_cookbook.utils.sdk_compat import (
    drop_unknown_session_options,
    has_rest_client,
    sdk_version,
    service_message,
)
from tinker_cookbook.utils.sdk_sessions import SessionEnd, close_session

if TYPE_CHECKING:
    import tinker

    Capabilities: TypeAlias = tinker.types.GetServerCapabilitiesResponse

__all__ = ["Connection", "check_reachable", "current_connection", "open_connections"]

PROBE_SECONDS = 10.0
_entered: list[Connection] = []


class Connection:
    """A service, the key for it, and the model to train there.

    Attributes:
        kind: `local` (started here), `remote` (an address was given) or `hosted`.
        reason: Why this service was chosen.
        model_name: The model, as the service names it.
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
        """The key that requests carry; None if the SDK fetches one per request."""
        return self._api_key

    def describe(self) -> str:
        """Return two lines that name the service, the reason and the model."""
        return self._choice.describe(self.model_name)

    def describe_dashboard(self) -> str | None:
        """Return the dashboard's address and how to sign in; None if the service has none."""
        if self._embedded is not None:
            return f"{self._embedded.dashboard_link()} (signs in once, while this command runs)"
        if self.kind == "hosted" or self._get_json("local/status?limit=0") is None:
            return None
        return f"{self.base_url}/ (asks for the service's key)"

    # ---- SDK clients ----

    def service_client(self, **options: Any) -> tinker.ServiceClient:
        """Open a session and return its SDK client; options go to `tinker.ServiceClient`.

        The session ends with the `with` block of the connection.
        """
        import tinker

        known = drop_unknown_session_options(options)
        client = tinker.ServiceClient(base_url=self.base_url, api_key=self._api_key, **known)
        self._service_clients.append(client)
        return client

    def rest_client(self) -> tinker.RestClient:
        """Return an SDK client for runs and checkpoints, which opens no session."""
        import tinker

        if has_rest_client():
            return tinker.RestClient(base_url=self.base_url, api_key=self._api_key)
        return self.service_client().create_rest_client()

    # ---- what the service offers ----

    def capabilities(self) -> Capabilities:
        """Return what the service says about itself and its models.

        Raises:
            ConfigurationError: if the service refuses the key or has another protocol.
        """
        import tinker

        answer = self._get_json("get_server_capabilities")
        if answer is not None:
            return tinker.types.GetServerCapabilitiesResponse.model_validate(answer)
        try:
            if has_rest_client():
                return self.rest_client().get_server_capabilities().result()
            return self.service_client().get_server_capabilities()
        except tinker.AuthenticationError as error:
            raise _refused_key(self.base_url) from error
        except (tinker.APIStatusError, tinker.TinkerError, ValueError) as error:
            raise _not_tinker(self.base_url, error) from error

    def supported_models(self) -> list[str]:
        """Return the models that the service offers; errors are those of `capabilities`."""
        answer = self._get_json("get_server_capabilities")  # without the SDK's slow import
        if answer is None:
            models = [model.model_name for model in self.capabilities().supported_models]
        else:
            models = [model.get("model_name") for model in answer.get("supported_models") or []]
        return sorted(name for name in models if name)

    def context_window(self) -> int | None:
        """Return the model's maximum tokens of prompt and reply together; None if not told.

        Errors are those of `capabilities`.
        """
        for model in self.capabilities().supported_models:
            if model.model_name == self.model_name:
                return getattr(model, "max_context_length", None)
        return None

    def tokenizer_folder(self, model_name: str) -> Path | None:
        """Return a model's tokenizer folder; None unless the service names one on this machine."""
        try:
            answer = self._get_json("get_server_capabilities") or {}
        except TinkerCookbookError:
            return None
        models = {model.get("model_name"): model for model in answer.get("supported_models") or []}
        found = models.get(model_name) or models.get(_offered_folder(model_name, [*models]), {})
        folder = found.get("tokenizer_id")
        return Path(folder) if folder and Path(folder).is_dir() else None

    def model_of(self, checkpoint: str) -> str:
        """Return the base model of a checkpoint.

        Raises:
            ConfigurationError: if the service does not have the checkpoint or its model.
        """
        import tinker

        try:
            found = self.rest_client().get_weights_info_by_tinker_path(checkpoint).result()
        except tinker.AuthenticationError as error:
            raise _refused_key(self.base_url) from error
        except (tinker.TinkerError, ValueError) as error:
            raise ConfigurationError(
                f"{checkpoint} cannot be found on {self.base_url}: {service_message(error)} "
                "`tinker-cookbook status` lists the checkpoints of the local service."
            ) from error
        return found.base_model

    def check_model(self, model_name: str | None) -> str:
        """Return the name by which the service offers a model; None means its only model.

        Raises:
            ConfigurationError: if the service does not offer the model, or if none is given and
                the service has several; the message lists its models.
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

    def _get_json(self, path: str) -> dict[str, Any] | None:
        """Send a plain request with the key; None if the service requires the SDK's tokens."""
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

    # ---- the end ----

    def close(self, *, at_once: bool = False) -> None:
        """Stop the service if it was started here; may be called twice.

        Args:
            at_once: Stop without waiting for the requests in progress.
        """
        if self._embedded is not None:
            self._embedded.stop(at_once=at_once)

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
        # Ctrl-C cancels the main task of an event loop; elsewhere it raises KeyboardInterrupt.
        interrupted = exc_type in (KeyboardInterrupt, asyncio.CancelledError)
        status = "interrupted" if interrupted else "success" if exc_type is None else "errored"
        if crash is None:
            self._end_sessions(status)
        self.close(at_once=interrupted)
        if crash is not None and exc_value is not None:
            raise TrainingError(crash) from exc_value

    def _end_sessions(self, status: SessionEnd) -> None:
        clients, self._service_clients = self._service_clients, []
        for client in clients:
            close_session(client, status)


def current_connection() -> Connection:
    """Return the connection of the innermost `with connect(...)` block of this process.

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


def open_connections() -> list[Connection]:
    """Return the connections of the open `with` blocks of this process, innermost first."""
    return list(reversed(_entered))


def check_reachable(choice: ServiceChoice, key: str | None) -> None:
    """Send the SDK's first request once, since the SDK itself would repeat it for minutes.

    Raises:
        ConfigurationError: if the service does not answer, refuses the key or has another protocol.
    """
    headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
    body = json.dumps({"sdk_version": sdk_version()}).encode()
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
    """Return the full path under which a service offers a model folder.

    Args:
        model_name: A path on this machine, or the end of exactly one of the paths.
        models: The models that the service offers.
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
