"""A channel that has collapsed: it says no everywhere, which a falling loss does not show."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from synmlops.learning.distributed import Ranks
from synmlops.params import CHANNELS

QUIET_STEPS = 200
"""Steps in a row, of those that saw foreground, after which a channel that says nothing raises the alarm."""
FAINT = 0.2
"""A channel says nothing if it is nowhere above 0.5 and, on foreground, no more than this on average."""


@dataclass
class CollapseWatch:
    """Follows what each channel says in training patches that hold its foreground.

    Both ways of collapsing look the same to it: all near 0, and the share of the foreground everywhere.

    Parameters
    ----------
    device : torch.device
        Where logits lie; nothing is read from there until `judge`.
    """

    device: torch.device
    quiet: list[int] = field(default_factory=lambda: [0] * len(CHANNELS))  # steps in a row
    alarmed: list[bool] = field(default_factory=lambda: [False] * len(CHANNELS))

    def __post_init__(self) -> None:
        self._sums = torch.zeros((4, len(CHANNELS)), device=self.device)
        self._highest = torch.zeros(len(CHANNELS), device=self.device)

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Take in the predictions of some patches, each (n, 3, z, y, x)."""
        axes = (0, 2, 3, 4)
        said = torch.sigmoid(logits.detach().float()) * valid
        n_valid, n_on = valid.sum(axes), (targets * valid).sum(axes)
        self._sums += torch.stack([said.sum(axes), n_valid, (said * targets).sum(axes), n_on])
        self._highest = torch.maximum(self._highest, said.amax(axes))

    def judge(self, step: int, n_steps: int, *, ranks: Ranks) -> list[str]:
        """Look at what was added in the last `n_steps`; all ranks find the same.

        Returns
        -------
        messages : list of str
            One for each channel that has collapsed just now, or recovered.
        """
        everywhere, n_valid, on, n_on = ranks.sum(self._sums).tolist()
        highest = ranks.highest(self._highest).tolist()
        self._sums, self._highest = torch.zeros_like(self._sums), torch.zeros_like(self._highest)
        messages = []
        for channel, name in enumerate(CHANNELS):
            if not n_on[channel]:
                continue  # nothing to be found, so nothing is told from saying nothing
            above = on[channel] / n_on[channel]
            around = (everywhere[channel] - on[channel]) / max(1, n_valid[channel] - n_on[channel])
            if highest[channel] > 0.5 or above > FAINT:
                if self.alarmed[channel]:
                    messages.append(f"{name}: recovered at step {step}")
                self.quiet[channel], self.alarmed[channel] = 0, False
                continue
            self.quiet[channel] += n_steps
            if self.quiet[channel] >= QUIET_STEPS and not self.alarmed[channel]:
                self.alarmed[channel] = True
                messages.append(
                    f"{name}: predicts nothing since step {step - self.quiet[channel] + 1} (step {step}: "
                    f"{above:.3f} on foreground, {around:.3f} elsewhere, {highest[channel]:.3f} at most); "
                    "if it stays so, lower train.learning_rate or loss.overlap, or raise "
                    "sampling.reject_probability or sampling.centred"
                )
        return messages

    def settle(self, ranks: Ranks) -> None:
        """Share what was added evenly among the ranks, so that one of them can keep it for all."""
        self._sums = ranks.sum(self._sums) / ranks.n_ranks
        self._highest = ranks.highest(self._highest)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return {
            "quiet": list(self.quiet),
            "alarmed": list(self.alarmed),
            "sums": self._sums,
            "highest": self._highest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.quiet, self.alarmed = list(state["quiet"]), list(state["alarmed"])
        self._sums, self._highest = state["sums"].to(self.device), state["highest"].to(self.device)
