# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from marlin_jax.bench.plot import plot, read_rows
from marlin_jax.bench.quality import SPARSE_METHODS, bench_quality
from marlin_jax.cli import main

LLAMA = Path(__file__).parents[2] / "data" / "llama-bf16"
TRIED = ("rtn-plain", "hqq", "gptq", "sparse24-gptq")
TEXT = "the quick brown fox jumps over the lazy dog and the cat sleeps on the mat " * 40


@pytest.fixture(scope="module")
def table(tmp_path_factory, small_checkpoint):
  """Some methods, on a tiny model with random weights: a window of 256 tokens of text."""
  file = tmp_path_factory.mktemp("quality") / "quality.csv"
  bench_quality(
    small_checkpoint,
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
    # 2:4 sparse: 4 bits and 2 of position for half of them.
    bits = {"hqq": 4.5, "sparse24-gptq": 3.25}.get(method, 4.25)
    assert float(row["bits_per_weight"]) == bits
    assert bool(row["output_error"]) == (method in ("gptq", "sparse24-gptq"))
  assert {row["tokens"] for row in rows.values()} == {"256"}


def test_the_table_becomes_a_picture(table, tmp_path):
  plot(table, tmp_path / "picture.png", "quality")
  assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match="no column speedup, which a picture of the kind 'speedup' needs"):
    plot(table, tmp_path / "other.png", "speedup")


def test_pruning_alone_has_neither_codes_nor_groups(tmp_path, small_checkpoint):
  file = tmp_path / "quality.csv"
  options = dict(windows=1, calibration_count=4, calibration_length=32, output=file)
  bench_quality(small_checkpoint, TEXT, [TEXT], methods=SPARSE_METHODS, bits=(16,), **options)
  bf16, *rows = read_rows(file)
  assert [row["method"] for row in rows] == list(SPARSE_METHODS)
  assert all(row["bits"] == "16" and row["group_size"] == "" and row["output_error"] == "" for row in rows)
  # Different models, none of them the float one.
  assert len({row["perplexity"] for row in (bf16, *rows)}) == 1 + len(SPARSE_METHODS)


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match=r"methods has \['magic'\], must be of rtn-plain, rtn, hqq"):
    bench_quality(LLAMA, TEXT, [TEXT], methods=["magic"])
  with pytest.raises(ValueError, match=r"methods has \['rtn'\], must be of sparse24-magnitude, .* with bits=\(16,\)"):
    bench_quality(LLAMA, TEXT, [TEXT], methods=["rtn"], bits=[16])


def test_the_command_line_takes_files(tmp_path, capsys):
  (tmp_path / "text.txt").write_text(TEXT)
  files = ["--heldout", str(tmp_path / "text.txt"), "--calibration", str(tmp_path / "text.txt")]
  options = ["--methods", "rtn", "--bits", "8", "--group-sizes", "column", "--windows", "1"]
  assert main(["bench", "quality", str(LLAMA), *files, *options]) == 0
  out = capsys.readouterr().out
  assert "bf16: perplexity" in out and "rtn                    8  column        8.0" in out
