"""Statistics of a probe: functions that turn one layer's gradients and weights into one number.

A statistic gets two lists of tensors on the device, a gradient and a weight for each of the layer's
parameters. It returns one number, also on the device. To add a statistic, decorate a function with
`statistic`. A strategy names it in `statistics`, as `grad_norm_sq` or as `my_module:my_function`.

A statistic that needs more than one gradient is decorated with `statistic(passes=True)`. It gets the
passes over a batch (`client/passes.py`) and returns one number for each measured layer. Such a statistic
costs more; its docstring states the passes and the memory, beside the one pass that all others share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layerfed.client.devices import wide
from layerfed.client.passes import Passes
from layerfed.config import ConfigError, imported
from layerfed.models.layers import LayerMap

__all__ = ["SEVERAL_PASSES", "STATISTICS", "Statistic", "load_statistic", "statistic"]

Measure = Callable[..., Tensor]

# The error of E[g²] − E[g]² from float32 sums, relative to E[g²]; a smaller variance counts as 0.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Statistic:
    """A statistic, as strategies name it.

    Attributes
    ----------
    measure : Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
        Turns the gradients and weights of one layer's parameters into one number, 0 or more. With
        `passes`, it turns `Passes` into a number for each measured layer.
    public : bool
        Whether the statistic depends on the global model alone, and so reveals nothing of a client's
        data. A private client sends it without noise.
    passes : bool
        Whether it makes its own passes.
    together : bool
        Whether a layer's number depends on the other layers of the probe, so that it is not the same in
        a probe of some layers (`strategy.probe-share`).
    """

    measure: Measure
    public: bool = False
    passes: bool = False
    together: bool = False

    def __call__(self, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Measure one layer."""
        return self.measure(gradients, weights)


STATISTICS: dict[str, Statistic] = {}
SEVERAL_PASSES: dict[str, Statistic] = {}


def statistic(
    *, public: bool = False, passes: bool = False, together: bool = False
) -> Callable[[Measure], Statistic]:
    """Return a decorator that makes a function a statistic of the same name."""

    def register(measure: Measure) -> Statistic:
        name = str(getattr(measure, "__name__", measure))
        found = Statistic(measure, public, passes, together)
        if measure.__module__ == __name__:
            (SEVERAL_PASSES if passes else STATISTICS)[name] = found
        return found

    return register


def of_data(names: Iterable[str], layers: LayerMap, *, at_global: bool) -> list[str]:
    """Return the statistics that depend on a client's data, which privacy has to cover.

    A statistic of weights alone is public at the global model, if no selectable block is personal.
    """
    shared = at_global and layers.personal.isdisjoint(block.name for block in layers.blocks)
    return [name for name in names if not (shared and load_statistic(name).public)]


def load_statistic(name: str) -> Statistic:
    """Return the statistic of a name, from `STATISTICS` or as `module:function`.

    Raises
    ------
    ConfigError
        If there is no such function, or it is not decorated with `statistic`.
    """
    known = STATISTICS | SEVERAL_PASSES
    if name in known:
        return known[name]
    found = imported(name, "statistic") if ":" in name else None
    if not isinstance(found, Statistic):
        raise ConfigError(f"unknown statistic {name!r}; known: {', '.join(known)}")
    return found


