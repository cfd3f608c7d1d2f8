# SPDX-License-Identifier: Apache-2.0
"""Many scenes in one call, by one process or several: the missing blocks are made first, then maps are written."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from drseg_core.errors import ConfigError, DRSegError, ResourceError
from drseg_core.files import remove_dead, write_text_atomic
from drseg_core.scenes.block_store import BlockStore, is_complete, note_complete, work_folder
from drseg_core.scenes.cluster import Cluster
from drseg_core.scenes.mosaic import Grid, Neighbour, neighbours
from drseg_core.scenes.predict import BLOCKS, OPEN, Mapper, Work
from drseg_core.scenes.sources import Scene

_log = logging.getLogger(__name__)

__all__ = ["Outcome", "Shard", "map_scenes"]


class Processes(Protocol):
    """This process among those that work together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...


class Shard(NamedTuple):
    """Part ``number``, from 0, of ``count`` independent calls.

    Examples:
        >>> from drseg_core.scenes.many import Shard
        >>> Shard.of("2/5")
        Shard(number=1, among=5)
    """

    number: int
    among: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """A shard from the value of ``--shard``.

        Raises:
            ConfigError: it is not ``i/n`` with i from 1 to n.
        """
        # Python refuses to read a number of thousands of digits
        found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--shard has a wrong value; expected i/n with i from 1 to n, got {text}")
        return cls(int(found[1]) - 1, int(found[2]))


class Outcome(NamedTuple):
    """What became of a scene.

    ``state`` is ``mapped``, ``shared`` (its blocks of this shard are made), ``failed`` or ``not reached``. ``error`` is
    one line, with its ``exit_code``. ``files`` were written, and ``seconds`` is the time it took here.

    Examples:
        >>> from drseg_core.scenes.many import Outcome
        >>> Outcome("scene.tif", "map.tif", "mapped").error is None
        True
    """

    image: str
    out: str
    state: str
    error: str | None = None
    exit_code: int = 0
    files: tuple[str, ...] = ()
    seconds: float = 0.0


def map_scenes(
    mapper: Mapper,
    scenes: Sequence[Scene],
    *,
    explain: Callable[[BaseException], tuple[str, int]],
    processes: Processes | None = None,
    shard: Shard | None = None,
    cluster: Cluster | None = None,
    mosaic: bool = False,
    keep_going: bool = False,
    overwrite: bool = False,
    report: Path | None = None,
    done: Callable[[Outcome], object] = lambda outcome: None,
    finish: Callable[[Sequence[Outcome]], object] = lambda outcomes: None,
    progress: bool = True,
) -> list[Outcome]:
    """Map scenes into the files they name.

    Finished blocks lie beside each output until all scenes are mapped. So an interrupted call goes on where it stopped,
    and the result has the same bytes.

    Several processes share the blocks of every scene, and then the writing of the maps. Blocks, and which tiles share a
    forward pass, do not depend on the number of processes.

    Args:
        mapper: the model.
        scenes: from :func:`drseg_core.scenes.sources.with_outputs`.
        explain: gives one line and an exit code for an exception of a scene.
        processes: the processes that work together; by default only this one.
        shard: make only a part of the blocks, and no map. A call without it writes the maps once all parts are made.
        cluster: its workers make the blocks, and this process writes the maps.
        mosaic: blend the scores of scenes that overlap on one grid, so that their maps agree there. While the call
            runs, this takes disk for the scores of all classes.
        keep_going: list a scene that fails, and go on with the others.
        overwrite: replace outputs.
        report: JSON file of the outcomes.
        done: called with each scene that is mapped or failed in this process.
        finish: called in the first process once all maps are there. A call that is stopped there goes on there.
        progress: show progress bars.

    Returns:
        One outcome for each scene. They are all complete in the first process. In another one, only its own are.

    Raises:
        Exception: that of the first scene that fails, unless ``keep_going``.

    Examples:
        >>> from drseg_core.cli.failures import failure
        >>> from drseg_core.scenes.many import map_scenes
        >>> from drseg_core.scenes.predict import run_mapper
        >>> from drseg_core.scenes.sources import list_scenes, with_outputs
        >>> scenes = with_outputs(list_scenes(["scene.tif", "absent.tif"]), "maps/{name}.tif")
        >>> explain = lambda error: failure(error, "predict")
        >>> found = map_scenes(run_mapper("run"), scenes, explain=explain, keep_going=True, progress=False)
        >>> [outcome.state for outcome in found]
        ['mapped', 'failed']
    """
    call = _Call(mapper, scenes, explain, keep_going, overwrite, done, progress)
    if mosaic and len(scenes) > 1:
        call.find_neighbours()
    begin, whole = time.perf_counter(), False
    try:
        if cluster is not None:
            call.by_cluster(cluster)
        elif processes is None or processes.world_size == 1:
            call.alone() if shard is None else call.together(_Alone(), shard)
        else:
            call.together(processes, shard)
        if processes is None or processes.rank == 0:
            call.check_present()
            finish(call.outcomes)
        whole = True
    finally:
        if processes is None or processes.rank == 0:
            if report is not None:
                write_report(report, call.outcomes, time.perf_counter() - begin)
            call.tidy(mapped=whole and shard is None)
    return call.outcomes


