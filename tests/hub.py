"""A local replacement for the Hugging Face Hub, which stores a repository's files without checks."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The server; ``repositories`` contains the pushed files by name and path. With ``refuse`` it answers 403."""

    def __init__(self, owner: str = "lab", refuse: bool = False) -> None:
        self.owner, self.refuse = owner, refuse
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Return the answer to one request."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or self.owner}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return {"url": f"{self.url}/{name}", "id": name, "name": name}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(name, body)
            return {"commitUrl": f"{self.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True}
        return {}

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.repositories[name][entry["value"]["path"]] = content


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        refused = self.hub.refuse and not self.path.startswith("/api/validate")
        answer = {"error": "You have no right to do this"} if refused else self.hub.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
