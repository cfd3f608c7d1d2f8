# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the engine, one file per op. They import torch and triton, never drseg_core."""
