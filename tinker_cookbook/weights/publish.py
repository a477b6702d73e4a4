"""Upload a model folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.weights.model_card import ModelCardConfig, generate_model_card

__all__ = ["publish_to_hf_hub"]


def publish_to_hf_hub(
    *,
    model_path: str,
    repo_id: str,
    private: bool = True,
    token: str | None = None,
    model_card: ModelCardConfig | None = None,
) -> str:
    """Upload a folder as a model repository.

    Args:
        model_path: Folder of an adapter or a full model.
        repo_id: `owner/name` of the repository; it is created if it does not exist.
        private: Whether a new repository is private.
        token: Access token; default: the one that is stored.
        model_card: If given, a README.md is generated from it; otherwise the folder's is used.

    Returns:
        The address of the repository.

    Raises:
        ConfigurationError: if the folder has no config.json or adapter_config.json.
    """
    folder = Path(model_path).expanduser()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigurationError(
            f"model_path={model_path} has neither config.json nor adapter_config.json; give the "
            "folder of a model or an adapter."
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    if model_card is not None:
        card = generate_model_card(config=model_card, repo_id=repo_id, model_path=model_path)
        card.push_to_hub(repo_id, token=token)
    return str(address)
