"""Play an environment at the terminal, or watch a model play, to check rewards before training.

    python -m recipes.play_env                                       # the task of rl_basic
    python -m recipes.play_env env=multiturn 'settings={"game": "twenty_questions"}'
    python -m recipes.play_env env=tool_use player=model             # or model_path=tinker://...
    python -m recipes.play_env env=my_module:MyDatasetBuilder

`env` is the name of a recipe, or a data set builder as module:name. `settings` are settings of that
recipe or builder, as JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
from pathlib import Path
from typing import Any, Literal

import chz

from tinker_cookbook import cli_utils, recipe, service
from tinker_cookbook.completers import TinkerTokenCompleter
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl import train
from tinker_cookbook.rl.play_w_env import play_env, print_trajectory_summary
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import Env, RLDatasetBuilder
from tinker_cookbook.runs.options import check_options
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.utils.misc_utils import lookup_func

logger = logging.getLogger(__name__)
DEFAULTS: dict[str, Any] = {
    "groups_per_batch": 1,
    "group_size": 1,
    "max_turns": 5,
}


@chz.chz
class Config:
    """The settings of this program."""

    env: str = chz.field(
        default="rl_basic", doc="Environment: a recipe, or a data set builder as module:name."
    )
    settings: str = chz.field(
        default="{}", doc="Settings of the recipe or the builder, as a JSON object."
    )
    player: Literal["person", "model"] = chz.field(default="person", doc="Who writes the replies.")
    batch: int = chz.field(default=0, doc="Number of the batch whose first group is played.")
    model_name: str | None = chz.field(default=None, doc="Base model; default: the service's.")
    model_path: str | None = chz.field(
        default=None, doc="Saved weights (tinker://...) that play; this sets player=model."
    )
    renderer_name: str | None = chz.field(default=None, doc="Chat format; default: the model's.")
    base_url: str | None = chz.field(
        default=None, doc="URL of the Tinker service for player=model, or `local`."
    )
    max_tokens: int = chz.field(default=64, doc="Maximum number of tokens per reply of the model.")
    multiline: bool = chz.field(
        default=False, doc="Whether a typed reply has several lines and ends with an empty one."
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)


def build_dataset_builder(config: Config, model_name: str) -> RLDatasetBuilder:
    """Return the named builder with the given settings, and small sizes by default."""
    try:
        given = json.loads(config.settings)
    except ValueError as error:
        raise ConfigurationError(
            f"settings={config.settings!r} is not JSON ({error}); write settings='{{\"seed\": 1}}'."
        ) from error
    if not isinstance(given, dict):
        raise ConfigurationError(
            f"settings={config.settings!r} is not a JSON object; write settings='{{\"seed\": 1}}'."
        )
    if ":" not in config.env:
        module = load_recipe(config.env)
        check_settings(config.env, module.Config, given)
        words = [f"{key}={value}" for key, value in given.items()]
        options = cli_utils.parse_config(module.Config, words)
        options = chz.replace(options, renderer_name=config.renderer_name)
        return module.build(recipe.complete(options, model_name)).dataset_builder
    from tinker_cookbook import model_info

    builder_class = load_builder(config.env)
    renderer_name = config.renderer_name or model_info.get_recommended_renderer_name(model_name)
    named = {**DEFAULTS, "num_batches": config.batch + 1}
    named |= {"model_name": model_name, "renderer_name": renderer_name}
    known = check_settings(config.env, builder_class, given)
    try:
        return builder_class(**{k: v for k, v in {**named, **given}.items() if k in known})
    except TypeError as error:
        raise ConfigurationError(
            f"settings={config.settings} does not fit: {error}; give it as JSON, such as "
            "settings='{\"seed\": 1}'."
        ) from error


def load_recipe(name: str) -> Any:
    """Import an RL recipe, a module with `Config` and `build`."""
    here = Path(__file__).parent
    module = f"{name}.__main__" if (here / name).is_dir() else name
    try:
        found = importlib.import_module(f"{__package__ or here.name}.{module}")
        if issubclass(found.Config, train.RunOptions):
            return found
    except (ModuleNotFoundError, AttributeError) as error:
        logger.debug("env=%s: %s", name, error)
    raise ConfigurationError(
        f"env={name} is not a recipe with environments; use one such as rl_basic or multiturn, or "
        "a data set builder as module:name."
    )


def load_builder(env: str) -> Any:
    """Import the class that `module:name` names."""
    try:
        return lookup_func(env)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"env={env} cannot be imported ({error.__cause__ or error}); write module:name, and "
            "start this program in the folder of the module."
        ) from error


def check_settings(env: str, settings_class: type, given: dict[str, Any]) -> set[str]:
    """Refuse settings that the class does not have, and return the names of those that it has."""
    known = {name for name in inspect.signature(settings_class).parameters if name[:2] != "__"}
    unknown = set(given) - known
    if unknown:
        raise ConfigurationError(
            f"settings has {', '.join(sorted(unknown))}, which {env} does not know; use "
            f"{', '.join(sorted(known))}."
        )
    return known


async def play(config: Config, model_name: str) -> None:
    """Play one episode, and show each turn with its reward."""
    builder = build_dataset_builder(config, model_name)
    if not callable(builder):
        raise ConfigurationError(
            f"env={config.env} cannot be called; give a data set builder, such as what "
            "problem_data(problems, grade) returns."
        )
    dataset, _ = await builder()
    if config.batch >= len(dataset):
        raise ConfigurationError(
            f"batch={config.batch} is beyond the data; use 0 to {len(dataset) - 1}."
        )
    group = dataset.get_batch(config.batch)[0]
    try:
        env = (await group.make_envs())[0]
        if config.player == "model" or config.model_path:
            await watch_model(config, model_name, env)
        else:
            await play_env(env, get_tokenizer(model_name), multiline=config.multiline)
    except EOFError as error:
        print(f"\n{error}; the episode is left unfinished")
    finally:
        await group.cleanup()


async def watch_model(config: Config, model_name: str, env: Env) -> None:
    """Let a model reply, and show the episode."""
    from tinker_cookbook.utils.sdk_futures import wait_for_client

    path = config.model_path
    source: dict[str, Any] = {"model_path": path} if path else {"base_model": model_name}
    with service.connect(config.base_url, model_name) as connection:
        print(connection.describe(), flush=True)
        client = connection.service_client()
        created = await asyncio.to_thread(client.create_sampling_client, **source)
        sampling_client = await asyncio.to_thread(wait_for_client, created)
        policy = TinkerTokenCompleter(sampling_client, config.max_tokens)
        trajectory = await run_rollout(policy, env)
    print_trajectory_summary(trajectory, get_tokenizer(model_name))


def main(config: Config) -> None:
    """Play one episode."""
    model_name = service.resolve_model(config.base_url, config.model_name)
    asyncio.run(play(config, model_name))


if __name__ == "__main__":
    cli_utils.entrypoint(main)
