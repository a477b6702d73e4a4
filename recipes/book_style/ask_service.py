"""Ask the base model on a Tinker service."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinker_cookbook import service
from tinker_cookbook.renderers import get_renderer, get_text_content
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.utils.sdk_futures import wait_for_client

__all__ = ["ask_base_model"]


@contextmanager
def ask_base_model(
    common: ChatDatasetBuilderCommonConfig, base_url: str | None, max_tokens: int
) -> Iterator[Callable[[str], str]]:
    """Yield a function from a prompt to the greedy answer of the base model."""
    import tinker

    renderer = get_renderer(common.renderer_name, get_tokenizer(common.model_name_for_tokenizer))
    params = tinker.SamplingParams(
        max_tokens=max_tokens, temperature=0.0, stop=renderer.get_stop_sequences()
    )
    with service.connect(base_url, common.model_name_for_tokenizer) as connection:
        client = connection.service_client()
        sampler = wait_for_client(client.create_sampling_client(base_model=connection.model_name))

        def ask(prompt: str) -> str:
            model_input = renderer.build_generation_prompt([{"role": "user", "content": prompt}])
            result = sampler.sample(model_input, 1, params).result()
            message, _ = renderer.parse_response(list(result.sequences[0].tokens))
            return get_text_content(message)

        yield ask
