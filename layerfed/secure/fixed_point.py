"""Updates as integers modulo 2³², so that pads can hide them and sums stay exact.

Client i clips each coordinate x of its update to [−c, c] and writes it as rint(s · d_i · x). The last
number is d_i itself. The scale s is the largest power of two at which a sum over all clients of the
round fits 32 bits with its sign:

    s · c · Σ_i d_i + n ≤ 2³¹ − 1

The only loss is the rounding to whole numbers, at most one half for each client. A coordinate of the
mean of n survivors with D examples is off by at most n / (2 s D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerfed.exchange.pieces import pieces
from layerfed.secure.crypto import UNIT

__all__ = ["FixedPoint"]

ROOM = 2**31 - 1


@dataclass(frozen=True)
class FixedPoint:
    """The integer format of one round's updates.

    Attributes
    ----------
    limit : float
        c, above 0.
    scale : float
        s: the integer that stands for a change of 1 with one example.
    """

    limit: float
    scale: float

    @classmethod
    def fitting(cls, limit: float, examples: int, clients: int) -> FixedPoint:
        """Choose the scale at which the sum over a round's clients cannot overflow.

        Parameters
        ----------
        limit : float
            c.
        examples, clients : int
            Σ d_i and n of all clients whose updates may enter the sum.

        Raises
        ------
        ValueError
            If the examples alone overflow the sum.
        """
        room = ROOM - clients
        if examples > room:
            raise ValueError(f"{examples} examples in one round; a secure sum counts to {room}")
        return cls(limit, 2.0 ** math.floor(math.log2(room / (limit * examples))))

    def error(self, examples: int, clients: int) -> float:
        """Return the largest error of a coordinate of the mean over `clients` clients."""
        return clients / (2 * self.scale * examples)

    def encode(self, update: Sequence[np.ndarray], examples: int) -> tuple[np.ndarray, int]:
        """Write an update, times its number of examples.

        Parameters
        ----------
        update : Sequence[numpy.ndarray]
            Tensors of Δ_i, with m elements together.
        examples : int
            d_i.

        Returns
        -------
        tuple[numpy.ndarray, int]
            The vector of `UNIT`, shape (m + 1,), with d_i last, and the number of clipped coordinates.

        Raises
        ------
        ValueError
            If the update holds NaN or Inf, or could overflow. A sum would not show either.
        """
        if examples * max(1.0, self.limit * self.scale) > ROOM:
            raise ValueError(f"{examples} examples overflow the scale {self.scale:g} of this round")
        vector = np.empty(sum(values.size for values in update) + 1, UNIT)
        place, cut = 0, 0
        for values in update:
            for part in pieces(values):
                piece = part.astype(np.float64)
                if not np.isfinite(piece).all():
                    raise ValueError("the update holds NaN or Inf; lower train.lr")
                cut += int((np.abs(piece) > self.limit).sum())
                np.clip(piece, -self.limit, self.limit, out=piece)
                whole = np.rint(piece * (self.scale * examples)).astype(np.int32)
                vector[place : place + piece.size] = whole.view(np.uint32)
                place += piece.size
        vector[-1] = examples
        return vector, cut

    def decode(self, total: np.ndarray, clients: int) -> tuple[np.ndarray, int]:
        """Return the mean update of a sum over some clients, float64 of shape (m,), and its Σ d_i.

        Raises
        ------
        ValueError
            If the sum states no examples, or a coordinate of the mean lies beyond c: it is then not a
            sum of encoded updates.
        """
        signed = total.astype(np.uint32, copy=False).view(np.int32)
        examples = int(signed[-1])
        if examples < 1:
            raise ValueError(f"the sum states {examples} examples")
        mean = signed[:-1] / (self.scale * examples)
        largest = float(np.abs(mean).max(initial=0.0))
        if largest > self.limit + self.error(examples, clients):
            raise ValueError(
                f"a coordinate of its mean is {largest:g}, and each client's is at most {self.limit:g}"
            )
        return mean, examples
