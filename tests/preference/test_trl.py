"""Every loss that TRL has, against TRL's own trainer: equal loss and equal gradient of the adapter.

    pytest -n0 -q -s tests/preference/test_trl.py           # prints the table

The same pairs, model and adapter in float32. Our side is the function that the train loop calls, on
the local service's engine; TRL's side is its trainer's loss, run backward by torch. Needs `trl`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker

from tests.tiny_models import tiny_model
from tinker_cookbook.preference.losses import PAIR_LOSSES, kto
from tinker_cookbook.preference.pair_gradients import submit_pair_gradient
from tinker_cookbook.preference.reply_gradients import submit_reply_gradient

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("default")
"""The libraries warn of their own old names."""
torch = pytest.importorskip("torch")

NUM_PAIRS = 4
PROMPT, CHOSEN = 5, 7
"""Tokens of a prompt, and of every chosen completion: CPO and ORPO of TRL average the supervised
term over the tokens of a batch, ours over each completion, which is the same for equal lengths."""
BETA = 0.3
LOSS_TOLERANCE, COSINE = 1e-4, 0.9999


class EngineClient:
    """The two requests that a step sends, computed by the engine in this process."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def forward(self, data: Sequence[tinker.Datum], loss_fn: str) -> Any:
        """Return the log probabilities."""
        return self._compute(data, loss_fn, backward=False)

    def forward_backward(self, data: Sequence[tinker.Datum], loss_fn: str) -> Any:
        """Add the gradient to that of the run."""
        return self._compute(data, loss_fn, backward=True)

    async def _compute(self, data: Sequence[tinker.Datum], loss_fn: str, *, backward: bool) -> Any:
        from tinker_cookbook.local.engine.types import LossSpec, TrainDatum

        converted = [
            TrainDatum(
                np.array(datum.model_input.to_ints(), np.int32),
                {name: value.to_numpy() for name, value in datum.loss_fn_inputs.items()},
            )
            for datum in data
        ]
        result = self.run.forward_backward(converted, LossSpec(loss_fn), backward=backward)
        outputs = [{"logprobs": SimpleNamespace(to_numpy=lambda p=p: p)} for p in result.logprobs]
        return SimpleNamespace(loss_fn_outputs=outputs)


@pytest.fixture(scope="module")
def engine() -> Any:
    """Return the model, and a function that makes a run with a random adapter."""
    from tinker_cookbook.local.engine.model.base_model import load_base_model
    from tinker_cookbook.local.engine.training.run import TrainingRun
    from tinker_cookbook.local.engine.types import LoraSpec

    model = load_base_model(tiny_model(), dtype=torch.float32)

    def make_run() -> Any:
        run = TrainingRun(model, LoraSpec(rank=4, seed=1, alpha=8.0, train_unembed=False))
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(run.adapter.parameters.shape, generator=generator)
        run.adapter.parameters.add_(noise, alpha=0.05)
        run.adapter.version += 1
        return run

    return SimpleNamespace(model=model, make_run=make_run)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Token ids: chosen and rejected completions in turns, with the prompt of each."""
    rng = np.random.default_rng(0)
    vocab_size = json.loads((tiny_model() / "config.json").read_text())["vocab_size"]
    rows = []
    for number in range(NUM_PAIRS):
        prompt = rng.integers(5, vocab_size, PROMPT).tolist()
        rows.append(prompt + rng.integers(5, vocab_size, CHOSEN).tolist())
        rows.append(prompt + rng.integers(5, vocab_size, 3 + 2 * number).tolist())
    return rows


def make_datum(tokens: list[int]) -> tinker.Datum:
    weights = np.array([0.0] * (PROMPT - 1) + [1.0] * (len(tokens) - PROMPT), np.float32)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:])),
            "weights": tinker.TensorData.from_numpy(weights),
        },
    )


def pad(rows: Sequence[list[int]]) -> dict[str, Any]:
    """Return padded rows, with masks of all tokens and of completion tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    completion = mask.clone()
    completion[:, :PROMPT] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


def sum_logprobs(run: Any, data: Sequence[tinker.Datum]) -> np.ndarray:
    """Return the sequence log probability of each datum."""
    output = asyncio.run(EngineClient(run).forward(data, "cross_entropy"))
    return np.array(
        [
            datum.loss_fn_inputs["weights"].to_numpy() @ found["logprobs"].to_numpy()
            for datum, found in zip(data, output.loss_fn_outputs, strict=True)
        ]
    )


