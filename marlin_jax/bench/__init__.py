# SPDX-License-Identifier: Apache-2.0
"""The measurements behind the numbers in the documentation."""
