# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from marlin_jax.bench.plot import plot, read_rows
from marlin_jax.bench.quality import bench_quality
from marlin_jax.cli import main

LLAMA = Path(__file__).parents[2] / "data" / "llama-bf16"
TRIED = ("rtn-plain", "hqq", "gptq")
TEXT = "the quick brown fox jumps over the lazy dog and the cat sleeps on the mat " * 40


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """Some methods, on a tiny model with random weights: a window of 256 tokens of text."""
  file = tmp_path_factory.mktemp("quality") / "quality.csv"
  bench_quality(
    LLAMA,
    TEXT,
    [TEXT],
    methods=TRIED,
    bits=(4,),
    group_sizes=(64,),
    windows=1,
    calibration_count=4,
    calibration_length=32,
    output=file,
  )
  return file


def test_a_row_a_method_beside_that_of_bfloat16(table):
  rows = {row["method"]: row for row in read_rows(table)}
  assert list(rows) == ["bf16", *TRIED]
  before = float(rows["bf16"]["perplexity"])
  for method in TRIED:
    row = rows[method]
    change = 100 * (float(row["perplexity"]) / before - 1)
    assert row["group_size"] == "64" and float(row["change_percent"]) == pytest.approx(change, abs=0.01)
    # 4 bits, and for every 64 weights a bfloat16 scale; HQQ has a zero point, too.
    assert float(row["bits_per_weight"]) == (4.5 if method == "hqq" else 4.25)
    assert bool(row["output_error"]) == (method == "gptq")
  assert {row["tokens"] for row in rows.values()} == {"256"}


def test_the_table_becomes_a_picture(table, tmp_path):
  plot(table, tmp_path / "picture.png", "quality")
  assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match="no column speedup, which a picture of the kind 'speedup' needs"):
    plot(table, tmp_path / "other.png", "speedup")


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match=r"methods has \['magic'\], must be of rtn-plain, rtn, hqq"):
    bench_quality(LLAMA, TEXT, [TEXT], methods=["magic"])


def test_the_command_line_takes_files(tmp_path, capsys):
  (tmp_path / "text.txt").write_text(TEXT)
  files = ["--heldout", str(tmp_path / "text.txt"), "--calibration", str(tmp_path / "text.txt")]
  options = ["--methods", "rtn", "--bits", "8", "--group-sizes", "column", "--windows", "1"]
  assert main(["bench", "quality", str(LLAMA), *files, *options]) == 0
  out = capsys.readouterr().out
  assert "bf16: perplexity" in out and "rtn                8  column        8.0" in out
