# SPDX-License-Identifier: Apache-2.0
"""The folder that a checkpoint is: found, its JSON files read, and a new one written so that it is whole or absent."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from marlin_jax.tokenizer import TOKENIZER_FILES

# Files beside the weights that belong to a model and pass from one checkpoint to another unchanged.
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json")


class CheckpointError(ValueError):
  """A checkpoint cannot be read or written; the message names the file or tensor, what it was and what it must be."""


def find_folder(path: str | os.PathLike[str]) -> Path:
  """The folder at `path`, or of the Hugging Face Hub model `path` if that is in the local cache. Never downloads.

  Raises:
    CheckpointError: there is no such folder, and no such model in the cache.
  """
  folder = Path(path)
  if folder.is_dir():
    return folder
  if folder.exists():
    raise CheckpointError(f"{folder} is a file, must be a checkpoint folder")
  try:
    return Path(huggingface_hub.snapshot_download(str(path), local_files_only=True))
  except HFValidationError:
    raise CheckpointError(f"{folder} does not exist, must be a checkpoint folder or the name of a Hub model") from None
  except LocalEntryNotFoundError:
    raise CheckpointError(
      f"{path} is neither a folder nor a Hub model in the local cache; `hf download {path}` brings it there"
    ) from None


def read_json(file: Path) -> dict[str, Any]:
  """The JSON object in `file`.

  Raises:
    CheckpointError: the file is missing or holds something else.
  """
  try:
    content = json.loads(file.read_bytes())
  except FileNotFoundError:
    raise CheckpointError(f"{file} is missing") from None
  except ValueError as error:
    raise CheckpointError(f"{file} is not valid JSON: {error}") from None
  if not isinstance(content, dict):
    raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, must hold an object")
  return content


def write_json(file: Path, content: dict[str, Any]) -> None:
  """Write a JSON object, indented, in the given key order."""
  file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(destination: str | os.PathLike[str]) -> Iterator[Path]:
  """A folder to write into that becomes `destination` when the block ends, and vanishes when the block fails.

  It lies beside the destination, on the same file system, so that the last step is one rename.

  Raises:
    CheckpointError: the destination exists and is not an empty folder, or writing failed (a full disk, for example).
  """
  destination = Path(destination)
  if destination.is_dir() and any(destination.iterdir()):
    raise CheckpointError(f"{destination} exists and is not empty; it must not exist yet")
  if destination.exists() and not destination.is_dir():
    raise CheckpointError(f"{destination} is a file, must be a folder that does not exist yet")
  beside = None
  try:
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    beside.chmod(0o755)  # mkdtemp makes a private folder; this one will be an ordinary one
    yield beside
    beside.rename(destination)
  except (OSError, SafetensorError) as error:
    raise CheckpointError(f"{destination} could not be written: {error}; nothing was left there") from error
  finally:
    # After the rename there is nothing at `beside`; before it, whatever was written goes.
    if beside is not None:
      shutil.rmtree(beside, ignore_errors=True)
