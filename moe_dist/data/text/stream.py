"""Training lanes of a text that is read as a stream, pass after pass, and never held in memory.

Lane b of B reads lines b, b + B, b + 2B, ..., each followed by `<eos>`. Line numbers continue over
the passes: line i in pass p over L lines has number p L + i. A lane reads its own lines one token
after another. Nothing is padded, and a window's tokens depend on the text, B and the previous
windows, but not on the ranks.

Legend: B lanes, b lanes on this rank, S timesteps, L lines in the text, U steps, T = U S words per
lane.
"""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from moe_dist.data.text.lanes import EOS_ID, Vocabulary, tokenize

LINES_PER_LANE = 64  # with this many lines per lane, two lanes rarely read the same line in a step
MAX_STEPS_CHECKED = 200  # steps that `_repeated_fraction` simulates ...
MAX_WORDS_CHECKED = 4_000_000  # ... and the words of all of them
MAX_REPEATED = 0.1  # of a step's words; in a text of a few lines some lanes meet now and then


def check_lanes(lines: Iterable[str], num_lanes: int, steps: int, streamed: bool) -> None:
    """Checks that the lanes read different words in a step.

    If lanes read the same words, the effective batch is smaller than configured. Lanes over a text
    in memory begin at different words and advance at one pace, so they never meet. Streamed lanes
    take turns at the lines. They meet if the text has few lines, or one line that is longer than
    all others together. The check reads at most `LINES_PER_LANE` lines per lane, if these have
    enough words for a step.

    Args:
        lines: The training text.
        num_lanes: B.
        steps: S.
        streamed: True for `Stream`, False for `lanes.Lanes`.

    Raises:
        ValueError: The text has fewer words than a step reads; or, if streamed, fewer lines than
            lanes, or more than `MAX_REPEATED` of a step's words are read more than once.
    """
    min_lines = LINES_PER_LANE * num_lanes if streamed else 1
    words_per_step = num_lanes * steps
    num_words = 0
    length_L: list[int] = []
    for line in lines:
        length_L.append(len(tokenize(line)) + 1)
        num_words += length_L[-1]
        if len(length_L) >= min_lines and num_words >= words_per_step:
            return
    num_lines = len(length_L)
    if streamed and num_lines < num_lanes:
        raise ValueError(
            f"data.streamed=true: the training text has {num_lines} lines for "
            f"batch.global_batch_size={num_lanes} lanes, and each lane begins at its own line; use "
            f"data.streamed=false or batch.global_batch_size of at most {num_lines}"
        )
    if num_words < words_per_step:
        raise ValueError(
            f"a step reads batch.global_batch_size={num_lanes} x batch.seq_len={steps} words, the "
            f"training text has {num_words}: give more text, or make batch.global_batch_size or "
            "batch.seq_len smaller"
        )
    if not streamed:
        return
    repeated = _repeated_fraction(np.array(length_L), num_lanes, steps)
    if repeated > MAX_REPEATED:
        raise ValueError(
            f"data.streamed=true: {repeated:.0%} of the words that "
            f"batch.global_batch_size={num_lanes} lanes read in a step of batch.seq_len={steps} "
            f"are the same words of the training text, which has {num_lines} lines, the longest "
            f"with {max(length_L)} of its {num_words} words; use data.streamed=false, give more "
            "lines, or make batch.global_batch_size or batch.seq_len smaller"
        )


