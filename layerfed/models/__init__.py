"""Models: building them and splitting them into layers.

Weights come from the hub, a local folder, or are random by explicit choice.

`model.name` is `family/architecture`: `layerfed/vit` (shipped), `open_clip/ViT-B-32`, `timm/…`,
`transformers/…`. Each family falls into layers as in the paper: embeddings are frozen, blocks are
selectable, and the head (with the final norm, and CLIP's projection) is trained by everyone
[S, section V].
"""
