"""A Flower app that takes layer selection from LayerFed."""
