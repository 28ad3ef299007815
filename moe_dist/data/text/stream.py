"""Training lanes of a text that is read as it comes, pass after pass, and never held whole.

Lane b of B reads lines b, b + B, b + 2B, ..., each followed by `<eos>`. Lines are numbered on over the passes, so that
line i of pass p of a text of L lines is line p L + i. A lane's next token is the next of its own lines: nothing is
padded, and which tokens a window holds depends on the text, B and the windows before it, not on ranks.

Legend: B lanes, b of them on this rank, S timesteps.
"""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from moe_dist.data.text.lanes import EOS_ID, Vocabulary, tokenize

LINES_PER_LANE = 64  # of which a text has so many that lanes rarely meet
MOST_LOOKED_AT = 200, 4_000_000  # steps, and words of all of them
MOST_SHARED = 0.1  # of a step's words; lanes of a text of a few lines meet now and then


def check_lanes(lines: Iterable[str], num_lanes: int, steps: int, streamed: bool) -> None:
    """Checks that lanes read different words in a step; a batch of the same words is smaller than it is set.

    Lanes go round the text at one pace, so that those of a text in memory, which begin at different words, stay apart.
    Streamed ones take turns at its lines, and meet where it has few, or one line that is longer than the others
    together. No more of the text is read than `LINES_PER_LANE` lines a lane, if these have the words of a step.

    Raises:
        ValueError: A text has fewer words than a step reads, or a streamed one fewer lines than lanes, or more than
            `MOST_SHARED` of the words of a step are read by several lanes, or twice by one.
    """
    num_needed = LINES_PER_LANE * num_lanes if streamed else 1
    num_words = 0
    length_L: list[int] = []
    for line in lines:
        length_L.append(len(tokenize(line)) + 1)
        num_words += length_L[-1]
        if len(length_L) >= num_needed and num_words >= num_lanes * steps:
            return
    if streamed and len(length_L) < num_lanes:
        raise ValueError(
            f"data.streamed=true: the training text has {len(length_L)} lines for batch.global_batch_size={num_lanes} lanes, "
            f"each of which begins at one of its own; use data.streamed=false or batch.global_batch_size of at most "
            f"{len(length_L)}"
        )
    if num_words < num_lanes * steps:
        raise ValueError(
            f"a step reads batch.global_batch_size={num_lanes} x batch.seq_len={steps} words, the training text has "
            f"{num_words}: give more text, or make batch.global_batch_size or batch.seq_len smaller"
        )
    if streamed and (share := _shared(np.array(length_L), num_lanes, steps)) > MOST_SHARED:
        raise ValueError(
            f"data.streamed=true: {share:.0%} of the words that batch.global_batch_size={num_lanes} lanes read in a step of "
            f"batch.seq_len={steps} are the same words of the training text, which has {len(length_L)} lines, the "
            f"longest of {max(length_L)} of its {num_words} words; use data.streamed=false, give more lines, or make "
            f"batch.global_batch_size or batch.seq_len smaller"
        )


