"""Runs in vLLM's process, in vLLM's environment: no request is answered without the key. The standard library alone.

vLLM 0.32 asks for its key on paths that begin with /v1; /invocations and others answer without one.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health", "/ping")
"""Whether the server lives may be asked by anyone."""
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware: 401 without `Authorization: Bearer` and the key of VLLM_API_KEY."""

    def __init__(self, app: App) -> None:
        self._app, self._wanted = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer, or hand on. What a browser asks before its request (OPTIONS) has no key, and runs no model."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_open = scope["type"] == "lifespan" or scope.get("path") in OPEN or scope.get("method") == "OPTIONS"
        if is_open or hmac.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
