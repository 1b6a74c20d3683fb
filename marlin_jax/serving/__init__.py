# SPDX-License-Identifier: Apache-2.0
"""A server for many clients on one device: continuous batching over static slots, and the OpenAI API in front of it."""