class Peer:
    """A trainer of TRL on the same model and adapter."""

    def __init__(self, run: Any, folder: Path, trainer: type, config: Any, dataset: Any) -> None:
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run.save(folder, base_model_name="tiny", with_optimizer=False)
        saved = json.loads((folder / "adapter_config.json").read_text())
        names = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias")
        lora = LoraConfig(task_type="CAUSAL_LM", **{name: saved[name] for name in names})
        base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
        self.trainer = trainer(
            model=base,
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(tiny_model()),
            peft_config=lora,
        )
        self.model = self.trainer.model
        result = set_peft_model_state_dict(
            self.model, load_file(folder / "adapter_model.safetensors")
        )
        assert not result.unexpected_keys

    def gradients(self, loss: Any) -> dict[str, Any]:
        """Return the gradient of each matrix of the adapter, by its name in a saved adapter."""
        self.model.zero_grad()
        loss.backward()
        return {
            name.replace(".default.", "."): parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }


def settings(folder: Path, **own: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "activation_checkpointing": False,
        "beta": BETA,
        **own,
    }


def compare(name: str, run: Any, loss: float, peer_loss: Any, peer: Peer) -> None:
    """Compare losses and gradients, and print a row of the table."""
    from tinker_cookbook.local.engine.model.lora import peft_tensor_name

    expected = peer.gradients(peer_loss)
    own, other = [], []
    for target in run.adapter.targets:
        for side in "AB":
            own.append(run.adapter.layout.matrix(run.gradient, f"{target.path}.{side}").flatten())
            other.append(expected.pop(peft_tensor_name(target.path, side)).flatten())
    assert not expected, "every trained matrix of the peer is compared"
    first, second = torch.cat(own).double(), torch.cat(other).double()
    cosine = float(first @ second / (first.norm() * second.norm()))
    ratio = float(first.norm() / second.norm())
    print(
        f"\n| {name} | {loss:.6f} | {peer_loss.item():.6f} | {cosine:.8f} | {ratio:.6f} |", end=""
    )
    assert loss == pytest.approx(peer_loss.item(), abs=LOSS_TOLERANCE)
    assert cosine >= COSINE
    assert ratio == pytest.approx(1, abs=1e-3)


def train_pairs(engine: Any, sequences: list[list[int]], name: str, **own: float) -> Any:
    """Return the run with the gradient of a batch of pairs, and the loss."""
    data = [make_datum(tokens) for tokens in sequences]
    from tinker_cookbook.local.engine.training.run import TrainingRun
    from tinker_cookbook.local.engine.types import LoraSpec

    base = TrainingRun(engine.model, LoraSpec(rank=1, seed=0, train_unembed=False))
    run = engine.make_run()
    step = asyncio.run(
        _submit(EngineClient(run), data, sum_logprobs(base, data), PAIR_LOSSES[name](**own))
    )
    return run, float(step.loss.loss_P.mean())


async def _submit(client: Any, data: Any, reference: np.ndarray, loss: Any) -> Any:
    step = await submit_pair_gradient(client, data, reference, loss)
    for gradient in step.gradients:
        await gradient
    return step


