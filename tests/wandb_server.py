"""A local server that W&B's real client uses as if it were W&B's. It stores what is sent for runs, and can hang.

It shows what the client sends, not that W&B would accept it.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from wandb_artifacts import ArtifactStore

KEY = "a" * 40
"""A key whose format W&B's client accepts."""

OPERATION = re.compile(r"\b(?:query|mutation)\s+([A-Za-z_]\w*)")


@dataclass
class ServerRun:
    """What the server has received of one run."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    console: list[str] = field(default_factory=list)
    """Lines of console output, without the time at which each was logged."""

    def lines(self) -> list[dict[str, Any]]:
        """Return the history as it was logged, without W&B's own keys."""
        return [{key: value for key, value in line.items() if not key.startswith("_")} for line in self.history]


class WandbServer(ThreadingHTTPServer):
    """Answers POST requests unless ``hanging`` or ``refusing`` names their kind: "graphql" (queries) or "history"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, ServerRun] = {}
        self.projects = ["toolkit"]
        self.views: dict[str, dict[str, Any]] = {}
        """Reports by id."""
        self.sweep = ""
        """Configuration of the last sweep, as YAML."""
        self.agent_commands: list[dict[str, Any]] = []
        """What the next heartbeat of a sweep's agent is answered with."""
        self.hanging: set[str] = set()
        self.refusing: set[str] = set()
        self.asked = 0
        """Questions so far."""
        self.artifacts = ArtifactStore(self.url)
        self.files: dict[str, bytes] = {}
        """Uploaded files that belong to a run, by name."""
        self.hung = 0
        """Requests that were not answered in time."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Return the URL at which the server listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def wait_while_hanging(self, kind: str) -> None:
        """Wait as long as this kind of request is set to hang."""
        self.hung += kind in self.hanging
        while kind in self.hanging:
            time.sleep(0.05)

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Return the data of one GraphQL operation; None for an unknown one."""
        name = variables.get("name") or ""
        match operation:
            case "GetProjects":
                names = [{"node": {"__typename": "Project", "id": name, "name": name, "entityName": "me",
                                   "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}}
                         for name in self.projects]  # fmt: skip
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                return {"models": {"edges": names, "pageInfo": page}}
            case "Runs":
                wanted = json.loads(variables["filters"])["name"]["$in"]
                nodes = [{"node": {**self._bucket(key), "projectId": "1"}, "cursor": key}
                         for key in self.runs if key in wanted]  # fmt: skip
                page = {"endCursor": None, "hasNextPage": False}
                runs = {"edges": nodes, "pageInfo": page}
                return {"project": {"internalId": "1", "runCount": len(nodes), "readOnly": False, "runs": runs}}
            case "ProjectInternalId":
                return {"project": {"id": "p", "internalId": "1"}}
            case "upsertView":
                return self._upsert_view(variables)
            case "SpecificReport":
                return {"view": self.views.get(variables["reportId"])}
            case "GetDefaultEntity":
                return {"viewer": {"id": "1", "entity": "me", "defaultEntity": {"name": "me"}}}
            case "Viewer":
                return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}",
                                   "teams": {"edges": []}}}  # fmt: skip
            case "ServerFeaturesQuery":
                features = [{"name": "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE", "isEnabled": True}]
                return {"serverInfo": {"features": features}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            case "RunResumeStatus":
                bucket = self._bucket(name) if name in self.runs else None
                return {"model": {"id": "p", "name": "p", "entity": {"id": "1", "name": "me"}, "bucket": bucket}}
            case "UpsertBucket":
                inserted = name not in self.runs
                self.runs.setdefault(name, ServerRun())
                return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}
            case "Run":
                bucket = self._bucket(name) if name in self.runs else None
                return {"project": {"id": "p", "internalId": "1", "run": bucket}}
            case "RunHistoryKeys":
                history = self.runs[name].history
                return {"project": {"run": {"historyKeys": {"lastStep": history[-1]["_step"]} if history else None}}}
            case "UpsertSweep":
                self.sweep = variables["config"]
                project = {"id": "p", "name": "p", "entity": {"id": "1", "name": "me"}}
                return {"upsertSweep": {"sweep": {"name": "s1", "project": project}, "configValidationWarnings": []}}
            case "SweepWithRuns":
                return {"project": {"sweep": {"id": "1", "name": "s1", "config": self.sweep, "runs": {"edges": []}}}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": "a1"}}}
            case "Heartbeat":
                commands, self.agent_commands = self.agent_commands, []
                return {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(commands)}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return self.artifacts.answer(operation, variables)

    def _upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = variables.get("id")
        key = known or f"VmlldzoxMjM{len(self.views)}"
        project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
        view = {"id": key, "type": variables["type"], "name": variables["name"], "spec": variables["spec"],
                "displayName": variables["displayName"], "description": variables["description"], "project": project,
                "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}  # fmt: skip
        self.views[key] = view
        return {"upsertView": {"view": view, "inserted": known is None}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        project = {"id": "p", "name": "p", "entity": {"id": "1", "name": "me"}}
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        return {"id": name, "name": name, "displayName": name, "config": "{}", "sweepName": None, "project": project,
                "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history), "historyTail": tail,
                "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": len(run.console),
                "wandbConfig": '{"t": 1}', "tags": [], "group": None, "jobType": None, "notes": None,
                "state": "running"}  # fmt: skip

    def take(self, name: str, body: dict[str, Any]) -> None:
        """Store the content of a file-stream request."""
        run = self.runs.setdefault(name, ServerRun())
        files = body.get("files") or {}
        if "wandb-history.jsonl" in files:
            chunk = files["wandb-history.jsonl"]
            run.history[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
        if "output.log" in files:
            chunk = files["output.log"]
            run.console[chunk["offset"] :] = [line.partition(" ")[2] for line in chunk["content"]]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)
        if body.get("complete"):
            run.exit_code = body["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        body, path = self._body(), unquote(self.path)
        if path.startswith("/upload/artifact/"):
            self.server.artifacts.put(path, body)
        else:
            self.server.files[path.removeprefix("/upload/")] = body
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            self.server.wait_while_hanging("graphql")
            self.server.asked += 1
            asked = json.loads(body)
            found = OPERATION.search(asked["query"])
            operation = asked.get("operationName") or (found[1] if found else "")
            data = self.server.answer(operation, asked.get("variables") or {})
            error = {"errors": [{"message": f"{operation} is not known here"}]}
            self._send({"data": data, **({} if data is not None else error)})
        elif self.path.endswith("/file_stream"):
            self.server.wait_while_hanging("history")
            if "history" in self.server.refusing:
                self._send({"error": "no right to write"}, 401)
                return
            self.server.take(self.path.split("/")[-2], json.loads(body))
            self._send({"exitcode": None, "limits": {}})
        else:
            self._send({})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        coding = self.headers.get("Content-Encoding", "")
        return gzip.decompress(data) if coding == "gzip" else zlib.decompress(data) if coding == "deflate" else data

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has disconnected
            self.close_connection = True


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Run a server until the end of the block."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.hanging.clear()
            server.shutdown()


@contextmanager
def logged_in_here(patch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Run a server that this process, and those that it starts, use as W&B's server."""
    with wandb_server() as server:
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield server


def without_login(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Remove the machine's login and any client that other tests started, which forked processes would inherit."""
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    wandb.teardown()