def _repeated_fraction(length_L: np.ndarray, num_lanes: int, steps: int) -> float:
    """Returns the fraction of a step's words that are read more than once in the same step.

    The fraction is a mean over the steps of two passes, at most `MAX_STEPS_CHECKED` steps and
    `MAX_WORDS_CHECKED` words. `length_L` has the words of each line, `<eos>` included.
    """
    words_per_step = num_lanes * steps
    num_lines = len(length_L)
    end_L = length_L.cumsum()
    max_steps = min(MAX_STEPS_CHECKED, max(1, MAX_WORDS_CHECKED // words_per_step))
    num_steps = min(max_steps, max(1, 2 * int(end_L[-1]) // words_per_step))
    words_per_lane = num_steps * steps
    # position_BT: the position in the text of each word that a lane reads
    position_BT = np.empty((num_lanes, words_per_lane), dtype=np.int64)
    for lane in range(num_lanes):
        filled = 0
        line = lane
        while filled < words_per_lane:
            full_length = length_L[line % num_lines]
            first = end_L[line % num_lines] - full_length
            length = min(full_length, words_per_lane - filled)
            position_BT[lane, filled : filled + length] = np.arange(first, first + length)
            filled += length
            line += num_lanes
    position_BUS = position_BT.reshape(num_lanes, num_steps, steps)
    sorted_UX = np.sort(position_BUS.swapaxes(0, 1).reshape(num_steps, -1), axis=1)
    return float((sorted_UX[:, 1:] == sorted_UX[:, :-1]).sum() / sorted_UX.size)


class Stream:
    """The streamed lanes on one rank.

    The rank reads every line in order, but tokenizes only the lines for its own lanes. Unused
    tokens stay in the buffers `ahead`, at 4 bytes per token. Lanes use tokens at one pace but lines
    at different paces, so while a lane with short lines reads more lines, the other buffers grow.
    If the lines come in random order, the buffers grow like the spread of B random walks: about
    8 sd(words per line) sqrt(lines per lane). They grow without limit only if each lane gets the
    same lines in every pass, which happens if L and B have a large common divisor and there are
    many passes. Such a text is small: read it with `data.streamed=false`.

    Attributes:
        lines: The text.
        vocabulary: The word vocabulary.
        num_lanes: B.
        local_lanes: This rank's lanes, by global index.
        place_B2: For each lane the (line, offset) of its next input token (int64).
        ahead: For each local lane the tokens that are read but not used.
    """

    def __init__(
        self, lines: Iterable[str], vocabulary: Vocabulary, num_lanes: int, lane_b: Iterable[int]
    ) -> None:
        """Starts all lanes at their first lines.

        Args:
            lines: The text, which must have at least one line and allow repeated iteration.
            vocabulary: The word vocabulary.
            num_lanes: B.
            lane_b: This rank's lanes, by global index.
        """
        self.lines = lines
        self.vocabulary = vocabulary
        self.num_lanes = num_lanes
        self.local_lanes = list(lane_b)
        first_line_B = torch.arange(num_lanes)
        offset_B = torch.zeros(num_lanes, dtype=torch.int64)
        self.load(torch.stack([first_line_B, offset_B], dim=1))

    def load(self, place_B2: torch.Tensor) -> None:
        """Continues from saved places.

        Args:
            place_B2: Each lane's (line, offset) of the next input token (int64).
        """
        self.place_B2 = place_B2.numpy().copy()
        self.ahead = {lane: array("i") for lane in self.local_lanes}
        self._reader = self._numbered_lines(int(self.place_B2[self.local_lanes, 0].min()))

    def places(self) -> torch.Tensor:
        """Returns place_B2 (int64) with zeros for the lanes of other ranks.

        The sum over all ranks is the argument of `load`.
        """
        place_B2 = torch.zeros(self.num_lanes, 2, dtype=torch.int64)
        place_B2[self.local_lanes] = torch.from_numpy(self.place_B2[self.local_lanes])
        return place_B2

    def window(
        self, steps: int, lane_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the next window for some lanes on this rank, and advances these lanes.

        Args:
            steps: S.
            lane_B: The lanes, all on this rank (integers).

        Returns:
            input_BS and target_BS (int64), and valid_BS (bool, all True).

        Raises:
            OSError: The text became damaged or empty after the run had started.
        """
        token_BS1 = np.empty((len(lane_B), steps + 1), dtype=np.int64)
        for row, lane in zip(token_BS1, lane_B.tolist(), strict=True):
            ahead = self.ahead[lane]
            # The last target is also the first input of the next window, so it stays in the buffer.
            while len(ahead) <= steps:
                self._read_line()
            row[:] = ahead[: steps + 1]
            del ahead[:steps]
        input_BS = token_BS1[:, :-1]
        target_BS = token_BS1[:, 1:]
        self._advance(input_BS, lane_B)
        valid_BS = torch.ones(input_BS.shape, dtype=torch.bool)
        return torch.from_numpy(input_BS), torch.from_numpy(target_BS), valid_BS

    def _advance(self, input_BS: np.ndarray, lane_B: np.ndarray) -> None:
        """Advances places behind these tokens; each `<eos>` ends one line."""
        steps = input_BS.shape[1]
        is_end_BS = input_BS == EOS_ID
        has_end_B = is_end_BS.any(axis=1)
        tokens_since_end_B = is_end_BS[:, ::-1].argmax(axis=1)  # defined only if has_end_B
        line_B, offset_B = self.place_B2[lane_B].T
        new_offset_B = np.where(has_end_B, tokens_since_end_B, offset_B + steps)
        self.place_B2[lane_B, 0] = line_B + self.num_lanes * is_end_BS.sum(axis=1)
        self.place_B2[lane_B, 1] = new_offset_B

    def _read_line(self) -> None:
        """Reads one line and, if it belongs to a lane of this rank, buffers its tokens."""
        try:
            index, line = next(self._reader)
        except ValueError as error:
            # The file was readable when the run started, so this is an error of the system.
            raise OSError(str(error)) from None
        lane = index % self.num_lanes
        if lane not in self.ahead:
            return
        place_line, place_offset = self.place_B2[lane]
        if index >= place_line:
            first = place_offset if index == place_line else 0
            self.ahead[lane].extend(self.vocabulary.encode([line])[first:].tolist())

    def _numbered_lines(self, start: int) -> Iterator[tuple[int, str]]:
        """Yields (number, line) from line number `start` on, without end.

        Only the first of the passes before `start` is read, to count the lines of a pass.
        """
        first = 0  # number of the first line of this pass
        while True:
            length = 0
            for length, line in enumerate(self.lines, 1):
                if first + length > start:
                    yield first + length - 1, line
            if not length:
                raise OSError(
                    "the training text has no line any more: "
                    "restore the text that the run started with"
                )
            first += length * max(1, (start - first) // length)
