"""Checks of an SGLang that has just started: is it ready, does it serve our model, does it see images."""

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from ghostvis_cli import demo
from ghostvis_cli.errors import EngineError
from ghostvis_cli.sglang.runtime import architectures

POLL_S = 0.3
ANSWER_S = 120.0  # for the first image on a slow machine
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class About:
    """What the server reports about itself."""

    model: str
    context_tokens: int | None


class Probe:
    """A client of one server on this machine. `admin_key` is for the management routes, where they need one."""

    def __init__(self, url: str, key: str | None = None, admin_key: str | None = None) -> None:
        self._admin_key = admin_key or key
        # A certificate would be for the name that clients use; this is our own child, on loopback.
        self._client = httpx2.AsyncClient(
            base_url=url, headers=_bearer(key), trust_env=False, verify=False, timeout=ANSWER_S
        )

    async def until_ready(self, *, answers: bool = True) -> None:
        """Wait without a limit: the caller has one, and watches the process. `answers` False: a rank above 0."""
        path = "/ready" if answers else "/health"
        while True:
            status = await self._status(path)
            if status == 200:
                return
            if status == 404:  # before 0.5.23
                path = "/health"
            await asyncio.sleep(POLL_S)

    async def about(self, config: Mapping[str, Any]) -> About:
        """EngineError unless it serves the model of `config` and, for a vision model, counts an image's tokens."""
        said = await self._get("/model_info", "/get_model_info")
        wanted, served = architectures(config), said.get("architectures")
        if served is not None and served != wanted:
            raise EngineError(f"SGLang serves {served}, not {wanted}", hint="ghostvis doctor")
        (card, *_) = (await self._get("/v1/models"))["data"]
        about = About(card["id"], card.get("max_model_len"))
        counted = await self._image_tokens(about.model) if "vision_config" in config else None
        if counted == 0:
            raise EngineError(
                "SGLang does not see images: the ghostvis plug-in or the chat template is not in use",
                hint="ghostvis doctor",
            )
        return about

    async def freeze(self) -> None:
        """Exclude what its processes have imported from garbage collection (`plugin/garbage.py`)."""
        await self._client.post("/freeze_gc", headers=_bearer(self._admin_key))

    async def until_idle(self) -> None:
        """Wait until nothing runs or waits, twice in a row: a request may be between two processes."""
        quiet = 0
        while quiet < 2:
            loads = (await self._get("/v1/loads"))["loads"]
            under_way = sum(each["num_running_reqs"] + each["num_waiting_reqs"] for each in loads)
            quiet = 0 if under_way else quiet + 1
            await asyncio.sleep(POLL_S)

    async def abort_all(self) -> None:
        """Cut every request short: finish reason abort."""
        body = {"rid": "", "abort_all": True}
        await self._client.post("/abort_request", json=body, headers=_bearer(self._admin_key), timeout=5.0)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _status(self, path: str) -> int:
        try:
            return (await self._client.get(path)).status_code
        except httpx2.HTTPError:
            return 0

    async def _get(self, *paths: str) -> dict[str, Any]:
        """The JSON of the first path that exists."""
        for path in paths:
            response = await self._client.get(path)
            if response.status_code == 200:
                return dict(response.json())
        raise EngineError(f"SGLang answers {paths[0]} with {response.status_code}", hint="ghostvis doctor")

    async def _image_tokens(self, model: str) -> int:
        """Positions that an image took: from the usage, or before 0.5.23 from the prompt's length."""
        image = base64.b64encode(demo.EXAMPLES[0].read_bytes()).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        usage = await self._usage(model, [part])
        details = usage.get("prompt_tokens_details") or {}
        if details.get("image_tokens") is not None:
            return int(details["image_tokens"])
        return int(usage["prompt_tokens"] - (await self._usage(model, []))["prompt_tokens"])

    async def _usage(self, model: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        content = [*parts, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise EngineError(
                f"SGLang refuses an image with {response.status_code}: {_message(response)}",
                hint="ghostvis doctor",
            )
        return dict(response.json()["usage"])


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _message(response: httpx2.Response) -> str:
    try:
        said = json.loads(response.text)
        return str(said.get("message") or said["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:300]
