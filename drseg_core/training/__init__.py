# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, checkpoints that survive anything, and the offline channel ranking."""
