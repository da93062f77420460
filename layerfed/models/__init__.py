"""The models that tasks fine-tune: from the hub, a local folder, or random by explicit choice.

`model.name` is `family/architecture`: `layerfed/vit` (shipped), `open_clip/ViT-B-32`, `timm/…`,
`transformers/…`. Each family falls into layers as in the paper: embeddings are frozen, blocks are
selectable, and the head (with the final norm, and CLIP's projection) is trained by everyone
[S, section V].
"""

from layerfed.models.image import build_image_classifier
from layerfed.models.text import (
    build_choice_model,
    build_text_classifier,
    load_tokenizer,
    reading_limits,
    tokenizer_key,
)

__all__ = [
    "build_choice_model",
    "build_image_classifier",
    "build_text_classifier",
    "load_tokenizer",
    "reading_limits",
    "tokenizer_key",
]
