# SPDX-License-Identifier: Apache-2.0
"""What a value of ``--cluster`` asks for. It is read before torch is imported."""

from __future__ import annotations

import re

from drseg_core.errors import ConfigError

MOST_WORKERS = 1024
"""Each is a process with a model of its own and needs a core: no machine has more of them for one map."""

# those that distributed has connections for
_ADDRESS = re.compile(r"(?:(?:tcp|tls|ucx|wss?)://)?(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/@\[\]]+):([0-9]{1,5})")


def local_workers(where: str) -> int | None:
    """So many processes of this machine; None for the address of a scheduler.

    Examples:
        >>> from drseg_core.scenes.workers import local_workers
        >>> local_workers("4"), local_workers("tcp://host:8786")
        (4, None)

    Raises:
        ConfigError: it is neither.
    """
    if re.fullmatch("[0-9]{1,9}", where) and 1 <= int(where) <= MOST_WORKERS:
        return int(where)
    address = _ADDRESS.fullmatch(where)
    if address is None or not 1 <= int(address[1]) <= 65535:
        raise ConfigError(
            "--cluster has a wrong value; expected the address of a scheduler, tcp://HOST:PORT, or a number of "
            f"processes from 1 to {MOST_WORKERS}, got {where}"
        )
    return None