def _shared(length_L: np.ndarray, num_lanes: int, steps: int) -> float:
    """Returns the fraction of a step's words that a lane reads again in the same step.

    The fraction is a mean over the steps of two passes, up to the bounds of `MOST_LOOKED_AT`.

    Args:
        length_L: Words of each line of the text, with its end.
        num_lanes: B.
        steps: S.
    """
    end_L = length_L.cumsum()
    most_steps, most_words = MOST_LOOKED_AT
    most_steps = min(most_steps, max(1, most_words // (num_lanes * steps)))
    num_steps = min(most_steps, max(1, 2 * int(end_L[-1]) // (num_lanes * steps)))
    num_words = num_steps * steps
    word_BT = np.empty(
        (num_lanes, num_words), dtype=np.int64
    )  # the place in the text of the word that a lane reads
    for lane in range(num_lanes):
        filled, line = 0, lane
        while filled < num_words:
            end = end_L[line % len(end_L)]
            length = min(length_L[line % len(end_L)], num_words - filled)
            first = end - length_L[line % len(end_L)]
            word_BT[lane, filled : filled + length] = np.arange(first, first + length)
            filled, line = filled + length, line + num_lanes
    by_step = word_BT.reshape(num_lanes, num_steps, steps).swapaxes(0, 1).reshape(num_steps, -1)
    by_step.sort(axis=1)
    return float((by_step[:, 1:] == by_step[:, :-1]).sum() / by_step.size)


class Stream:
    """The lanes of one rank. Reads every line in order, but tokenises only those of its own lanes.

    What a lane has not yet used of its lines waits in `ahead`, 4 bytes a token. Lanes use up tokens at one pace, but
    lines at another, so one whose lines are short makes the others wait for it with full buffers: a lane's buffer is
    as long as what its lines, up to the last line read, have more than it used. Where lines come in no order, that is
    the spread of B random walks: about 8 sd(words of a line) sqrt(lines per lane). It grows without end only where
    lanes get the same lines in every pass, which is where L and B have a large common divisor and passes are many; such
    a text fits in memory, and `data.streamed=false` reads it.
    """

    def __init__(
        self, lines: Iterable[str], vocabulary: Vocabulary, num_lanes: int, lane_b: Iterable[int]
    ) -> None:
        """`lines` can be iterated over again and again; there is at least one. `lane_b`: global lanes of this rank."""
        self.lines, self.vocabulary, self.num_lanes = lines, vocabulary, num_lanes
        self.mine = list(lane_b)
        self.load(
            torch.stack([torch.arange(num_lanes), torch.zeros(num_lanes, dtype=torch.int64)], dim=1)
        )

    def load(self, place_B2: torch.Tensor) -> None:
        """Goes on from the places of all lanes: (line, offset) that the next input token of each lane is at."""
        self.place_B2 = place_B2.numpy().copy()
        self.ahead = {lane: array("i") for lane in self.mine}
        self.reader = self._numbered(int(self.place_B2[self.mine, 0].min()))

    def places(self) -> torch.Tensor:
        """place_B2 (int64), zeros for lanes of other ranks: the sum over ranks is what `load` takes."""
        place_B2 = torch.zeros(self.num_lanes, 2, dtype=torch.int64)
        place_B2[self.mine] = torch.from_numpy(self.place_B2[self.mine])
        return place_B2

    def window(
        self, steps: int, lane_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next input_BS and target_BS (int64) of lanes `lane_B`, all of this rank, and valid_BS (all True).

        Raises:
            OSError: The text, which could be read before, broke or has no line any more.
        """
        token_BS1 = np.empty((len(lane_B), steps + 1), dtype=np.int64)
        for row, lane in zip(token_BS1, lane_B.tolist(), strict=True):
            ahead = self.ahead[lane]
            while (
                len(ahead) <= steps
            ):  # the last target is the next window's first input, so it stays
                self._read_line()
            row[:] = ahead[: steps + 1]
            del ahead[:steps]
        input_BS, target_BS = token_BS1[:, :-1], token_BS1[:, 1:]
        self._move_on(input_BS, lane_B)
        return (
            torch.from_numpy(input_BS),
            torch.from_numpy(target_BS),
            torch.ones(input_BS.shape, dtype=torch.bool),
        )

    def _move_on(self, input_BS: np.ndarray, lane_B: np.ndarray) -> None:
        """Places behind these tokens. No word of a line is `<eos>`, so each one is a line's end."""
        steps, end_BS = input_BS.shape[1], input_BS == EOS_ID
        since_end_B = end_BS[:, ::-1].argmax(
            axis=1
        )  # tokens behind the last <eos>, where there is one
        line_B, offset_B = self.place_B2[lane_B].T
        self.place_B2[lane_B, 0] = line_B + self.num_lanes * end_BS.sum(axis=1)
        self.place_B2[lane_B, 1] = np.where(end_BS.any(axis=1), since_end_B, offset_B + steps)

    def _read_line(self) -> None:
        try:
            index, line = next(self.reader)
        except ValueError as error:  # the file was whole at the start and broke during training
            raise OSError(str(error)) from None
        lane = index % self.num_lanes
        if lane in self.ahead and index >= self.place_B2[lane, 0]:
            first = self.place_B2[lane, 1] if index == self.place_B2[lane, 0] else 0
            self.ahead[lane].extend(self.vocabulary.encode([line])[first:].tolist())

    def _numbered(self, start: int) -> Iterator[tuple[int, str]]:
        """(index, line) from line `start` on, without end. Of the passes before `start` only the first is read, which
        tells their length."""
        first = 0  # of this pass
        while True:
            length = 0
            for length, line in enumerate(self.lines, 1):
                if first + length > start:
                    yield first + length - 1, line
            if not length:
                raise OSError(
                    "the training text has no line any more: give the one that the run began with"
                )
            first += length * max(1, (start - first) // length)
