# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from drseg_core.checkpoints.channels import ChannelFile, load_channels, save_channels
from drseg_core.checkpoints.checkpoint import (
    WEIGHTS,
    Checkpoint,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_aside_damaged,
)
from drseg_core.checkpoints.lock import run_lock
from drseg_core.checkpoints.run import (
    CHANNELS,
    CONFIG,
    check_class_names,
    check_output,
    check_resumable,
    holds_clip,
    model_of,
    plain_config,
    warm_start,
    write_run_files,
)
from drseg_core.checkpoints.versions import device_name
from drseg_core.config.load import config_from_dict
from drseg_core.config.reading import AUTO
from drseg_core.config.schema import Config, ReadingConfig
from drseg_core.config.validate import validate
from drseg_core.data import SegmentationDataset, open_dataset
from drseg_core.data.loader import training_batches
from drseg_core.errors import CheckpointError, ConfigError, NumericalError
from drseg_core.files import check_room
from drseg_core.models.count import count_parameters, count_text
from drseg_core.models.segmenter import Segmenter
from drseg_core.models.weights import check_left_out, left_out_hashes, load_into, model_state, weights_hash
from drseg_core.training.diagnose import first_nonfinite
from drseg_core.training.distributed import ProcessGroup, process_group
from drseg_core.training.logs import Clock, Progress, RunLog, Window
from drseg_core.training.loss import training_loss
from drseg_core.training.optim import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer,
    set_learning_rate,
    training_progress,
)
from drseg_core.training.randomness import random_state, restore_random_state, seed_everything
from drseg_core.training.rank_channels import rank_channels
from drseg_core.training.signals import StopSignals, TrainingStopped

__all__ = ["train"]

WINDOW = 512
"""Side of the parts in which large images are read, at least the crop's."""

_log = logging.getLogger(__name__)


