"""Start the proxy from the command line.

python -m tinker_cookbook.capture.proxy.serve --base-model Qwen/Qwen3-8B --record-to captures
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from tinker_cookbook.capture.endpoint import make_server
from tinker_cookbook.capture.exporter import CaptureExporter, JsonlFileSink
from tinker_cookbook.capture.instrument import instrument_tinker, uninstrument_tinker
from tinker_cookbook.capture.proxy.app import ProxyDeps, make_app

__all__ = ["main", "validate_bind"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY_VARIABLE = "CAPTURE_PROXY_KEY"


def validate_bind(host: str, auth_token: str | None) -> str | None:
    """Return why a host may not be listened on, or None if it may."""
    if host in _LOOPBACK or auth_token:
        return None
    return f"--host {host} can be reached by others; set {_KEY_VARIABLE} to a secret key first"


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; return the exit status."""
    arguments = _parser().parse_args(argv)
    token = os.environ.get(_KEY_VARIABLE) or None
    problem = validate_bind(arguments.host, token)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    exporter = None
    if arguments.record_to:
        from tinker_cookbook.stores.storage import storage_from_uri

        exporter = CaptureExporter(JsonlFileSink(storage_from_uri(arguments.record_to)))
        instrument_tinker(exporter)
    try:
        asyncio.run(_serve(arguments, token))
    except KeyboardInterrupt:
        return 0
    finally:
        if exporter is not None:
            uninstrument_tinker()
            exporter.shutdown()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base-model", default=None, help="The base model to sample from.")
    parser.add_argument("--model-path", default=None, help="A checkpoint to sample from.")
    parser.add_argument("--renderer", default=None, help="The chat format.")
    parser.add_argument("--base-url", default=None, help="Address of the Tinker service.")
    parser.add_argument("--host", default="127.0.0.1", help="The address to listen on.")
    parser.add_argument("--port", type=int, default=8401, help="The port to listen on.")
    parser.add_argument("--max-tokens", type=int, default=1024, help="Maximum tokens per reply.")
    parser.add_argument("--record-to", default="", help="Folder of the records; none by default.")
    return parser


async def _serve(arguments: argparse.Namespace, token: str | None) -> None:
    from tinker_cookbook import model_info, service
    from tinker_cookbook.renderers import load_renderer

    with service.connect(
        arguments.base_url, arguments.base_model, checkpoint=arguments.model_path
    ) as connection:
        model = connection.check_model(arguments.base_model)
        named = {"base_model": model}
        if arguments.model_path:
            named = {"model_path": arguments.model_path}
        client = await connection.service_client().create_sampling_client(**named)
        renderer_name = arguments.renderer or model_info.get_recommended_renderer_name(model)
        deps = ProxyDeps(load_renderer(renderer_name, model), client, model, arguments.max_tokens)
        app = make_app(deps, auth_token=token)
        server = make_server(app, host=arguments.host, port=arguments.port)
        print(f"http://{arguments.host}:{arguments.port}/run/NAME/traj/0/v1", flush=True)
        await server.serve()


if __name__ == "__main__":
    sys.exit(main())
