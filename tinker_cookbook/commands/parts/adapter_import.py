"""Store a PEFT adapter that was trained elsewhere as a checkpoint of the local service."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tinker_cookbook.exceptions import ConfigurationError, WeightsAdapterError
from tinker_cookbook.utils.nearest_name import nearest_name

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.model.lora import Adapter, LoraTarget
    from tinker_cookbook.local.engine.types import LoraSpec
    from tinker_cookbook.local.service.storage.store import Store
    from tinker_cookbook.weights.adapter_files import Adapter as PeftAdapter

__all__ = ["Imported", "import_adapter"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Imported:
    """The checkpoints of an imported adapter."""

    state_path: str
    sampler_path: str
    model: str
    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Kinds of adapted modules, such as q_proj."""


def import_adapter(
    folder: Path, state_dir: Path, *, model: str | None, name: str, renderer: str | None
) -> Imported:
    """Write the adapter into a state folder; services that use the folder can load it at once.

    Args:
        folder: The adapter, as PEFT saves it.
        state_dir: State folder of the local service.
        model: The base model, as the service names it; default: the one that the adapter names.
        name: Name of the checkpoints.
        renderer: Chat format to record; None if it is unknown.

    Raises:
        ConfigurationError: if the name is not allowed, or the base model cannot be found.
        WeightsAdapterError: if the adapter cannot be read, is not plain LoRA, or adapts modules
            that the service cannot adapt.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"name={name!r} is not allowed; use letters, digits and the signs . _ -"
        )
    from tinker_cookbook.local.service.storage.store import Store
    from tinker_cookbook.model_files import resolve_model_folder
    from tinker_cookbook.weights.adapter_files import open_adapter

    with open_adapter(folder) as source:
        model_name = _service_name(model or source.base_model, folder)
        base_folder = resolve_model_folder(model_name, weights=False)
        adapter = _convert(source, base_folder)
        store = Store(state_dir)
        try:
            paths = _save(store, adapter, model_name, base_folder, name, renderer)
        finally:
            store.close()
        modules = {module.rpartition(".")[2] for module in source.matrices}
        return Imported(*paths, model_name, source.rank, source.alpha, tuple(sorted(modules)))


def _service_name(model: str, folder: Path) -> str:
    """Return the name under which the service offers a model."""
    from tinker_cookbook.model_files import DEFAULT_MODEL, find_on_this_machine

    if not model:
        raise ConfigurationError(
            f"{folder} does not name its base model; add --model NAME, as `serve` names it."
        )
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    default = find_on_this_machine(DEFAULT_MODEL)
    is_default = default is not None and path.resolve() == default.resolve()
    return DEFAULT_MODEL if is_default else str(path.resolve())


def _convert(source: PeftAdapter, base_folder: Path) -> Adapter:
    """Return the adapter in the service's form.

    The service adapts all modules of a part (attention, MLP, output embedding). The modules that
    PEFT did not adapt get matrices of zeros: they change nothing, and their gradient is zero, so
    they stay as they are when the adapter is trained further.
    """
    from tinker_cookbook.local.engine.model.lora import Adapter, check_lora_spec
    from tinker_cookbook.local.engine.types import LoraSpec
    from tinker_cookbook.local.errors import UserError

    everything = LoraSpec(rank=source.rank, alpha=source.alpha)
    try:
        check_lora_spec(everything)
    except UserError as error:
        raise WeightsAdapterError(f"{source.folder}: {error}") from error
    targets = {target.path: target for target in _targets(base_folder, everything)}
    _check_modules(source, targets)
    parts = {targets[module].part for module in source.matrices}
    spec = LoraSpec(
        rank=source.rank,
        alpha=source.alpha,
        train_attn="attn" in parts,
        train_mlp="mlp" in parts,
        train_unembed="unembed" in parts,
    )
    adapter = Adapter(spec, [target for target in targets.values() if target.part in parts])
    adapter.parameters.zero_()
    _copy_matrices(source, adapter)
    return adapter


def _targets(base_folder: Path, spec: LoraSpec) -> tuple[LoraTarget, ...]:
    """Return every module of the base model that the service can adapt; reads no weights."""
    from tinker_cookbook.local.engine.model.architecture import read_arch, read_config_json
    from tinker_cookbook.local.engine.model.hf_model import find_linears
    from tinker_cookbook.local.engine.model.hf_support import model_on_meta
    from tinker_cookbook.local.engine.model.lora import lora_targets
    from tinker_cookbook.local.engine.model.vision import has_vision

    arch = read_arch(base_folder)
    if arch is not None:
        return lora_targets(arch, spec)
    reads_images = has_vision(read_config_json(base_folder))
    return find_linears(model_on_meta(base_folder), reads_images=reads_images)


def _check_modules(source: PeftAdapter, targets: Mapping[str, LoraTarget]) -> None:
    """Refuse modules that the service cannot adapt, by name."""
    kinds = sorted({path.rpartition(".")[2] for path in targets})
    for module in source.matrices:
        if module in targets:
            continue
        near = nearest_name(module, list(targets))
        hint = f" The nearest one is {near}." if near else ""
        raise WeightsAdapterError(
            f"{source.folder} adapts {module}, which the service cannot adapt in this model; it "
            f"can adapt {', '.join(kinds)}.{hint} Check --model, or merge the adapter into its "
            "base model with PEFT and train that."
        )


def _copy_matrices(source: PeftAdapter, adapter: Adapter) -> None:
    for module, matrices in source.matrices.items():
        pairs = {"A": (adapter.a(module), matrices.a), "B": (adapter.b(module), matrices.b)}
        for side, (place, matrix) in pairs.items():
            if place.shape != matrix.shape:
                raise WeightsAdapterError(
                    f"{source.folder}: {module} lora_{side} has the shape {tuple(matrix.shape)}, "
                    f"this model and rank need {tuple(place.shape)}. Check --model and the rank."
                )
            place.copy_(matrix)


def _save(
    store: Store,
    adapter: Adapter,
    model: str,
    base_folder: Path,
    name: str,
    renderer: str | None,
) -> tuple[str, str]:
    """Store the adapter as a training state and as sampler weights of a new run."""
    from tinker_cookbook.checkpoint_utils import add_renderer_name_to_user_metadata
    from tinker_cookbook.local.engine.model.adapter_origin import find_origin
    from tinker_cookbook.local.service.storage.store import NewCheckpoint

    metadata: dict[str, str] = {}
    add_renderer_name_to_user_metadata(metadata, renderer)
    run_id = _add_run(store, adapter.spec, model, metadata, name)
    paths = []
    for segment in ("weights", "sampler_weights"):
        staged = store.stage()
        try:
            origin = find_origin(model, base_folder)
            adapter.save_peft(staged, base_model_name=model, origin=origin)
            new = NewCheckpoint(run_id=run_id, segment=segment, name=name, has_optimizer=False)
            paths.append(store.commit(staged, new).tinker_path)
        finally:
            store.discard(staged)
    return paths[0], paths[1]


def _add_run(store: Store, spec: LoraSpec, model: str, metadata: dict[str, str], name: str) -> str:
    """Record a finished session with one run, which cannot be trained itself."""
    from tinker_cookbook.local.service.state.sessions import DEFAULT_PROJECT
    from tinker_cookbook.local.service.storage.rows import Lora, RunRow, SessionRow

    now = time.time()
    session_id = str(uuid.uuid4())
    store.index.insert(
        SessionRow(
            session_id=session_id,
            created_at=now,
            last_seen_at=now,
            display_name=f"import of {name}",
            user_metadata=None,
            tags=[],
            project_id=DEFAULT_PROJECT,
            sdk_version=None,
            status={"type": "client_finished", "reason": {"type": "success"}, "detail": "imported"},
        )
    )
    run_id = f"{session_id}:train:0"
    store.index.insert(
        RunRow(
            run_id=run_id,
            session_id=session_id,
            base_model=model,
            lora=cast(Lora, asdict(spec)),
            user_metadata=metadata or None,
            created_at=now,
            last_request_at=now,
            is_trainable=False,
        )
    )
    return run_id
