"""What the local server says of itself in /openapi.json, and that it keeps to it whatever it is sent."""

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.openai.describe import DESCRIPTION
from ghostvis_cli.openai.schema import BODY
from tests.engines.serving import Letters, Running, running

SCHEMAS = DESCRIPTION["components"]["schemas"]
RANGES = {
    field: rules
    for field, described in SCHEMAS["ChatBody"]["properties"].items()
    for rules in described.get("anyOf", ())
    if "minimum" in rules
}
EXAMPLES = 60  # for each route and each way of making requests
# Every route and method, with requests as described; those with a body with others too.
CASES = [
    (path, method, mode)
    for path, methods in DESCRIPTION["paths"].items()
    for method, operation in methods.items()
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or "requestBody" in operation
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(context_tokens=2_000_000), vocabulary=Letters()) as started:
        yield started


def test_the_description_is_served_and_names_every_field_that_is_read(server: Running) -> None:
    for body in BODY.values():
        known = body.known()
        assert set(SCHEMAS[body.__name__]["properties"]) == known.read | known.ignored | set(known.neutral)
    assert server.send("GET", "/openapi.json")[0] == 200


@pytest.mark.parametrize("field", [field for field in RANGES if field not in ("n", "top_logprobs")])
def test_the_ranges_described_are_those_that_are_taken(field: str, server: Running) -> None:
    low, high = RANGES[field]["minimum"], RANGES[field]["maximum"]
    step = 1 if "integer" in RANGES[field]["type"] else 1e-10
    for value, status in ((low, 200), (high, 200), (low - step, 400), (high * 1.0001 + step, 400)):
        value = int(value) if isinstance(low, int) and isinstance(step, int) else value
        assert (value, server.chat(**{field: value})[0]) == (value, status)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_no_request_is_answered_with_a_5xx_or_otherwise_than_described(
    path: str, method: str, mode: GenerationMode, server: Running
) -> None:
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]

    statuses = Counter[int]()
    made_up = 404 if "{model}" in path else 200  # no name that is made up is our model's

    @seed(0)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        # A body may fit the description and still be too much, or hold no image where it names one.
        statuses[case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code] += 1

    check()
    assert statuses[made_up if mode == GenerationMode.POSITIVE else 400]
