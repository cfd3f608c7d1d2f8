# SPDX-License-Identifier: Apache-2.0
"""Inference on images of any size, metrics and reports."""
