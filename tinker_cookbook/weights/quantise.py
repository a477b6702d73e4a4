"""Quantise a GGUF file with the library of llama-cpp-python: `python -m ... SOURCE TARGET NUMBER`.

`llama_tools` runs this module as a separate process if the program `llama-quantize` is missing.
NUMBER is llama.cpp's number of the format.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["quantise"]


def quantise(source: str, target: str, number: int) -> int:
    """Call llama.cpp's quantiser and return its status; 0 is success."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = number
    settings.nthread = len(os.sched_getaffinity(0))
    pointer = ctypes.byref(settings)
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), pointer)


if __name__ == "__main__":
    sys.exit(quantise(sys.argv[1], sys.argv[2], int(sys.argv[3])))
