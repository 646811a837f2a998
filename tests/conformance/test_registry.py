"""The types of the installed PEFT's own registry: each is served, or refused for a reason that its error names."""

from __future__ import annotations

import peft
import pytest
from cases import REFUSED, SPECS, Spec

from mlora.lowering import LOWERINGS
from mlora.lowering import REFUSED as REASONS

TYPES = sorted(kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
OWN = {"DELTA", "LYCORIS"}  # mlora's own, and that of other trainers' files


def kind_of(spec: Spec) -> str:
    """The type that the spec's files name."""
    if "peft_type" in spec.rewritten:
        return str(spec.rewritten["peft_type"])
    config = getattr(peft, spec.kind)
    return next(kind.value for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is config)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_has_one_verdict(kind: str) -> None:
    """A type that PEFT adds fails here until it has a lowering or a reason, and a case."""
    assert (kind in LOWERINGS) != (kind in REASONS), f"{kind}: PEFT has it, and mlora neither serves nor refuses it"
    tried = [spec for spec in SPECS if kind_of(spec) == kind]
    assert tried, f"{kind} is in no case of the conformance suite"
    assert any(spec.verdict != REFUSED for spec in tried) == (kind in LOWERINGS)


def test_no_verdict_is_of_a_type_that_peft_does_not_have() -> None:
    assert {*LOWERINGS, *REASONS} - OWN == set(TYPES)
