# SPDX-License-Identifier: Apache-2.0
"""Workers of a Dask cluster make the blocks; here they are threads of this process."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest

from drseg_core.errors import BackendUnavailableError, ConfigError, MissingExtraError, RasterError
from drseg_core.scenes import cluster as module
from drseg_core.scenes.workers import local_workers
from tests.scenes.test_many import color_mapper, content, expected, folder, mapped, narrow_strips
from tests.scenes.test_predict import NORTH_UP, write

__all__ = ["expected", "folder", "narrow_strips"]
pytest.importorskip("rasterio")


@pytest.fixture
def workers() -> Any:
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    with distributed.Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield module.Cluster(client, color_mapper)


@pytest.mark.promise("C45")
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_workers_write_the_bytes_of_one(workers, folder, expected, tmp_path):
    assert workers.parts == 4
    mapped(color_mapper(), folder, tmp_path / "maps", cluster=workers)
    assert content(tmp_path / "maps") == expected


def test_what_a_worker_says(workers, folder, tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (scenes / "0.tif").write_bytes((folder / "0.tif").read_bytes())
    # opened without a word, and damaged further down
    noise = np.random.default_rng(0).integers(0, 256, (3, 100, 100)).astype(np.uint8)
    write(scenes / "1.tif", noise, crs="EPSG:32632", transform=NORTH_UP, compress="deflate")
    data = bytearray((scenes / "1.tif").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    (scenes / "1.tif").write_bytes(data)
    with pytest.raises(RasterError, match="1.tif is damaged or incomplete"):
        mapped(color_mapper(), scenes, tmp_path / "stops", cluster=workers)
    outcomes = mapped(color_mapper(), scenes, tmp_path / "maps", cluster=workers, keep_going=True)
    assert [found.state for found in outcomes] == ["mapped", "failed"] and outcomes[1].exit_code == 3


def test_without_the_extra(monkeypatch):
    def absent(*words: str) -> None:
        raise MissingExtraError(" ".join(words))

    monkeypatch.setattr(module, "require", absent)
    with pytest.raises(MissingExtraError, match="predict cluster"):
        module.open_cluster("2", color_mapper).__enter__()


def test_what_a_cluster_is_called():
    assert local_workers("1") == 1 and local_workers("1024") == 1024
    for address in ("tcp://127.0.0.1:8786", "tls://host:1", "node-3.site.org:65535", "tcp://[::1]:8786"):
        assert local_workers(address) is None
    wrong = (
        "",
        "0",
        "-1",
        "1025",
        "1.5",
        "abc",
        "host",
        "tcp://host",
        "host:0",
        "host:65536",
        "http://host:80",
        "9" * 5000,
    )
    for where in (*wrong, "tcp://host:8786/", "tcp://two words:1", "\u0664"):
        with pytest.raises(ConfigError, match="--cluster has a wrong value; expected the address of a scheduler"):
            local_workers(where)
        with pytest.raises(ConfigError, match="--cluster has a wrong value"):
            module.open_cluster(where, color_mapper).__enter__()


def test_no_scheduler_answers(caplog):
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    import dask

    with socket.socket() as closed, dask.config.set({"distributed.comm.timeouts.connect": "300ms"}):
        # bound, so nobody else takes it, but not listening
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        # the second lacks a certificate
        for address in (f"tcp://{place}", f"tls://{place}", place):
            with pytest.raises(BackendUnavailableError) as refused:
                module.open_cluster(address, color_mapper).__enter__()
            words = str(refused.value)
            assert words.startswith(f"--cluster: no scheduler answers; expected one at {address}, got ")
            assert "\n" not in words and refused.value.exit_code == 5
    assert caplog.text == ""
