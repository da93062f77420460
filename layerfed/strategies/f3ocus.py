"""Layers with the largest eigenvalue of their neural tangent kernel, spread over the clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from layerfed.config import Section
from layerfed.runs.records import Choice
from layerfed.selection import mean_gain
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ilp import prepared, solved


class F3OCUS(SelectiveStrategy):
    """Each round trades the layers' importance for clients against diverse choices.

    In F³OCUS (Saha et al., CVPR 2025, arXiv 2411.11912) a layer's importance for a client is the share

        S_{i,l} = λ_{i,l} / Σ_k λ_{i,k}

    of the largest eigenvalue of the layer's neural tangent kernel on its data. The server maximises the
    clients' total importance and minimises the variance over layers of the number of clients k_l that
    train each, by meta-heuristics that approximate the Pareto front of the two. Here one weight μ puts
    both into one program, which has a proven optimum:

        max Σ_i Σ_l S_{i,l} m_i(l) + μ Σ_l k_l (n − k_l)   s.t.   Σ_l c_l m_i(l) ≤ R_i

    If clients spend whole budgets, Σ_l k_l does not change, and the second term is −μ L Var(k) and a
    constant. So this is (P1) with a negative λ on other gains. The paper was read in abstract and
    summaries only, and no code of its authors was found. Which point of the front they take, and
    whether their kernel is that of the loss or of the outputs, could not be confirmed; here it is that
    of the loss.
    """

    class Options(Section):
        """The weight of diversity."""

        diversity: Annotated[float, Field(ge=0)] = 1.0
        """μ, relative to the mean selected importance of a client as λ of `ilp` is. 0 gives each
        client its own most important layers."""

    name = "f3ocus"
    statistics = ("ntk_eigenvalue",)
    masks = "own"
    options: Options

    def select(self, candidates: Candidates) -> Choice:
        """Solve the program on the shares of the eigenvalues."""
        values = candidates.statistics["ntk_eigenvalue"]
        totals = values.sum(axis=1, keepdims=True)
        problem, rounding = prepared(candidates, values / np.where(totals > 0, totals, 1.0))
        reward = self.options.diversity * mean_gain(problem) / max(problem.clients, 1)
        choice = solved(replace(problem, consistency=-reward), candidates)
        return replace(choice, rounding=rounding)