@statistic()
def grad_norm_sq(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return ‖g_{i,l}‖², summed over the layer's tensors [S, (P1)]."""
    return _sums(gradients)[:, 0].sum()


@statistic()
def grad_mean_sq(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return ‖g_{i,l}‖² / n_l, with n_l the layer's elements: large layers have no advantage."""
    return grad_norm_sq(gradients, weights) / sum(gradient.numel() for gradient in gradients)


@statistic()
def relative_grad_sq(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return ‖g_{i,l}‖² / ‖θ_l‖², the square of what `rgn` ranks by; 0 for weights of zero."""
    size = param_norm_sq(gradients, weights)
    return torch.where(size > 0, grad_norm_sq(gradients, weights) / size, 0.0)


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


# ---------------------------------------------------------------------- of more than one gradient

# Steps of the power iteration. The Rayleigh quotient's error is the square of the vector's.
POWER_STEPS = 6

# The length of the difference in the curvature, relative to the weights.
DIFFERENCE = 1e-4


@statistic(passes=True)
def fisher(passes: Passes) -> Tensor:
    """Return Σ_p ‖F_p‖ over the layer's tensors, F the diagonal of the empirical Fisher matrix.

    F_p is the mean over the batch's examples of their squared gradients, element by element. Fed-HeLLo's
    code scores a layer so, but takes the gradient of the label's logit; here it is that of the loss,
    which is the log-likelihood for cross-entropy. It takes as many FLOPs as one pass over the batch, an
    example at a time, and the memory of one gradient of the model.
    """
    squares: dict[int, list[Tensor]] = {}
    examples = passes.examples()
    for example in examples:
        passes.backward(lambda row, own: _add(squares, row, (g.square() for g in own)), example)
    return _column(
        passes,
        [torch.stack([(s / len(examples)).norm() for s in own]).sum() for own in _rows(squares)],
    )


@statistic(passes=True)
def ntk_eigenvalue(passes: Passes) -> Tensor:
    """Return the largest eigenvalue of the layer's neural tangent kernel on the batch, by example.

    The kernel is Θ = J Jᵀ with a row of J for the gradient of each example's loss by the layer's
    parameters, and the result is that of Θ / n over n examples. Power iteration finds it without holding
    J: one pass forms Jᵀ v, another J (Jᵀ v). The Rayleigh quotient of the last vector is a lower bound.
    It takes the FLOPs of 2 × `POWER_STEPS` passes, an example at a time, and the memory of one gradient.
    """
    examples = passes.examples()
    shape = (len(passes.weights), len(examples))
    # Not ones: gradients of a trained model nearly cancel in their sum, far from the eigenvector.
    start = torch.randn(shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (start / start.norm()).to(passes.device, wide(passes.device))
    vectors, values = start.expand(shape), start.new_zeros(shape[0])
    for _ in range(POWER_STEPS):
        sums: dict[int, list[Tensor]] = {}
        image = torch.zeros_like(vectors)
        for visit in (partial(_weigh, sums, vectors), partial(_project, sums, image)):
            for i, example in enumerate(examples):
                passes.backward(partial(visit, i), example)
        values = (vectors * image).sum(dim=1)
        vectors = image / image.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.clamp(values, min=0.0) / shape[1]


def _weigh(
    sums: dict[int, list[Tensor]], vectors: Tensor, i: int, row: int, own: Sequence[Tensor]
) -> None:
    """Add an example's gradients to Jᵀ v."""
    _add(sums, row, (g * vectors[row, i].to(g.dtype) for g in own))


def _project(
    sums: Mapping[int, list[Tensor]], image: Tensor, i: int, row: int, own: Sequence[Tensor]
) -> None:
    """Write an example's entry of J (Jᵀ v)."""
    image[row, i] = _dot(own, sums[row])


@statistic(passes=True)
def grad_signal_sq(passes: Passes) -> Tensor:
    """Return ⟨g_a, g_b⟩ of the batch's two halves, or 0 if it is negative.

    Its expectation is ‖∇f_i‖², without the noise of the batch, tr(Σ) / n, which is part of ‖g‖² and
    which no step can gain; near an optimum it is most of it. Of a batch of one it is ‖g‖². It takes the
    FLOPs of one pass, and the memory of one gradient.
    """
    count = len(next(iter(passes.batch.values())))
    halves = [
        {name: tensor[part] for name, tensor in passes.batch.items()}
        for part in ([slice(count // 2), slice(count // 2, None)] if count > 1 else [slice(1)])
    ]
    first: dict[int, list[Tensor]] = {}
    products = torch.zeros(len(passes.weights), dtype=wide(passes.device), device=passes.device)

    def project(row: int, own: Sequence[Tensor]) -> None:
        products[row] = _dot(first[row], own)

    passes.backward(lambda row, own: _add(first, row, own), halves[0])
    passes.backward(project, halves[-1])
    return products.clamp(min=0.0)


@statistic(passes=True)
def loss_decrease(passes: Passes) -> Tensor:
    """Return max(0, f(θ) − f(θ − η g_l)): what one step of SGD on the layer alone gains on its batch.

    η is `train.lr`. It takes one forward pass for each layer, and the memory of one gradient and of one
    block in float32.
    """
    gradients: dict[int, list[Tensor]] = {}
    before = passes.backward(lambda row, own: _add(gradients, row, own))
    gains = []
    for row, own in enumerate(_rows(gradients)):
        with passes.moved(row, own, -passes.lr):
            gains.append((before - passes.loss()).clamp(min=0.0))
    return _column(passes, gains)


@statistic(passes=True, together=True)
def newton_decrease(passes: Passes) -> Tensor:
    """Return what a quadratic model of the loss promises for a step −s g_l: s ‖g_l‖² − s² c_l / 2.

    c_l is the layer's part of the curvature along the gradient of all layers, g_lᵀ (H g)_l, from the
    difference of two gradients. s is the best step, ‖g_l‖² / c_l, but at most η = `train.lr`. It takes
    one pass more, and the memory of one gradient and of all blocks in float32.
    """
    gradients: dict[int, list[Tensor]] = {}
    passes.backward(lambda row, own: _add(gradients, row, own))
    own = _rows(gradients)
    squares = _column(passes, [_dot(g, g) for g in own])
    weights = _column(passes, [_dot(w, w) for w in passes.weights]).sum()
    step = float(DIFFERENCE * (weights / squares.sum().clamp(min=1e-30)).sqrt())
    products = torch.zeros_like(squares)

    def project(row: int, there: Sequence[Tensor]) -> None:
        products[row] = _dot(own[row], there)

    with ExitStack() as moved:
        for row, gradient in enumerate(own):
            moved.enter_context(passes.moved(row, gradient, -step))
        passes.backward(project)
    curvature = (squares - products) / step
    best = torch.where(curvature * passes.lr > squares, squares / curvature, passes.lr)
    return (best * squares - best.square() * curvature / 2).clamp(min=0.0)


def _add(sums: dict[int, list[Tensor]], row: int, terms: Iterable[Tensor]) -> None:
    """Add one term for each of a layer's parameters."""
    if row in sums:
        for total, term in zip(sums[row], terms, strict=True):
            total += term
    else:
        sums[row] = [term.clone() for term in terms]


def _rows(by_row: Mapping[int, list[Tensor]]) -> list[list[Tensor]]:
    """Return what was kept of each layer, in their order; backward visits them from the output."""
    return [by_row[row] for row in sorted(by_row)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    products = [(a.float() * b.float()).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(products).to(wide(products[0].device)).sum()


def _column(passes: Passes, values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(wide(passes.device)) for value in values])
