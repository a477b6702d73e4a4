"""Whether a run trains an adapter on the output embedding.

Models with tied embeddings (the default model, Qwen3 up to 4B, Llama 3.2) use one matrix as input
and output embedding. An adapter on the output embedding works as long as it stays separate from
the model. A tool that merges it writes it into the shared matrix and changes the input embedding
too. For these models it is therefore trained only on request.
"""

from __future__ import annotations

import logging

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["choose_train_unembed", "has_tied_embeddings"]

logger = logging.getLogger(__name__)


def has_tied_embeddings(model_name: str) -> bool | None:
    """Return whether a model's input and output embeddings are tied; None for unknown models."""
    from tinker_cookbook.hyperparam_utils import get_model_dimensions

    try:
        return get_model_dimensions(model_name).tied
    except ConfigurationError:
        return None


def choose_train_unembed(model_name: str, wanted: bool | None = None) -> bool:
    """Return whether to train an adapter on the output embedding.

    Args:
        model_name: The base model. For an unknown model the service's default applies: True.
        wanted: The user's setting; None to choose by the model.
    """
    tied = has_tied_embeddings(model_name) if wanted is not False else None
    if wanted is None:
        return not tied
    if wanted and tied:
        logger.warning(
            "train_unembed=True: the input and output embeddings of %s are tied; the adapter works "
            "if it stays separate from the model, but PEFT's merge_and_unload would change the "
            "input embedding as well",
            model_name,
        )
    return wanted
