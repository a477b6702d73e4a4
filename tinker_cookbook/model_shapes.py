"""The matrices of a model that an adapter trains, from config.json or a table of known models.

Projections of attention (or of linear attention or Mamba where a model has them instead), of every
MLP and of every expert are counted, and the unembedding. Routers, norms, convolutions, embeddings
and vision towers are not. A matrix that a checkpoint stores fused (gate with up, or queries with
keys and values) counts as its parts, unless the model's own module is one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["AdapterShapes", "hidden_size", "known_config", "read_shapes"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterShapes:
    """Sums of inputs and outputs over all matrices: the parameters of an adapter with rank 1."""

    attention: int
    mlp: int
    unembedding: int
    hidden: int


def read_shapes(model_name: str, config: Config) -> AdapterShapes:
    """Return the shapes of the matrices that a config.json describes.

    Raises:
        ConfigurationError: if the kind of model is unknown, or the file lacks a key it needs.
    """
    text = _Text(model_name, text_config(config))
    kind = str(text.config.get("model_type", ""))
    count = _KINDS.get(kind)
    if count is None:
        raise ConfigurationError(
            f"model_name={model_name} is of type {kind!r}; its matrices are known for "
            f"{', '.join(sorted(_KINDS))}."
        )
    attention, mlp = count(text)
    hidden = hidden_size(model_name, config)
    return AdapterShapes(attention, mlp, hidden + text["vocab_size"], hidden)


def hidden_size(model_name: str, config: Config) -> int:
    """Return the width of the residual stream, under whatever name the config has it.

    Raises:
        ConfigurationError: if the config lacks it.
    """
    text = text_config(config)
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(text.get(name), int):
            return text[name]
    raise ConfigurationError(
        f"model_name={model_name}: its config.json has none of hidden_size, n_embd, d_model; it "
        "does not describe a language model that is known here."
    )


def text_config(config: Config) -> Config:
    """Return the language model's part of a config.json; in vision models it is nested."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), Mapping):
            # Some configs keep settings of the whole model outside the nested part.
            shared = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            return {**shared, **config[name]}
    return config


