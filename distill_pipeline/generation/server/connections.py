"""Connections to servers, in small pools.

With every request a pool of httpx2 looks at each of its idle connections (2.16), which costs more than the request itself where
they are many. So there are many pools of a few connections, and the first with room is taken.
"""

from typing import Any

POOL_CONNECTIONS = 8


class Connections:
    """HTTP clients that share their settings; as many as requests in flight need."""

    def __init__(self, http: Any, *, key: str | None, connect_seconds: float, deadline: float) -> None:
        """
        Args:
            http: the module of the client.
            key: sent with each request; None sends none.
            deadline: seconds a request may take without a byte.
        """
        self._http = http
        self._headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        self._timeout = http.Timeout(deadline, connect=connect_seconds, pool=None)
        self._certificates = http.create_ssl_context()
        self._clients: list[Any] = []
        self._in_flight: list[int] = []

    async def get(self, url: str) -> Any:
        """The response to a GET."""
        return await self._request("GET", url, None)

    async def post(self, url: str, body: bytes) -> Any:
        """The response to a POST of JSON."""
        return await self._request("POST", url, body)

    async def _request(self, method: str, url: str, body: bytes | None) -> Any:
        number = next((i for i, busy in enumerate(self._in_flight) if busy < POOL_CONNECTIONS), len(self._clients))
        if number == len(self._clients):
            limits = self._http.Limits(max_connections=None, max_keepalive_connections=None)
            self._clients.append(
                self._http.AsyncClient(
                    headers=self._headers, limits=limits, timeout=self._timeout, verify=self._certificates
                )
            )  # fmt: skip
            self._in_flight.append(0)
        self._in_flight[number] += 1
        try:
            return await self._clients[number].request(method, url, content=body)
        finally:
            self._in_flight[number] -= 1

    async def aclose(self) -> None:
        """Close them all."""
        for client in self._clients:
            await client.aclose()
