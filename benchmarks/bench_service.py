"""The service under test: `tinker-cookbook serve` in a separate process, used through the SDK."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (64, 128, 192, 256, 288, 320, 512, 224)
"""8 conversations, 1,984 tokens; the first third of each is prompt and has weight 0."""
MAX_ID = 40_000
RANK = 32
_START_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Service:
    """A running service and an SDK client."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str | None = None,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        import tinker

        self.model = model
        self.started = time.perf_counter()
        self._state = tempfile.TemporaryDirectory(prefix="bench-service-")
        port = _free_port()
        key = f"tml-{secrets.token_hex(20)}"
        words = ["serve", "--model", model, "--port", str(port), "--state-dir", self._state.name]
        words += ["--dtype", dtype] if dtype else []
        words += ["--num-threads", str(threads)] if threads else []
        words += ["--device", device] if device else []
        self._output = Path(self._state.name, "output.txt")
        with self._output.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinker_cookbook.cli", *words],
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "TINKER_API_KEY": key},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        os.environ["NO_PROXY"] = "127.0.0.1,localhost"
        url = f"http://127.0.0.1:{port}"
        self._wait_for(url)
        self.client = tinker.ServiceClient(base_url=url, api_key=key)

    def _wait_for(self, url: str) -> None:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                ended = self._process.poll() is not None
                if ended or time.perf_counter() - self.started > _START_SECONDS:
                    text = self._output.read_text(encoding="utf-8")
                    raise RuntimeError(f"the service did not start:\n{text}") from error
                time.sleep(0.02)

    def new_run(self, *, seed: int = 0) -> Any:
        """Return a training client with adapters on attention and MLP, like those of the peers."""
        return self.client.create_lora_training_client(
            base_model=self.model, rank=RANK, seed=seed, train_unembed=False
        ).result()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2]
        return sum(int(ticks) for ticks in fields.split()[11:13]) / _TICKS

    def memory(self, field: str = "VmHWM") -> int:
        """Return memory in bytes: the peak for `VmHWM`, the current size for `VmRSS`."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(field)

    def close(self) -> None:
        """Stop the service and remove its state."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()
            self._process.wait()
        self._state.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def conversations(lengths: tuple[int, ...], *, seed: int = 0) -> list[list[int]]:
    """Return fixed pseudo-random token ids; one more than each length, for the shifted targets."""
    rng = np.random.default_rng(seed)
    return [rng.integers(100, MAX_ID, length + 1).tolist() for length in lengths]


def passages(folder: str, lengths: tuple[int, ...]) -> list[list[int]]:
    """Return pieces of the documentation's text like `conversations`, by a model's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    files = sorted(Path(__file__).parent.parent.glob("docs/*.md"))
    ids = tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in files)).ids
    ends = np.cumsum([length + 1 for length in lengths])
    return [ids[end - length - 1 : end] for end, length in zip(ends, lengths, strict=True)]


def make_data(
    lengths: tuple[int, ...],
    sequences: list[list[int]] | None = None,
    *,
    prompt_tokens: int | None = None,
) -> list[Any]:
    """Return sequences (default: the conversations) as datums.

    The prompt, which is their first third unless told otherwise, has weight 0.
    """
    from tinker import types

    data = []
    for tokens in sequences or conversations(lengths):
        weights = np.ones(len(tokens) - 1, np.float32)
        weights[: len(weights) // 3 if prompt_tokens is None else prompt_tokens - 1] = 0
        inputs = {
            "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:], np.int64)),
            "weights": types.TensorData.from_numpy(weights),
        }
        prompt = types.ModelInput.from_ints(tokens[:-1])
        data.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
    return data


def train_step(run: Any, data: list[Any]) -> float:
    """Run one pipelined forward_backward and optim_step; return the summed loss."""
    from tinker import types

    loss = run.forward_backward(data, "cross_entropy")
    step = run.optim_step(types.AdamParams(learning_rate=1e-4))
    result = loss.result()
    step.result()
    return float(result.metrics["loss:sum"])


def generate(
    samplers: list[Any], prompts: list[list[int]], *, new_tokens: int, num_samples: int = 1
) -> int:
    """Sample from all prompts concurrently, alternating samplers; return the number of tokens."""
    from tinker import types

    params = types.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[MAX_ID + 5000])
    futures = [
        samplers[index % len(samplers)].sample(
            types.ModelInput.from_ints(prompt), num_samples, params
        )
        for index, prompt in enumerate(prompts)
    ]
    return sum(len(s.tokens) for future in futures for s in future.result().sequences)


def score(sampler: Any, prompts: list[list[int]]) -> int:
    """Compute logprobs of all prompts concurrently; return the number of tokens."""
    from tinker import types

    futures = [sampler.compute_logprobs(types.ModelInput.from_ints(prompt)) for prompt in prompts]
    return sum(len(future.result()) for future in futures)
