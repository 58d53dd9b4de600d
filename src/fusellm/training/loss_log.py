"""What is added up from one log line to the next."""

import time
from typing import Any

import torch

from fusellm.training.collator import BatchCounts


class LossLog:
    """Losses and counts of the batches since the last log line.

    The losses are added on the device that they are on, and read where they are drained.
    """

    def __init__(self, device: torch.device) -> None:
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)
        self._counts = [0.0] * 4
        self._since = time.perf_counter()
        self.any = False

    def add(self, counts: BatchCounts, clm: torch.Tensor, fusion: torch.Tensor) -> None:
        """Add a batch.

        Args:
            clm, fusion: sums of L_CLM and L_Fusion over its positions, in nats.
        """
        self._losses += torch.stack([clm, fusion]).detach()
        for n, count in enumerate(
            (counts.predicted, counts.fused, counts.kept_mass, counts.tokens)
        ):
            self._counts[n] += count
        self.any = True

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was not spent on training."""
        self._since += seconds

    def drained(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes for a log line; the sums begin anew.

        Returns:
            `clm_loss` in nats per predicted token, `tokens_per_second`, and `fused_share`: of the
            predicted tokens those with a fused distribution. Where there are any, `fusion_loss`
            in nats per such token and `kept_mass`: the mass that their distributions have kept.
        """
        counts = torch.tensor(self._counts, dtype=torch.float64, device=self._losses.device)
        sums = accelerator.reduce(torch.cat([self._losses, counts]), reduction="sum")
        clm, fusion, predicted, fused, kept_mass, tokens = sums.tolist()
        now = time.perf_counter()
        means = {
            "clm_loss": clm / max(predicted, 1),
            "fused_share": fused / max(predicted, 1),
            "tokens_per_second": round(tokens / (now - self._since), 1),
        }
        if fused:
            means |= {"fusion_loss": fusion / fused, "kept_mass": kept_mass / fused}
        self._losses.zero_()
        self._counts = [0.0] * 4
        self._since, self.any = now, False
        return means
