# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench plot`: the tables of `bench matmul`, `bench quality` and `bench serve` as pictures.

A panel for every shape of weights, every number of bits, or TPOT and TTFT.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from marlin_jax.bench.table import read_rows
from pallas_kernels import MatmulProblem

Row = dict[str, str]
_NAMES = {"xla_int4": "4 bits, XLA's own"}


def plot(table: Path, image: Path, kind: str = "speedup") -> None:
  """Draws the CSV of `bench matmul`, or of `bench quality` or `bench serve` for a kind of that name, into a PNG.

  Raises:
    ValueError: the table is one for another kind of picture.
  """
  import matplotlib  # a large package, of use only here

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  rows = read_rows(table)
  needed = {"quality": "perplexity", "serve": "tpot_ms"}.get(kind, "speedup")
  if not rows or needed not in rows[0]:
    raise ValueError(f"{table} has no column {needed}, which a picture of the kind {kind!r} needs")
  figure = FIGURES[kind](rows)
  image.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(image, dpi=110)
  plt.close(figure)


def speedup_figure(rows: Sequence[Row]) -> Any:
  """Speed-up over bfloat16 against batch size: what was measured, and what the hardware's limits would allow."""

  def draw(panel: Any, shape_rows: Sequence[Row]) -> None:
    batches = sorted({int(row["m"]) for row in shape_rows})
    for sparse, style, label in ((False, "--", "limit"), (True, ":", "limit, 2:4")):
      of_kind = [row for row in shape_rows if _sparse(row) == sparse]
      limits = {int(row["m"]): float(row["bf16_us"]) / float(row["limit_us"]) for row in of_kind}
      if limits:
        panel.plot(list(limits), list(limits.values()), style, color="gray", label=label)
    for name, of_name in _by("implementation", shape_rows).items():
      line = [(int(row["m"]), float(row["speedup"])) for row in of_name]
      panel.plot(*zip(*line, strict=True), "o-", markersize=3, label=_NAMES.get(name, f"4 bits, {name}"))
    panel.axhline(1, color="black", linewidth=0.8, label="bfloat16 (XLA)")
    panel.set(xscale="log", xlabel="batch", xticks=batches[::2], xticklabels=batches[::2], ylim=(0, 6))
    panel.minorticks_off()

  return _figure(rows, draw, "speed-up over bfloat16")


def roofline_figure(rows: Sequence[Row]) -> Any:
  """Arithmetic done a second against arithmetic a byte moved, under the roof that was measured in the same run.

  A product with 4-bit weights does nearly four times the arithmetic a byte that the bfloat16 one does, so it lies
  further right: higher up the slope, or under the flat part of the roof, where fewer bytes gain nothing.
  """
  problems = [_problem(row) for row in rows]
  limits = [float(row["limit_us"]) / 1e6 for row in rows]
  bandwidth = max(problem.bytes / limit for problem, limit in zip(problems, limits, strict=True))
  peak = max(problem.flops / limit for problem, limit in zip(problems, limits, strict=True))

  def draw(panel: Any, shape_rows: Sequence[Row]) -> None:
    intensities = [1, peak / bandwidth, 8192]
    panel.plot(intensities, [min(peak, bandwidth * i) / 1e12 for i in intensities], color="gray", label="roof")
    for name, of_name in _by("implementation", shape_rows).items():
      points = [(p.flops / p.bytes, p.flops / float(row["time_us"]) / 1e6) for row in of_name for p in [_problem(row)]]
      panel.plot(*zip(*points, strict=True), "o-", markersize=3, label=_NAMES.get(name, f"4 bits, {name}"))
    dense = {int(row["m"]): (_problem(row), float(row["bf16_us"])) for row in shape_rows if not _sparse(row)}
    points = [(p.flops / (2 * (p.k * p.n + p.m * (p.k + p.n))), p.flops / time / 1e6) for p, time in dense.values()]
    panel.plot(*zip(*points, strict=True), "o-", color="black", markersize=3, label="bfloat16 (XLA)")
    panel.set(xscale="log", yscale="log", xlabel="FLOP a byte")

  return _figure(rows, draw, "TFLOP/s")


