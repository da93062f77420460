"""The client's half of a round: a resident model, training, the probe, and a node's limits."""