def train(
    config: Config,
    data: str,
    out: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    device: str | None = None,
    show_progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Train a model and leave it in a run folder.

    Under ``torchrun`` the processes share every batch. Processes that ``torchrun`` starts again after a failure
    (``--max-restarts``) go on from the last checkpoint. On the CPU a run without a time limit may be stopped and
    resumed any number of times. Its result is then, bit for bit, that of a run that was never stopped.

    Args:
        config: model, optimisation and seed.
        data: data set, see :func:`drseg_core.data.open_dataset`; its split ``train`` is used.
        out: run folder; new or empty, unless ``resume``.
        resume: go on after the newest undamaged checkpoint in ``out``.
        init: run folder, checkpoint folder or weight file; its weights are the initial ones wherever they fit.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes CUDA if there is one.
        show_progress: show a progress bar, or lines if stderr is not a terminal.
        on_step: called after every step with the number of steps taken.

    Returns:
        The run folder.

    Raises:
        ConfigError: ``out`` is not empty, or options are out of range or contradict each other.
        DatasetError: the data cannot be read, or have class names that cannot be prompts.
        CheckpointError: nothing to resume, another configuration, or the folder is in use.
        NumericalError: ``train.nan_limit`` steps in a row were not finite, or the last ones, or all.
        ResourceError: the disk is full.
        TrainingStopped: a signal ended the training, after its state was saved.

    Examples:
        >>> from drseg_core.config.load import load_config, override
        >>> from drseg_core.training.loop import train
        >>> config = override(load_config("run/config.yaml"), {"seed": 1})
        >>> train(config, "folder:data", "again", device="cpu", show_progress=False).as_posix()
        'again'
    """
    validate(config)
    run = Path(out)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run / CONFIG).is_file():
        resume, init = True, None
    if resume and init is not None:
        raise ConfigError("train: resume and init exclude each other; a resumed run goes on with its own weights")
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(process_group(device))
        if config.train.batch_size % group.world_size:
            raise ConfigError(
                f"train: train.batch_size cannot be shared; expected a multiple of the {group.world_size} processes, "
                f"got {config.train.batch_size}"
            )
        check_output(run, resume=resume)
        checkpoint = None
        if resume:
            if group.is_main:
                stack.enter_context(run_lock(run))
                remove_leftovers(run)
            group.barrier()
            checkpoint = newest_checkpoint(run)
        if checkpoint is not None:
            config = dataclasses.replace(config, reading=_resumed_reading(config, checkpoint))
        dataset = open_dataset(data, "train", reading=config.reading, window=max(WINDOW, config.train.crop_size))
        if dataset.reading is not None:
            config = dataclasses.replace(config, reading=dataset.reading)
        ranking = None
        if checkpoint is not None:
            check_resumable(checkpoint, config, dataset.class_names)
            trainer = Trainer(config, dataset, run, group, read_clip=not holds_clip(checkpoint.weights()))
            trainer.restore(checkpoint)
        else:
            if resume and group.is_main:
                _log.warning("resume: %s has no checkpoint yet; training starts at step 0", run)
            trainer = Trainer(config, dataset, run, group)
            ranking = trainer.start(None if init is None else Path(init))
        if group.is_main:
            check_room(run, trainer.checkpoint_bytes(), "train")
        # a new folder only after everything that may refuse, so that the corrected command can have its name
        if not resume and group.is_main:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock(run))
            check_output(run, resume=False)
        if group.is_main:
            counts = count_parameters(trainer.model)
            facts = {
                "command": sys.argv,
                "parameters": {name: count._asdict() for name, count in counts.items()},
                "device": str(group.device),
                "machine": {"device": device_name(str(group.device)), "threads": torch.get_num_threads()},
                "processes": group.world_size,
                "data": {"spec": data, "sha256": trainer.fingerprint, "samples": len(dataset)},
                "init": None if init is None else str(init),
            }
            write_run_files(run, config, dataset.class_names, facts, resumed_at=trainer.step if resume else None)
            _log.info("trained parameters: %s", count_text(counts))
            if ranking is not None:
                save_channels(run / CHANNELS, ranking)
        trainer.fit(show_progress=show_progress, on_step=on_step)
    return run


def _resumed_reading(config: Config, checkpoint: Checkpoint) -> ReadingConfig:
    """The values that the start of a run measured hold for all of it; a configuration without them is the same one."""
    kept = config_from_dict(checkpoint.config.get("reading", {}), ReadingConfig, str(checkpoint.path))
    own = config.reading
    if own.scale is None or own.scale == AUTO:
        own = dataclasses.replace(own, scale=kept.scale)
    return dataclasses.replace(own, depth=own.depth or kept.depth, gsd=own.gsd or kept.gsd)


class Trainer:
    """One run in this process: the model, the optimiser, and how far they are."""

    def __init__(
        self,
        config: Config,
        dataset: SegmentationDataset,
        run: Path,
        group: ProcessGroup,
        *,
        read_clip: bool = True,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.run = run
        self.group = group
        seed_everything(config.seed)
        self.model: Segmenter = model_of(config, read_clip=read_clip).to(group.device)
        check_class_names(self.model, dataset.class_names)
        self.optimizer = build_optimizer(self.model.parameter_groups(config.train), config.train)
        self.parameters = [value for entry in self.optimizer.param_groups for value in entry["params"]]
        self.tokens = self.model.tokenize(dataset.class_names).to(group.device)
        # the initial weights above are the same in all processes; dropout below differs
        seed_everything(config.seed + group.rank)
        self.fingerprint = dataset.fingerprint()
        self.step = self.position = self.skipped = 0
        # the last of them, in a row
        self.refused = 0
        self.saved_step = -1
        self.left_out: dict[str, str] | None = None
        self.elapsed = 0.0

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint: the weights, and two more values of the optimiser for each that is trained."""
        weights = sum(value.numel() * value.element_size() for value in model_state(self.model).values())
        return weights + sum(2 * 4 * parameter.numel() for parameter in self.parameters)

    def start(self, init: Path | None) -> ChannelFile | None:
        """First step of a new run: take weights from another one, and split the channels.

        Returns:
            The ranking behind the split, in the main process; None where there is none.
        """
        split_is_set = init is not None and warm_start(self.model, init)
        split, spsd = self.model.spsd, self.config.model.spsd
        matched = self.model.pdgr is not None and self.config.model.graph.norm_scale == "match"
        if split is None or (spsd.channels is None and split_is_set):
            return None
        if spsd.semantic_ratio == 0 and not matched:
            return None
        backbone = self.config.model.clip.name
        ranking = None
        if spsd.channels is not None:
            ranking = load_channels(spsd.channels, channels=split.channels, backbone=backbone)
            ranking = ranking.split_again(spsd.semantic_ratio)
        elif self.group.is_main:
            ranking = rank_channels(
                self.model,
                self.dataset,
                spsd,
                backbone=backbone,
                weights_hash=weights_hash(self.model.clip),
                seed=self.config.seed,
                device=self.group.device,
            )
        score, scale = torch.zeros(split.channels, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if ranking is not None:
            score = ranking.score
            scale = scale + (ranking.norm_scale if matched else 0.0)
        split.set_ranking(self.group.broadcast(score.to(self.group.device)))
        if matched:
            assert self.model.pdgr is not None
            measured = float(self.group.broadcast(scale.to(self.group.device)))
            torch.nn.init.constant_(self.model.pdgr.output_norm.weight, measured)
            _log.info("weight of the graph's LayerNorm: %.4f, which gives CLIP's own norm", measured)
        return ranking

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was made.

        Raises:
            CheckpointError: it belongs to other data, or its content does not fit the model.
        """
        state = checkpoint.training_state()
        if state["dataset_sha256"] != self.fingerprint:
            raise CheckpointError(
                f"resume: the data are not those of {checkpoint.path}; "
                f"dataset_sha256: {state['dataset_sha256'][:12]} then, {self.fingerprint[:12]} now"
            )
        load_into(self.model, checkpoint.weights(), name=str(checkpoint.path / WEIGHTS))
        check_left_out(self.model, checkpoint.left_out, name=str(checkpoint.path))
        load_optimizer(self.optimizer, state["optimizer"], self.model.parameters())
        for parameter, kept in self.optimizer.state.items():
            # a parameter that was a single number in an older version; the count of steps is one in every version
            if parameter.numel() == 1:
                kept.update({name: value.view_as(parameter) for name, value in kept.items() if name != "step"})
        self.step, self.position, self.skipped = state["step"], state["position"], state["skipped"]
        self.refused = state.get("refused", 0)
        self.elapsed = state["elapsed"]
        if len(state["random"]) == self.group.world_size:
            restore_random_state(state["random"][self.group.rank])
        elif self.group.is_main:
            _log.warning(
                "resume: %d processes then, %d now; dropout goes on with other random values",
                len(state["random"]),
                self.group.world_size,
            )
        self.saved_step = self.step
        if self.group.is_main:
            set_aside_damaged(self.run, self.step)

    def fit(self, *, show_progress: bool = True, on_step: Callable[[int], None] | None = None) -> None:
        """Train until the first limit; save at the set intervals, at the end, and when a signal asks for a stop."""
        options = self.config.train
        network = self.group.wrap(self.model.train())
        batches = training_batches(
            self.dataset,
            crop_size=options.crop_size,
            batch_size=options.batch_size,
            seed=self.config.seed,
            start=self.position,
            color_jitter=options.color_jitter,
            workers=options.workers,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )
        progress = training_progress(self.step, self.elapsed, options)
        window = Window(len(self.dataset.class_names), self.group)
        text = self._text()
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            clock = Clock(self.elapsed)
            log = stack.enter_context(RunLog(self.run, step=self.step)) if self.group.is_main else None
            bar = Progress(start=self.step, total=options.iterations, enabled=show_progress and self.group.is_main)
            stack.callback(bar.close)
            while progress < 1.0:
                batch = next(batches)
                image, mask = batch.image.to(self.group.device), batch.mask.to(self.group.device)
                with self._autocast():
                    output = network(image, text)
                loss = training_loss(output, mask, options)
                shared = self.group.agree(loss, clock.seconds(), signals.received)
                self.elapsed = shared.elapsed
                # the processes' gradients are averaged: this makes their average that of all pixels
                shares = [self.group.world_size / max(terms, 1.0) for terms in shared.terms]
                torch.stack([part.total * share for part, share in zip(loss, shares, strict=True)]).sum().backward()
                norm = float(nn.utils.clip_grad_norm_(self.parameters, options.gradient_clip))
                if math.isfinite(shared.loss) and math.isfinite(norm):
                    progress = training_progress(self.step, self.elapsed, options)
                    set_learning_rate(self.optimizer, learning_rate_factor(progress, self.step, options))
                    self.optimizer.step()
                    window.add(shared.loss, norm, output.logits.detach(), mask)
                    self.refused = 0
                else:
                    self.skipped += 1
                    self.refused += 1
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                if self.refused >= options.nan_limit:
                    raise self._not_finite(image)
                self.position = batch.position + options.batch_size
                progress = training_progress(self.step, self.elapsed, options)
                bar.step()
                if self.step % options.log_every == 0 or progress >= 1.0:
                    record = window.close(self.step, self.optimizer, self.skipped, self.position, self.elapsed)
                    if log is not None:
                        log.add(record)
                        bar.record(record, progress)
                if shared.signal or progress >= 1.0 or (self.step % options.checkpoint_every == 0):
                    self.save()
                if on_step is not None:
                    on_step(self.step)
                # weights that end so are of no use, but kept
                if progress >= 1.0:
                    self._check_end(image, text)
                if shared.signal and progress < 1.0:
                    name = signal.Signals(shared.signal).name
                    message = f"train: stopped by {name} after step {self.step}; go on with --resume"
                    raise TrainingStopped(message, shared.signal)

    def _check_end(self, image: Tensor, text: Tensor) -> None:
        """Refuse weights that no later step looks at."""
        if self.refused > 1 or self.refused == self.step:
            raise self._not_finite(image)
        with torch.no_grad(), self._autocast():
            if torch.isfinite(self.model(image, text).logits).all():
                return
            cause = first_nonfinite(self.model, image, self.tokens)
        raise NumericalError(
            f"train: logits are not finite after the last step, {self.step}; the first bad tensor is {cause}"
        )

    def _not_finite(self, image: Tensor) -> NumericalError:
        with self._autocast():
            cause = first_nonfinite(self.model, image, self.tokens)
        return NumericalError(
            f"train: {self.refused} steps in a row were not finite, the last at step {self.step}; "
            f"the first bad tensor is {cause}"
        )

    def _text(self) -> Tensor:
        """The class names as the model takes them: embeddings if the text encoder is frozen."""
        if self.model.trains_text:
            return self.tokens
        with torch.no_grad(), self._autocast():
            return self.model.encode_text(self.tokens)

    def _autocast(self) -> torch.autocast:
        # bfloat16 has the range of float32, so gradients need no scaling
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=enabled)

    def save(self) -> None:
        """Write a checkpoint; all processes take part."""
        random = self.group.gather(random_state())
        if self.group.is_main and self.saved_step != self.step:
            if self.left_out is None:
                # frozen, so once is enough
                self.left_out = left_out_hashes(self.model)
            save_checkpoint(
                self.run,
                self.step,
                model=model_state(self.model),
                training={
                    "step": self.step,
                    "position": self.position,
                    "skipped": self.skipped,
                    "refused": self.refused,
                    "elapsed": self.elapsed,
                    "optimizer": self.optimizer.state_dict(),
                    "random": random,
                    "dataset_sha256": self.fingerprint,
                },
                config=plain_config(self.config),
                class_names=self.dataset.class_names,
                keep=self.config.train.keep_checkpoints,
                left_out=self.left_out,
            )
        self.saved_step = self.step
        self.group.barrier()
