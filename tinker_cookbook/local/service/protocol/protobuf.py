"""The SDK's generated protobuf module, without importing the SDK.

`import tinker` imports torch if it is installed, which takes seconds. The generated file itself
needs only protobuf, so it is loaded from its path. If the SDK has already been imported, as in
tests, its module is used: a second copy would clash with the first in protobuf's descriptor pool.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

__all__ = ["load_proto"]

SDK_MODULE = "tinker.proto.tinker_public_pb2"


@cache
def load_proto() -> ModuleType:
    """Return the module that defines ForwardBackwardRequest, SampleResponse and the rest."""
    loaded = sys.modules.get(SDK_MODULE)
    return loaded if loaded is not None else _load_from_file(_proto_path())


def _proto_path() -> Path:
    package = importlib.util.find_spec("tinker")
    assert package is not None, "tinker is not installed"
    assert package.submodule_search_locations is not None, "tinker is not a package"
    return Path(package.submodule_search_locations[0]) / "proto" / "tinker_public_pb2.py"


def _load_from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tinker_public_pb2", path)
    assert spec is not None, f"{path} cannot be loaded"
    assert spec.loader is not None, f"{path} cannot be loaded"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
