"""Places to run untrusted programs: this machine, SandboxFusion, Modal."""

from enum import StrEnum

from tinker_cookbook.sandbox.local_sandbox import LocalSandbox, SandboxLimits
from tinker_cookbook.sandbox.modal_sandbox import ModalSandbox
from tinker_cookbook.sandbox.sandbox_interface import (
    SandboxInterface,
    SandboxResult,
    SandboxTerminatedError,
)
from tinker_cookbook.sandbox.sandboxfusion import SandboxFusionClient, SandboxFusionSandbox

__all__ = [
    "LocalSandbox",
    "ModalSandbox",
    "SandboxBackend",
    "SandboxFusionClient",
    "SandboxFusionSandbox",
    "SandboxInterface",
    "SandboxLimits",
    "SandboxResult",
    "SandboxTerminatedError",
    "create_sandbox",
]


class SandboxBackend(StrEnum):
    """The place where programs run."""

    LOCAL = "local"
    SANDBOXFUSION = "sandboxfusion"
    MODAL = "modal"


async def create_sandbox(backend: SandboxBackend | str) -> SandboxInterface:
    """Create a sandbox with the backend's default settings; `await sandbox.cleanup()` removes it.

    Raises:
        ConfigurationError: if the backend's package or account is missing.
    """
    backend = SandboxBackend(backend)
    if backend is SandboxBackend.LOCAL:
        return LocalSandbox()
    if backend is SandboxBackend.SANDBOXFUSION:
        return SandboxFusionSandbox()
    return await ModalSandbox.create()
