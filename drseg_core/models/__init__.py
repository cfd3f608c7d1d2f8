# SPDX-License-Identifier: Apache-2.0
"""The model: encoders, correlation, aggregation, decoder; baselines/ has the parts of compared methods alone."""
