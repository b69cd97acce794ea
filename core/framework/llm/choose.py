"""Which provider serves a model, by the model's name. The providers' own packages are imported on first use."""

from __future__ import annotations

import os

from framework._secrets import register_url
from framework.errors import SurefootError
from framework.llm.provider import LLMProvider

_OPENAI = ("gpt-", "chatgpt-", "o1", "o3", "o4", "codex-")
_OPENAI_URL = "https://api.openai.com"
_KEY_VARIABLES = {
    "mistral": "MISTRAL_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "groq": "GROQ_API_KEY",
    "cohere": "COHERE_API_KEY",
    "together_ai": "TOGETHERAI_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "xai": "XAI_API_KEY",
}


class UnknownModel(SurefootError, LookupError):
    """No installed provider serves a model of this name."""


def provider_for(
    model: str,
    *,
    api_key: str | None = None,
    base_url: str | None = None,
    timeout_seconds: float = 60.0,
) -> LLMProvider:
    """A provider for ``model``: ``claude…`` or ``anthropic/…`` by Anthropic's client; ``gpt-…``, ``o1…`` and the like
    or ``openai/…`` by OpenAI's; the rest by LiteLLM when it is installed.

    With a ``base_url`` every name but ``anthropic/…`` goes to OpenAI's client, ``claude…`` too: most servers speak its
    protocol. Without one, the clients read OPENAI_BASE_URL and ANTHROPIC_BASE_URL themselves. ``mock`` gives the model
    that needs nothing.
    Raises ValueError when the key is missing, ImportError when the client is not installed (both say how to go on),
    and UnknownModel.
    """
    register_url(base_url)
    family, name = _family(model, base_url)
    if family == "mock":
        from framework.llm.mock import MockLLM  # noqa: PLC0415 - only the one that is used

        return MockLLM()
    if family == "anthropic":
        from framework.llm.anthropic import AnthropicProvider  # noqa: PLC0415 - only the one that is used

        return AnthropicProvider(api_key, name, base_url=base_url, timeout_seconds=timeout_seconds)
    if family == "openai":
        from framework.llm.openai import OpenAIProvider  # noqa: PLC0415 - only the one that is used

        return OpenAIProvider(name, api_key=api_key, base_url=base_url, timeout_seconds=timeout_seconds)
    from framework.llm.litellm import LiteLLMProvider, is_installed  # noqa: PLC0415 - only the one that is used

    if not is_installed():
        raise UnknownModel(
            f"No provider is known for the model {model!r}. Models named claude… and gpt-… are served by the extras "
            '`pip install "surefoot[anthropic]"` and `pip install "surefoot[openai]"`; any model behind an '
            "OpenAI-compatible endpoint with a base_url, or as openai/NAME with OPENAI_BASE_URL set; the models of "
            'other vendors with `pip install "surefoot[litellm]"`.'
        )
    return LiteLLMProvider(model, api_key, base_url, timeout=timeout_seconds)


def key_variable(model: str, base_url: str | None = None) -> str | None:
    """The environment variable that holds the key for ``model``; None when none is needed or known."""
    family, _ = _family(model, base_url)
    if family == "anthropic":
        return "ANTHROPIC_API_KEY"
    if family == "openai":
        endpoint = base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
        return "OPENAI_API_KEY" if endpoint.startswith(_OPENAI_URL) else None  # others may need one or not
    return _KEY_VARIABLES.get(model.partition("/")[0]) if family == "other" and "/" in model else None


def missing_key(model: str, base_url: str | None = None) -> str | None:
    """The environment variable that has to be set for ``model`` (behind ``base_url``) and is not."""
    variable = key_variable(model, base_url)
    return variable if variable is not None and not os.environ.get(variable) else None


def _family(model: str, base_url: str | None = None) -> tuple[str, str]:
    """(mock | anthropic | openai | other, the model's name as that provider knows it)."""
    prefix, slash, rest = model.partition("/")
    if slash and prefix in ("anthropic", "openai"):
        return prefix, rest
    if model == "mock":
        return "mock", model
    if base_url is not None:
        return "openai", model
    if model.startswith("claude"):
        return "anthropic", model
    if model.startswith(_OPENAI):
        return "openai", model
    return "other", model
