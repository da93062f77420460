"""The gateway passes on the calls that SuperNodes need, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from layerfed.deploy import gateway
from layerfed.deploy.federation import Federation
from layerfed.deploy.gateway import FLEET, build_gateway

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def app(tmp_path: Path) -> Starlette:
    federation = Federation(tmp_path)
    federation.create_certificates([], days=1)
    return build_gateway("superlink:8000", federation.ca)


def ask(app: Starlette, upstream: Handler, request: httpx.Request) -> httpx.Response:
    """Send a request through the gateway to a fake SuperLink."""

    async def asked() -> httpx.Response:
        async def answer(passed: httpx.Request) -> httpx.Response:
            await passed.aread()
            made = upstream(passed)

            async def body() -> AsyncIterator[bytes]:
                yield made.content

            return httpx.Response(made.status_code, headers=made.headers, content=body())

        app.state.superlink = httpx.AsyncClient(
            base_url="https://superlink:8000", transport=httpx.MockTransport(answer)
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="https://gateway") as client:
            return await client.send(request)

    return asyncio.run(asked())


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"{request.url} reached the SuperLink")


def post(path: str, body: bytes = b"x") -> httpx.Request:
    return httpx.Request("POST", f"https://gateway{path}", content=body)


def test_a_supernodes_message_passes_unchanged(app: Starlette) -> None:
    seen: list[httpx.Request] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(401, content=b"reply", headers={"x-flower": "yes"})

    request = post("/v1/fleet/pull-messages", b"question")
    request.headers["flwr-signature"] = "signed"
    reply = ask(app, upstream, request)
    assert (reply.status_code, reply.content, reply.headers["x-flower"]) == (401, b"reply", "yes")
    (passed,) = seen
    assert passed.url == "https://superlink:8000/v1/fleet/pull-messages"
    assert (passed.content, passed.headers["flwr-signature"]) == (b"question", "signed")


@pytest.mark.parametrize("name", FLEET)
def test_each_call_of_a_supernode_is_let_through(name: str, app: Starlette) -> None:
    reply = ask(app, lambda request: httpx.Response(200), post(f"/v1/fleet/{name}"))
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "//v1/fleet/pull-messages",
    ],
)
def test_everything_else_is_not_there(path: str, app: Starlette) -> None:
    assert ask(app, never, post(path)).status_code == 404


def test_only_posts_pass(app: Starlette) -> None:
    request = httpx.Request("GET", "https://gateway/v1/fleet/pull-messages")
    assert ask(app, never, request).status_code == 405


def test_what_is_too_large_is_refused(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MOST_BYTES", 10)
    assert ask(app, never, post("/v1/fleet/push-object", b"x" * 11)).status_code == 413
    unsized = post("/v1/fleet/push-object")
    del unsized.headers["content-length"]
    assert ask(app, never, unsized).status_code == 411


@pytest.mark.parametrize("name", FLEET)
def test_a_superlink_that_stumbles_is_asked_again_where_that_does_no_harm(
    name: str, app: Starlette
) -> None:
    """SuperNodes end on 500 and try again on 503; a push or confirmation is not sent twice."""

    def stumbles(request: httpx.Request) -> httpx.Response:
        return httpx.Response(500, content=b"database is locked")

    reply = ask(app, stumbles, post(f"/v1/fleet/{name}"))
    once = {"activate-node", "deactivate-node", "push-messages", "confirm-message-received"}
    assert reply.status_code == (500 if name in once else 503)
    assert reply.content == b"database is locked"


def test_a_superlink_that_is_down_is_a_reason_to_try_again(app: Starlette) -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert ask(app, down, post("/v1/fleet/pull-messages")).status_code == 502
