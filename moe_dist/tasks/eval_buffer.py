"""A buffer for a whole split's outputs, for metrics beyond sums over samples."""

import torch

from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.mesh import Mesh


class EvalBuffer:
    """Outputs for this rank's samples since the last `reset`.

    A task's `eval_batches` resets the buffer, its `loss` adds outputs in evaluation, and its
    `finalize_eval` gathers and frees them. It is empty in training.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, torch.Tensor]] = []

    def reset(self) -> None:
        """Frees all outputs."""
        self._rows.clear()

    def add(self, first: int, output_B: torch.Tensor) -> None:
        """Adds outputs for consecutive samples.

        Args:
            first: The first sample's number in the split.
            output_B: One row for each sample, (B, ...); stored in float64.
        """
        self._rows.append((first, output_B.detach().double()))

    def gather(self, num_samples: int, row_shape: tuple[int, ...], mesh: Mesh) -> torch.Tensor:
        """Returns all ranks' outputs and resets the buffer. A collective.

        Args:
            num_samples: Samples N in the split; rows after the last one are padding.
            row_shape: One row's shape.
            mesh: The ranks.

        Returns:
            The outputs on the CPU, (N, *row_shape), float64; zeros for samples without an output.
        """
        shape = (num_samples, *row_shape)
        output_N = torch.zeros(shape, dtype=torch.float64, device=mesh.device)
        for first, output_B in self._rows:
            kept = output_B[: max(0, num_samples - first)]
            output_N[first : first + len(kept)] = kept
        self.reset()
        return all_reduce_sum(output_N, mesh.dp).cpu()
