"""A policy on a server in place of one in this process: what `vlm4vla evaluate --remote` rolls out.

Trap: server and simulator each have their own copy of this project; the manifest that the server tells (fingerprint,
convention, camera, looks) is what the checks are made on, exactly as for a local checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.client import RemoteError, RemotePolicy
from vlm4vla_core.errors import InputError


class Remote:
    """The part of a `VLAPolicy` that a rollout needs, answered by a server.

    fingerprint: of the server's checkpoint. labels: `checkpoint.row_labels` there. domains: looks it was trained in.
    Raises InputError when the server refuses, fails or cannot be reached; rows that are finished stay.
    """

    def __init__(self, address: str, token: str | None = None, *, alone: bool = False, timeout: float = 300.0) -> None:
        try:
            self.client = RemotePolicy(address, token, timeout)
        except RemoteError as error:
            fix = "start one with `vlm4vla serve CHECKPOINT`, and give its HOST:PORT and token"
            raise InputError(str(error), fix=fix) from None
        told, self._alone, self.url = self.client.policy, alone, self.client.url
        self.fingerprint, self.labels, self.domains = told["fingerprint"], told["labels"], told["domains"]
        convention = ActionConvention.from_dict(told["convention"])
        self.config = SimpleNamespace(convention=convention, chunk=told["chunk"], camera=told["camera"])

    def predict(self, images: np.ndarray, instructions: Sequence[str]) -> SimpleNamespace:
        """`.actions` (B, chunk, A) for pictures uint8 (B, H, W, 3) and B instructions."""
        try:
            return SimpleNamespace(actions=self.client.predict(images, list(instructions), self._alone))
        except RemoteError as error:
            fix = "issue the command again when the server is back: finished episodes are kept"
            raise InputError(str(error), where=self.url, fix=fix) from None
