"""The bank's own backbone: every bank carries the weights it was built from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kinprune.backbones import Backbone, load_backbone
from kinprune.bank.record import Header, check_backbone, check_space
from kinprune.bank.storage import Bank
from kinprune.units import UnitSpace, find_units


def load_bank_backbone(bank: Bank, num_classes: int, *, seed: int = 0) -> Backbone:
    """The backbone that the bank is about, from the bank's own weights, with a new head of ``num_classes``.

    Raises:
        BankError: the weights are gone or altered, or this version of timm builds another model.
    """
    return build_backbone(bank.header, bank.store.get(bank.header.backbone_weights), num_classes, seed=seed)


def build_backbone(header: Header, content: bytes, num_classes: int, *, seed: int = 0) -> Backbone:
    """The same where the bank itself is out of reach: ``content`` is the file of its backbone's weights."""
    wanted = header.preprocessing
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.safetensors"
        path.write_bytes(content)
        backbone = load_backbone(
            header.spec.name,
            num_classes=num_classes,
            weights=path,
            seed=seed,
            image_size=wanted.image_size,
            mean=wanted.mean,
            std=wanted.std,
            interpolation=wanted.interpolation,
            crop_pct=wanted.crop_pct,
        )
    check_backbone(header, backbone.fingerprint, backbone.spec, backbone.preprocessing)
    return backbone


def bank_space(bank: Bank, backbone: Backbone) -> UnitSpace:
    """The unit space of the bank's backbone; BankError where this version finds other units than the bank has."""
    space = find_units(
        backbone.model, bank.header.preprocessing.image_size, stream=bank.header.stream, head=backbone.head
    )
    check_space(bank.header, space)
    return space
