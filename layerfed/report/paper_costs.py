"""What a run costs as the paper counts [S, Table 3], beside what was measured.

The paper counts a selected layer as its share of the whole model and nothing else: not the forward pass
through frozen layers, not the gradient's way down to the lowest selected layer, not the head, and no
downlink. Its printed figures follow from this to their last digit but one [I]: full fine-tuning of CLIP
ViT-B/32 in five steps of 64 images is 3 × 8.818 GFLOPs × 320 = 8.47 TFLOPs a client and round (forward,
and backward as twice forward), its 87.85 million float32 parameters are 2,811 Mbit, and one of twelve
layers is a twelfth of each: 0.71 TFLOPs and 234 Mbit. How its FLOPs of selection (1.51, and 0.30 on one
batch) come about is not known; here they are those that probes were counted to take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["PaperCosts", "paper_costs"]

# Forward, and backward as twice forward.
PASSES = 3


@dataclass(frozen=True)
class PaperCosts:
    """Training of one client in one round, by the paper's rule.

    Attributes
    ----------
    flops : float | None
        None where clients train by epochs, so that no number of examples is the same for all.
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
    """Apply the paper's rule to measured figures: share of the selected layers × whole model.

    A client's share is Σ_l m(l) c_l / Σ_l c_l over the selectable layers [S, Table 3, I], with c_l the
    layer's FLOPs or bytes; a client that trains all of them counts as the whole model.

    Parameters
    ----------
    masks : numpy.ndarray
        m_i of every client and round, shape (n, L).
    layer_flops : numpy.ndarray
        FLOPs of one example's forward pass through each selectable layer, shape (L,).
    model_flops : float
        The same through the whole model.
    layer_bytes : numpy.ndarray
        Shape (L,).
    model_bytes : float
    examples : int, optional
        Examples that a client trains on in a round.

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
