# SPDX-License-Identifier: Apache-2.0
"""The demo model that ships with the project: where it lies, text it has never seen, and text of the kind it has."""

import json
import sysconfig
from importlib import resources
from pathlib import Path

from marlin_jax.demo.corpus import read_sources

__all__ = ["calibration_texts", "heldout_text", "model_path"]


def model_path() -> Path:
  """The folder of the shipped float model: a Hugging Face checkpoint that `marlin_jax.load_model` reads.

  Raises:
    FileNotFoundError: the installation lacks the model's files.
  """
  folder = Path(str(resources.files(__name__))) / "model"
  if not (folder / "config.json").is_file():
    raise FileNotFoundError(
      f"the demo model is missing: {folder} has no config.json; "
      "`python examples/04_train_demo.py --output DIR` trains it anew"
    )
  return folder


def heldout_text() -> str:
  """Python source files, one after the other, that the demo model was not trained on, for its perplexity.

  Raises:
    FileNotFoundError: the installation lacks the text.
  """
  file = model_path() / "heldout.txt"
  if not file.is_file():
    raise FileNotFoundError(f"the demo model's held-out text is missing: {file}")
  # Bytes, not read_text(): line ends stay as they are.
  return file.read_bytes().decode("utf-8")


def calibration_texts() -> list[str]:
  """Python source files of the kind the demo model was trained on: this interpreter's standard library.

  Without the files, by name, that were held out from its training. The text differs a little from one version of Python
  to the next.

  Raises:
    ValueError: the standard library is not there as source.
  """
  facts = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))["corpus"]
  held_out = {*facts["sample_files"], *facts["validation_files"]}
  sources = read_sources(Path(sysconfig.get_paths()["stdlib"]))
  return [text for path, text in sources.items() if path not in held_out]
