# SPDX-License-Identifier: Apache-2.0
"""What is measured, and how: ``python -m bench COMMAND``, from the folder that this package lies in."""
