"""The OpenAPI document, and what schemathesis makes of it: requests of every shape, none of which may be a 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from spin_ray.serving.api import make_app
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.tiny_runs import tiny_config

APP = make_app(FakeEngines(), tiny_config(), [], empty_votes())
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"Host": "localhost"})


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
def test_no_request_is_a_500_and_every_answer_is_as_documented(case: schemathesis.Case) -> None:
    case.call_and_validate(
        headers={"Host": "localhost"}, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
    )


def test_the_document_names_openais_routes_and_nothing_that_steers_an_engine() -> None:
    paths = set(APP.openapi()["paths"])
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/compare", "/healthz", "/readyz"} <= paths
    assert not [path for path in paths if "cache" in path or "lora" in path or "rpc" in path or "profile" in path]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_templates_and_tools_are_no_part_of_a_request(path: str) -> None:
    document = APP.openapi()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    body = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert body["additionalProperties"] is False
    assert not {"chat_template", "chat_template_kwargs", "tools", "priority"} & set(body["properties"])
