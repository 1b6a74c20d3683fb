# SPDX-License-Identifier: Apache-2.0
from marlin_jax.bench.table import read_rows, write_rows


def test_what_is_measured_again_takes_its_row_and_the_others_stay(tmp_path):
  table = tmp_path / "of" / "table.csv"
  write_rows(table, [dict(m=1, group=None, us=3.0), dict(m=2, group=64, us=4.0)], key=("m", "group"))
  write_rows(
    table, [dict(m=8, group=64, us=6.0), dict(m=1, group=None, us=1 / 3, date="now")], key=("m", "group"), digits=3
  )
  assert read_rows(table) == [
    dict(m="1", group="", us="0.333", date="now"),
    dict(m="2", group="64", us="4.0", date=""),
    dict(m="8", group="64", us="6", date=""),
  ]


def test_without_a_key_all_rows_are_new(tmp_path):
  table = tmp_path / "table.csv"
  write_rows(table, [dict(m=1), dict(m=2)])
  write_rows(table, [dict(m=3)])
  assert read_rows(table) == [dict(m="3")]
