"""Imports point down only: the folders are the architecture, and this test is its wall."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "tinker_cookbook"

# The longest prefix that fits decides. A module may import its own layer and those below it.
LAYERS = {
    "tinker_cookbook": 0,
    "tinker_cookbook.exceptions": 0,
    "tinker_cookbook.utils": 1,
    "tinker_cookbook.model_files": 1,
    "tinker_cookbook.replies": 1,
    "tinker_cookbook.dialects": 1,
    "tinker_cookbook.hub_datasets": 2,
    "tinker_cookbook.tokenizer_utils": 2,
    "tinker_cookbook.model_info": 2,
    "tinker_cookbook.hyperparam_utils": 2,
    "tinker_cookbook.model_shapes": 2,
    "tinker_cookbook.unembedding": 2,
    "tinker_cookbook.checkpoint_utils": 2,
    "tinker_cookbook.image_processing_utils": 2,
    "tinker_cookbook.interrupts": 2,
    "tinker_cookbook.run_directory": 2,
    "tinker_cookbook.run_options": 2,
    "tinker_cookbook.run_report": 2,
    "tinker_cookbook.runs": 2,
    "tinker_cookbook.service": 2,
    # The loops and loggers write through these; the rest of `stores` reads runs back.
    "tinker_cookbook.stores.checkpoint_record": 1,
    "tinker_cookbook.stores.storage": 1,
    "tinker_cookbook.stores._incremental": 1,
    "tinker_cookbook.stores.training_store": 1,
    "tinker_cookbook.stores": 4,
    "tinker_cookbook.viewer": 4,
    "tinker_cookbook.renderers": 3,
    "tinker_cookbook.display": 4,
    "tinker_cookbook.supervised": 4,
    "tinker_cookbook.rl": 4,
    "tinker_cookbook.preference": 4,
    "tinker_cookbook.weights": 4,
    "tinker_cookbook.distillation": 4,
    "tinker_cookbook.completers": 4,
    "tinker_cookbook.eval": 4,
    "tinker_cookbook.sandbox": 4,
    "tinker_cookbook.tool_use": 4,
    "tinker_cookbook.third_party": 4,
    "tinker_cookbook.capture": 4,
    "tinker_cookbook.supervised.train": 5,
    "tinker_cookbook.rl.async_training": 5,
    "tinker_cookbook.rl.loop": 5,
    "tinker_cookbook.rl.recipe": 6,
    "tinker_cookbook.rl.stream_training": 5,
    "tinker_cookbook.rl.sync_training": 5,
    "tinker_cookbook.rl.train": 5,
    "tinker_cookbook.preference.loop": 5,
    "tinker_cookbook.preference.one_step": 5,
    "tinker_cookbook.preference.train_dpo": 5,
    "tinker_cookbook.preference.train_kto": 5,
    "tinker_cookbook.preference.train_pointwise": 5,
    "tinker_cookbook.distillation.sdft": 5,
    "tinker_cookbook.distillation.train_off_policy": 5,
    "tinker_cookbook.distillation.on_policy_loop": 5,
    "tinker_cookbook.distillation.train_on_policy": 5,
    "tinker_cookbook.cli_utils": 6,
    "tinker_cookbook.recipe": 6,
    "tinker_cookbook.recipe_runner": 6,
    "tinker_cookbook.recipes": 6,
    "tinker_cookbook.settings_help": 6,
    "tinker_cookbook.commands": 6,
    "tinker_cookbook.cli": 6,
}
LOCAL = f"{PACKAGE}.local"
# What both sides of the wire share: the lowest layer, which knows neither renderers nor services.
SHARED = tuple(
    f"{PACKAGE}.{name}" for name in ("exceptions", "utils", "model_files", "replies", "dialects")
)
LOCAL_MAY_IMPORT = (LOCAL, *SHARED)
REPLIES = f"{PACKAGE}.replies"
MAY_IMPORT_LOCAL = (LOCAL, f"{PACKAGE}.commands")
# The rooms of the local service, and the rooms that each may import; the longest prefix decides.
# Training and sampling never meet, and nothing below the process knows who starts it.
ENGINE_SEAM = "types settings csr loss_graph loss_graph_names memory budget"
"""Modules of the engine that say what crosses its border; they hold no torch models."""
SAMPLING_MODEL = """adapters batch cache_rows kv_cache known_scores prefix_index prefix_store
random_numbers torch_decoder native_adapters native_decoder native_structs hf_decoder
torch_layers adapter_bank static_step static_decoder cuda_graphs"""
"""Modules of sampling that compute batches; they know nothing of requests and scheduling."""
LOCAL_ROOMS: dict[str, str] = {
    "errors": "",
    "limits": "errors",
    **{f"engine.{name}": "errors seam" for name in ENGINE_SEAM.split()},
    "engine.native": "errors seam",
    "engine.model": "errors seam engine.native",
    "engine.training": "errors seam engine.native engine.model",
    "engine.sampling": "errors seam engine.native engine.model",
    "engine": "errors seam engine.native engine.model engine.training engine.sampling",
    "service": "errors seam engine engine.sampling",
    "service.storage": "errors seam service",
    "service.protocol": "errors seam service",
    "service.state": "errors seam engine engine.sampling service service.storage service.protocol",
    "service.routes": "errors seam engine service service.storage service.protocol service.state",
    "openai_api": "errors seam engine engine.sampling service service.protocol service.state",
    "app": "errors service service.protocol service.routes service.state openai_api",
    "plan_shapes": "errors seam engine.native engine.model engine.sampling",
    "plan": "errors seam engine.native engine.model plan_shapes",
    "process": "errors seam engine engine.model engine.native service service.storage "
    "service.protocol service.state app plan",
}
# Only names for code of other recipes; it is not a recipe, so it cannot be copied.
OTHER_NAMES = "recipes.multiplayer_rl"
# Importing any of these takes seconds; client code does so inside the functions that need them.
TORCH_WHEN_CALLED = (
    f"{PACKAGE}.weights",
    f"{PACKAGE}.preference.train_dpo",
    f"{PACKAGE}.distillation.sdft_datums",
)
"""Functions of these modules compute with torch; importing them does not load it."""
HEAVY = ("torch", "tinker", "transformers", "datasets")


@dataclass(frozen=True)
class Edge:
    """One import statement."""

    source: str
    target: str
    where: str
    at_import: bool
    """False inside a function or under `if TYPE_CHECKING`."""


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_edges(path: Path, root: Path) -> Iterator[Edge]:
    source = module_name(path, root)
    package = source if path.name == "__init__.py" else source.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, at_import in walk_imports(tree, at_import=True):
        for target in import_targets(node, package):
            yield Edge(source, target, f"{path.relative_to(root)}:{node.lineno}", at_import)


def walk_imports(
    node: ast.AST, *, at_import: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        else:
            yield from walk_imports(child, at_import=at_import and not runs_later(child))


def runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def import_targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Absolute names; `from a import b` counts as `a.b`, since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    return [f"{base}.{alias.name}" for alias in node.names]


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str | None:
    """The room of a module or name of the local service; None outside it and for its entry."""
    inside = name.removeprefix(f"{LOCAL}.")
    rooms = [room for room in LOCAL_ROOMS if under(inside, room)]
    return max(rooms, key=len) if rooms and inside != name else None


def room_problem(edge: Edge) -> str | None:
    """What is wrong with an edge between two rooms of the local service, or None."""
    source, target = room_of(edge.source), room_of(edge.target)
    if source is None or target is None or source == target:
        return None
    allowed = set(LOCAL_ROOMS[source].split())
    if "seam" in allowed or source.removeprefix("engine.") in ENGINE_SEAM.split():
        allowed |= {"limits", *(f"engine.{name}" for name in ENGINE_SEAM.split())}
    return None if target in allowed else f"local.{source} imports local.{target}"


def layer_of(name: str) -> int | None:
    prefixes = [prefix for prefix in LAYERS if under(name, prefix)]
    return LAYERS[max(prefixes, key=len)] if prefixes else None


def edge_problem(edge: Edge) -> str | None:
    """What is wrong with an edge of the package, or None."""
    if under(edge.target, "recipes") or under(edge.target, f"{PACKAGE}.recipes"):
        return "the package imports a recipe"
    if under(edge.source, LOCAL):
        inside = under(edge.target, PACKAGE)
        if inside and not any(under(edge.target, prefix) for prefix in LOCAL_MAY_IMPORT):
            return "the local service imports client code"
        return room_problem(edge)
    if under(edge.source, REPLIES) and not under(edge.target, REPLIES):
        outside = edge.target.partition(".")[0] not in sys.stdlib_module_names
        return "the reader of replies imports more than the standard library" if outside else None
    if under(edge.target, "torch"):
        if not edge.at_import and any(under(edge.source, m) for m in TORCH_WHEN_CALLED):
            return None
        return "torch is used outside local/"
    if edge.at_import and edge.target.partition(".")[0] in HEAVY:
        return f"{edge.target} is imported when the module is; import it where it is used"
    if not under(edge.target, PACKAGE):
        return None
    if under(edge.target, LOCAL):
        allowed = any(under(edge.source, prefix) for prefix in MAY_IMPORT_LOCAL)
        return None if allowed else "client code imports the local service"
    return layer_problem(edge)


def layer_problem(edge: Edge) -> str | None:
    source, target = layer_of(edge.source), layer_of(edge.target)
    if source is None or target is None:
        return None
    # `from package import name` where the name is re-exported by the package's own __init__.
    if edge.source == edge.target.rpartition(".")[0]:
        return None
    return f"layer {source} imports layer {target}" if target > source else None


def package_edges() -> list[Edge]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [edge for path in paths for edge in read_edges(path, ROOT)]


def test_no_edge_points_up():
    problems = [
        f"{edge.where}: {edge.source} -> {edge.target}: {problem}"
        for edge in package_edges()
        if (problem := edge_problem(edge))
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_of_the_local_service_has_a_room():
    modules = {module_name(path, ROOT) for path in (ROOT / PACKAGE / "local").rglob("*.py")}
    without = {name for name in modules if room_of(name) is None}
    assert without == {LOCAL, f"{LOCAL}.__main__"}


def test_modules_import_each_other_without_a_circle():
    """Imports inside functions and under TYPE_CHECKING count too."""
    modules = {module_name(path, ROOT): path for path in (ROOT / PACKAGE).rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = [edge.target for edge in read_edges(path, ROOT)]
        # `from a import b` names a module `a.b`, or else something in the module `a`.
        imported = {each if each in modules else each.rpartition(".")[0] for each in targets}
        graph[name] = (imported & modules.keys()) - {name}
    assert len(graph) > 300, "the whole package is read"
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle


def test_what_computes_batches_knows_nothing_of_scheduling():
    sampling = f"{LOCAL}.engine.sampling"
    inside = tuple(f"{sampling}.{name}" for name in SAMPLING_MODEL.split())
    problems = [
        f"{edge.where}: {edge.source} -> {edge.target}"
        for edge in package_edges()
        if edge.source in inside and under(edge.target, sampling)
        if not any(under(edge.target, name) for name in inside)
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_has_a_layer():
    modules = {module_name(path, ROOT) for path in (ROOT / PACKAGE).rglob("*.py")}
    outside = {name for name in modules if not under(name, LOCAL)}
    without = sorted(name for name in outside if name != PACKAGE and layer_of(name) == 0)
    assert without == [f"{PACKAGE}.exceptions"], f"give these a layer: {without}"


def test_recipes_and_examples_use_no_torch_and_no_other_recipe():
    problems = []
    for folder in ("recipes", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            own = ".".join(path.relative_to(ROOT).with_suffix("").parts[:2])
            for edge in read_edges(path, ROOT):
                foreign = under(edge.target, "recipes") and not under(edge.target, own)
                foreign = foreign and own != OTHER_NAMES
                if foreign or under(edge.target, "torch") or under(edge.target, LOCAL):
                    problems.append(f"{edge.where}: imports {edge.target}")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "target", "at_import", "word"),
    [
        ("tinker_cookbook.renderers.chatml", "tinker_cookbook.supervised.data", False, "layer 3"),
        ("tinker_cookbook.supervised.data", "tinker_cookbook.supervised.train", True, "layer 4"),
        ("tinker_cookbook.supervised.data", "torch.nn", False, "torch"),
        ("tinker_cookbook.weights.merge", "torch", True, "torch"),
        ("tinker_cookbook.supervised.data", "tinker.types", True, "where it is used"),
        ("tinker_cookbook.local.app", "tinker_cookbook.renderers", False, "client code"),
        ("tinker_cookbook.service", "tinker_cookbook.local.errors", False, "local service"),
        ("tinker_cookbook.replies.reader", "tinker_cookbook.exceptions", False, "standard library"),
        ("tinker_cookbook.replies.reader", "pydantic", True, "standard library"),
        ("tinker_cookbook.cli", "recipes.sl_basic", False, "recipe"),
        (f"{LOCAL}.engine.training.run", f"{LOCAL}.engine.sampling.stops.x", True, "sampling"),
        (f"{LOCAL}.engine.native.products", f"{LOCAL}.engine.model.matrices.x", True, "model"),
        (f"{LOCAL}.service.state.core", f"{LOCAL}.openai_api.sampling.x", False, "openai_api"),
        (f"{LOCAL}.service.routes.rest", f"{LOCAL}.process.launch.x", False, "process"),
    ],
)
def test_the_wall_stops_a_wrong_edge(source: str, target: str, at_import: bool, word: str):
    problem = edge_problem(Edge(source, target, "here:1", at_import))
    assert problem is not None
    assert word in problem


@pytest.mark.parametrize(
    ("source", "target", "at_import"),
    [
        ("tinker_cookbook.supervised.train", "tinker_cookbook.supervised.data", True),
        ("tinker_cookbook.supervised.data", "tinker.types", False),
        ("tinker_cookbook.local.engine.training.run", "torch.nn", True),
        ("tinker_cookbook.local.openai_api.reply", "tinker_cookbook.replies.reader", True),
        ("tinker_cookbook.renderers.parsing", "tinker_cookbook.replies.reader", True),
        ("tinker_cookbook.local.app", "tinker_cookbook.model_files.cookbook_home", True),
    ],
)
def test_the_wall_lets_a_right_edge_through(source: str, target: str, at_import: bool):
    assert edge_problem(Edge(source, target, "here:1", at_import)) is None


def test_imports_are_read_relative_and_inside_functions(tmp_path: Path):
    package = tmp_path / "pkg"
    package.mkdir()
    module = package / "mod.py"
    module.write_text("from . import near\nfrom .deep import x\ndef f():\n    import torch\n")
    edges = [(edge.target, edge.at_import) for edge in read_edges(module, tmp_path)]
    assert edges == [("pkg.near", True), ("pkg.deep.x", True), ("torch", False)]
