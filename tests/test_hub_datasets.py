"""Data sets of the hub: what cannot be had is one error, without the hub's own retries."""

# pyright: reportAttributeAccessIssue=false

from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.hub_datasets import load_hub_table
from tinker_cookbook.supervised import ChatDatasetBuilderCommonConfig
from tinker_cookbook.supervised.data import HFDatasetSource, InterleavedChatDatasetBuilder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_mix_asks_the_hub_once():
    builder = InterleavedChatDatasetBuilder(
        sources=[HFDatasetSource(path="someone/chats")],
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer="unused", renderer_name="chatml", max_length=64, batch_size=1
        ),
    )
    with pytest.raises(
        ConfigurationError, match=r"^someone/chats cannot be fetched: .* not reachable .* folder"
    ):
        builder()


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ('{"a": 1}', {"split": "nope"}, r"""Unknown split "nope". Should be one of \['train'\]"""),
        ('{"a": 1}', {"name": "other"}, "'other' not found"),
        ('{"a": [', {}, "JSON parse error"),
        (None, {}, "doesn't contain any data files"),
    ],
)
def test_a_folder_that_does_not_fit_says_why(tmp_path: Path, text, options, problem):
    folder = tmp_path / "rows"
    folder.mkdir()
    if text is not None:
        (folder / "train.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=rf"rows cannot be read: .*{problem}.* Take mine."):
        load_hub_table(str(folder), **options, advice="Take mine.")
