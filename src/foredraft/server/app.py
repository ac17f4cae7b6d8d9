"""The application: routes, and what they need, put together. `create_app` knows no engine; `engine_loader` does.

Handlers live in chat.py and completions.py; this file only binds them to addresses.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from foredraft.errors import ForedraftError
from foredraft.server.auth import Keys, parse_keys, require_admin
from foredraft.server.chat import chat, check_template
from foredraft.server.completions import complete
from foredraft.server.errors import ApiError, as_api_error, invalid_body
from foredraft.server.launching import LaunchSpec, from_launch, from_speculative_launch
from foredraft.server.metrics import Metrics
from foredraft.server.middleware import Guard
from foredraft.server.models import Loader, Models
from foredraft.server.registry import Registry, load_registry
from foredraft.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LaunchRequest,
    SpeculativeLaunchRequest,
    TokenizeRequest,
)
from foredraft.server.settings import Settings
from foredraft.versions import installed

VERSION = installed("foredraft") or "unknown"
PLAYGROUND = Path(__file__).parent / "playground"
CONTENT_POLICY = "default-src 'self'; style-src 'self'; script-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Launch:
    """A model that is launched when the server starts."""

    spec: LaunchSpec
    uid: str


@dataclass(slots=True)
class Services:
    """What handlers need; on `app.state.services` while the application runs."""

    settings: Settings
    models: Models
    metrics: Metrics
    registry: Registry


def create_app(
    settings: Settings,
    make_loader: "Callable[[Settings, Metrics], Loader] | None" = None,
    launches: tuple[Launch, ...] = (),
) -> FastAPI:
    """A server. `make_loader` says how models are loaded: by default with our engine.

    Raises:
        RequestError: the key file or the registry is not as it should be.
    """
    keys = Keys(parse_keys(list(settings.keys), "the API keys"), settings.key_file)
    registry, metrics = load_registry(settings), Metrics()
    loader = (make_loader or engine_loader)(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models = Models(loader, settings.limits, settings.memory_budget)
        app.state.services = Services(settings, models, metrics, registry)
        for launch in launches:
            models.launch(launch.spec, launch.uid)
        yield
        await models.close()

    app = FastAPI(title="foredraft", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    for kind in (ApiError, ForedraftError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(Guard, keys=keys, limits=settings.limits, hosts=settings.allowed_hosts)
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    _generation_routes(app)
    _model_routes(app)
    _operating_routes(app)
    if settings.playground:
        _playground_routes(app)
    return app


def engine_loader(settings: Settings, metrics: Metrics) -> Loader:
    """Models in this process, on foredraft's engine."""
    from foredraft.server.backend import EngineModel
    from foredraft.server.launching import footprint, load

    def load_model(spec: LaunchSpec, uid: str, loop: asyncio.AbstractEventLoop, room: int | None) -> EngineModel:
        return EngineModel(load(spec, room), settings.limits, metrics.of(uid), loop)

    return Loader(footprint, load_model)


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


# --- routes ---------------------------------------------------------------------------------------------------------


def _generation_routes(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", tags=["generate"], summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        here = services(request)
        uid, model = here.models.ready(body.model)
        request.state.facts["model"] = uid
        return await chat(body, request, uid, model, here.settings.limits)

    @app.post("/v1/completions", tags=["generate"], summary="Go on from a prompt")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        here = services(request)
        uid, model = here.models.ready(body.model)
        request.state.facts["model"] = uid
        return await complete(body, request, uid, model, here.settings.limits)

    @app.post("/tokenize", tags=["tokens"], summary="Token ids of a text or a chat")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        uid, model = services(request).models.ready(body.model)
        if body.messages is not None:
            check_template(uid, model)
        messages = [message.for_template() for message in body.messages or ()]
        ids = await asyncio.to_thread(model.encode, messages if body.prompt is None else body.prompt)
        texts = {"token_strs": [model.token(token)[0] for token in ids]} if body.return_token_strs else {}
        return {"count": len(ids), "max_model_len": model.info.max_model_len, "tokens": ids, **texts}

    @app.post("/detokenize", tags=["tokens"], summary="The text of token ids")
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        _, model = services(request).models.ready(body.model)
        return {"prompt": model.decode(body.tokens)}


def _model_routes(app: FastAPI) -> None:
    @app.get("/v1/models", tags=["models"], summary="All models and their states")
    async def list_models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [entry.describe() for entry in services(request).models.list()]}

    @app.get("/v1/models/{uid}", tags=["models"], summary="One model")
    async def get_model(uid: str, request: Request) -> dict[str, Any]:
        return services(request).models.entry(uid).describe()

    @app.post("/v1/models", tags=["models"], summary="Launch a model", status_code=202)
    async def launch(body: LaunchRequest, request: Request, response: Response) -> dict[str, Any]:
        require_admin(request.state.key)
        here = services(request)
        entry = here.models.launch(from_launch(body, here.registry), body.uid)
        if body.wait:
            await here.models.launched(entry)
            response.status_code = 200
        return entry.describe()

    @app.delete("/v1/models/{uid}", tags=["models"], summary="Let a model finish, and free it")
    async def delete(uid: str, request: Request) -> dict[str, Any]:
        require_admin(request.state.key)
        await services(request).models.delete(uid)
        return {"id": uid, "object": "model", "deleted": True}

    @app.post("/experimental/speculative_llms", tags=["models"], summary="Launch as Xinference's client does")
    async def launch_speculative(body: SpeculativeLaunchRequest, request: Request) -> dict[str, str]:
        require_admin(request.state.key)
        here = services(request)
        entry = here.models.launch(from_speculative_launch(body, here.registry), body.model_uid)
        await here.models.launched(entry)
        return {"model_uid": entry.uid}

    @app.get("/v1/model_registrations/{model_type}", tags=["models"], summary="The registry: what names there are")
    async def registrations(model_type: str, request: Request) -> list[dict[str, Any]]:
        if model_type != "LLM":
            raise ApiError(400, f"model_type={model_type[:100]!r} is not served here; ask for LLM", "model_type")
        return services(request).registry.describe()

    @app.get("/v1/cluster/auth", include_in_schema=False)
    async def cluster_auth() -> dict[str, bool]:
        """Xinference's client asks whether to send its key."""
        return {"auth": True}


def _operating_routes(app: FastAPI) -> None:
    @app.get("/health", tags=["operating"], summary="The process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": VERSION}

    @app.get("/ready", tags=["operating"], summary="Every launched model is ready", responses={503: {}})
    async def ready(request: Request) -> Response:
        models = services(request).models
        states = {entry.uid: entry.state for entry in models.list()}
        return JSONResponse({"ready": models.all_ready, "models": states}, 200 if models.all_ready else 503)

    @app.get("/metrics", tags=["operating"], summary="Prometheus metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        body, kind = services(request).metrics.render()
        return Response(body, headers={"Content-Type": kind})


def _playground_routes(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PLAYGROUND / "index.html", headers={"Content-Security-Policy": CONTENT_POLICY})

    app.mount("/playground", StaticFiles(directory=PLAYGROUND), name="playground")


# --- errors ---------------------------------------------------------------------------------------------------------


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    answer = as_api_error(error)
    return JSONResponse(answer.body(), answer.status, answer.headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    answer = invalid_body(error.errors(), request.headers.get("content-type", ""))
    return JSONResponse(answer.body(), answer.status)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405) and request.scope.get("route") is None:
        known = "GET /openapi.json lists what there is"
        message = f"there is no {request.method} {request.url.path[:100]} here; {known}"
    answer = ApiError(error.status_code, message)
    return JSONResponse(answer.body(), answer.status, error.headers)
