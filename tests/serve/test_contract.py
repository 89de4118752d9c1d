"""The OpenAPI description against the service: whatever fits it, or just does not, is answered as it says."""

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")

CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]
WITH_BODIES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
WITHOUT = ["/v1/models", "/v1/models/{name}", "/health", "/metrics"]


@pytest.fixture(scope="module")
def description(small):
    return schemathesis.openapi.from_url(small.url + "/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [("POST", path, mode) for path in WITH_BODIES for mode in schemathesis.GenerationMode]
    + [("GET", path, schemathesis.GenerationMode.POSITIVE) for path in WITHOUT],
)
def test_what_is_answered_is_what_is_described(description, method, path, mode):
    @hypothesis.given(case=description[path][method].as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=60, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def ask(case):
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # anything but the one name there is would go no further
        answer = case.call_and_validate(checks=CHECKS)
        seen.add(answer.status_code)

    seen = set()
    ask()
    if method == "POST":
        wanted = 200 if mode is schemathesis.GenerationMode.POSITIVE else 400
        assert wanted in seen, "nothing got as far as this test is for"


def test_every_path_is_tried(description):
    assert {operation.ok().path for operation in description.get_all_operations()} == {*WITH_BODIES, *WITHOUT}
