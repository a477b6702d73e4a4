"""A test of the whole path of a recipe: a tiny model is trained and sampled on a local service.

    python -m tinker_cookbook.commands.parts.self_test FOLDER

Prints one JSON object: the loss before each step, the sampled tokens, and the seconds. The service
and the SDK are those that recipes use. `FOLDER` gets the model and the state of the service.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SelfTest", "run_self_test"]

SelfTest = dict[str, object]
"""The object that the test prints, or `{"problem": TEXT}`."""
LIMIT_SECONDS = 120
HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 32, 64, 1, 4, 258
END_TOKEN = 256
TOKENS = [72, 101, 108, 108, 111, 33, END_TOKEN]


def run_self_test() -> SelfTest:
    """Run the test in a separate process, with its own state folder and without any key."""
    with tempfile.TemporaryDirectory(prefix="tinker-cookbook-doctor-") as folder:
        kept = {key: text for key, text in os.environ.items() if not key.startswith("TINKER_")}
        own = {"TINKER_COOKBOOK_HOME": folder, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
        native = {k: v for k, v in os.environ.items() if k == "TINKER_COOKBOOK_NATIVE"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, folder],
                env=kept | own | native,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"it did not end within {LIMIT_SECONDS} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return {"problem": lines[-1]}


def _train_and_sample(folder: Path) -> SelfTest:
    """Train one step, compare the loss before and after it, and sample from the new weights."""
    import tinker

    from tinker_cookbook import service

    started = time.monotonic()
    _write_model(folder / "model")
    losses = []
    with service.connect("local", str(folder / "model")) as connection:
        client = connection.service_client().create_lora_training_client(
            connection.model_name, rank=4, seed=0
        )
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=TOKENS[1:], dtype="int64"),
                "weights": tinker.TensorData(data=[1.0] * (len(TOKENS) - 1), dtype="float32"),
            },
        )
        for _ in range(2):
            gradient = client.forward_backward([datum], "cross_entropy")
            client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
            losses.append(gradient.result().metrics["loss:sum"])
        sampler = client.save_weights_and_get_sampling_client("self-test")
        prompt = tinker.ModelInput.from_ints(TOKENS[:1])
        params = tinker.SamplingParams(max_tokens=4, temperature=0.0)
        reply = sampler.sample(prompt, num_samples=1, sampling_params=params).result()
    num_sampled = len(reply.sequences[0].tokens)
    report: SelfTest = {"losses": losses, "num_sampled": num_sampled}
    if not losses[1] < losses[0]:
        report["problem"] = f"a training step did not lower the loss ({losses[0]}, {losses[1]})"
    return report | {"seconds": time.monotonic() - started}


def _write_model(folder: Path) -> None:
    """Write a random Llama model whose tokens are bytes."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config()), encoding="utf-8")
    save_file(_weights(np.random.default_rng(0)), folder / "model.safetensors")


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY - 1,
        "eos_token_id": END_TOKEN,
        "torch_dtype": "float32",
    }


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    import numpy as np

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    layer = "model.layers.0."
    shapes: dict[str, tuple[int, int]] = {}
    shapes |= dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (HIDDEN, HIDDEN))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN))
    shapes["mlp.down_proj"] = (HIDDEN, INNER)
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm")
    return {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        **{f"{layer}{name}.weight": matrix(*shape) for name, shape in shapes.items()},
        **{f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms},
    }


if __name__ == "__main__":
    print(json.dumps(_train_and_sample(Path(sys.argv[1]))))
