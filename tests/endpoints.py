"""A local HTTP server that stands for an OpenAI-compatible endpoint, and what may go wrong with one."""

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """What the server sends: HTTP by default, or whatever `act` does with the connection."""

    text: str = "ready"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    act: Callable[[BaseHTTPRequestHandler], None] | None = None
    finish_reason: str = "stop"


Model = Callable[[dict[str, Any]], Said | str]


class Server(ThreadingHTTPServer):
    """An endpoint whose replies are a function of the request's body; it counts requests and answers by body."""

    daemon_threads = True

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.lock = threading.Lock()

    @property
    def spec(self) -> str:
        return f"fake@http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = json.dumps(body, sort_keys=True)
        with self.server.lock:
            self.server.asked[name] += 1
        said = self.server.model(body)
        said = Said(said) if isinstance(said, str) else said
        if said.act:
            said.act(self)
            return
        content = said.body
        if content is None:
            usage = {
                "prompt_tokens": sum(len(message["content"].split()) for message in body["messages"]),
                "completion_tokens": len(said.text.split()),
            }
            if said.status == 200:
                with self.server.lock:
                    self.server.answered[name] += 1
                    self.server.prompt_tokens += usage["prompt_tokens"]
                    self.server.completion_tokens += usage["completion_tokens"]
            choice = {"message": {"role": "assistant", "content": said.text}, "finish_reason": said.finish_reason}
            content = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(said.status)
        for header, value in {"Content-Type": "application/json", **said.headers}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(model: Model) -> Iterator[Server]:
    with Server(model) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Naps(list[float]):
    """Waits that are noted instead of waited."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Breaks off in the middle of a reply."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
