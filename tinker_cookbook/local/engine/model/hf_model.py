"""Every other causal language model that transformers loads, behind the engine's interface.

It is slower than the native path: one sequence at a time, gradients by autograd, LoRA as a second
product. LoRA is added to every nn.Linear and to gpt2's Conv1D. Modules whose path mentions
attention count as `attn`, the output embedding as `unembed`, and all others as `mlp`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.architecture import read_config_json
from tinker_cookbook.local.engine.model.gradients import GradientSink, SpareGradients
from tinker_cookbook.local.engine.model.hf_support import (
    check_cache,
    check_is_causal,
    read_hf_config,
)
from tinker_cookbook.local.engine.model.lora import Adapter, LoraTarget
from tinker_cookbook.local.engine.model.pack import Pack
from tinker_cookbook.local.engine.model.pack_loss import PackLoss
from tinker_cookbook.local.engine.model.transformer import ForwardPass
from tinker_cookbook.local.engine.model.vision import VISION_PATH_WORDS, VisionInputs, has_vision
from tinker_cookbook.local.engine.types import ImageInput, LoraSpec
from tinker_cookbook.local.errors import UserError

__all__ = [
    "HfModel",
    "HfSequence",
    "find_linears",
    "hf_cache_bytes",
    "hf_pass_bytes",
    "max_positions",
    "wanted_targets",
]

_ATTENTION_WORDS = ("attn", "attention")
_FALLBACK_MAX_POSITIONS = 2048


class HfModel:
    """A frozen transformers model whose linear modules can take an adapter."""

    def __init__(
        self, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype
    ) -> None:
        """
        Raises:
            WeightsError: if transformers cannot load the folder as a causal language model, or the
                model has no linear modules to train.
        """
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        read_hf_config(folder)
        reads_images = has_vision(read_config_json(folder))
        loader = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
        try:
            model, found = cast(Any, loader).from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except (ValueError, OSError, KeyError, ImportError) as error:
            cause = str(error).partition("\n")[0]
            raise WeightsError(f"transformers cannot load {folder}: {cause}") from error
        if found["missing_keys"]:  # transformers would initialize them at random
            missing = ", ".join(sorted(found["missing_keys"])[:5])
            raise WeightsError(f"{folder} lacks {missing}; the files are incomplete")
        if model.get_output_embeddings() is None:
            raise WeightsError(f"{folder} has no output embedding; a language model is expected")
        self._model = model.to(device).eval().requires_grad_(False)
        self._model.config.use_cache = False
        check_cache(folder, model)
        if not reads_images:
            check_is_causal(folder, model)
        self.vision = VisionInputs(self._model, folder) if reads_images else None
        self.device = torch.device(device)
        self.product_dtype = dtype
        self.cache_argument = _cache_argument(self._model)
        """Name of the forward pass's argument for the key-value cache."""
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.max_positions = max_positions(model.config)
        self.pack_tokens = 1
        self.shares_prefixes = False
        self.spare_gradients = SpareGradients()
        self._in_use: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
        self._linears = self._attach()
        if not self._linears:
            raise WeightsError(f"{folder} has no linear modules that LoRA could be added to")

    @property
    def transformers_model(self) -> Any:
        return self._model

    @property
    def ties_embeddings(self) -> bool:
        head, embed = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        return head.weight is embed.weight

    def lora_targets(self, spec: LoraSpec) -> tuple[LoraTarget, ...]:
        """Return the linear modules that `spec` trains.

        Raises:
            UserError: if it asks for dropout, which only the engine's own models have.
        """
        if spec.dropout:
            raise UserError(
                f"lora_dropout={spec.dropout} is not available for models that run through "
                "transformers; leave it out"
            )
        return wanted_targets(self._linears, spec)

    def batch_bytes(
        self,
        num_tokens: int,
        num_targets: int,
        rank: int,
        *,
        backward: bool,
        num_copied_keys: int = 0,
    ) -> int:
        """Return a rough estimate of the extra memory for a pack; see `hf_pass_bytes`."""
        return hf_pass_bytes(
            self._model.config, num_tokens, vocab_size=self.vocab_size, backward=backward
        )

    def logprobs(self, adapter: Adapter, pack: Pack) -> torch.Tensor:
        """Return the logprobs of the pack's targets, float32 [M, K]."""
        with torch.no_grad(), self._using(_matrices(adapter), adapter.scale):
            return self._logprobs(pack)

    def kept_bytes(self, num_tokens: int, rank: int) -> int | None:
        """Return None: a forward pass of transformers is not kept."""
        del num_tokens, rank
        return None

    def logprobs_and_pass(self, adapter: Adapter, pack: Pack) -> tuple[torch.Tensor, ForwardPass]:
        """Never called, since `kept_bytes` returns None."""
        raise NotImplementedError

    def logprobs_and_gradient(
        self,
        adapter: Adapter,
        pack: Pack,
        loss: PackLoss,
        sink: GradientSink,
        *,
        kept: ForwardPass | None = None,
    ) -> torch.Tensor:
        """Return the logprobs, and add the LoRA gradients of the loss to `sink`."""
        assert kept is None, "`kept_bytes` returns None"
        matrices = _matrices(adapter)
        leaves = [m.detach().requires_grad_() for pair in matrices.values() for m in pair]
        pairs = dict(zip(matrices, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        with torch.enable_grad(), self._using(pairs, adapter.scale):
            logprobs = self._logprobs(pack)
            values = logprobs.detach()
            if loss.by_sequence:
                loss.see_all(values)
            gradient = loss.gradient(slice(0, len(values)), values)
            found = torch.autograd.grad(logprobs, leaves, gradient, allow_unused=True)
        for path, a_grad, b_grad in zip(pairs, found[::2], found[1::2], strict=True):
            for side, grad in (("A", a_grad), ("B", b_grad)):
                if grad is not None:
                    sink.layout.matrix(sink.flat, f"{path}.{side}").add_(grad)
        return values

    @property
    def count_image_tokens(self) -> Callable[[ImageInput, str], int] | None:
        return None if self.vision is None else self.vision.num_tokens

    def start(self, adapter: Adapter | None, images: Sequence[ImageInput] = ()) -> HfSequence:
        """Begin to decode a sequence; its images must be inside the first tokens."""
        return HfSequence(self, adapter, images)

    def inputs_from_start(
        self, tokens: torch.Tensor, images: Sequence[ImageInput]
    ) -> tuple[dict[str, Any], int]:
        """Return the arguments for a whole sequence, as `VisionInputs.model_inputs` does."""
        if self.vision is None:
            return {"input_ids": tokens[None]}, 0
        return self.vision.model_inputs(tokens, images)

    def _logprobs(self, pack: Pack) -> torch.Tensor:
        """Return the logprobs with a graph, in the order of the pack's rows."""
        logits = []
        for index, tokens in enumerate(pack.tokens.split(pack.lengths)):
            inputs, _ = self.inputs_from_start(tokens, pack.images[index] if pack.images else ())
            logits.append(self._model(**inputs, use_cache=False).logits[0])
        selected = torch.cat(logits)[pack.rows].float()
        return F.log_softmax(selected, dim=-1).gather(1, pack.targets)

    def _attach(self) -> tuple[LoraTarget, ...]:
        """Make every linear module add the active adapter; return the modules in order."""
        targets = find_linears(self._model, reads_images=self.vision is not None)
        for target in targets:
            self._model.get_submodule(target.path).register_forward_hook(self._hook(target.path))
        return targets

    def _hook(self, path: str) -> Callable[..., torch.Tensor | None]:
        def add_lora(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            matrices = self._in_use.get(path)
            if matrices is None:
                return None
            a, b, scale = matrices
            update = F.linear(F.linear(inputs[0].float(), a), b) * scale
            return (output.float() + update).to(output.dtype)

        return add_lora

    @contextmanager
    def _using(
        self, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float
    ) -> Iterator[None]:
        self._in_use = {path: (a, b, scale) for path, (a, b) in matrices.items()}
        try:
            yield
        finally:
            self._in_use = {}


def find_linears(model: Any, *, reads_images: bool) -> tuple[LoraTarget, ...]:
    """Return every linear module that can take an adapter, in order; vision modules cannot."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    targets = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            out_features, in_features = module.weight.shape
        elif isinstance(module, Conv1D):  # gpt2 stores its matrices transposed
            in_features, out_features = module.weight.shape
        else:
            continue
        if reads_images and any(word in path for word in VISION_PATH_WORDS):
            continue
        part = "unembed" if module is head else _part_of(path)
        targets.append(LoraTarget(path, out_features, in_features, path, part))
    return tuple(targets)


def wanted_targets(targets: Sequence[LoraTarget], spec: LoraSpec) -> tuple[LoraTarget, ...]:
    """Return the targets that `spec` trains."""
    wanted = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
    return tuple(target for target in targets if wanted[target.part])


class HfSequence:
    """A sequence that is being decoded, with its key-value cache."""

    def __init__(
        self, model: HfModel, adapter: Adapter | None, images: Sequence[ImageInput] = ()
    ) -> None:
        from transformers import DynamicCache

        self._model = model
        self._images = images
        self._shift = 0
        self._matrices = {} if adapter is None else _matrices(adapter)
        self._scale = 1.0 if adapter is None else adapter.scale
        self._cache = DynamicCache(config=model.transformers_model.config)

    def fork(self) -> HfSequence:
        """Return an independent copy."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append int64 tokens [n]; return the logits after each of them, float32 [n, V]."""
        tokens = tokens.to(self._model.device)
        vision, past = self._model.vision, int(self._cache.get_seq_length())
        if not past:
            inputs, self._shift = self._model.inputs_from_start(tokens, self._images)
        else:
            inputs: dict[str, Any] = {"input_ids": tokens[None]}
            # Otherwise the model would use the shift of the sequence that it saw last.
            if vision is not None and vision.has_grid_positions:
                inputs["position_ids"] = vision.text_positions(
                    past + self._shift, len(tokens), tokens.device
                )
        with torch.no_grad(), self._model._using(self._matrices, self._scale):
            inputs[self._model.cache_argument] = self._cache
            output = self._model.transformers_model(**inputs, use_cache=True)
        return output.logits[0].float()


def hf_cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the memory of one token's keys and values in all layers, from the configuration.

    Layers that keep the last tokens only make it less for long sequences.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers * 2 * kv_heads * head_dim * dtype.itemsize


def hf_pass_bytes(config: Any, num_tokens: int, *, vocab_size: int, backward: bool) -> int:
    """Return a rough estimate of the memory for a pass over one sequence, from the configuration.

    Attention is computed in one piece, so it grows with the square of the length.
    """
    text = config.get_text_config()
    num_layers = int(getattr(text, "num_hidden_layers", 1))
    hidden = int(getattr(text, "hidden_size", 1024))
    heads = int(getattr(text, "num_attention_heads", 1))
    per_layer = 4 * num_tokens * (30 * hidden + 2 * heads * num_tokens)
    logits = 4 * num_tokens * vocab_size
    return per_layer * (num_layers if backward else 1) + logits * (4 if backward else 2)


def max_positions(config: Any) -> int:
    """Return the context length that a configuration of transformers states."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or _FALLBACK_MAX_POSITIONS)


def _matrices(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        target.path: (adapter.a(target.path), adapter.b(target.path)) for target in adapter.targets
    }


def _cache_argument(model: Any) -> str:
    """Return `cache`, or `past_key_values` (until transformers 5.23 and in others' models)."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names and "past_key_values" not in names else "past_key_values"


def _part_of(path: str) -> str:
    return "attn" if any(word in path.lower() for word in _ATTENTION_WORDS) else "mlp"