@dataclass(frozen=True)
class _Text:
    """A config whose errors name the missing key."""

    model_name: str
    config: Config

    def __getitem__(self, key: str) -> int:
        value = self.config.get(key)
        if value is None:
            raise ConfigurationError(
                f"model_name={self.model_name}: its config.json has no {key}, from which the "
                f"matrices of a {self.config.get('model_type')} model follow; add it, or take the "
                "file that came with the weights."
            )
        return value

    def get(self, key: str, default: int) -> int:
        value = self.config.get(key)
        return default if value is None else value

    @property
    def kinds_of_layers(self) -> list[str]:
        given = self.config.get("layer_types") or self.config.get("layers_block_type")
        if given:
            return list(given)
        every = self.get("full_attention_interval", 4)
        return [
            "full_attention" if (i + 1) % every == 0 else "linear_attention"
            for i in range(self["num_hidden_layers"])
        ]

    def heads(self) -> tuple[int, int]:
        """Return the width of all query heads and of all key heads."""
        heads = self["num_attention_heads"]
        width = self.get("head_dim", self["hidden_size"] // heads)
        return heads * width, self.get("num_key_value_heads", heads) * width


def _gated(text: _Text, width: int) -> int:
    """Count an MLP of gate, up and down."""
    return 3 * (text["hidden_size"] + width)


def _grouped_attention(text: _Text, gates: int = 1) -> int:
    hidden = text["hidden_size"]
    queries, keys = text.heads()
    return (hidden + gates * queries) + 2 * (hidden + keys) + (queries + hidden)


def _latent_attention(text: _Text) -> int:
    """Count DeepSeek's multi-head latent attention: low-rank queries, keys and values."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    rope, plain, values = text["qk_rope_head_dim"], text["qk_nope_head_dim"], text["v_head_dim"]
    latent = text["kv_lora_rank"]
    queries = heads * (plain + rope)
    rank = text.get("q_lora_rank", 0)
    total = (hidden + rank) + (rank + queries) if rank else hidden + queries
    total += (hidden + latent + rope) + (latent + heads * (plain + values))
    return total + heads * values + hidden


def _linear_attention(text: _Text) -> int:
    """Count Qwen3.5's gated delta net: one matrix for q, k and v, and those of its gates."""
    hidden = text["hidden_size"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    heads = text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    gates = (hidden + values) + 2 * (hidden + heads)
    return (hidden + 2 * keys + values) + gates + (values + hidden)


def _dense(text: _Text) -> tuple[int, int]:
    layers = text["num_hidden_layers"]
    mlp = _gated(text, text["intermediate_size"])
    return layers * _grouped_attention(text), layers * mlp


def _phi3(text: _Text) -> tuple[int, int]:
    """Count a Phi-3: queries, keys and values are one matrix; so are gate and up."""
    layers, hidden, width = (
        text[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    queries, keys = text.heads()
    attention = (hidden + queries + 2 * keys) + (queries + hidden)
    return layers * attention, layers * ((hidden + 2 * width) + (width + hidden))


def _gpt2(text: _Text) -> tuple[int, int]:
    layers, hidden = text["n_layer"], text["n_embd"]
    width = text.get("n_inner", 4 * hidden)
    return layers * ((hidden + 3 * hidden) + 2 * hidden), layers * 2 * (hidden + width)


def _num_experts(text: _Text) -> int:
    """Return the number of routed experts; published files and transformers use other keys."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return text[next((name for name in names if name in text.config), names[0])]


def _experts(text: _Text, width_key: str) -> int:
    return _num_experts(text) * _gated(text, text[width_key])


def _mixtral(text: _Text) -> tuple[int, int]:
    layers = text["num_hidden_layers"]
    experts = _experts(text, "intermediate_size")
    return layers * _grouped_attention(text), layers * experts


def _qwen3_moe(text: _Text) -> tuple[int, int]:
    layers = text["num_hidden_layers"]
    every = text.get("decoder_sparse_step", 1)
    plain = set(text.config.get("mlp_only_layers") or ())
    sparse = sum((i + 1) % every == 0 and i not in plain for i in range(layers))
    mlp = sparse * _experts(text, "moe_intermediate_size")
    if sparse < layers:
        mlp += (layers - sparse) * _gated(text, text["intermediate_size"])
    return layers * _grouped_attention(text), mlp


def _qwen3_5(text: _Text) -> tuple[int, int]:
    full = text.kinds_of_layers.count("full_attention")
    linear = len(text.kinds_of_layers) - full
    attention = full * _grouped_attention(text, gates=2) + linear * _linear_attention(text)
    if text.config["model_type"] == "qwen3_5_text":
        return attention, (full + linear) * _gated(text, text["intermediate_size"])
    experts = _experts(text, "moe_intermediate_size")
    shared = _gated(text, text["shared_expert_intermediate_size"])
    return attention, (full + linear) * (experts + shared)


def _shared_experts(
    attention: Callable[[_Text], int],
) -> Callable[[_Text], tuple[int, int]]:
    """Count models whose first layers are dense, with shared and routed experts in the others."""

    def count(text: _Text) -> tuple[int, int]:
        layers, dense = text["num_hidden_layers"], text.get("first_k_dense_replace", 1)
        width = text["moe_intermediate_size"]
        experts = _num_experts(text) * _gated(text, width)
        shared = _gated(text, text.get("n_shared_experts", 1) * width)
        mlp = dense * _gated(text, text["intermediate_size"]) + (layers - dense) * (
            experts + shared
        )
        return layers * attention(text), mlp

    return count


def _nemotron_h(text: _Text) -> tuple[int, int]:
    """Count layers of Mamba, attention, MLPs and experts in a pattern; the MLPs have no gate."""
    hidden = text["hidden_size"]
    pattern = text.config.get("hybrid_override_pattern")
    names = {"linear_attention": "M", "mamba": "M", "moe": "E", "mlp": "-"}
    layers = pattern or "".join(names.get(kind, "*") for kind in text.kinds_of_layers)
    attention = layers.count("*") * _grouped_attention(text)
    if "M" in layers:
        inner = text["mamba_num_heads"] * text["mamba_head_dim"]
        state = 2 * text["n_groups"] * text["ssm_state_size"]
        projected = 2 * inner + state + text["mamba_num_heads"]
        attention += layers.count("M") * ((hidden + projected) + (inner + hidden))
    mlp = 0
    if "-" in layers:
        mlp += layers.count("-") * 2 * (hidden + text["intermediate_size"])
    if "E" in layers:
        outer = text.get("moe_latent_size", hidden)
        experts = _num_experts(text) * 2 * (outer + text["moe_intermediate_size"])
        shared = 2 * (hidden + text["moe_shared_expert_intermediate_size"])
        latent = 0 if outer == hidden else 2 * (hidden + outer)
        mlp += layers.count("E") * (experts + shared + latent)
    return attention, mlp


_KINDS: dict[str, Callable[[_Text], tuple[int, int]]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), _dense),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen3_vl_text"), _dense),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text"), _qwen3_moe),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _qwen3_5),
    **dict.fromkeys(
        ("deepseek_v3", "kimi_k2", "glm4_moe_lite"), _shared_experts(_latent_attention)
    ),
    "glm4_moe": _shared_experts(_grouped_attention),
    **dict.fromkeys(("mixtral", "gpt_oss"), _mixtral),
    "nemotron_h": _nemotron_h,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


# ---- models known by name: the values of their published config.json files ----


def _heads(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _row(kind: str, hidden: int, layers: int, width: int, vocab: int, **own: Any) -> Config:
    shared = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": width}
    return {"model_type": kind, "vocab_size": vocab, **shared, **own}


def _dense_row(
    kind: str, shape: tuple[int, int, int], heads: tuple[int, int, int], vocab: int
) -> Config:
    return _row(kind, *shape, vocab, **_heads(*heads))


def _qwen3_moe_row(hidden: int, layers: int, heads: int, width: int) -> Config:
    own = {"num_experts": 128, "moe_intermediate_size": width}
    return _row("qwen3_moe", hidden, layers, 0, 151936, **_heads(heads, 4, 128), **own)


def _qwen3_5_row(
    hidden: int, layers: int, heads: tuple[int, int], values: int, **mlp: int
) -> Config:
    linear = {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": values,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    own = _heads(*heads, 256) | linear | mlp
    kind = "qwen3_5_moe_text" if "num_experts" in mlp else "qwen3_5_text"
    return _row(kind, hidden, layers, own.pop("width", 0), 248320, **own)


def _latent_row(kind: str, heads: int, dense: int, experts: int, vocab: int) -> Config:
    """Return DeepSeek V3's dimensions; Kimi K2 differs in the arguments only."""
    own = {
        "num_attention_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
    }
    return _row(kind, 7168, 61, 18432, vocab, **own)


def _glm_row(hidden: int, layers: int, width: int, **own: int) -> Config:
    return _row(
        "glm4_moe", hidden, layers, width, 151552, **_heads(96, 8, 128), n_shared_experts=1, **own
    )


def _gpt_oss_row(layers: int, experts: int) -> Config:
    return _row(
        "gpt_oss", 2880, layers, 2880, 201088, **_heads(64, 8, 64), num_local_experts=experts
    )


_DEEPSEEK = _latent_row("deepseek_v3", 128, 3, 256, 129280)
_KIMI = _latent_row("kimi_k2", 64, 1, 384, 163840)
_GLM = _glm_row(
    5120, 92, 12288, first_k_dense_replace=3, n_routed_experts=160, moe_intermediate_size=1536
)
_GLM_AIR = _glm_row(
    4096, 46, 10944, first_k_dense_replace=1, n_routed_experts=128, moe_intermediate_size=1408
)
_GLM_FLASH_OWN = {
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 1,
}
_NEMOTRON_OWN = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}
_EXPERTS_35B = {
    "num_experts": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_EXPERTS_397B = {
    "num_experts": 512,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
}
_QWEN_27B = _qwen3_5_row(5120, 64, (24, 4), 48, width=17408)
_QWEN_35B = _qwen3_5_row(2048, 40, (16, 2), 32, **_EXPERTS_35B)
# Keyed by the name's last part without suffixes such as -Instruct or -Base.
_KNOWN: dict[str, Config] = {
    "Meta-Llama-3-8B": _dense_row("llama", (4096, 32, 14336), (32, 8, 128), 128256),
    "Meta-Llama-3-70B": _dense_row("llama", (8192, 80, 28672), (64, 8, 128), 128256),
    "Llama-3.1-405B": _dense_row("llama", (16384, 126, 53248), (128, 8, 128), 128256),
    "SmolLM3-3B": _dense_row("smollm3", (2048, 36, 11008), (16, 4, 128), 128256),
    "Qwen2.5-0.5B": _dense_row("qwen2", (896, 24, 4864), (14, 2, 64), 151936),
    "Qwen2.5-1.5B": _dense_row("qwen2", (1536, 28, 8960), (12, 2, 128), 151936),
    "Qwen2.5-3B": _dense_row("qwen2", (2048, 36, 11008), (16, 2, 128), 151936),
    "Qwen2.5-7B": _dense_row("qwen2", (3584, 28, 18944), (28, 4, 128), 152064),
    "Qwen2.5-14B": _dense_row("qwen2", (5120, 48, 13824), (40, 8, 128), 152064),
    "Qwen2.5-32B": _dense_row("qwen2", (5120, 64, 27648), (40, 8, 128), 152064),
    "Qwen2.5-72B": _dense_row("qwen2", (8192, 80, 29568), (64, 8, 128), 152064),
    "Qwen3-VL-2B": _dense_row("qwen3", (2048, 28, 6144), (16, 8, 128), 151936),
    "Qwen3-VL-4B": _dense_row("qwen3", (2560, 36, 9728), (32, 8, 128), 151936),
    "Qwen3-VL-8B": _dense_row("qwen3", (4096, 36, 12288), (32, 8, 128), 151936),
    "Qwen3-VL-32B": _dense_row("qwen3", (5120, 64, 25600), (64, 8, 128), 151936),
    **dict.fromkeys(("Qwen3-30B-A3B", "Qwen3-VL-30B-A3B"), _qwen3_moe_row(2048, 48, 32, 768)),
    **dict.fromkeys(("Qwen3-235B-A22B", "Qwen3-VL-235B-A22B"), _qwen3_moe_row(4096, 94, 64, 1536)),
    "Qwen3.5-4B": _qwen3_5_row(2560, 32, (16, 4), 32, width=9216),
    "Qwen3.5-9B": _qwen3_5_row(4096, 32, (16, 4), 32, width=12288),
    **dict.fromkeys(("Qwen3.5-27B", "Qwen3.6-27B", "Qwen3.8-27B"), _QWEN_27B),
    **dict.fromkeys(("Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B", "Qwen3.8-35B-A3B"), _QWEN_35B),
    "Qwen3.5-397B-A17B": _qwen3_5_row(4096, 60, (32, 2), 64, **_EXPERTS_397B),
    **dict.fromkeys(
        ("DeepSeek-V3", "DeepSeek-V3-0324", "DeepSeek-R1", "DeepSeek-R1-0528", "DeepSeek-V3.1"),
        _DEEPSEEK,
    ),
    **dict.fromkeys(("Kimi-K2", "Kimi-K2-Thinking", "Kimi-K2.5", "Kimi-K2.6"), _KIMI),
    **dict.fromkeys(("GLM-4.5", "GLM-4.6", "GLM-4.7"), _GLM),
    "GLM-4.5-Air": _GLM_AIR,
    "GLM-4.7-Flash": _row("glm4_moe_lite", 2048, 47, 10240, 154880, **_GLM_FLASH_OWN),
    "gpt-oss-20b": _gpt_oss_row(24, 32),
    "gpt-oss-120b": _gpt_oss_row(36, 128),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": _row(
        "nemotron_h", 2688, 52, 1856, 131072, **_heads(32, 2, 128), **_NEMOTRON_OWN
    ),
    "Mistral-Nemo": _dense_row("mistral", (5120, 40, 14336), (32, 8, 128), 131072),
    "Mistral-Small-3.2-24B": _dense_row("mistral", (5120, 40, 32768), (32, 8, 128), 131072),
    "gemma-3-270m": _dense_row("gemma3_text", (640, 18, 2048), (4, 1, 256), 262144),
    "gemma-3-1b": _dense_row("gemma3_text", (1152, 26, 6912), (4, 1, 256), 262144),
    "gemma-3-4b": _dense_row("gemma3_text", (2560, 34, 10240), (8, 4, 256), 262208),
    "gemma-3-12b": _dense_row("gemma3_text", (3840, 48, 15360), (16, 8, 256), 262208),
    "gemma-3-27b": _dense_row("gemma3_text", (5376, 62, 21504), (32, 16, 128), 262208),
}
_SUFFIXES = (
    "-Instruct-2507",
    "-Thinking-2507",
    "-Instruct-2407",
    "-Instruct-2506",
    "-Base-2407",
    "-Instruct",
    "-Thinking",
    "-Base",
    "-BF16",
    "-it",
    "-pt",
)


def known_config(model_name: str) -> Config | None:
    """Return the table's config of a model; None if the table lacks the model."""
    short = model_name.partition(":")[0].rstrip("/").rpartition("/")[2]
    for name in (short, *(short.removesuffix(suffix) for suffix in _SUFFIXES)):
        if name in _KNOWN:
            return _KNOWN[name]
    return None
