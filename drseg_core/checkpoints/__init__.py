# SPDX-License-Identifier: Apache-2.0
"""What a training leaves and how it is read: run folders, checkpoints that appear whole, models to give away."""
