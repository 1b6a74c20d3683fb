# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench plot`: the table of `bench matmul` as a picture, speed-up over bfloat16 against batch size."""

import csv
from collections import defaultdict
from pathlib import Path


def plot_matmul(table: Path, image: Path) -> None:
  """Draws a panel a shape: the measured speed-up, and the one that the hardware's limits would allow.

  Args:
    table: the CSV of `bench matmul`.
    image: the PNG to write.
  """
  import matplotlib  # a large package, of use only here

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  shapes = defaultdict(list)
  with table.open(newline="") as file:
    for row in csv.DictReader(file):
      shapes[int(row["k"]), int(row["n"])].append(row)
  figure, panels = plt.subplots(1, len(shapes), figsize=(3 * len(shapes), 2.8), sharey=True, squeeze=False)
  for panel, ((k, n), rows) in zip(panels[0], shapes.items(), strict=True):
    batches = sorted({int(row["m"]) for row in rows})
    limits = {int(row["m"]): float(row["bf16_us"]) / float(row["limit_us"]) for row in rows}
    panel.plot(batches, [limits[m] for m in batches], "--", color="gray", label="limit")
    for name in dict.fromkeys(row["implementation"] for row in rows):
      line = [(int(row["m"]), float(row["speedup"])) for row in rows if row["implementation"] == name]
      panel.plot(*zip(*line, strict=True), "o-", markersize=3, label=f"4 bits, {name}")
    panel.axhline(1, color="black", linewidth=0.8, label="bfloat16 (XLA)")
    panel.set(xscale="log", title=f"K={k} N={n}", xlabel="batch", xticks=batches[::2], xticklabels=batches[::2])
    panel.minorticks_off()
    panel.set_ylim(0, 6)
  panels[0][0].set_ylabel("speed-up over bfloat16")
  panels[0][0].legend(frameon=False, fontsize=8)
  device, date, version = (rows[0][name] for name in ("device", "date", "jax_version"))
  figure.suptitle(f"4-bit matmul, groups of 128, {device}, JAX {version}, {date}", fontsize=9)
  figure.tight_layout()
  image.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(image, dpi=110)
