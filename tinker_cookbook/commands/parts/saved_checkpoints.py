"""Checkpoints that a service keeps: look up their sizes and delete them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.local.service.storage.checkpoint_index import CheckpointRow

__all__ = ["CheckpointStore", "open_checkpoint_store"]


class CheckpointStore(Protocol):
    """A place where checkpoints are kept."""

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        """Return the size in bytes of each `tinker://` path that exists."""
        ...

    def delete(self, path: str) -> None:
        """Delete an existing checkpoint."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...


def open_checkpoint_store(base_url: str | None) -> CheckpointStore:
    """Open the state folder of this machine, or the service that a recipe would choose.

    Raises:
        ConfigurationError: if the service does not answer, or the state folder has no checkpoints.
    """
    from tinker_cookbook import service

    choice = service.choose_service(base_url)
    if choice.kind == "local":
        return _StateFolder()
    connection = service.Connection(choice, service.find_api_key(), model_name="")
    connection.supported_models()  # fails at once; the SDK would retry for minutes
    return _Service(connection.rest_client())


class _StateFolder:
    """State folder of the services that recipes start; none of them needs to run."""

    def __init__(self) -> None:
        from tinker_cookbook.local.service.storage.store import Store
        from tinker_cookbook.model_files import cookbook_home

        folder = cookbook_home().resolve() / "service"
        if not (folder / "index.sqlite3").exists():
            raise ConfigurationError(
                f"nothing is saved in {folder}; name another service with --base-url."
            )
        self._store = Store(folder)

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        rows = {path: self._find(path) for path in paths}
        return {path: row.size_bytes for path, row in rows.items() if row is not None}

    def delete(self, path: str) -> None:
        row = self._find(path)
        if row is not None:
            self._store.delete(row)

    def close(self) -> None:
        self._store.close()

    def _find(self, path: str) -> CheckpointRow | None:
        run_id, _, rest = path.removeprefix("tinker://").partition("/")
        segment, _, name = rest.partition("/")
        return self._store.find(run_id, segment, name)


class _Service:
    """A running service at an address."""

    def __init__(self, rest: tinker.RestClient) -> None:
        self._rest = rest

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        import tinker

        wanted = set(paths)
        found: dict[str, int] = {}
        for run_id in {path.removeprefix("tinker://").partition("/")[0] for path in wanted}:
            try:
                answer = self._rest.list_checkpoints(run_id).result()
            except (tinker.NotFoundError, ValueError):
                continue  # this run belongs to another service
            found |= {item.tinker_path: item.size_bytes or 0 for item in answer.checkpoints}
        return {path: size for path, size in found.items() if path in wanted}

    def delete(self, path: str) -> None:
        self._rest.delete_checkpoint_from_tinker_path(path).result()

    def close(self) -> None:
        pass
