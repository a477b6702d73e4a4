"""Download a checkpoint from a Tinker service as a folder of files."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinker_cookbook.exceptions import WeightsDownloadError
from tinker_cookbook.weights.output_folder import complete_folder

if TYPE_CHECKING:
    from tinker_cookbook import service

__all__ = ["download"]

CHUNK_BYTES = 2**20
MAX_ATTEMPTS = 5
EXPORT_SECONDS = 3600
"""How long a temporary export may live if it cannot be deleted."""


def download(*, tinker_path: str, output_dir: str, base_url: str | None = None) -> str:
    """Download the adapter of a checkpoint.

    An interrupted transfer continues where it stopped, up to 5 times. The folder appears only when
    everything has arrived.

    Args:
        tinker_path: `tinker://RUN/weights/NAME` or `tinker://RUN/sampler_weights/NAME`.
        output_dir: Folder to create.
        base_url: The service; default: chosen as by the recipes.

    Returns:
        The folder.

    Raises:
        ConfigurationError: if the folder exists and is not empty.
        WeightsDownloadError: if the service does not have the checkpoint, or the transfer fails.
    """
    if not tinker_path.startswith("tinker://"):
        raise WeightsDownloadError(
            f"tinker_path={tinker_path!r} must begin with tinker://, e.g. "
            "tinker://RUN/sampler_weights/final."
        )
    from tinker_cookbook import service

    with complete_folder(output_dir) as output, service.connect(base_url) as connection:
        address = _find_archive(connection, tinker_path)
        if address is not None:
            with tempfile.TemporaryFile() as archive:
                _fetch(address, archive)
                _unpack(archive, output, tinker_path)
        else:
            _download_files(connection, tinker_path, output)
        if not (output / "adapter_config.json").exists():
            raise WeightsDownloadError(f"{tinker_path} holds no adapter_config.json.")
    return str(Path(output_dir).expanduser())


def _find_archive(connection: service.Connection, tinker_path: str) -> str | None:
    """Ask the service for the address of the checkpoint as one archive; None if it has none."""
    import httpx

    run_id, _, name = tinker_path.removeprefix("tinker://").partition("/")
    headers = {"X-API-Key": connection.api_key} if connection.api_key else {}
    api = f"{connection.base_url.rstrip('/')}/api/v1"
    url = f"{api}/training_runs/{run_id}/checkpoints/{name}/archive"
    try:
        answer = httpx.get(url, headers=headers, timeout=60)
    except httpx.HTTPError as error:
        raise WeightsDownloadError(f"{connection.base_url} does not answer: {error}.") from error
    if answer.is_redirect:
        # The address is signed; the key must not go to another server.
        return str(httpx.URL(url).join(answer.headers["location"]))
    if answer.status_code in (400, 404, 405, 410, 501) and "/weights/" in tinker_path:
        return None  # newer services have no archives; training checkpoints have another way
    raise WeightsDownloadError(
        f"{tinker_path} cannot be downloaded: HTTP {answer.status_code} {answer.text[:200]}"
    )


def _download_files(connection: service.Connection, tinker_path: str, output: Path) -> None:
    """Export a training checkpoint to a temporary external checkpoint and download its files."""
    import tinker

    from tinker_cookbook.utils.sdk_compat import service_message, wait_for_client

    client = connection.service_client()
    rest = connection.rest_client()
    try:
        training = wait_for_client(client.create_training_client_from_state(tinker_path))
        saved = training.save_weights_external("download", ttl_seconds=EXPORT_SECONDS).result()
        try:
            urls = rest.get_external_weights_urls(saved.path).result().urls
            for name, url in urls.items():
                if Path(name).name != name:
                    raise WeightsDownloadError(f"{tinker_path}: the file name {name!r} is unsafe.")
                with open(output / name, "wb") as file:
                    _fetch(url, file)
        finally:
            rest.delete_checkpoint_from_tinker_path(saved.path).result()
    except (tinker.TinkerError, ValueError) as error:
        raise WeightsDownloadError(
            f"{tinker_path} cannot be downloaded: {service_message(error)}"
        ) from error


def _fetch(url: str, target: IO[bytes]) -> None:
    """Download a file; continue after a broken connection."""
    import httpx

    for attempt in range(1, MAX_ATTEMPTS + 1):
        have = target.tell()
        asked = {"Range": f"bytes={have}-"} if have else {}
        try:
            with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=60) as got:
                got.raise_for_status()
                if have and got.status_code != 206:
                    target.seek(0)  # the server does not continue; start again
                    target.truncate()
                for chunk in got.iter_bytes(CHUNK_BYTES):
                    target.write(chunk)
            return
        except httpx.HTTPStatusError as error:
            raise WeightsDownloadError(
                f"the archive cannot be downloaded: HTTP {error.response.status_code}."
            ) from error
        except httpx.HTTPError as error:
            if attempt == MAX_ATTEMPTS:
                raise WeightsDownloadError(
                    f"the download broke off {attempt} times, after {target.tell()} bytes: {error}."
                ) from error


def _unpack(archive: IO[bytes], output: Path, tinker_path: str) -> None:
    """Unpack a tar archive; names that lead outside the folder are refused."""
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as opened:
            opened.extractall(output, filter="data")
        (output / "checkpoint_complete").unlink(missing_ok=True)  # a mark that some services add
    except tarfile.TarError as error:
        raise WeightsDownloadError(
            f"{tinker_path}: the archive is damaged ({error}); try again."
        ) from error
