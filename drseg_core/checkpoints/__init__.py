# SPDX-License-Identifier: Apache-2.0
"""What a training leaves: run folders, checkpoints that appear whole, rankings, and models to give away."""
