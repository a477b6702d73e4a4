"""Peers that do the same work: transformers + PEFT and llama.cpp, each in its own process.

A short probe chooses the faster number format, so that no peer is slowed down by a format that the
processor handles badly.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_service import MAX_ID, RANK, conversations

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DTYPES = ("float32", "bfloat16")


class PeerError(RuntimeError):
    """A peer cannot run on this machine; the message gives the reason."""


class PeerProcess:
    """A peer in a separate process, so that its memory and CPU time can be measured."""

    def __init__(
        self,
        kind: str,
        folder: str,
        threads: int,
        *,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> None:
        """Start the process; `dtype` None lets a probe choose the format."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, kind, folder, threads, dtype, device)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._receive()

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Run a method; return its tokens, seconds, CPU seconds and the peak memory so far."""
        self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise PeerError("its process ended, probably because of a lack of memory") from error
        if isinstance(answer, str):
            raise PeerError(answer)
        return answer

    def close(self) -> None:
        """End the process, which stops when its pipe is closed."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, kind: str, folder: str, threads: int, dtype: str | None, device: str) -> None:
    try:
        builders = {
            "train": _TrainPeer,
            "generate": _GeneratePeer,
            "llama_cpp": _LlamaPeer,
            "engine": _EnginePeer,
        }
        peer = builders[kind](folder, threads, dtype, device)
        pipe.send(peer.about)
        while True:
            name, arguments = pipe.recv()
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = getattr(peer, name)(**arguments)
            _wait_for(device)
            pipe.send(
                {
                    "tokens": tokens,
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            )
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _wait_for(device: str) -> None:
    """Wait for what was queued on a GPU, so that it counts as time of the call."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _load_peft(folder: str, dtype: str, device: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=_attention(dtype, device)
    )
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(LINEAR))
    return get_peft_model(base, config).to(device)


def _attention(dtype: str, device: str) -> str:
    """Return the fastest attention of transformers: flash-attn needs a GPU and 16-bit numbers."""
    flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash and device == "cuda" and dtype == "bfloat16" else "sdpa"


class _TorchPeer:
    """A model in the format that a probe found faster."""

    def __init__(self, folder: str, threads: int, dtype: str | None, device: str) -> None:
        import torch
        import transformers

        self._device = device
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        seconds = {}
        for name in [] if dtype else _DTYPES:
            self._prepare(folder, name)
            self._probe()
            started = time.perf_counter()
            self._probe()
            _wait_for(device)
            seconds[name] = time.perf_counter() - started
        self.dtype = dtype or min(_DTYPES, key=lambda name: seconds[name])
        if not seconds or self.dtype != _DTYPES[-1]:
            self._prepare(folder, self.dtype)
            self._probe()
        attention = _attention(self.dtype, device)
        self.about = {"dtype": self.dtype, "attention": attention, "probe_seconds": seconds}

    def _prepare(self, folder: str, dtype: str) -> None:
        raise NotImplementedError

    def _probe(self) -> None:
        raise NotImplementedError


class _TrainPeer(_TorchPeer):
    """Standard training steps: logits of all positions, then cross-entropy."""

    def _prepare(self, folder: str, dtype: str) -> None:
        import torch

        self._model = _load_peft(folder, dtype, self._device)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def _probe(self) -> None:
        self.step(lengths=(64,), padded=False)

    def step(self, *, lengths: tuple[int, ...], padded: bool) -> int:
        """Run forward, backward and Adam, on one padded batch or on one conversation at a time."""
        import torch

        sequences = conversations(lengths)
        size = len(sequences) if padded else 1
        for first in range(0, len(sequences), size):
            batch = _padded(sequences[first : first + size])
            ids, mask, targets = (tensor.to(self._device) for tensor in batch)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            loss.backward()
            del logits, loss
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sum(lengths)


def _padded(sequences: list[list[int]]) -> tuple[Any, Any, Any]:
    """Return input ids, attention mask and targets (-100 for untrained positions)."""
    import torch

    width = max(len(tokens) for tokens in sequences) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, tokens in enumerate(sequences):
        length = len(tokens) - 1
        ids[row, :length] = torch.tensor(tokens[:-1])
        mask[row, :length] = 1
        targets[row, length // 3 : length] = torch.tensor(tokens[1 + length // 3 :])
    return ids, mask, targets


class _GeneratePeer(_TorchPeer):
    """Generation and scoring with transformers, with the adapter attached."""

    def _prepare(self, folder: str, dtype: str) -> None:
        self._model = _load_peft(folder, dtype, self._device).eval()

    def _probe(self) -> None:
        self.generate(prompts=conversations((31,) * 4), new_tokens=8)

    def generate(self, *, prompts: list[list[int]], new_tokens: int) -> int:
        import torch

        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        return len(prompts) * new_tokens

    def score(self, *, prompts: list[list[int]]) -> int:
        """Compute logprobs of prompts of equal length in one forward pass."""
        import torch

        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids).logits[:, :-1].float()
            torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])
        return ids.numel()


class _LlamaPeer:
    """The server of llama.cpp in this process (xllamacpp), without an adapter."""

    def __init__(self, folder: str, threads: int, dtype: str | None, device: str) -> None:
        import xllamacpp

        del dtype  # the file decides
        if device != "cpu":
            raise PeerError("llama.cpp is measured on a CPU only")
        path = os.environ.get("BENCH_GGUF") or _find_gguf(folder)
        self._api, self._path, self._threads = xllamacpp, path, threads
        self._server: Any = None
        self.about = {"file": Path(path).name, "version": xllamacpp.__version__}

    def prepare(self, *, count: int, length: int) -> int:
        """Start a server with one slot per sequence; this is not part of the measurement."""
        params = self._api.CommonParams()
        params.model.path = self._path
        params.n_parallel, params.n_ctx = count, count * length
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.cache_ram_mib, params.verbosity = 0, -1
        self._server = self._api.Server(params)
        return 0

    def generate(self, *, prompts: list[list[int]], new_tokens: int) -> int:
        """Sample from all prompts concurrently at temperature 1."""
        request = {
            "n_predict": new_tokens,
            "temperature": 1.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
        }
        with ThreadPoolExecutor(len(prompts)) as pool:
            calls = [{**request, "prompt": prompt} for prompt in prompts]
            answers = list(pool.map(self._server.handle_completions, calls))
        if any("usage" not in answer for answer in answers):
            raise PeerError(f"llama.cpp refused: {answers[0]}")
        return sum(answer["usage"]["completion_tokens"] for answer in answers)


class _EnginePeer:
    """The engine itself in this process, without the service."""

    def __init__(self, folder: str, threads: int, dtype: str | None, device: str) -> None:
        import torch
        from bench_limits import format_in_use
        from train_speed import engine_run

        del dtype  # the service's format counts
        torch.set_num_threads(threads)
        used = format_in_use(device)
        self._run = engine_run(Path(folder), used, device=device)
        self.about: dict[str, Any] = {"dtype": used}
        self.step(lengths=(64,))

    def step(self, *, lengths: tuple[int, ...]) -> int:
        """Run forward, backward and Adam."""
        from train_speed import engine_data

        from tinker_cookbook.local.engine.types import AdamSpec, LossSpec

        data = engine_data(lengths, self._run.model.vocab_size)
        self._run.forward_backward(data, LossSpec("cross_entropy"))
        self._run.optim_step(AdamSpec(learning_rate=1e-4))
        return sum(lengths)


def _find_gguf(folder: str) -> str:
    found = sorted(Path(folder).glob("*.gguf"))
    if not found:
        raise PeerError(
            "no GGUF file of the model; write one with benchmarks/bench_gguf.py and set BENCH_GGUF "
            "to it"
        )
    return str(found[0])


def random_prompts(rng: Any, count: int, length: int) -> list[list[int]]:
    """Return new random prompts, so that no prefix cache applies."""
    return rng.integers(100, MAX_ID, (count, length)).tolist()
