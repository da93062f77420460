"""The live pages of runs: a small server on 127.0.0.1 that reads run folders and writes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from layerfed.config import ConfigError
from layerfed.report import page, plain, run_folders, run_view
from layerfed.watch.overview import mark, overview

__all__ = ["build_watch", "changes", "serve_watch"]

HOST = "127.0.0.1"
POLL_SECONDS = 0.5
# A browser notices a dead connection by a missing sign of life.
QUIET_POLLS = 30
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def build_watch(root: Path, token: str) -> Starlette:
    """Return the server of live pages as an ASGI app.

    It answers GET requests whose path begins with the token, for runs at or below `root`. Other users of
    the machine can reach the port, but do not know the token. A page of another site cannot read from it
    either, since answers are for the names of this machine only and allow no other origin.

    Parameters
    ----------
    root : Path
        A run folder, or a folder of run folders.
    token : str
        Secret part of every address.
    """
    root = root.resolve()

    def folder_of(request: Request) -> Path | None:
        """Return the run that a request is about; None for the list of runs."""
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            raise HTTPException(404)
        name = request.path_params.get("name")
        if name is None:
            return root if (root / "summary.json").is_file() else None
        try:
            folder: Path = (root / name).resolve()
        except (OSError, ValueError):
            raise HTTPException(404) from None
        # Links are resolved, so neither `..` nor a link leads out of the root.
        if not folder.is_relative_to(root) or not (folder / "summary.json").is_file():
            raise HTTPException(404)
        return folder

    def view(folder: Path | None) -> dict[str, Any]:
        seen = mark([folder] if folder else run_folders(root))
        live = {"events": f"events?seen={seen}", "source": "data", "list": f"/{token}/"}
        if folder is not None:
            return {**run_view(folder), **live}
        runs = [
            # A name need not be UTF-8, and a page is.
            {**run, "name": raw.decode(errors="replace"), "href": f"run/{quote(raw)}/"}
            for run in overview(root)
            for raw in [os.fsencode(run["name"])]
        ]
        going = sum(run["status"] == "running" for run in runs)
        return {
            "kind": "list",
            "title": root.name or str(root),
            "folder": str(root),
            "sentence": f"{len(runs)} runs, {going} of them not finished.",
            "runs": runs,
            **live,
        }

    async def read(request: Request) -> dict[str, Any]:
        folder = folder_of(request)
        try:
            return await asyncio.to_thread(view, folder)
        except (OSError, ValueError, KeyError) as error:
            raise HTTPException(503, f"{type(error).__name__}: {error}; try again") from None

    async def show(request: Request) -> Response:
        found = await read(request)
        return HTMLResponse(
            await asyncio.to_thread(lambda: page(found, live=True)), headers=HEADERS
        )

    async def data(request: Request) -> Response:
        text = await asyncio.to_thread(json.dumps, plain(await read(request)))
        return Response(text, media_type="application/json", headers=HEADERS)

    async def events(request: Request) -> Response:
        folder = folder_of(request)
        stream = changes(
            lambda: mark([folder] if folder else run_folders(root)),
            request.query_params.get("seen", ""),
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)

    async def refused(request: Request, error: Exception) -> Response:
        found = error if isinstance(error, HTTPException) else HTTPException(500)
        return PlainTextResponse(found.detail, found.status_code, headers=HEADERS)

    routes = []
    for place in ("/{token}/", "/{token}/run/{name:path}/"):
        routes += [
            Route(f"{place}data", data, methods=["GET"]),
            Route(f"{place}events", events, methods=["GET"]),
            Route(place, show, methods=["GET"]),
        ]
    # Longer paths first: a run's name may hold any text, also `data`.
    routes.sort(key=lambda route: "{name" not in route.path)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={HTTPException: refused})


async def changes(
    look: Callable[[], str], seen: str, every: float = POLL_SECONDS
) -> AsyncIterator[str]:
    """Yield a server-sent event for each change, and a comment as a sign of life in between.

    Parameters
    ----------
    look : Callable[[], str]
        Returns the present mark.
    seen : str
        The mark of the page that asks, so that no change between page and question is missed.
    every : float
        Seconds between two looks.
    """
    yield "retry: 2000\n\n"
    quiet = 0
    while True:
        if (now := await asyncio.to_thread(look)) != seen:
            seen, quiet = now, 0
            yield "data: changed\n\n"
        elif (quiet := quiet + 1) % QUIET_POLLS == 0:
            yield ": alive\n\n"
        await asyncio.sleep(every)


def serve_watch(root: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve live pages until the process is told to stop.

    Parameters
    ----------
    root : Path
    port : int
        0 takes a free one.
    say : Callable[[str], None]
        Called with the address, which holds the token.

    Raises
    ------
    ConfigError
        If the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} cannot be used: {error.strerror}; choose another, or 0 for a free one"
            ) from None
        token = secrets.token_urlsafe(24)
        say(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        config = uvicorn.Config(
            build_watch(root, token),
            log_level="warning",
            access_log=False,  # it would hold the token
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])
