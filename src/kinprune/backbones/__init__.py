"""Pre-trained models: timm names, local safetensors files, a user's own factory."""

from kinprune.backbones.classifier import find_classifier
from kinprune.backbones.loading import Backbone, fingerprint, load_backbone
from kinprune.backbones.spec import BackboneSpec, build_architecture

__all__ = [
    "Backbone",
    "BackboneSpec",
    "build_architecture",
    "find_classifier",
    "fingerprint",
    "load_backbone",
]
