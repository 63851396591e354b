"""What a run needs to go on after a kill, written by all ranks together (torch.distributed.checkpoint)."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bench.learn.progress import Progress
from bench.learn.train import Twin
from bench.parallel import Ranks


class Checkpoints:
    """The checkpoints of one run, one folder each, of which the newest whole one counts.

    Any number of ranks reads what any other number wrote.

    Args:
        folder: where they lie.
        ranks: the processes that write and read.
    """

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks

    def newest(self) -> Path | None:
        """The folder of the latest checkpoint that was written to its end; its metadata come last."""
        whole = [path.parent for path in self.folder.glob("step-*/.metadata")]
        return max(whole, default=None)

    def save(self, step: int, twins: Sequence[Twin], notes: Any) -> None:
        """Write the state before ``step``, and then remove what is older. ``notes`` is kept as JSON."""
        path = self.folder / f"step-{step:08}"
        with self._as_many_as_we_are() as options:
            save(_state(step, twins, notes), checkpoint_id=path, **options)
        if self.ranks.first:
            for other in self.folder.glob("step-*"):
                if other != path:
                    shutil.rmtree(other)

    def load(self, path: Path, twins: Sequence[Twin]) -> tuple[int, Any]:
        """Put the twins where they were.

        Returns:
            The step to go on with, and the notes.

        Raises:
            ValueError: the checkpoint has other twins.
        """
        state = _state(0, twins, None)
        try:
            with self._as_many_as_we_are() as options:
                load(state, checkpoint_id=path, **options)
        except CheckpointException as error:
            raise ValueError(f"{path} does not fit this run: {error}; resume with the options of that run") from error
        for twin in twins:
            saved = state[twin.attention]
            set_state_dict(
                twin.model, twin.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
            )
            twin.progress = Progress(**json.loads(saved["progress"]))
        run = json.loads(state["run"])
        return run["step"], run["notes"]

    @contextmanager
    def _as_many_as_we_are(self) -> Iterator[dict[str, bool]]:
        """The options that let one process save and load alone, and no warning that it does."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield {"no_dist": self.ranks.mesh is None}

    def remove(self) -> None:
        """Remove them all: the run is done."""
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def _state(step: int, twins: Sequence[Twin], notes: Any) -> dict[str, Any]:
    """Tensors by name, sharded as they are on each rank; what is not a tensor as JSON."""
    state: dict[str, Any] = {"run": json.dumps({"step": step, "notes": notes})}
    for twin in twins:
        model, optimizer = get_state_dict(twin.model, twin.optimizer)
        state[twin.attention] = {
            "model": model,
            "optimizer": optimizer,
            "progress": json.dumps(asdict(twin.progress)),
        }
    return state
