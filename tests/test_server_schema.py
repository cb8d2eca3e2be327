"""Requests made from the server's own document, right ones and wrong ones: it answers as the document says."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="it needs Python 3.11")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402

EXAMPLES = 10  # of each endpoint, of each kind
QUICK = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_it_answers_as_its_document_says(operations, mode):
    seen = set()
    for operation in operations:

        @QUICK
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case):
            if isinstance(case.body, dict):  # a short text
                for name in {"max_tokens", "max_completion_tokens"} & case.body.keys():
                    case.body[name] = min(case.body[name], 5) if isinstance(case.body[name], int) else case.body[name]
            response = case.call(timeout=60)
            seen.add(response.status_code)
            case.validate_response(response, checks=[checks.not_a_server_error, checks.status_code_conformance])

        try:
            run()
        except Exception as error:
            if type(error).__name__ in ("Unsatisfiable", "SkipTest"):  # nothing can be wrong with this endpoint
                continue
            raise
    assert 400 in seen if mode is GenerationMode.NEGATIVE else 200 in seen
