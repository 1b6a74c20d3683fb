# SPDX-License-Identifier: Apache-2.0
"""Turns pytest's JUnit file of `make gpu-test` into the table in docs/results: python tests/gpu_table.py FILE.xml"""

import collections
import sys
import xml.etree.ElementTree as ElementTree

import jax


def main(path: str) -> None:
  rows = collections.defaultdict(collections.Counter)
  for case in ElementTree.parse(path).iter("testcase"):
    failed = case.find("failure") is not None or case.find("error") is not None
    outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
    rows[case.get("classname"), case.get("name").split("[")[0]][outcome] += 1
  print(f"# GPU tests\n\n{jax.devices()[0].device_kind}, JAX {jax.__version__}, by `make gpu-test`.\n")
  print("| test | passed | failed | skipped |\n|---|---|---|---|")
  for (module, name), outcomes in rows.items():
    counts = (str(outcomes[outcome]) for outcome in ("passed", "failed", "skipped"))
    print(f"| {module.removeprefix('tests.')}: {name.removeprefix('test_').replace('_', ' ')} | {' | '.join(counts)} |")


if __name__ == "__main__":
  main(sys.argv[1])
