# SPDX-License-Identifier: Apache-2.0
"""From the original archives of a benchmark set to its folders: unpacking, finding, decoding, cutting."""

from drseg_core.data.prepare.write import Options, Prepared, patch_starts, prepare

__all__ = ["Options", "Prepared", "patch_starts", "prepare"]
