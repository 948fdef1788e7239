"""The paths of the API and their handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec

from llm_engine.api.errors import RequestError
from router.answers import Detokenized, Health, ModelCard, ModelList, Readiness, Tokens
from router.chat_completions import chat_completions
from router.completions import completions, encode_text
from router.dashboard import PATHS as dashboard_paths
from router.dashboard import dashboard
from router.edge import Edge
from router.exchange import Exchange
from router.failures import MethodNotAllowed, NotFound
from router.generation import encode_json
from router.openapi import document
from router.requests import decode_body
from router.schemas import DetokenizeBody, TokenizeBody
from router.tenants import is_loopback

Handler = Callable[[Edge, Exchange], Awaitable[None]]

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MODELS = "/v1/models"

_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


@dataclass(frozen=True, slots=True)
class Route:
    """A handler under a path template. `generates`: counts against the bound on open requests and the tenant's."""

    template: str
    handler: Handler
    generates: bool = False
    needs_key: bool = False  # where tenants have keys; what generates always does


async def list_models(edge: Edge, exchange: Exchange) -> None:
    """Every served name."""
    names = edge.dispatcher.model_names
    exchange.respond(200, encode_json(ModelList(data=[_card(edge, name) for name in names])))


async def get_model(edge: Edge, exchange: Exchange) -> None:
    """One served name."""
    name = exchange.path.removeprefix(f"{MODELS}/")
    edge.check_model(name)
    exchange.respond(200, encode_json(_card(edge, name)))


async def health(edge: Edge, exchange: Exchange) -> None:
    """The event loop answers."""
    exchange.respond(200, encode_json(Health()))


async def ready(edge: Edge, exchange: Exchange) -> None:
    """200 if requests have workers to run on, else 503. Addresses and requests are for clients of this host only."""
    is_ready = edge.dispatcher.ready()
    client = exchange.client()
    is_local = client is not None and is_loopback(client[0])
    report = Readiness(ready=is_ready, detail=dict(edge.dispatcher.status()) if is_local else {})
    exchange.respond(200 if is_ready else 503, encode_json(report))


async def metrics(edge: Edge, exchange: Exchange) -> None:
    """Prometheus exposition."""
    exchange.respond(200, edge.metrics.render(), METRICS_TYPE)


async def openapi(edge: Edge, exchange: Exchange) -> None:
    """This API, with the limits of this server."""
    exchange.respond(200, encode_json(document(edge.limits, edge.dispatcher.model_names)))


async def tokenize(edge: Edge, exchange: Exchange) -> None:
    """Token ids of a text, as /v1/completions would see it."""
    body = decode_body(_tokenize_decoder, await exchange.json_body(edge.config.max_body_bytes))
    if body.model is not None:
        edge.check_model(body.model)
    ids = await encode_text(edge, body.prompt, add_bos=body.add_special_tokens)
    answer = Tokens(tokens=ids, count=len(ids), max_model_len=edge.dispatcher.max_model_len)
    exchange.respond(200, encode_json(answer))


async def detokenize(edge: Edge, exchange: Exchange) -> None:
    """Text of token ids, special tokens included."""
    body = decode_body(_detokenize_decoder, await exchange.json_body(edge.config.max_body_bytes))
    if body.model is not None:
        edge.check_model(body.model)
    if body.tokens and max(body.tokens) >= edge.tokenizer.vocab_size:
        raise RequestError(f"token ids are integers from 0 to {edge.tokenizer.vocab_size - 1}", param="tokens")
    exchange.respond(200, encode_json(Detokenized(prompt=edge.tokenizer.decode(body.tokens))))


_ROUTES: Mapping[str, Mapping[str, Route]] = {
    "/v1/completions": {"POST": Route("/v1/completions", completions, generates=True)},
    "/v1/chat/completions": {"POST": Route("/v1/chat/completions", chat_completions, generates=True)},
    MODELS: {"GET": Route(MODELS, list_models, needs_key=True)},
    "/health": {"GET": Route("/health", health)},
    "/ready": {"GET": Route("/ready", ready)},
    "/metrics": {"GET": Route("/metrics", metrics)},
    "/openapi.json": {"GET": Route("/openapi.json", openapi)},
    "/tokenize": {"POST": Route("/tokenize", tokenize, needs_key=True)},
    **{path: {"GET": Route(path, dashboard)} for path in dashboard_paths},
    "/detokenize": {"POST": Route("/detokenize", detokenize, needs_key=True)},
}
_MODEL_ROUTES = {"GET": Route(f"{MODELS}/{{model}}", get_model, needs_key=True)}


def find_route(method: str, path: str) -> Route:
    """Raises NotFound or MethodNotAllowed."""
    methods = _ROUTES.get(path)
    if methods is None:
        if not path.startswith(f"{MODELS}/"):
            raise NotFound(f"there is no {path}; /openapi.json lists what there is")
        methods = _MODEL_ROUTES
    route = methods.get(method)
    if route is None:
        allow = ", ".join(methods)
        raise MethodNotAllowed(f"{path} takes {allow}", allow=allow)
    return route


def _card(edge: Edge, name: str) -> ModelCard:
    return ModelCard(id=name, created=edge.started, max_model_len=edge.dispatcher.max_model_len)
