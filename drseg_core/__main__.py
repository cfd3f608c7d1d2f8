# SPDX-License-Identifier: Apache-2.0
"""``python -m drseg_core`` is ``drseg``."""

import sys

from drseg_core.cli.main import main

sys.exit(main())
