"""Sample from a saved checkpoint, or from a base model.

    python examples/sample_from_checkpoint.py tinker://... --prompt "How is the sea?"
    python examples/sample_from_checkpoint.py HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Hello"

A checkpoint is looked up in the state folder of the local service, or on the service that
--base-url (or the environment) names.
"""

import argparse

from tinker_cookbook import cli_utils, model_info, service
from tinker_cookbook.renderers import get_renderer, get_text_content
from tinker_cookbook.tokenizer_utils import get_tokenizer


def main(
    target: str | None,
    prompt: str,
    *,
    model: str | None = None,
    renderer_name: str | None = None,
    base_url: str | None = None,
    max_tokens: int = 100,
    temperature: float = 0.7,
) -> str:
    """Print and return one answer."""
    import tinker  # takes a second to import, and --help does not need it

    checkpoint = target if target is not None and target.startswith("tinker://") else None
    model_name = model if checkpoint else target
    with service.connect(base_url, model_name, checkpoint=checkpoint) as connection:
        print(connection.describe())
        client = connection.service_client()
        if checkpoint:
            sampler = client.create_sampling_client(model_path=checkpoint).result()
        else:
            sampler = client.create_sampling_client(base_model=connection.model_name).result()
        base_model = sampler.get_base_model()
        tokenizer = get_tokenizer(base_model)
        name = renderer_name or model_info.get_recommended_renderer_name(base_model)
        renderer = get_renderer(name, tokenizer)

        params = tinker.SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop=renderer.get_stop_sequences()
        )
        model_input = renderer.build_generation_prompt([{"role": "user", "content": prompt}])
        result = sampler.sample(model_input, 1, params).result()
        message, _ = renderer.parse_response(result.sequences[0].tokens)
    answer = get_text_content(message)
    print(f"\n> {prompt}\n{answer}")
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", help="checkpoint (tinker://...) or base model")
    parser.add_argument("--prompt", default="How is the weather out there?")
    parser.add_argument("--model", help="base model of the checkpoint; default: the service's")
    parser.add_argument("--renderer", dest="renderer_name", help="default: the model's format")
    parser.add_argument("--base-url", help="URL of a Tinker service; default: as for recipes")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7)
    with cli_utils.errors_in_one_line():
        main(**vars(parser.parse_args()))
