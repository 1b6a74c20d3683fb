# SPDX-License-Identifier: Apache-2.0
import json
import runpy
import shutil
import sysconfig
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from marlin_jax.checkpoint import load_model
from marlin_jax.demo.corpus import Corpus

SCRIPT = Path(__file__).parents[2] / "examples" / "04_train_demo.py"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
  return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
  def run_script(*arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")

  return run_script


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("source")
  for package in ("email", "json", "logging", "collections"):
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / package, folder / package)
  return folder


def test_tiny_run_learns_and_writes_a_checkpoint_that_loads(run, source: Path, tmp_path: Path, capsys):
  corpus_file, output = tmp_path / "corpus.npz", tmp_path / "model"
  run("--tiny", "--source", source, "--prepare", corpus_file)
  run("--tiny", "--source", corpus_file, "--output", output)

  facts = json.loads((output / "training.json").read_text())
  assert facts["steps"] == 20
  # Uniform guessing over 512 tokens costs ln 512 = 6.24.
  assert facts["losses"][0] == pytest.approx(np.log(512), abs=0.2)
  assert np.mean(facts["losses"][-3:]) < facts["losses"][0] - 0.5

  model = load_model(output)
  corpus = Corpus.load(corpus_file)
  assert (output / "heldout.txt").read_bytes().decode() == corpus.sample
  ids = model.tokenizer.encode(corpus.sample)
  assert model.tokenizer.decode(ids) == corpus.sample
  assert model.config.eos_token_ids == (0,)
  printed = capsys.readouterr().out
  assert "held-out sample" in printed
  assert printed.count("--- ") == 3


def test_an_existing_output_is_refused_before_any_work(run, tmp_path: Path, capsys):
  with pytest.raises(SystemExit):
    run("--tiny", "--output", tmp_path)
  assert f"--output must not exist, and {tmp_path} does" in capsys.readouterr().err


def test_each_epoch_covers_the_stream_once(script: SimpleNamespace):
  recipe, length = script.TINY, 64 * 48 + 63
  epoch = np.concatenate([batch.ravel() for batch in islice(script.window_starts(length, recipe, 0), 6)])
  assert len(set(epoch)) == 48
  assert len(set(epoch % 64)) == 1
  assert epoch.min() >= 0 and epoch.max() + 64 < length


def test_learning_rate_warms_up_and_ends_at_zero(script: SimpleNamespace):
  recipe = script.FULL
  assert script.learning_rate(0.0, recipe) == 0
  assert script.learning_rate(recipe.warm_up, recipe) == pytest.approx(recipe.learning_rate)
  assert script.learning_rate((1 + recipe.warm_up) / 2, recipe) == pytest.approx(recipe.learning_rate / 2)
  assert script.learning_rate(1.0, recipe) == pytest.approx(0, abs=1e-12)
