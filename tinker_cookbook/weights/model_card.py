"""Model card text for a published model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["ModelCardConfig", "generate_model_card"]


@dataclass
class ModelCardConfig:
    """What a model card says."""

    base_model: str
    """Hub name of the base model."""
    datasets: list[str] = field(default_factory=list)
    """Hub names of the training data."""
    tags: list[str] = field(default_factory=list)
    license: str | None = None
    """License identifier, such as apache-2.0; the base model's terms apply as well."""
    language: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    """Training settings to list, such as learning_rate."""
    results: dict[str, float] = field(default_factory=dict)
    """Measured results to list, such as test/nll."""


def generate_model_card(
    *, config: ModelCardConfig, repo_id: str | None = None, model_path: str | None = None
) -> ModelCard:
    """Build a model card.

    Args:
        config: What the card says.
        repo_id: Name of the repository, used as the title.
        model_path: Folder of the model; tells whether it is an adapter or a full model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_adapter = model_path is not None and (Path(model_path) / "adapter_config.json").exists()
    tags = ["tinker-cookbook", *(["lora", "peft"] if is_adapter else []), *config.tags]
    data = ModelCardData(
        base_model=config.base_model,
        datasets=config.datasets or None,
        language=config.language or None,
        license=config.license,
        library_name="peft" if is_adapter else "transformers",
        tags=tags,
    )
    kind = "A LoRA adapter for" if is_adapter else "A fine-tuned version of"
    parts = [
        f"# {(repo_id or 'Fine-tuned model').rpartition('/')[2]}",
        f"{kind} `{config.base_model}`, trained with tinker-cookbook.",
        _table("Training settings", config.settings),
        _table("Results", {name: f"{value:.4g}" for name, value in config.results.items()}),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _table(title: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| name | value |", "|---|---|", *lines])
