"""Build models and split them into layers.

`model.name` is `family/architecture`: `layerfed/vit` (shipped), `open_clip/ViT-B-32`, `timm/…`,
`transformers/…`. Weights come from the hub or a local folder, or are random by explicit choice. Models
of each family are split as in the paper: embeddings are frozen, blocks are selectable, and every client
trains the head (with the final norm, and CLIP's projection) [S, section V].
"""
