# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands take."""

import argparse
from pathlib import Path

from marlin_jax.calibration.text import read_texts
from marlin_jax.demo import calibration_texts


def group_size(text: str) -> int | None:
  """A group size as it is typed: a number, or "column"."""
  return None if text == "column" else int(text)


def add_calibration(parser: argparse.ArgumentParser, *, length: int) -> None:
  """Adds the texts of a calibration set, and how many windows of how many tokens are drawn from them."""
  parser.add_argument(
    "--calibration", type=Path, nargs="+", metavar="FILE", help="text to calibrate on (default: Python's own sources)"
  )
  parser.add_argument("--calibration-count", type=int, default=128, help="windows of it (default %(default)s)")
  parser.add_argument("--calibration-length", type=int, default=length, help="tokens of a window (default %(default)s)")


def calibration(arguments: argparse.Namespace) -> list[str]:
  """The texts that the arguments of `add_calibration` name."""
  return calibration_texts() if arguments.calibration is None else read_texts(arguments.calibration)
