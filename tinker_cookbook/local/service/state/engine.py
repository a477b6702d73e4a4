"""Access to the engine, which starts in the background, and the catalog of models.

The engine takes seconds to import torch and to load weights; the service answers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.local.engine.types import ModelInfo
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.settings import ServiceSettings
from tinker_cookbook.model_files import find_context_window, resolve_model_folder

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.worker import EngineWorker

__all__ = ["EngineAccess", "ModelCard"]

logger = logging.getLogger(__name__)

FOLDER_LEVELS = 3
MAX_LISTED = 500
_FALLBACK_LENGTH = 2048
"""Context length of models whose configuration has no limit. The engine uses the same."""


@dataclass(frozen=True)
class ModelCard:
    """What clients can learn about a model before it is loaded."""

    folder: str
    architecture: str
    max_context_length: int


def _read_card(name: str) -> ModelCard:
    folder = resolve_model_folder(name, weights=False).resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json does not hold an object")
    return ModelCard(
        folder=str(folder),
        architecture=str(config.get("model_type", "unknown")),
        max_context_length=find_context_window(config) or _FALLBACK_LENGTH,
    )


def _list_folders(roots: Sequence[Path]) -> list[str]:
    """Return the model folders in some folders, up to three levels deep, as in the hub's cache."""
    found: list[str] = []
    for root in roots:
        for folder, below, files in os.walk(root):
            depth = len(Path(folder).relative_to(root).parts)
            if depth and "config.json" in files:
                found.append(str(Path(folder).resolve()))
            if (depth and "config.json" in files) or depth == FOLDER_LEVELS:
                below.clear()
            below[:] = sorted(name for name in below if not name.startswith("."))
            if len(found) >= MAX_LISTED:
                return found
    return list(dict.fromkeys(found))


class EngineAccess:
    """Starts the engine and gives access to it when it is ready."""

    def __init__(self, settings: ServiceSettings, *, spill_dir: Path | None = None) -> None:
        """`spill_dir` is the folder for adapters that are moved out of memory."""
        self._settings = settings
        self._spill_dir = spill_dir
        self._worker: Future[EngineWorker] = Future()
        self._loads: dict[str, Future[ModelInfo]] = {}
        self._cards: dict[str, ModelCard] = {}
        self._is_closing = False
        self._names = {name: name for name in settings.models}
        for name in settings.models:
            if Path(name).is_dir():
                self._names.setdefault(str(Path(name).resolve()), name)

    def start(self) -> None:
        threading.Thread(target=self._start_worker, name="engine-start", daemon=True).start()

    def _start_worker(self) -> None:
        try:
            from tinker_cookbook.local.engine.worker import EngineWorker

            settings = self._settings
            worker = EngineWorker(replace(settings.engine, spill_dir=self._spill_dir))
            first = worker.load_model(settings.models[0])
        except BaseException as error:
            logger.exception("the engine could not be started")
            self._worker.set_exception(error)
            return
        first.add_done_callback(self._log_first_load)
        self._loads[settings.models[0]] = first
        self._worker.set_result(worker)

    def _log_first_load(self, load: Future[ModelInfo]) -> None:
        # these objects live until the end; scanning them in each collection would delay requests
        gc.collect()
        gc.freeze()
        error = load.exception()
        if error is not None and self._is_closing:
            logger.info(
                "model %s was not loaded, because the service stops", self._settings.models[0]
            )
        elif error is not None:
            logger.error("model %s could not be loaded: %s", self._settings.models[0], error)
        else:
            logger.info("model %s is loaded", self._settings.models[0])

    async def ready(self) -> EngineWorker:
        """Return the engine; wait until it has started."""
        return await asyncio.shield(asyncio.wrap_future(self._worker))

    async def wait_for_failure(self) -> None:
        """Return when the engine could not start or has ended. Otherwise never return."""
        try:
            worker = await self.ready()
            first = asyncio.wrap_future(self._loads[self._settings.models[0]])
            await asyncio.gather(first, return_exceptions=True)
        except Exception:
            return
        if worker.has_ended:
            return
        await asyncio.Event().wait()

    @property
    def worker(self) -> EngineWorker:
        """The running engine. Only for callers that know that it is ready."""
        return self._worker.result(timeout=0)

    @property
    def is_ready(self) -> bool:
        return self._worker.done() and self._worker.exception() is None

    def loaded_models(self) -> dict[str, ModelInfo]:
        """Return the models that have been loaded."""
        loads = list(self._loads.items())
        done = [(name, load) for name, load in loads if load.done() and not load.cancelled()]
        return {name: load.result() for name, load in done if load.exception() is None}

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were named at the start of the service."""
        return self._settings.models

    async def offered(self) -> list[str]:
        """Return the models that clients may use: named ones, then those in model folders."""
        found = await asyncio.to_thread(_list_folders, self._settings.model_dirs)
        known = {str(Path(name).resolve()) for name in self.models if Path(name).is_dir()}
        offered = list(self.models)
        for name in found:
            if name not in known:
                with contextlib.suppress(UserError):  # not a model folder
                    await self.describe(name)
                    offered.append(name)
        return offered

    def canonical_name(self, base_model: str, *, field: str = "base_model") -> str:
        """Return the name under which a model is served.

        Raises:
            UserError: the service does not serve it.
        """
        name = self._names.get(base_model) or self._find_in_folders(base_model)
        if name is None:
            served = [*self.models, *(f"the models in {d}" for d in self._settings.model_dirs)]
            raise UserError(
                f"{field}={base_model!r} is not served here; this service has "
                f"{', '.join(served)}. Start it with --model {base_model} to add it"
            )
        return name

    def check_base_model(self, base_model: str | None, trained_on: str, path: str) -> None:
        """Refuse a given base model that is not the one of a checkpoint.

        Raises:
            UserError: the base models differ.
        """
        if base_model is not None and self.canonical_name(base_model) != trained_on:
            raise UserError(
                f"base_model={base_model!r} does not fit {path}, which was trained on "
                f"{trained_on!r}; leave it out"
            )

    def _find_in_folders(self, base_model: str) -> str | None:
        """Return a folder in one of the model folders, given its absolute or relative path."""
        for root in self._settings.model_dirs:
            try:
                folder = (root / base_model).resolve(strict=True)
            except (OSError, ValueError, RuntimeError):
                continue
            inside = folder != root and folder.is_relative_to(root)
            if inside and (folder / "config.json").is_file():
                return str(folder)
        return None

    async def load(self, name: str) -> ModelInfo:
        """Load a served model, unless it is loaded.

        Raises:
            UserError: it cannot be loaded; the message names the model and the cause.
        """
        worker = await self.ready()
        load = self._loads.get(name)
        if load is None or (load.done() and load.exception() is not None):
            load = self._loads[name] = worker.load_model(name)
        try:
            return await asyncio.shield(asyncio.wrap_future(load))
        except (UserError, TinkerCookbookError, OSError) as error:
            raise UserError(f"base_model={name!r} cannot be loaded: {error}") from error

    async def describe(self, name: str) -> ModelCard:
        """Return what a served model's config.json says. Its weights are not loaded.

        Raises:
            UserError: the model's files cannot be found or read.
        """
        card = self._cards.get(name)
        if card is None:
            try:
                card = self._cards[name] = await asyncio.to_thread(_read_card, name)
            except (TinkerCookbookError, OSError, ValueError) as error:
                raise UserError(f"base_model={name!r} cannot be read: {error}") from error
        return card

    def close(self) -> None:
        """Stop the engine. An engine that is still starting ends with the process."""
        self._is_closing = True
        if self.is_ready:
            self.worker.close()