def quality_figure(rows: Sequence[Row]) -> Any:
  """What quantization costs in perplexity against the bits a weight takes: a line a method, a point a group size."""
  import matplotlib.pyplot as plt

  quantized = [row for row in rows if row["method"] != "bf16"]
  of_bits = _by("bits", quantized)
  figure, panels = plt.subplots(1, len(of_bits), figsize=(4.2 * len(of_bits), 3.2), squeeze=False)
  for panel, (bits, bits_rows) in zip(panels[0], of_bits.items(), strict=True):
    for method, of_method in _by("method", bits_rows).items():
      line = sorted((float(row["bits_per_weight"]), float(row["change_percent"])) for row in of_method)
      panel.plot(*zip(*line, strict=True), "o-", markersize=3, label=method)
    panel.axhline(0, color="black", linewidth=0.8, label="bfloat16")
    panel.set(title=f"{bits} bits", xlabel="bits a weight, with scales and zero points")
  panels[0][0].set_ylabel("perplexity, % over bfloat16")
  panels[0][0].legend(frameon=False, fontsize=7)
  first = quantized[0]
  figure.suptitle(f"{first['tokens']} held-out tokens, {first['calibration_tokens']} for calibration", fontsize=9)
  figure.tight_layout()
  return figure


def serve_figure(rows: Sequence[Row]) -> Any:
  """What clients wait for against the requests a second, median and 99th percentile; rows of overload are left out."""
  import matplotlib.pyplot as plt

  rows = [row for row in rows if row["refused"] == row["cancelled"] == "0"]
  figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.0))
  for panel, time, name in zip(panels, ("tpot", "ttft"), ("a token after the first", "the first token"), strict=True):
    for weights, of_weights in _by("weights", rows).items():
      rates = [float(row["requests_per_second"]) for row in of_weights]
      (line,) = panel.plot(rates, [float(row[f"{time}_ms"]) for row in of_weights], "o-", markersize=3, label=weights)
      late = [float(row[f"{time}_p99_ms"]) for row in of_weights]
      panel.plot(rates, late, ":", color=line.get_color(), label=f"{weights}, 99th percentile")
    panel.set(title=f"{name}, ms", xlabel="requests a second", ylim=(0, None))
  figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=7, ncols=4, loc="lower center")
  first = rows[0]
  tokens = f"{first['prompt_tokens']} tokens in, {first['new_tokens']} out, {first['slots']} slots"
  figure.suptitle(f"{first['model']}, {tokens}, {first['device']}, JAX {first['jax_version']}", fontsize=9)
  figure.tight_layout(rect=(0, 0.07, 1, 1))  # the legend is below
  return figure


FIGURES = {"speedup": speedup_figure, "roofline": roofline_figure, "quality": quality_figure, "serve": serve_figure}


def _figure(rows: Sequence[Row], draw: Callable[[Any, Sequence[Row]], None], ylabel: str) -> Any:
  import matplotlib.pyplot as plt

  shapes: dict[tuple[int, int], list[Row]] = defaultdict(list)
  for row in sorted(rows, key=lambda row: int(row["m"])):  # rows that were measured later stand at a table's end
    shapes[int(row["k"]), int(row["n"])].append(row)
  figure, panels = plt.subplots(1, len(shapes), figsize=(3 * len(shapes), 3.1), sharey=True, squeeze=False)
  for panel, ((k, n), shape_rows) in zip(panels[0], shapes.items(), strict=True):
    draw(panel, shape_rows)
    panel.set_title(f"K={k} N={n}")
  panels[0][0].set_ylabel(ylabel)
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, frameon=False, fontsize=7, ncols=4, loc="lower center")
  device, date, version = (rows[0][name] for name in ("device", "date", "jax_version"))
  figure.suptitle(f"4-bit matmul, groups of {rows[0]['group_size']}, {device}, JAX {version}, {date}", fontsize=9)
  figure.tight_layout(rect=(0, 0.12, 1, 1))  # the legend is below
  return figure


def _by(column: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
  groups: dict[str, list[Row]] = defaultdict(list)
  for row in rows:
    groups[row[column]].append(row)
  return groups


def _problem(row: Row) -> MatmulProblem:
  sizes = {name: int(row[name]) for name in ("m", "n", "k", "group_size")}
  return MatmulProblem(**sizes, dtype=jnp.dtype(row["dtype"]), sparse24=_sparse(row))


def _sparse(row: Row) -> bool:
  return row["implementation"].endswith("2:4")
