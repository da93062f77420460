"""The models, and how they are split into layers that are selected: LayerFed's own."""

from layerfed.models.image import build_image_classifier
from layerfed.models.layers import LayerMap
from layerfed.models.text import build_choice_model, build_text_classifier

__all__ = [
    "LayerMap",
    "build_choice_model",
    "build_image_classifier",
    "build_text_classifier",
]