def write_report(path: Path, outcomes: Sequence[Outcome], seconds: float) -> None:
    """The outcomes as JSON."""
    counts = {state: sum(found.state == state for found in outcomes) for state in _STATES}
    content = {"counts": counts, "seconds": round(seconds, 3), "scenes": [found._asdict() for found in outcomes]}
    write_text_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


_STATES = ("mapped", "shared", "failed", "not reached")


class _Alone:
    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class _Call:
    """The scenes of one call, and their outcomes."""

    def __init__(
        self,
        mapper: Mapper,
        scenes: Sequence[Scene],
        explain: Callable[[BaseException], tuple[str, int]],
        keep_going: bool,
        overwrite: bool,
        done: Callable[[Outcome], object],
        progress: bool,
    ) -> None:
        self.mapper, self.scenes, self.explain, self.keep_going = mapper, scenes, explain, keep_going
        self.overwrite, self.done, self.progress = overwrite, done, progress
        self.outcomes = [Outcome(scene.image, str(scene.out), "not reached") for scene in scenes]
        self.folders = [work_folder(str(scene.out)) for scene in scenes]
        self.neighbours: list[tuple[Neighbour, ...]] = [() for _ in scenes]

    def find_neighbours(self) -> None:
        self.neighbours = neighbours([self._grid(scene.image) for scene in self.scenes], self.folders)

    def _grid(self, image: str) -> Grid | None:
        # what cannot be opened is said in its turn
        with contextlib.suppress(DRSegError):
            return self.mapper.grid(image)
        return None

    def alone(self) -> None:
        if any(self.neighbours):
            # all blocks, then all maps
            self.together(_Alone(), None)
            return
        work = Work(self.mapper.facts)
        for number in range(len(self.scenes)):
            self._do(number, work, "mapped")

    def together(self, processes: Processes, shard: Shard | None) -> None:
        rank, world_size = processes.rank, processes.world_size
        first, count = (0, 1) if shard is None else shard
        parts = count * world_size
        # which process removes blocks of other options: none, if other calls may use them
        if rank == 0:
            for number in self._left():
                self._do(number, Work(self.mapper.facts, OPEN, alone=shard is None))
        self._agree(processes)
        steps = (*self.mapper.steps, BLOCKS)
        for step in steps if shard is None else steps[:1]:
            for number in self._left():
                # the next scene begins with the next process: scenes of one block are shared too
                part = (first * world_size + rank + number) % parts
                self._do(number, Work(self.mapper.facts, step, part, parts, alone=False))
            self._agree(processes)
        if shard is not None:
            self.outcomes = [found if found.error else found._replace(state="shared") for found in self.outcomes]
            return
        for number in self._left():
            if number % world_size == rank:
                self._do(number, Work(self.mapper.facts, alone=False), "mapped")
        self._agree(processes)

    def by_cluster(self, cluster: Cluster) -> None:
        for number in self._left():
            self._do(number, Work(self.mapper.facts, OPEN))
        for step in (*self.mapper.steps, BLOCKS):
            left = self._left()
            given = [(self.scenes[number], self.neighbours[number]) for number in left]
            errors = cluster.make(given, step, overwrite=self.overwrite)
            for number, error in zip(left, errors, strict=True):
                if error is not None:
                    self._failed(number, error)
                    if not self.keep_going:
                        raise error
        for number in self._left():
            self._do(number, Work(self.mapper.facts, alone=False), "mapped")

    def _failed(self, number: int, error: Exception) -> None:
        message, code = self.explain(error)
        self.outcomes[number] = self.outcomes[number]._replace(state="failed", error=message, exit_code=code, files=())
        self.done(self.outcomes[number])

    def _left(self) -> list[int]:
        return [number for number, found in enumerate(self.outcomes) if found.state == "not reached"]

    def _agree(self, processes: Processes) -> None:
        """Share what each process knows with all, and wait until all are here."""
        for outcomes in processes.gather(self.outcomes):
            for number, found in enumerate(outcomes):
                if self.outcomes[number].state == "not reached" and found.state != "not reached":
                    self.outcomes[number] = found

    def _do(self, number: int, work: Work, state: str | None = None) -> None:
        scene, begin = self.scenes[number], time.perf_counter()
        # the first was found to be of the same model and options
        if number and not self.folders[number].exists() and is_complete(self.folders[0], Path(str(scene.out))):
            self._mapped(number, "mapped", (str(scene.out),))
            return
        failed = {str(self.folders[n]) for n, found in enumerate(self.outcomes) if found.state == "failed"}
        work = work._replace(neighbours=self.neighbours[number], left_out=frozenset(failed))
        try:
            files = self.mapper.write(
                scene.image,
                scene.out,
                polygons=scene.polygons,
                overwrite=self.overwrite,
                work=work,
                progress=self.progress,
            )
        except Exception as error:
            self._took(number, begin)
            self._failed(number, error)
            if not self.keep_going:
                raise
            return
        self._took(number, begin)
        if state is not None:
            self._mapped(number, state, tuple(map(str, files.present())))

    def _mapped(self, number: int, state: str, names: tuple[str, ...]) -> None:
        self.outcomes[number] = self.outcomes[number]._replace(state=state, files=names)
        self.done(self.outcomes[number])

    def _took(self, number: int, begin: float) -> None:
        seconds = self.outcomes[number].seconds + time.perf_counter() - begin
        self.outcomes[number] = self.outcomes[number]._replace(seconds=round(seconds, 3))

    def check_present(self) -> None:
        """Check that finished maps are still there: a folder may be moved, or a disk removed, during the call."""
        for number, found in enumerate(self.outcomes):
            gone = next((name for name in found.files if not Path(name).exists()), None)
            if gone is not None:
                error = ResourceError(
                    f"predict: {gone} was written and is gone; expected it to stay until the call ends"
                )
                self._failed(number, error)
                if not self.keep_going:
                    raise error

    def tidy(self, *, mapped: bool) -> None:
        """Remove the blocks if nothing is left to do, or say which are kept."""
        if mapped and all(found.state == "mapped" for found in self.outcomes):
            # the first folder says so until the others are gone: killed in between, the call goes on from there
            # another call may have come to the same end, and removed that folder
            with contextlib.suppress(FileNotFoundError):
                note_complete(self.folders[0], [Path(name) for found in self.outcomes for name in found.files])
            for folder in filter(Path.is_dir, reversed(self.folders)):
                store = BlockStore(folder, {})
                # another call may have come to it by now
                with contextlib.suppress(ConfigError), store.claim(alone=True):
                    store.remove()
        for scene in self.scenes:
            # folders that a killed process was removing
            remove_dead(Path(str(scene.out)))
        kept = [folder for folder in self.folders if folder.is_dir()]
        if kept:
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            _log.info("what is finished is kept in %s%s: the same command goes on there", kept[0], more)
