"""The gateway: the only way from the network to the SuperLink.

Flower's SuperLink serves three interfaces on one port. SuperNode authentication guards one of them,
Fleet. The other two answer every caller that reaches the port: Control starts runs and registers nodes,
and Runtime hands tasks to workers. So the SuperLink listens on loopback only, and this gateway passes on
the calls that a SuperNode needs, and no others.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["FLEET", "build_gateway", "serve_gateway"]

# The calls of an authenticated SuperNode. Only the administrator registers and unregisters nodes.
FLEET = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
# Those of them that can be repeated. A SuperLink on a busy disk answers 500, "database is locked", and a
# SuperNode ends on a 500 from any call; on 503 it tries again.
REPEATABLE = (
    "send-node-heartbeat",
    "pull-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
)
# Arrays travel in chunks of 5 MB, an app's bundle in one piece of at most 10 MiB.
MOST_BYTES = 32 * 2**20
UPSTREAM_SECONDS = 60.0
# Headers of a connection and not of the message (RFC 9110, 7.6.1), and headers that each end sets
# itself.
HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}


def build_gateway(superlink: str, ca: Path) -> Starlette:
    """Return the gateway as an ASGI app.

    Parameters
    ----------
    superlink : str
        HOST:PORT of the SuperLink.
    ca : Path
        Certificate of the authority that signed the SuperLink's certificate.
    """

    @asynccontextmanager
    async def connected(app: Starlette) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=str(ca))
        async with httpx.AsyncClient(
            base_url=f"https://{superlink}",
            verify=context,
            timeout=UPSTREAM_SECONDS,
            trust_env=False,
        ) as client:
            app.state.superlink = client
            yield

    async def forward(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return PlainTextResponse("content-length is missing", 411)
        if int(length) > MOST_BYTES:
            return PlainTextResponse(f"more than {MOST_BYTES} bytes", 413)
        client: httpx.AsyncClient = request.app.state.superlink
        passed = client.build_request(
            "POST",
            request.scope["path"],
            content=request.stream(),
            headers=[(k, v) for k, v in request.headers.items() if k not in HOP],
        )
        try:
            reply = await client.send(passed, stream=True)
        except httpx.TransportError:
            # SuperNodes try again on this answer, for example while a SuperLink restarts.
            return PlainTextResponse("the SuperLink does not answer", 502)
        status = reply.status_code
        if status == 500 and request.scope["path"].rpartition("/")[2] in REPEATABLE:
            status = 503
        return StreamingResponse(
            reply.aiter_raw(),
            status,
            {k: v for k, v in reply.headers.items() if k not in HOP},
            background=BackgroundTask(reply.aclose),
        )

    routes = [Route(f"/v1/fleet/{name}", forward, methods=["POST"]) for name in FLEET]
    return Starlette(routes=routes, lifespan=connected)


def serve_gateway(
    superlink: str, ca: Path, certificate: Path, key: Path, host: str, port: int
) -> None:
    """Serve the gateway over TLS until the process is told to stop."""
    uvicorn.run(
        build_gateway(superlink, ca),
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
