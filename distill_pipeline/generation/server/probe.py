"""Asked before the first prompt: is there a server, does it take the key, has it the model? Each no has its own error."""

import json
import os
from typing import Any

from distill_pipeline.errors import ConfigError, DistillError, GenerationError, MissingExtraError, ModelNotFoundError
from distill_pipeline.generation.server.replies import brief, error_text

NAMED_MODELS = 10


def http_client(what: str = "engine openai") -> Any:
    """The module of the HTTP client, which ``what`` needs. Raises MissingExtraError."""
    try:
        import httpx2
    except ImportError as err:
        raise MissingExtraError.of(what, "httpx2", "server") from err
    return httpx2


def key_of(whose: str, api_key_env: str | None) -> str | None:
    """The key that the environment holds. Raises ConfigError where the variable that should is not set."""
    if api_key_env is None:
        return None
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"{whose}: the environment variable {api_key_env}, which server.api_key_env names, is not set. Set it to the key."
        )
    return key


async def probe(client: Any, url: str, *, name: str, model: str, api_key_env: str | None) -> None:
    """Ask ``GET url/models``.

    Raises:
        GenerationError: nobody answers there, or the server fails.
        ConfigError: the key is refused, or the address is no OpenAI-compatible server's.
        ModelNotFoundError: the server does not have the model.
    """
    try:
        response = await client.get(f"{url}/models")
    except http_client().HTTPError as err:
        raise unreachable(name, url, ": ".join(part for part in (type(err).__name__, str(err)) if part)) from err
    if response.status_code != 200:
        raise refusal(name, url, response.status_code, brief(error_text(response.content)), model, api_key_env)
    try:
        models = [str(entry["id"]) for entry in json.loads(response.content)["data"]]
    except (ValueError, KeyError, TypeError) as err:
        raise _wrong_url(name, url, f"{url}/models is no list of models") from err
    if model not in models:
        raise no_such_model(name, url, model, models)


def refusal(name: str, url: str, status: int, said: str, model: str, api_key_env: str | None) -> DistillError:
    """The error of a status that no request of this run gets past."""
    if status in {401, 403}:
        what = "Set server.api_key_env to the name of the variable that holds a key."
        if api_key_env is not None:
            what = f"Put a valid key into {api_key_env}."
        whose = "asks for a key" if api_key_env is None else f"refuses the key in {api_key_env}"
        return ConfigError(f"teacher {name}: the server at {url} {whose} ({status}: {said}). {what}")
    if status == 404 and "model" in said.lower():
        return _model_missing(name, url, model, f" (404: {said})")
    if status == 402 or status == 429:
        return GenerationError(
            f"teacher {name}: the account at {url} has no money left ({status}: {said}). Everything answered is stored: pay, "
            "and run again."
        )
    if status >= 500:
        return GenerationError(f"teacher {name}: the server at {url} fails ({status}: {said}). Mend it, and run again.")
    return _wrong_url(name, url, f"it answers {status}: {said}")


def unreachable(name: str, url: str, why: str) -> GenerationError:
    """The error of an address where nobody answers."""
    return GenerationError(f"teacher {name}: no server answers at {url} ({why}). Start it, or mend server.base_url.")


def no_such_model(name: str, url: str, model: str, models: list[str]) -> ModelNotFoundError:
    """The error of a server with other models."""
    named = ", ".join(models[:NAMED_MODELS]) or "none"
    more = f" and {len(models) - NAMED_MODELS} more" if len(models) > NAMED_MODELS else ""
    return _model_missing(name, url, model, f"; it has: {named}{more}")


def _model_missing(name: str, url: str, model: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"teacher {name}: the server at {url} does not have the model {model}{why}. Set teachers.{name}.model to a name that "
        "GET /models gives there, or load the model into the server."
    )


def _wrong_url(name: str, url: str, why: str) -> ConfigError:
    return ConfigError(
        f"teacher {name}: {url} is no OpenAI-compatible server: {why}. server.base_url must end where "
        "/chat/completions begins, usually /v1."
    )
