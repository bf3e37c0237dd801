"""Folder of a run, owned by one process: the checkpoint to resume from, and writing of checkpoints."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from a2fpn._atomic import sync, write_text
from a2fpn.errors import CheckpointError, ConfigError, MissingFileError, RunError
from a2fpn.training.config import TrainConfig
from a2fpn.training.generations import (
    NAMES,
    STATE_FOLDER,
    Generation,
    OldFormatError,
    Record,
    newest,
    put_files,
    read_generation,
    read_generations,
    remove,
    rewrite_generation,
    sync_folder,
    write_generation,
)
from a2fpn.training.lock import LOCK_FILE, RunLock
from a2fpn.training.state import CONFIG_FILE, LOG_FILE, METRICS_FILE, RunState, write_config

START_ANEW = "Start a new run in another run.output."
ASIDE = ".aside"
"""Name suffix of generations set aside because the run does not resume from them, numbered from the second on."""
FAILED = ".failed"
"""Name suffix of a generation whose weights failed; only the newest is kept, as a run may fail repeatedly."""


class CheckpointWriteError(RunError):
    """A checkpoint that could not be written; earlier ones are untouched."""


@dataclass(frozen=True)
class Content:
    """Content of a generation.

    Args:
        record: Progress and settings.
        metrics: Content of ``metrics.jsonl``.
        save_model: Writes ``config.json`` and the evaluated weights to a folder.
        change_model: Updates the metadata in ``config.json`` of a folder with the same weights.
        optimizer: Tensors of the optimizer.
        trained: The trained weights, if they differ from the evaluated ones.
    """

    record: Record
    metrics: str
    save_model: Callable[[Path], object]
    change_model: Callable[[Path], object]
    optimizer: Mapping[str, Tensor]
    trained: Mapping[str, Tensor] | None


class RunFolder:
    """Owner of a run's folder, until :meth:`close`; only the main process has one.

    Args:
        output: The folder; created if it does not exist.
        resume: False; True for the newest generation in the folder; ``"auto"`` for the same if there is one; or the
            path of a run or a generation.

    Attributes:
        source: The generation to resume from, or None.
        notes: Messages to the user about the folder's content.

    Raises:
        ConfigError: If another process owns the folder, or it holds a run and ``resume`` is False.
        CheckpointError: If no generation is intact.
        MissingFileError: If there is nothing to resume.
    """

    def __init__(self, output: Path, resume: bool | str) -> None:
        self.output = output
        self.notes: list[str] = []
        self._whole: dict[str, Generation] = {}
        self._damaged: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._written: int | None = None  # step of the generation that this process wrote
        if not any(os.path.lexists(output / name) for name in (LOCK_FILE, *NAMES)):  # no run has been started here
            self._refuse(CONFIG_FILE, LOG_FILE, or_else="remove it")
        self._lock = RunLock(output)
        try:
            self._tidy()
            self.source = self._find(resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    # Resuming

    def _refuse(self, *names: str, or_else: str = "run.resume=auto") -> None:
        found = [name for name in names if os.path.lexists(self.output / name)]
        if found:
            raise ConfigError(
                f"{self.output} already holds a run ({found[0]}); choose another run.output, or {or_else}."
            )

    def _tidy(self) -> None:
        """Clean up after a process that was killed during a save."""
        old, last = self._hidden("last", "old"), self.output / "last"
        if old.exists() and not last.exists():
            old.rename(last)
        for name in (*NAMES, METRICS_FILE, CONFIG_FILE):
            for leftover in (*self.output.glob(f".{name}.*partial"), self._hidden(name, "old")):
                remove(leftover)

    def _find(self, resume: bool | str) -> Generation | None:
        """Find the generation to resume from."""
        if not resume:
            self._refuse(*NAMES, METRICS_FILE)
            return None
        own = self.output.resolve()
        start = own if resume in (True, "auto") else Path(str(resume)).resolve()
        start = start.parent if start.name == STATE_FOLDER else start
        if not start.is_dir():
            raise MissingFileError(
                f"run.resume={resume}: no such folder; expected auto, or the folder of a run or of one of its "
                "checkpoints."
            )
        if start != own and not (start.parent == own and (start / STATE_FOLDER).exists()):
            self._refuse(*NAMES, METRICS_FILE)
        self._whole, self._damaged = read_generations(own)
        if (start / STATE_FOLDER).exists():
            try:
                return read_generation(start)
            except OldFormatError:
                raise
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} run.resume=auto continues from the newest intact checkpoint."
                ) from error
        whole, damaged = (self._whole, self._damaged) if start == own else read_generations(start)
        self.notes += damaged.values()
        self.notes += [
            f"{generation.folder} has other metadata in its config.json than when it was written."
            for generation in whole.values()
            if generation.edited
        ]
        if whole:
            source = newest(whole, damaged)
            if damaged:
                place = f"{source.folder.name} (step {source.state.step})"
                self.notes.append(f"Continuing from {place}, the newest intact checkpoint.")
            return source
        if damaged:
            raise CheckpointError(f"No checkpoint of {start} is intact: {' '.join(damaged.values())} {START_ANEW}")
        if resume != "auto":
            raise MissingFileError(f"run.resume: no training state in {start}; start without run.resume.")
        self._refuse(METRICS_FILE, or_else="remove it, as its checkpoints are")
        return None

    def settle(self, state: RunState) -> None:
        """Bring the folder to the resumed state: its metrics, its ``best``, and nothing newer.

        If the run resumes from a generation other than ``last`` and ``previous``, ``last`` becomes a copy of it, so
        that a kill before the next checkpoint changes nothing.

        Args:
            state: State of ``source``, resumed; its best is corrected to the one in the folder.

        Raises:
            CheckpointWriteError: If the folder can't be written to.
        """
        source = self.source
        if source is None:
            return
        self._steps = {name: generation.state.step for name, generation in self._whole.items()}
        own = self.output.resolve()
        foreign = source.folder not in [own / name for name in NAMES]  # the ones here may not be its predecessors
        copied = source.folder not in (own / "last", own / "previous")
        with self._writing():
            for name in ("last", "previous"):
                newer = name in self._whole and (foreign or self._whole[name].state.step > source.state.step)
                replaced = copied and name == "last"  # by the copy, atomically
                if newer or (name in self._damaged and not replaced):
                    self._set_aside(name)
            if copied and ("last" in self._damaged or not os.path.lexists(self.output / "last")):
                self._copy(source, "last", keep=True)
            write_text(self.output / METRICS_FILE, source.metrics())
            self._settle_best(source, state)

    def _settle_best(self, source: Generation, state: RunState) -> None:
        folder, best = self.output / "best", self._whole.get("best")
        if best is not None and (best.state.step, best.state.value) == (state.best_step, state.best):
            return
        if state.value is not None and state.best_step == state.step and (not best or best.state.step <= state.step):
            self._copy(source, "best")
            return
        if best is not None and best.state.value is not None:
            # From steps that will be repeated, or from an abandoned branch: never replaced by a worse one.
            state.best, state.best_epoch, state.best_step = best.state.value, best.state.epoch, best.state.step
            self.notes.append(f"{folder} is of step {state.best_step}; it stays until another is as good.")
            return
        if os.path.lexists(folder):
            self._set_aside("best")
        if state.best is None:
            return
        self.notes.append(f"The best checkpoint, of epoch {state.best_epoch}, is not in {self.output}.")
        state.forget_best()
        if state.value is not None:
            state.best, state.best_epoch, state.best_step = state.value, state.epoch, state.step
            self._copy(source, "best")
            self.notes.append(f"The one of epoch {state.epoch} takes its place.")

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml``.

        Raises:
            CheckpointWriteError: If the folder can't be written to.
        """
        with self._writing():
            write_config(config, self.output)

    def forget_best(self, state: RunState) -> None:
        """Set ``best`` aside, because later evaluations are not comparable with it."""
        state.forget_best()
        with self._writing():
            if os.path.lexists(self.output / "best"):
                self._set_aside("best")

    def last_good(self, step: int) -> str:
        """Describe the last good checkpoint when the step after ``step`` fails.

        A checkpoint is good if a later step succeeded. A ``last`` with the weights that failed is set aside, if there
        is an earlier checkpoint.
        """
        good = max(
            (name for name in self._steps if self._steps[name] < step), key=self._steps.__getitem__, default=None
        )
        failed = next((name for name in NAMES if self._steps.get(name) == step), None)
        if good is None:
            if failed is None:
                return "There is no checkpoint before it."
            return f"The only checkpoint, {self.output / failed}, holds the weights that failed."
        found = f"The last good checkpoint is {self.output / good} (step {self._steps[good]})"
        if failed != "last":
            return f"{found}."
        remove(self.output / f"last{FAILED}")
        aside = self._set_aside("last", FAILED)
        return (
            f"{found}, from which run.resume=auto continues; the one of step {step} holds the weights that failed and "
            "is "
            f"kept as {aside.name}."
        )

    def _set_aside(self, name: str, end: str = ASIDE, *, folder: Path | None = None) -> Path:
        ends = itertools.chain([end], (f"{end}{number}" for number in itertools.count(2)))
        aside = next(path for path in (self.output / f"{name}{end}" for end in ends) if not os.path.lexists(path))
        (folder or self.output / name).rename(aside)
        self._steps.pop(name, None)
        self.notes.append(f"{self.output / name} is kept as {aside.name}; it can be deleted.")
        return aside

    # Saving

    def save(self, content: Content, *, best: bool) -> None:
        """Write ``last``, keeping its predecessor as ``previous``, and ``best`` if these weights are the best.

        A second save at the same step writes only what changed, since evaluation changes no weights.

        Raises:
            CheckpointWriteError: If it can't be written; earlier checkpoints are untouched.
            FolderTakenError: If another process took the folder.
        """
        self._lock.check()
        last, partial, step = self.output / "last", self._hidden("last", "partial"), content.record.state.step
        with self._writing():
            remove(partial)
            partial.mkdir()
            same_weights = self._written == step and last.exists()
            if same_weights:
                rewrite_generation(last, partial, content.record, content.metrics, change_model=content.change_model)
            else:
                write_generation(
                    partial,
                    content.record,
                    content.metrics,
                    save_model=content.save_model,
                    optimizer=content.optimizer,
                    trained=content.trained,
                )
            sync_folder(partial)
            if last.exists() and self._steps.get("last") != step:  # else previous would be of the same step
                self._put(last, "previous")
                self._steps["previous"] = self._steps.get("last", 0)
            self._put(partial, "last")
            self._written = self._steps["last"] = step
            write_text(self.output / METRICS_FILE, content.metrics)
            if best:
                self._copy(Generation(last, content.record), "best")

    def _copy(self, source: Generation, name: str, *, keep: bool = False) -> None:
        """Copy a generation to another name; a generation of that name is removed, or set aside."""
        partial = self._hidden(name, "partial")
        remove(partial)
        put_files(source.folder, partial)
        sync_folder(partial)
        self._put(partial, name, keep=keep)
        self._steps[name] = source.state.step

    def _put(self, folder: Path, name: str, *, keep: bool = False) -> None:
        """Replace a folder by another, removing it or setting it aside; after a kill one of them is intact."""
        old, target = self._hidden(name, "old"), self.output / name
        remove(old)
        if os.path.lexists(target):
            target.rename(old)
        folder.rename(target)
        sync(self.output)
        if keep and os.path.lexists(old):
            self._set_aside(name, folder=old)
        remove(old)

    def _hidden(self, name: str, kind: str) -> Path:
        return self.output / f".{name}.{kind}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert write errors of the disk or a library to a one-line error."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            for name in NAMES:
                remove(self._hidden(name, "partial"))
            kept = [name for name in NAMES if (self.output / name).exists()]
            untouched = (
                f"{', '.join(kept)} untouched; run.resume=auto continues from there" if kept else "none before it"
            )
            raise CheckpointWriteError(
                f"cannot write a checkpoint to {self.output}: {' '.join(str(error).split())} "
                f"({shutil.disk_usage(self.output).free / 2**20:.0f} MiB free); {untouched}."
            ) from error
