"""Launches: what they draft with, why they fail, and what a failed one does to requests for others."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fake_model import FakeModel
from servers import until
from starlette.testclient import TestClient

from foredraft import LLM
from foredraft.assembly import BUNDLED, bundled_draft
from foredraft.errors import ModelError, RequestError
from foredraft.server.app import create_app
from foredraft.server.errors import ApiError
from foredraft.server.launching import LaunchSpec, footprint, from_launch, from_speculative_launch
from foredraft.server.models import Loader
from foredraft.server.registry import Registry, load_registry
from foredraft.server.schemas import LaunchRequest, SpeculativeLaunchRequest
from foredraft.server.settings import Settings

ASK = {"prompt": "a", "max_tokens": 2}


def loads_unless_bad(spec: LaunchSpec, *_: object) -> Any:
    if "bad" in spec.name:
        raise ValueError("torn pages")
    return FakeModel()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """Of a server whose models are there at once, and fail where they are called so."""
    rules = Settings(allowed_folders=(tmp_path,))
    loader = Loader(lambda spec: 0, loads_unless_bad)
    with TestClient(create_app(rules, lambda *_: loader), base_url="http://localhost") as client:
        yield client


def launch(client: TestClient, folder: Path, uid: str) -> None:
    client.post("/v1/models", json={"target": str(folder), "uid": uid})
    until(lambda: client.get(f"/v1/models/{uid}").json()["state"] in ("ready", "failed"))


def told(client: TestClient, **more: object) -> str:
    return str(client.post("/v1/completions", json={**ASK, **more}).json()["error"]["message"])


def test_requests_without_a_model_mean_the_one_that_is_usable(client: TestClient, tmp_path: Path) -> None:
    assert told(client).startswith("no model is launched")
    launch(client, tmp_path / "bad", "broken")
    assert told(client).startswith("the model 'broken' failed to load")
    launch(client, tmp_path / "good", "first")
    assert client.post("/v1/completions", json=ASK).json()["model"] == "first"
    assert told(client, model="other") == "no model 'other' here; there is first"
    launch(client, tmp_path / "good", "second")
    assert told(client) == "name a model in the field 'model'; there is first, second"
    for uid in ("first", "second"):
        client.delete(f"/v1/models/{uid}")
    launch(client, tmp_path / "bad", "broken-too")
    assert "none that is usable" in told(client)


def test_why_a_launch_failed_is_in_the_log(
    client: TestClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "foredraft.server"):
        launch(client, tmp_path / "bad", "broken")
    assert "torn" not in client.get("/v1/models/broken").json()["error"]  # whatever a checkpoint's code says
    assert "torn pages" in [getattr(record, "fields", {}).get("why") for record in caplog.records]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_folder_that_is_not_there_is_told_in_the_librarys_words(tmp_path: Path, role: str) -> None:
    missing = str(tmp_path / "nope")
    with pytest.raises(ModelError, match="the path does not exist") as caught:
        LLM(**{role: missing})
    with TestClient(create_app(Settings(allowed_folders=(tmp_path,))), base_url="http://localhost") as client:
        answer = client.post("/v1/models", json={role: missing, "wait": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == " ".join(str(caught.value).split())


def test_paths_of_the_operators_registry_are_not_told(tmp_path: Path) -> None:
    file = tmp_path / "registry.json"
    file.write_text(f'{{"model": [{{"name": "ours", "path": "{tmp_path}/secret"}}]}}')
    with TestClient(create_app(Settings(registry=file)), base_url="http://localhost") as client:
        for body in ({"target": "ours"}, {"draft": "ours"}):
            message = client.post("/v1/models", json={**body, "wait": True}).json()["error"]["message"]
            assert "no model at ours: the path does not exist" in message and str(tmp_path) not in message


@pytest.mark.parametrize("path", ["{}/secret", "{}/secret/", "{}//secret", "{}/./secret", "~/secret", "~/secret/"])
@pytest.mark.parametrize("there", [False, True])
def test_however_the_registry_writes_a_path_it_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, there: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if there:
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "registry.json"
    file.write_text(json.dumps({"model": [{"name": "ours", "path": path.format(tmp_path)}]}))
    with TestClient(create_app(Settings(registry=file)), base_url="http://localhost") as client:
        for body in ({"target": "ours"}, {"draft": "ours"}):
            message = client.post("/v1/models", json={**body, "wait": True}).json()["error"]["message"]
            assert "ours" in message and "secret" not in message


def test_of_the_operators_own_folders_only_the_names_are_told() -> None:
    spec = LaunchSpec("t", "~/models/t", "/home/x/models/t/d", draft_name="d")
    home = str(Path("~/models/t").expanduser())
    assert spec.as_named(f"{home}/config.json, /home/x/models/t/d: no") == "t/config.json, d: no"
    assert LaunchSpec("bundled", draft="int4+skip").as_named("None of int4+skip") == "None of int4+skip"


def test_the_bundled_target_has_its_draft_model_however_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(BUNDLED / "target")
    for name in (None, BUNDLED / "target", str(BUNDLED / "target") + "/", tmp_path / "link"):
        assert bundled_draft(name) == BUNDLED / "draft"
    for other in (BUNDLED / "draft", "gpt2", "", "a\0b", "x" * 9000, object()):
        assert bundled_draft(other) is None


def test_a_launch_by_name_drafts_as_the_library_does() -> None:
    registry = load_registry(Settings())
    spec = from_launch(LaunchRequest(target="foredraft-bundled", size_in_billions=0.01), registry)
    assert LLM(spec.target, spec.draft).drafter.name == LLM().drafter.name == "suffix, model"
    assert footprint(spec) == footprint(LaunchSpec("bundled"))


@pytest.mark.parametrize(("asked", "found"), [(None, None), ("none", "none"), ("8-bit", "int8"), ("int4", "int4")])
def test_bits_of_the_draft_model(asked: str | None, found: str | None) -> None:
    registry = load_registry(Settings())
    ours = LaunchRequest(draft_quantization=asked)
    assert from_launch(ours, registry).draft_weight_format == found
    sizes = {"model_size_in_billions": 0.01, "draft_model_size_in_billions": 0.001}
    names = {"model_name": "foredraft-bundled", "draft_model_name": "foredraft-bundled"}
    xinference = SpeculativeLaunchRequest(**names, **sizes, draft_quantization=asked)
    assert from_speculative_launch(xinference, registry).draft_weight_format == found


def test_bits_of_the_draft_model_that_are_not_known() -> None:
    body = LaunchRequest(draft_quantization="3-bit")
    with pytest.raises(ApiError, match="draft_quantization='3-bit' is not known; use none, int8, 8-bit, int4, 4-bit"):
        from_launch(body, load_registry(Settings()))


@pytest.mark.parametrize("draft", ["auto", "ngram", "int4"])
@pytest.mark.parametrize("field", ["draft_quantization", "draft_dtype", "draft_device"])
def test_what_is_asked_of_a_draft_model_that_is_none_is_refused_at_once(draft: str, field: str) -> None:
    value = {"draft_quantization": "int8", "draft_dtype": "bf16", "draft_device": "cpu"}[field]
    body = LaunchRequest(target="foredraft-bundled", size_in_billions=0.001, draft=draft, **{field: value})
    with pytest.raises(ApiError, match=f"draft='{draft}' .*, so {field}='{value}' cannot be honoured; leave") as caught:
        from_launch(body, load_registry(Settings()))
    assert (caught.value.status, caught.value.param) == (400, field)


def test_caches_that_hold_no_text_are_refused_at_once(tmp_path: Path) -> None:
    registry = load_registry(Settings(allowed_folders=(tmp_path,)))
    with pytest.raises(RequestError, match=r"cache_bytes=3 is not usable; .* at least [0-9]+ "):
        from_launch(LaunchRequest(cache_bytes=3), registry)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "x"}')
    body = LaunchRequest(target=str(tmp_path / "odd"), draft="none", cache_bytes=3)
    assert from_launch(body, registry).cache_bytes == 3  # loading says what is wrong


def test_what_is_no_model_takes_nothing_and_fails_when_it_is_loaded() -> None:
    for name in ("/not/there", "a--b/c", "x" * 300 + "/y"):
        assert footprint(LaunchSpec(name, name, "none")) == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"target": "foredraft-bundled"}, "size_in_billions"),
        ({"draft": "foredraft-bundled"}, "draft_size_in_billions"),
    ],
)
def test_several_sizes_say_which_field_tells_them_apart(client: TestClient, body: Any, field: str) -> None:
    error = client.post("/v1/models", json=body).json()["error"]
    assert error["param"] == field
    assert error["message"].endswith(f"'foredraft-bundled' has several sizes (0.01, 0.001); say which in '{field}'")


def test_xinferences_fields_are_named_too() -> None:
    registry: Registry = load_registry(Settings())
    with pytest.raises(Exception, match="say which in 'draft_model_size_in_billions'"):
        registry.resolve("foredraft-bundled", None, "draft_model_name")


def test_the_page_tells_of_every_field_of_a_launch() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    assert [name for name in LaunchRequest.model_fields if f"`{name}`" not in page] == []
