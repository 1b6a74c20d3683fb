# SPDX-License-Identifier: Apache-2.0
"""Striped partitioning: every step is computed once, and every block's parts find their way to its owner."""

import itertools

import numpy as np
import pytest

from pallas_kernels.hopper_stripes import Stripes

CASES = [
  dict(programs=132, blocks=112, steps=32, stages=4),  # less blocks than programs
  dict(programs=132, blocks=112, steps=128, stages=5),  # a block ends with part of a turn
  dict(programs=132, blocks=224, steps=128, stages=4),  # between one and two waves
  dict(programs=132, blocks=896, steps=128, stages=5),  # whole blocks first
  dict(programs=4, blocks=8, steps=7, stages=4),  # whole waves only
  dict(programs=7, blocks=3, steps=10, stages=4),  # a block of more than two programs
  dict(programs=9, blocks=3, steps=9, stages=3),  # a unit for each
  dict(programs=1, blocks=3, steps=1, stages=2),
]


def pieces(stripes):
  """program -> [(block, first step, steps, programs with the rest)]."""
  table = []
  for program in range(stripes.programs):
    found = [stripes.piece(program, i) for i in range(int(stripes.pieces(program)))]
    table.append([(*map(int, piece), range(*map(int, others))) for piece, others in found])
  return table


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_of_every_block_is_computed_once(case):
  stripes = Stripes(**case)
  count = np.zeros((stripes.blocks, stripes.steps), int)
  for block, first, steps, _ in itertools.chain(*pieces(stripes)):
    assert first % stripes.stages == 0 and steps > 0  # a piece begins at the first stage of the ring
    count[block, first : first + steps] += 1
  np.testing.assert_array_equal(count, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_owner_adds_all_other_parts_in_the_order_of_k(case):
  table = pieces(Stripes(**case))
  for program, found in enumerate(table):
    for i, (block, first, _, others) in enumerate(found):
      if first:
        assert not any(others for *_, others in found[:i])  # published before this program waits for anyone
      else:
        rest = [(f, p) for p, list_ in enumerate(table) for b, f, *_ in list_ if b == block and f]
        assert [p for _, p in sorted(rest)] == list(others)
        assert all(p > program for p in others)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nobody_has_more_than_a_unit_more_than_another(case):
  stripes = Stripes(**case)
  work = [sum(-(-steps // stripes.stages) for _, _, steps, _ in found) for found in pieces(stripes)]
  assert max(work) - min(work) <= 1


def test_there_is_a_turn_for_every_program():
  with pytest.raises(ValueError, match="programs=132 must be at most the 64 turns of the ring to share"):
    Stripes(programs=132, blocks=16, steps=16, stages=4)
