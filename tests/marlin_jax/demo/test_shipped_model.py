# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import marlin_jax.demo
from marlin_jax.checkpoint import load_model
from marlin_jax.demo import heldout_text, model_path
from marlin_jax.generation.scoring import perplexity


@pytest.fixture(scope="module")
def model():
  return load_model(model_path())


def test_model_is_whole_and_has_the_promised_size(model):
  parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
  assert 20e6 <= parameters <= 22e6
  assert model.config.hidden_size % 128 == 0
  assert model.config.intermediate_size % 128 == 0
  assert model.tokenizer.vocab_size == model.config.vocab_size
  shards = list(model_path().glob("*.safetensors"))
  assert max(shard.stat().st_size for shard in shards) < 8 * 2**20 + 2**16
  assert sum(shard.stat().st_size for shard in shards) < 64 * 2**20


def test_tokenizer_gives_the_heldout_text_back(model):
  text = heldout_text()
  assert 200_000 <= len(text.encode()) <= 300_000
  assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_model_knows_python(model):
  tokens = np.array(model.tokenizer.encode(heldout_text()[:20_000]))[:2048]
  assert perplexity(model, tokens, window=512) < 20


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(marlin_jax.demo.resources, "files", lambda package: tmp_path)
  with pytest.raises(FileNotFoundError, match=r"demo model is missing: .*config\.json"):
    model_path()
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  assert model_path() == tmp_path / "model"
  with pytest.raises(FileNotFoundError, match=r"held-out text is missing: .*heldout\.txt"):
    heldout_text()
