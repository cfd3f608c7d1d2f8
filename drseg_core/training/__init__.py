# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, its loss, optimiser and log, and the offline channel ranking."""
