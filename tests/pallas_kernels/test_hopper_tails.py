# SPDX-License-Identifier: Apache-2.0
"""Tails: every step is computed once, and every block's tail finds its way to the owner."""

import numpy as np
import pytest

from pallas_kernels.hopper_tails import Tails

CASES = [
  dict(programs=132, blocks=112, steps=32),
  dict(programs=132, blocks=224, steps=128),  # a whole wave first
  dict(programs=132, blocks=896, steps=128),  # six of them
  dict(programs=132, blocks=66, steps=16),  # a helper for every owner
  dict(programs=132, blocks=120, steps=128),  # ten for each helper
  dict(programs=7, blocks=5, steps=23),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_of_every_block_is_computed_once(case):
  tails = Tails(**case)
  count = np.zeros((tails.blocks, tails.steps), int)
  owner = np.full(tails.blocks, -1)
  for program in range(tails.programs):
    for i in range(int(tails.pieces(program))):
      block, first, steps = map(int, tails.piece(program, i))
      assert steps > 0
      count[block, first : first + steps] += 1
      if tails.helps(program, i):
        assert first == tails.head
        assert tails.is_helped(owner[block], tails.waves)
        # Its place among the last wave's blocks, by which both find its slot.
        assert block - tails.waves * tails.programs in range(tails.owners)
      else:
        assert first == 0 and owner[block] < 0
        owner[block] = program
        assert tails.is_helped(program, i) == (steps < tails.steps)
  np.testing.assert_array_equal(count, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nobody_has_much_more_to_do_than_an_equal_share(case):
  tails = Tails(**case)
  work = [
    sum(int(tails.piece(p, i)[2]) for i in range(int(tails.pieces(p)))) - tails.waves * tails.steps
    for p in range(tails.programs)
  ]
  share = tails.owners * tails.steps / tails.programs
  assert max(work) <= share * 1.3
  assert max(work) < tails.steps


@pytest.mark.parametrize("change", [dict(blocks=132), dict(blocks=65), dict(blocks=131)], ids=str)
def test_there_must_be_something_to_share(change):
  with pytest.raises(ValueError, match="programs=132 must leave half of them or more a block of"):
    Tails(**(dict(programs=132, blocks=112, steps=32) | change))