DPO_LOSSES: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("dpo", {}, {"loss_type": ["sigmoid"]}),
    (
        "dpo_with_nll",
        {"nll_weight": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    ("robust_dpo", {"label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ("ipo", {}, {"loss_type": ["ipo"]}),
    ("hinge", {}, {"loss_type": ["hinge"]}),
    ("length_normalized_dpo", {}, {"loss_type": ["sigmoid_norm"]}),
]


def text_pairs() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)


@pytest.mark.parametrize(("name", "own", "theirs"), DPO_LOSSES, ids=lambda value: str(value)[:24])
def test_a_dpo_step_is_that_of_dpo_trainer(
    engine: Any, sequences: list[list[int]], tmp_path: Path, name: str, own: Any, theirs: Any
):
    run, loss = train_pairs(engine, sequences, name, beta=BETA, **own)
    config = trl.DPOConfig(**settings(tmp_path, **theirs))
    peer = Peer(run, tmp_path, trl.DPOTrainer, config, text_pairs())
    batch = pad(sequences[0::2] + sequences[1::2])
    compare(name, run, loss, peer.trainer._compute_loss(peer.model, batch, False), peer)


@pytest.mark.parametrize(
    ("name", "own", "theirs"),
    [
        ("cpo", {"nll_weight": 1.0}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
        (
            "simpo",
            {"gamma": 0.5},
            {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
        ),
    ],
    ids=["cpo", "simpo"],
)
def test_a_cpo_step_is_that_of_cpo_trainer(
    engine: Any, sequences: list[list[int]], tmp_path: Path, name: str, own: Any, theirs: Any
):
    cpo = pytest.importorskip("trl.experimental.cpo")
    run, loss = train_pairs(engine, sequences, name, beta=BETA, **own)
    config = cpo.CPOConfig(**settings(tmp_path, **theirs))
    peer = Peer(run, tmp_path, cpo.CPOTrainer, config, text_pairs())
    found, _ = peer.trainer.get_batch_loss_metrics(peer.model, side_by_side(sequences))
    compare(name, run, loss, found, peer)


def test_an_orpo_step_has_the_odds_ratio_of_orpo_trainer(
    engine: Any, sequences: list[list[int]], tmp_path: Path
):
    """TRL's supervised term also trains the prompt; ours is that of CPO, compared above."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    run, loss = train_pairs(engine, sequences, "orpo", beta=BETA)
    config = orpo.ORPOConfig(**settings(tmp_path))
    peer = Peer(run, tmp_path, orpo.ORPOTrainer, config, text_pairs())
    chosen, rejected, *_ = peer.trainer.concatenated_forward(peer.model, side_by_side(sequences))
    ratio, *_ = peer.trainer.odds_ratio_loss(chosen, rejected)
    compare("orpo", run, loss, -chosen.mean() - ratio.mean(), peer)


def side_by_side(sequences: list[list[int]]) -> dict[str, Any]:
    """Return a batch in the shape of the CPO and ORPO trainers."""
    batch = {}
    for side, rows in (("chosen", sequences[0::2]), ("rejected", sequences[1::2])):
        padded = pad(rows)
        ids = padded["input_ids"]
        batch[f"{side}_input_ids"] = ids
        batch[f"{side}_attention_mask"] = padded["attention_mask"]
        batch[f"{side}_labels"] = ids.masked_fill(padded["completion_mask"] == 0, -100)
    return batch


def test_a_kto_step_is_that_of_kto_trainer(engine: Any, sequences: list[list[int]], tmp_path: Path):
    from datasets import Dataset

    from tinker_cookbook.local.engine.training.run import TrainingRun
    from tinker_cookbook.local.engine.types import LoraSpec

    is_good = np.array([True, False, False, True] * (NUM_PAIRS // 2))
    # Each prompt with the completion of the sequence before it, as TRL does.
    mismatched = [
        own[:PROMPT] + before[PROMPT:]
        for own, before in zip(sequences, [sequences[-1], *sequences], strict=False)
    ]
    rows = [row for pair in zip(sequences, mismatched, strict=True) for row in pair]
    data = [make_datum(tokens) for tokens in rows]
    base = TrainingRun(engine.model, LoraSpec(rank=1, seed=0, train_unembed=False))
    reference = sum_logprobs(base, data)
    run = engine.make_run()
    loss = partial(kto, beta=BETA, good_weight=1.0, bad_weight=1.3)
    step = asyncio.run(_submit_replies(EngineClient(run), data, is_good, reference, loss))
    config = trl.KTOConfig(
        **settings(
            tmp_path,
            desirable_weight=1.0,
            undesirable_weight=1.3,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=2,
        )
    )
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    peer = Peer(run, tmp_path, trl.KTOTrainer, config, dataset)
    kl = {f"KL_{name}": value for name, value in pad(mismatched).items()}
    batch = {**pad(sequences), **kl, "label": torch.tensor(is_good)}
    found = peer.trainer._compute_loss(peer.model, batch, False)
    print(f"\nKL estimate {step.batch.kl_baseline:.6f}", end="")
    compare("kto", run, float(step.loss.loss_S.mean()), found, peer)


async def _submit_replies(
    client: Any, data: Any, is_good: np.ndarray, reference: np.ndarray, loss: Any
) -> Any:
    step = await submit_reply_gradient(client, data, is_good, reference, loss)
    for gradient in step.gradients:
        await gradient
    return step
