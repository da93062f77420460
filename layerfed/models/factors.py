"""Names of adapters' tensors, as PEFT has them: the factors A and B, and the weight beside them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FACTOR_A", "OWN", "SHARED", "adapted_weight", "factor_pairs", "of_ranks"]

# The adapter that is averaged, and a second one that stays on each client.
SHARED, OWN = "default", "personal"
FACTOR_A, FACTOR_B, ADAPTED = f".lora_A.{SHARED}.", f".lora_B.{SHARED}.", ".base_layer."


def factor_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names of A and B of each adapter among some parameters."""
    return [(name, name.replace(FACTOR_A, FACTOR_B)) for name in names if FACTOR_A in name]


def adapted_weight(factor: str) -> str:
    """Return the name of the weight beside which an adapter's A is."""
    return factor.replace(FACTOR_A, ADAPTED)


def of_ranks(name: str, ranks: slice) -> tuple[slice, ...]:
    """Return the index of some ranks of a tensor: rows of A, columns of B, and all of any other."""
    if FACTOR_A in name:
        return (ranks,)
    return (slice(None), ranks) if FACTOR_B in name else ()
