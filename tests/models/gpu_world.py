"""The same on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.dispatch.staged import StagedDispatcher
from tests.models.world import World

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class GpuWorld(World):
    """`engine.logits` are those of the last step, by sequence, on the host."""

    def make_engine(self, *args: Any, **options: Any) -> Any:
        from elastic_ep.models.gpu.engine import DeviceEngine

        class RecordingDeviceEngine(DeviceEngine):
            turn = 0

            def _run(self, work: Sequence[SequenceWork], state: Any) -> torch.Tensor:
                """Every third step kernel by kernel: nobody may see which."""
                self.turn += 1
                return self._run_eagerly(work, state) if self.turn % 3 == 0 else super()._run(work, state)

            def _finish(self, work: Sequence[SequenceWork], logits: torch.Tensor, *rest: Any) -> Any:
                host = logits.cpu()
                self.logits = {item.seq_id: host[i] for i, item in enumerate(item for item in work if item.sample is not None)}
                return super()._finish(work, logits, *rest)

        return RecordingDeviceEngine(*args, **options)

    def make_dispatcher(self) -> Any:
        return StagedDispatcher(LocalDispatcher(), torch.device("cuda", 0))
