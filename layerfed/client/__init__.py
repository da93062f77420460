"""The client's half of a round: a resident model, training, the probe, what a node affords."""
