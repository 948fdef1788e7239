"""The OpenAPI 3.1 document, generated from the structs that decode and encode, plus the limits of this server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from router import answers, schemas
from router.chat.messages import FunctionSpec
from router.sampling import Limits

_REF = "#/components/schemas/{name}"
_STRUCTS = (
    schemas.CompletionBody,
    schemas.ChatBody,
    schemas.TokenizeBody,
    schemas.DetokenizeBody,
    FunctionSpec,
    answers.Completion,
    answers.CompletionChunk,
    answers.ChatCompletion,
    answers.ChatChunk,
    answers.ModelList,
    answers.ModelCard,
    answers.Health,
    answers.Readiness,
    answers.Tokens,
    answers.Detokenized,
    answers.ErrorBody,
)
_ERRORS = {
    400: "The request can't be served as written.",
    401: "No API key, or one that is not valid here.",
    404: "The model is not served here.",
    405: "The method is not served here; see Allow.",
    408: "The body stopped coming.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests; come back after Retry-After seconds.",
    500: "An error of the server.",
    503: "No capacity now; come back after Retry-After seconds.",
    504: "The request was not finished within its deadline.",
}
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 503)
_GENERATION_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)

Json = dict[str, Any]


def document(limits: Limits, model_names: Sequence[str]) -> Json:
    """The document as a JSON-serialisable tree."""
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
    _narrow(components, limits, model_names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": "1",
            "description": "OpenAI-compatible serving of DeepSeek V3.2 and its family.",
        },
        "paths": _paths(model_names),
        "components": {"schemas": components},
    }


def _paths(model_names: Sequence[str]) -> Json:
    model_parameter = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": list(model_names)},
    }
    return {
        "/v1/completions": {
            "post": _operation(
                "completions",
                "Complete prompts.",
                body=schemas.CompletionBody,
                answer=answers.Completion,
                errors=_GENERATION_ERRORS,
                event=answers.CompletionChunk,
            )
        },
        "/v1/chat/completions": {
            "post": _operation(
                "chatCompletions",
                "Answer a conversation.",
                body=schemas.ChatBody,
                answer=answers.ChatCompletion,
                errors=_GENERATION_ERRORS,
                event=answers.ChatChunk,
            )
        },
        "/v1/models": {"get": _operation("listModels", "Served names.", answer=answers.ModelList, errors=(401,))},
        "/v1/models/{model}": {
            "get": _operation("getModel", "One served name.", answer=answers.ModelCard, errors=(401, 404))
            | {"parameters": [model_parameter]}
        },
        "/tokenize": {
            "post": _operation(
                "tokenize",
                "Token ids of a text.",
                body=schemas.TokenizeBody,
                answer=answers.Tokens,
                errors=_BODY_ERRORS,
            )
        },
        "/detokenize": {
            "post": _operation(
                "detokenize",
                "Text of token ids.",
                body=schemas.DetokenizeBody,
                answer=answers.Detokenized,
                errors=_BODY_ERRORS,
            )
        },
        "/health": {"get": _operation("health", "Whether the process is alive.", answer=answers.Health)},
        "/ready": {
            "get": _operation(
                "ready", "Whether requests have workers to run on.", answer=answers.Readiness, also=(503,)
            )
        },
        "/metrics": {"get": _text_operation("metrics", "Metrics in the Prometheus text format.", "text/plain")},
        "/openapi.json": {"get": _text_operation("openapi", "This document.", "application/json")},
    }


def _operation(
    name: str,
    summary: str,
    *,
    answer: type,
    body: type | None = None,
    errors: Sequence[int] = (),
    also: Sequence[int] = (),
    event: type | None = None,
) -> Json:
    """`also`: further statuses that carry the answer; `event`: what a stream carries instead, if there is one."""
    content: Json = {"application/json": {"schema": _ref(answer)}}
    responses: Json = {str(status): {"description": summary, "content": content} for status in also}
    if event is not None:
        content = content | {"text/event-stream": {"schema": _event_schema(event)}}
    responses["200"] = {"description": summary, "content": content}
    for status in (*errors, 405):
        responses[str(status)] = _error(status)
    operation: Json = {"operationId": name, "summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return operation


def _text_operation(name: str, summary: str, media_type: str) -> Json:
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    content = {media_type: {"schema": schema}}
    responses = {"200": {"description": summary, "content": content}, "405": _error(405)}
    return {"operationId": name, "summary": summary, "responses": responses}


def _error(status: int) -> Json:
    content = {"application/json": {"schema": _ref(answers.ErrorBody)}}
    return {"description": _ERRORS[status], "content": content}


def _event_schema(event: type) -> Json:
    chunk = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(event), _ref(answers.ErrorBody)]},
    }
    data = {"anyOf": [chunk, {"const": "[DONE]"}], "description": "A JSON object; [DONE] in the last event."}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _ref(struct: type) -> Json:
    return {"$ref": _REF.format(name=struct.__name__)}


def _narrow(components: Json, limits: Limits, model_names: Sequence[str]) -> None:
    """Put what only this server knows into the generated schemas."""
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": limits.max_model_len - 1}
    completion = components["CompletionBody"]["properties"]
    text = {"type": "string", "minLength": 1}
    completion["prompt"] = {
        "anyOf": [
            text,
            tokens,
            {"type": "array", "items": text, "minItems": 1, "maxItems": limits.max_sequences},
            {"type": "array", "items": tokens, "minItems": 1, "maxItems": limits.max_sequences},
        ]
    }
    _variant(completion["logprobs"], "integer")["maximum"] = limits.max_logprobs
    chat = components["ChatBody"]["properties"]
    _variant(chat["top_logprobs"], "integer")["maximum"] = limits.max_logprobs
    components["DetokenizeBody"]["properties"]["tokens"] = {"type": "array", "items": token}
    for properties in (completion, chat):
        properties["model"] = {"type": "string", "enum": list(model_names)}
        _variant(properties["n"], "integer")["maximum"] = limits.max_n
        _variant(properties["stop_token_ids"], "array")["items"] = token
    for name in ("TokenizeBody", "DetokenizeBody"):
        components[name]["properties"]["model"] = {"enum": [*model_names, None]}


def _variant(schema: Json, kind: str) -> Json:
    """The alternative of a nullable schema that is of this type."""
    found: Json = next(option for option in schema["anyOf"] if option.get("type") == kind)
    return found
