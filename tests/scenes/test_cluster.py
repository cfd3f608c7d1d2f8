# SPDX-License-Identifier: Apache-2.0
"""Workers of a Dask cluster make the blocks; here they are threads of this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drseg_core.errors import MissingExtraError, RasterError
from drseg_core.scenes import cluster as module
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
