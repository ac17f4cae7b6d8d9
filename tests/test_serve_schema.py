"""schemathesis, in process and over a model that is not there: no request, however odd, makes a 500."""

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import schemathesis
from fake_model import FakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from servers import until
from starlette.testclient import TestClient

from foredraft.server.app import Launch, create_app
from foredraft.server.launching import LaunchSpec
from foredraft.server.models import Loader
from foredraft.server.settings import Limits, Settings

CASES = int(os.environ.get("FOREDRAFT_TEST_CASES", "25"))  # of each operation


def fake_loader(settings: Settings, metrics: Any) -> Loader:
    return Loader(lambda spec: 1000, lambda spec, uid, loop, room: FakeModel())


@pytest.fixture
def app() -> Any:
    """Anew for each test: requests made at random may end the model."""
    rules = Settings(limits=Limits(max_body=2**20), memory_budget=5000)
    return create_app(rules, fake_loader, (Launch(LaunchSpec("fake"), "fake"),))


@pytest.fixture
def api(app: Any) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_nothing_makes_a_500(api: Any) -> None:
    """Each operation by itself; not through schemathesis' plugin, which this pytest is too new for."""
    tried = 0
    for found in api.get_all_operations():
        asked_at_random(found.ok().as_strategy())()
        tried += 1
    assert tried >= 12


def asked_at_random(cases: SearchStrategy[Any]) -> Callable[[], None]:
    @given(case=cases)
    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500 or response.status_code in (503, 507), response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    return ask


def test_fake_answers(app: Any) -> None:
    """The handlers alone: a whole answer, a stream with a sign of life, usage."""
    with TestClient(app, base_url="http://localhost") as client:
        until(lambda: client.get("/ready").status_code == 200)
        body = {"messages": [{"role": "user", "content": "x"}], "return_draft_info": True}
        whole = client.post("/v1/chat/completions", json=body).json()
        assert whole["choices"][0]["message"]["content"] == "ok"
        assert whole["choices"][0]["draft_info"]["tokens"][1] == {"id": 2, "text": "k", "kind": "bonus", "drafter": ""}
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True, "n": 2}).text
        assert ": alive" in streamed and streamed.endswith("data: [DONE]\n\n")
        assert client.get("/ready").json() == {"ready": True, "models": {"fake": "ready"}}
