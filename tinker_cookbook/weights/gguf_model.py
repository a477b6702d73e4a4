"""Run a GGUF file through llama.cpp, to compare it with the service.

llama.cpp's library comes from the package llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError, WeightsError
from tinker_cookbook.weights.llama_tools import has_library

__all__ = ["GgufModel"]

_F32 = 0
"""ggml's number of float32, for the KV cache."""


class GgufModel:
    """A model in llama.cpp, on the CPU, with a float32 KV cache. Use it as a context manager."""

    def __init__(
        self, file: str | Path, *, adapter: str | Path | None = None, max_tokens: int = 2048
    ) -> None:
        """Load a model.

        Args:
            file: GGUF file of a model.
            adapter: GGUF file of an adapter for it.
            max_tokens: Longest sequence.

        Raises:
            ConfigurationError: if llama-cpp-python is not installed.
            WeightsError: if llama.cpp cannot load a file.
        """
        self._lib = _load_library()
        self._max_tokens = max_tokens
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(os.fsencode(file), settings)
        if not self._model:
            raise WeightsError(f"llama.cpp cannot load {file}; its messages are above.")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self._context = self._lib.llama_init_from_model(self._model, self._context_settings())
        if adapter is not None:
            self._load_adapter(adapter)

    def _context_settings(self) -> Any:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self._max_tokens
        settings.n_seq_max = 1
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        return settings

    def _load_adapter(self, file: str | Path) -> None:
        adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(file))
        if not adapter:
            raise WeightsError(f"llama.cpp cannot load the adapter {file}.")
        adapters = (type(adapter) * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise WeightsError(f"llama.cpp cannot use the adapter {file}.")

    def tokenize(self, text: str, *, control_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, without those that llama.cpp would add around it.

        Args:
            text: The text.
            control_tokens: Whether the names of control tokens in the text stand for them.
        """
        data = text.encode()
        room = len(data) + 8
        found = (ctypes.c_int32 * room)()
        number = self._lib.llama_tokenize(
            self._vocab, data, len(data), found, room, False, control_tokens
        )
        return list(found[:number])

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp writes a begin-of-sequence token before a prompt."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def chat_template(self) -> str:
        """The chat template in the file; empty if there is none."""
        found = self._lib.llama_model_chat_template(self._model, None)
        return found.decode() if found else ""

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after each token, float32 [T, vocabulary]."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(tokens, 0, all_logits=True)

    def _decode(self, tokens: Sequence[int], start: int, *, all_logits: bool) -> np.ndarray:
        """Continue the sequence; return the logits of the new tokens, or of the last one."""
        if start + len(tokens) > self._max_tokens:
            raise WeightsError(f"{start + len(tokens)} tokens exceed {self._max_tokens}.")
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = all_logits or index == len(tokens) - 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status != 0:
            raise WeightsError(f"llama.cpp failed to compute {len(tokens)} tokens ({status}).")
        rows = len(tokens) if all_logits else 1
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (rows, self.vocab_size)).copy()

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int]) -> list[int]:
        """Return the most likely continuation, token by token; it ends with a stop token."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        reply: list[int] = []
        new = list(prompt)
        while len(reply) < max_tokens:
            start = len(prompt) + len(reply) - 1 if reply else 0
            reply.append(int(self._decode(new, start, all_logits=False)[0].argmax()))
            new = reply[-1:]
            if reply[-1] in stop:
                break
        return reply

    def close(self) -> None:
        """Free the memory; may be called twice."""
        if self._model is not None:
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _load_library() -> ModuleType:
    """Return llama.cpp's functions; their messages are not printed."""
    if not has_library():
        raise ConfigurationError(
            "running a GGUF file needs llama.cpp's library; install it with "
            "`pip install llama-cpp-python`."
        )
    import llama_cpp  # pyright: ignore[reportMissingImports]

    if not _callbacks:

        @llama_cpp.llama_log_callback
        def discard(level: int, text: bytes, _: Any) -> None:
            del level, text

        _callbacks.append(discard)
        llama_cpp.llama_log_set(discard, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


_callbacks: list[Any] = []
"""Keeps the function that llama.cpp calls for its messages."""
