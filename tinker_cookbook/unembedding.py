"""Whether a run adapts the output embedding.

In models with tied embeddings (the default one, Qwen3 up to 4B, Llama 3.2) the output embedding
is the input embedding. An adapter on it can be used beside the model, but tools that merge
adapters write it into the matrix that both share, and change the input side too. So it is left out
there unless it is asked for.
"""

from __future__ import annotations

import logging

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["choose_train_unembed", "has_tied_embeddings"]

logger = logging.getLogger(__name__)


def has_tied_embeddings(model_name: str) -> bool | None:
    """Whether the output embedding is the input embedding; None if the model is not known here."""
    from tinker_cookbook.hyperparam_utils import get_model_dimensions

    try:
        return get_model_dimensions(model_name).tied
    except ConfigurationError:
        return None


def choose_train_unembed(model_name: str, wanted: bool | None = None) -> bool:
    """What to ask the service for; `wanted` is the user's word, None leaves it to the model.

    A model that is not known here is trained as the service does without being asked: with it.
    """
    tied = has_tied_embeddings(model_name) if wanted is not False else None
    if wanted is None:
        return not tied
    if wanted and tied:
        logger.warning(
            "train_unembed=True: the output embedding of %s is its input embedding too; the "
            "adapter can be used beside the model, but PEFT's merge_and_unload would change the "
            "input embedding as well",
            model_name,
        )
    return wanted
