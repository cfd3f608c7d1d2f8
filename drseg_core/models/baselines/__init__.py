# SPDX-License-Identifier: Apache-2.0
"""What only the methods that DR-Seg is compared with need; ``config/methods.py`` says which options make each."""
