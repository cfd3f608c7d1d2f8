# SPDX-License-Identifier: Apache-2.0
"""Configuration: frozen dataclasses, YAML presets and dotted overrides."""
