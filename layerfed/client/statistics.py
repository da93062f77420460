"""Statistics of a probe: functions that turn one layer's gradients and weights into one number.

A statistic gets two lists of tensors on the device, a gradient and a weight for each of the layer's
parameters. It returns one number, also on the device. To add a statistic, decorate a function with
`statistic`. A strategy names it in `statistics`, as `grad_norm_sq` or as `my_module:my_function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfed.client.devices import wide
from layerfed.config import imported

__all__ = ["STATISTICS", "Statistic", "load_statistic", "statistic"]

Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

# The error of E[g²] − E[g]² from float32 sums, relative to E[g²]; a smaller variance counts as 0.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Statistic:
    """A statistic, as strategies name it.

    Attributes
    ----------
    measure : Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
        Turns the gradients and weights of one layer's parameters into one number, 0 or more.
    public : bool
        Whether the statistic depends on the global model alone, and so reveals nothing of a client's
        data. A private client sends it without noise.
    """

    measure: Measure
    public: bool = False

    def __call__(self, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Measure one layer."""
        return self.measure(gradients, weights)


STATISTICS: dict[str, Statistic] = {}


def statistic(*, public: bool = False) -> Callable[[Measure], Statistic]:
    """Return a decorator that makes a function a statistic of the same name."""

    def register(measure: Measure) -> Statistic:
        name = str(getattr(measure, "__name__", measure))
        found = Statistic(measure, public)
        if measure.__module__ == __name__:
            STATISTICS[name] = found
        return found

    return register


def load_statistic(name: str) -> Statistic:
    """Return the statistic of a name, from `STATISTICS` or as `module:function`.

    Raises
    ------
    ValueError
        If there is no such function, or it is not decorated with `statistic`.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    found = imported(name, "statistic") if ":" in name else None
    if not isinstance(found, Statistic):
        raise ValueError(f"unknown statistic {name!r}; known: {', '.join(STATISTICS)}")
    return found


@statistic()
def grad_norm_sq(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return ‖g_{i,l}‖², summed over the layer's tensors [S, (P1)]."""
    return _sums(gradients)[:, 0].sum()


@statistic(public=True)
def param_norm_sq(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return ‖θ_l‖²."""
    return torch.stack([w.to(wide(w.device)).square().sum() for w in weights]).sum()


@statistic()
def snr(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return |mean(g)| / var(g) over all elements of the layer's gradient [S]; 0 for variance 0."""
    squares, total = _sums(gradients).sum(dim=0)
    count = sum(gradient.numel() for gradient in gradients)
    mean, variance = _moments(squares, total, count)
    return torch.where(variance > 0, mean.abs() / variance, 0.0)


@statistic()
def snr_code(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return mean(g)² / std(g) of each tensor, summed over the layer [C]; 0 for variance 0."""
    sums = _sums(gradients)
    counts = torch.tensor([g.numel() for g in gradients], dtype=sums.dtype, device=sums.device)
    mean, variance = _moments(sums[:, 0], sums[:, 1], counts)
    # The released code uses torch.std, which divides by the number of elements less one.
    deviation = (variance * counts / (counts - 1).clamp(min=1)).sqrt()
    return torch.where(variance > 0, mean.square() / deviation, 0.0).sum()


def _sums(gradients: Sequence[Tensor]) -> Tensor:
    """Return ‖g‖² and Σ g of each tensor, shape (P, 2), summed in float32 and returned wide."""
    rows = [
        torch.stack(
            [
                torch.linalg.vector_norm(gradient, dtype=torch.float32).square(),
                gradient.sum(dtype=torch.float32),
            ]
        )
        for gradient in gradients
    ]
    return torch.stack(rows).to(wide(rows[0].device))


def _moments(squares: Tensor, total: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of elements from their sums; a variance within rounding is 0."""
    mean, square = total / count, squares / count
    variance = square - mean.square()
    return mean, torch.where(variance > ROUNDING * square, variance, 0.0)
