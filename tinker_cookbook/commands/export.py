"""Write a checkpoint as a model folder that other tools load.

Forms: `merged` is a full model for transformers, vLLM and SGLang; `adapter` is a PEFT adapter;
`gguf` is a full model for llama.cpp, with a Modelfile for Ollama; `gguf-adapter` is an adapter for
llama.cpp, to be loaded next to the base model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError, RendererError
from tinker_cookbook.utils.byte_sizes import format_bytes

if TYPE_CHECKING:
    from tinker_cookbook.service import Connection

__all__ = ["add_arguments", "run"]

FORMS = ("adapter", "merged", "gguf", "gguf-adapter")
DTYPES = ("bfloat16", "float16", "float32")
QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
MAX_KL = 0.01
"""Nats per token. Rounding weights to bfloat16 costs about 0.0003."""
MAX_KL_QUANTISED = 0.5
"""The same for formats below 8 bits, which cost more the smaller the model is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", metavar="PATH", help="tinker://RUN/sampler_weights/NAME")
    parser.add_argument("folder", metavar="FOLDER", help="folder to create")
    parser.add_argument(
        "--as",
        dest="form",
        choices=FORMS,
        default="merged",
        help="form of the result, see above (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="number format of a merged model (default: %(default)s)",
    )
    parser.add_argument(
        "--quant",
        choices=QUANTS,
        help="number format of a GGUF file (default: q8_0; f32 for an adapter); the ones below 8 "
        "bits need llama.cpp's quantiser, e.g. of the package llama-cpp-python",
    )
    parser.add_argument(
        "--renderer",
        metavar="NAME",
        help="chat format of the Modelfile (default: the run's, or the recommended one of the "
        "model)",
    )
    parser.add_argument(
        "--llama-cpp",
        metavar="FOLDER",
        help="checkout of llama.cpp whose converter is used (default: the packaged one)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="base model; default: the one that the service names"
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="Tinker service that has the checkpoint; default: as the recipes choose",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the result with the service on sampled tokens; exit with 1 above --max-kl",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help=f"largest KL divergence that --check accepts, per token (default: {MAX_KL}; "
        f"{MAX_KL_QUANTISED} below 8 bits)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and compare if asked."""
    from tinker_cookbook import renderers, service
    from tinker_cookbook.runs import interrupts

    if not args.checkpoint.startswith("tinker://"):
        raise ConfigurationError(
            f"PATH={args.checkpoint} must begin with tinker://, e.g. "
            "tinker://RUN/sampler_weights/final."
        )
    if args.renderer is not None:
        renderers.check_renderer_name(args.renderer)
    with service.connect(args.base_url) as connection:
        model = args.model or connection.model_of(args.checkpoint)
        # From here on, Ctrl-C waits until what was written has been deleted.
        interrupts.mark_begun()
        _export(args, connection, model)
        print(f"{args.form:<8} {args.folder}")
        num_bytes = sum(path.stat().st_size for path in Path(args.folder).iterdir())
        print(f"size     {format_bytes(num_bytes)}")
        if args.form == "gguf":
            _write_modelfile(args, connection, model)
        return _check(args, connection, model) if args.check else 0


def _export(args: argparse.Namespace, connection: Connection, model: str) -> None:
    from tinker_cookbook import weights

    with tempfile.TemporaryDirectory(prefix="tinker-export-") as scratch:
        adapter = weights.download(
            tinker_path=args.checkpoint,
            output_dir=str(Path(scratch) / "adapter"),
            base_url=connection.base_url,
        )
        _note_base_format(Path(adapter))
        if args.form == "adapter":
            weights.build_lora_adapter(
                base_model=model, adapter_path=adapter, output_path=args.folder
            )
        elif args.form == "merged":
            weights.build_hf_model(
                base_model=model, adapter_path=adapter, output_path=args.folder, dtype=args.dtype
            )
        else:
            _export_gguf(args, model, adapter)


def _note_base_format(adapter: Path) -> None:
    """Say so if the adapter was trained on quantised weights: exports use the full ones."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        base_format = (file.metadata() or {}).get("base_format", "full")
    if base_format != "full":
        print(
            f"base     the adapter was trained on base weights in {base_format}; the export uses "
            "the full ones, and --check measures the difference"
        )


def _export_gguf(args: argparse.Namespace, model: str, adapter: str) -> None:
    from tinker_cookbook.weights import build_gguf, build_gguf_adapter

    if args.form == "gguf":
        build_gguf(
            base_model=model,
            adapter_path=adapter,
            output_path=args.folder,
            quantisation=args.quant or "q8_0",
            llama_cpp=args.llama_cpp,
        )
    else:
        build_gguf_adapter(
            base_model=model,
            adapter_path=adapter,
            output_path=args.folder,
            quantisation=args.quant or "f32",
            llama_cpp=args.llama_cpp,
        )


def _write_modelfile(args: argparse.Namespace, connection: Connection, model: str) -> None:
    """Write Ollama's Modelfile; print why not if the chat format cannot be expressed."""
    from tinker_cookbook import checkpoint_utils, model_info
    from tinker_cookbook.renderers import load_renderer
    from tinker_cookbook.weights.gguf import find_gguf
    from tinker_cookbook.weights.ollama import write_modelfile

    name = args.renderer or checkpoint_utils.get_renderer_name_from_checkpoint(
        connection.service_client(), args.checkpoint
    )
    name = name or model_info.get_recommended_renderer_name(model)
    file = find_gguf(args.folder)
    assert file is not None, "the export has just been written"
    try:
        path = write_modelfile(file, load_renderer(name, model))
    except RendererError as error:
        print(f"ollama   no Modelfile: {error}")
        return
    print(f"ollama   ollama create NAME -f {path}   (chat format: {name})")


def _check(args: argparse.Namespace, connection: Connection, model: str) -> int:
    from tinker_cookbook.model_files import resolve_model_folder
    from tinker_cookbook.utils.sdk_compat import wait_for_client
    from tinker_cookbook.weights.verify import compare_with_service

    sampler = args.checkpoint.replace("/weights/", "/sampler_weights/")
    client = wait_for_client(connection.service_client().create_sampling_client(model_path=sampler))
    found = compare_with_service(client, args.folder, resolve_model_folder(model))
    below_8_bits = args.form == "gguf" and (args.quant or "").startswith(("q4", "q5", "q6"))
    bound = args.max_kl if args.max_kl is not None else MAX_KL_QUANTISED if below_8_bits else MAX_KL
    verdict = "ok" if found.kl <= bound else f"above {bound}"
    print(
        f"check    KL(service, export) = {found.kl:.2e} nats per token, {verdict}; largest "
        f"difference {found.max_difference:.2e} nats ({found.num_tokens} tokens); "
        f"{found.num_greedy} of {found.num_prompts} greedy replies equal"
    )
    return 0 if found.kl <= bound else 1
