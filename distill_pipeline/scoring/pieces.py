"""What is handed to whoever scores: a few rows of whole prompts, which scorers are asked about which of them, and the answers.

A piece is answered from its rows alone, so pieces can be answered anywhere and in any order. It is smaller than a chunk,
because a row can take a scorer seconds, and everybody waits for the slowest piece.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer

PIECE_ROWS = 64
"""A piece ends with the first prompt that fills it so far."""

Place = tuple[str, str]
"""A scorer by the domain that lists it (``*`` too) and the name it has there."""

Answers = Mapping[Place, Sequence[ScoreValue]]
"""For each scorer that was asked its scores, in the order of the rows it was asked about."""


@dataclass(frozen=True)
class Piece:
    """Rows, and for each scorer the numbers of those it is to score."""

    rows: Sequence[AnswerRow]
    asked: Mapping[Place, Sequence[int]]

    @staticmethod
    def of(rows: Sequence[AnswerRow], asked: Mapping[Place, Sequence[int]]) -> "Piece":
        """A piece that holds those of the rows that somebody is asked about."""
        numbers = sorted({number for wanted in asked.values() for number in wanted})
        places = {number: at for at, number in enumerate(numbers)}
        renumbered = {place: [places[number] for number in wanted] for place, wanted in asked.items() if wanted}
        return Piece([rows[number] for number in numbers], renumbered)


class PieceScorer:
    """Answers pieces. Its scorers are entered when the first row is there, and left by :meth:`close`."""

    def __init__(self, scorers: Mapping[Place, OpenedScorer]) -> None:
        self._scorers = scorers
        self._entered = ExitStack()
        self._is_ready = False

    def __call__(self, piece: Piece) -> Answers:
        """Raises what the scorers raise when they are entered: ConfigError, MissingExtraError."""
        if piece.asked and not self._is_ready:
            for scorer in {id(scorer): scorer for scorer in self._scorers.values()}.values():
                self._entered.enter_context(scorer)
            self._is_ready = True
        return {
            place: self._scorers[place].score([piece.rows[number] for number in numbers])
            for place, numbers in piece.asked.items()
        }

    def close(self) -> None:
        """End the processes of the scorers and whatever these have started."""
        self._entered.close()
