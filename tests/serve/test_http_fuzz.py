"""The routes against their own description: schemathesis makes requests that fit it and requests that do not. Whatever
comes, the answer is one that the description has, never a failure of the server, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from http_serving import Served, serving
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from mlora.serve.http import Access, Limits

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
USUAL = {"model": "a", "max_tokens": 4, "adapter": None, "merged_adapters": None}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        tmp_path_factory.mktemp("adapters"), access=Access([], "admin"), runtime_adapters=True,
        limits=Limits(default_tokens=4, answers=3, prompts=4),
    ) as served:  # fmt: skip
        yield served


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_description_holds(served: Served, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    tried = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(
            max_examples=20, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):  # or few would get as far as the model
                case.body.update({key: value for key, value in USUAL.items() if key in case.body})
            case.call_and_validate(checks=CHECKS, headers={"authorization": "Bearer admin"})

        holds()
        tried.add(operation.path)
    assert {"/v1/completions", "/v1/chat/completions", "/", "/generate", "/generate_stream", "/tokenize"} < tried
    assert served.engine.stats().alive and {"/v1/load_lora_adapter", "/unload_lora_adapter"} < tried
