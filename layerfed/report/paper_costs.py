"""The costs of a run in the paper's accounting [S, Table 3].

The paper counts a selected layer as its share of the whole model. It does not count the forward pass
through frozen layers, the gradient's way down to the lowest selected layer, the head, or the downlink.
Its printed figures follow from this rule to their last digit but one [I]. Full fine-tuning of CLIP
ViT-B/32 in five steps of 64 images is 3 × 8.818 GFLOPs × 320 = 8.47 TFLOPs a client and round (forward,
and backward as twice forward). Its 87.85 million float32 parameters are 2,811 Mbit. One of twelve layers
is a twelfth of each: 0.71 TFLOPs and 234 Mbit. The rule behind the paper's FLOPs of selection (1.51, and
0.30 on one batch) is not known; here the probes' counted FLOPs are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["PaperCosts", "paper_costs"]

# One forward pass, and a backward pass that counts as two.
PASSES = 3


@dataclass(frozen=True)
class PaperCosts:
    """The costs of one client's training in one round, by the paper's rule.

    Attributes
    ----------
    flops : float | None
        None if clients train by epochs, since clients then train on different numbers of examples.
    bytes_up : float
    """

    flops: float | None
    bytes_up: float


def paper_costs(
    masks: np.ndarray,
    *,
    layer_flops: np.ndarray,
    model_flops: float,
    layer_bytes: np.ndarray,
    model_bytes: float,
    examples: int | None,
) -> PaperCosts:
    """Return costs by the paper's rule: the selected layers' share of the whole model's costs.

    A client's share is Σ_l m(l) c_l / Σ_l c_l over the blocks [S, Table 3, I], with c_l the block's
    FLOPs or bytes. A client that trains all blocks counts as the whole model.

    Parameters
    ----------
    masks : numpy.ndarray
        m_i of every client and round, shape (n, L).
    layer_flops : numpy.ndarray
        FLOPs of one example's forward pass through each block, shape (L,).
    model_flops : float
        FLOPs of one example's forward pass through the whole model.
    layer_bytes : numpy.ndarray
        Size of each block, shape (L,).
    model_bytes : float
    examples : int, optional
        Number of examples that a client trains on in a round.

    Returns
    -------
    PaperCosts
        Means over clients and rounds.
    """
    flops = None
    if examples is not None:
        flops = PASSES * model_flops * examples * _share(masks, layer_flops)
    return PaperCosts(flops, model_bytes * _share(masks, layer_bytes))


def _share(masks: np.ndarray, costs: np.ndarray) -> float:
    return float((masks @ costs).mean() / costs.sum())
