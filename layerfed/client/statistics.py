"""What a probe measures of each layer: one function a statistic, from gradients and weights to a number.

A statistic is a function of a layer's gradients and weights, one tensor each a parameter, on the device.
Its result is one number, on the device as well. To add one, decorate a function with `statistic`; a
strategy names it in its `statistics`, by its name here or as `my_package.my_module:function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from layerfed.client.devices import wide

__all__ = ["STATISTICS", "Statistic", "load_statistic", "statistic"]

Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

# E[g²] − E[g]² of float32 sums is known to this share of E[g²]; a variance below it is none.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Statistic:
    """A statistic, as strategies name it.

    Attributes
    ----------
    name : str
    measure : Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
        From the gradients and the weights of one layer's parameters to one number, not negative.
    public : bool
        Whether it depends on the global model alone, so that it says nothing of a client's data. It is
        measured once then, not once a batch.
    """

    name: str
    measure: Measure
    public: bool = False

    def __call__(self, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Measure one layer."""
        return self.measure(gradients, weights)


STATISTICS: dict[str, Statistic] = {}


def statistic(*, public: bool = False) -> Callable[[Measure], Statistic]:
    """Make a function a statistic of its name."""

    def register(measure: Measure) -> Statistic:
        name = str(getattr(measure, "__name__", measure))
        found = Statistic(name, measure, public)
        if measure.__module__ == __name__:
            STATISTICS[name] = found
        return found

    return register


def load_statistic(name: str) -> Statistic:
    """Return the statistic of a name, in `STATISTICS` or as `module:function`.

    Raises
    ------
    ValueError
        If there is none of that name, or it is not decorated as one.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    module, colon, attribute = name.partition(":")
    found = getattr(import_module(module), attribute, None) if colon else None
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
    """Return |mean(g)| / var(g) over all elements of the layer's gradient [S]; 0 without a variance."""
    squares, total = _sums(gradients).sum(dim=0)
    count = sum(gradient.numel() for gradient in gradients)
    mean, variance = _moments(squares, total, count)
    return torch.where(variance > 0, mean.abs() / variance, 0.0)


@statistic()
def snr_code(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return mean(g)² / std(g) of each tensor, summed over the layer [C]; 0 without a variance."""
    sums = _sums(gradients)
    counts = torch.tensor([g.numel() for g in gradients], dtype=sums.dtype, device=sums.device)
    mean, variance = _moments(sums[:, 0], sums[:, 1], counts)
    # torch.std, as the released code has it, divides by the number of elements less one.
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
    """Return mean and variance of elements from their sums; 0 for a variance that is only rounding."""
    mean, square = total / count, squares / count
    variance = square - mean.square()
    return mean, torch.where(variance > ROUNDING * square, variance, 0.0)
