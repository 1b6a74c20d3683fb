# SPDX-License-Identifier: Apache-2.0
"""The demo model that ships with the project: where it lies, and text it has never seen."""

from importlib import resources
from pathlib import Path

__all__ = ["heldout_text", "model_path"]


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
