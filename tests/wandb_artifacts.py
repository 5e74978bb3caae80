"""The part of the local W&B server that stores artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TIME = "2026-01-01T00:00:00"
PROJECT = {"id": "p", "internalId": "1", "name": "p", "entity": {"name": "me"}}
ORGANIZATION = {"__typename": "Organization", "name": "lab", "orgEntity": {"__typename": "Entity", "name": "lab-org"}}


@dataclass
class ServerArtifact:
    """One version of an artifact."""

    id: str
    name: str
    kind: str
    digest: str
    aliases: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    """Content of each file by its path in the artifact."""
    is_committed: bool = False


class ArtifactStore:
    """Artifacts, the runs that use them, and links to registries."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.artifacts: dict[str, ServerArtifact] = {}
        self.used: list[str] = []
        """Names of the artifacts that a run declared as its input."""
        self.links: list[tuple[str, str, str]] = []
        """Name of the linked artifact, registry and collection."""

    def versions(self, kind: str) -> list[ServerArtifact]:
        """Return the committed artifacts of a type."""
        return [each for each in self.artifacts.values() if each.kind == kind and each.is_committed]

    def put(self, path: str, content: bytes) -> None:
        """Store an uploaded file, if it belongs to an artifact: /upload/artifact/ID/PATH."""
        parts = path.split("/", 4)
        if parts[2] == "artifact":
            self.artifacts[parts[3]].files[parts[4]] = content

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Return the data of one GraphQL operation; None for an unknown one."""
        given = variables.get("input", variables)
        match operation:
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                return self._create(given)
            case "CreateArtifactManifest":
                file = self._upload(given["artifactID"], "wandb_manifest.json")
                return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
            case "UpdateArtifactManifest":
                return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": None}}}
            case "CreateArtifactFiles":
                files = [self._upload(one["artifactID"], one["name"]) for one in given["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
            case "CommitArtifact":
                self.artifacts[given["artifactID"]].is_committed = True
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}
            case "UseArtifact":
                self.used.append(self.artifacts[given["artifactID"]].name)
                return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}
            case "ArtifactByID":
                return {"artifact": self._describe(self.artifacts[given["id"]])}
            case "FetchOrgInfoFromEntity":
                return {"entity": {"organization": ORGANIZATION, "user": None}}
            case "LinkArtifact":
                return self._link(given)
        return None

    def _create(self, given: dict[str, Any]) -> dict[str, Any]:
        name, digest = given["artifactCollectionName"], given["digest"]
        same = (
            one for one in self.artifacts.values() if (one.name, one.digest, one.is_committed) == (name, digest, True)
        )
        found = next(same, None)
        if found is None:
            key, aliases = f"a{len(self.artifacts)}", [one["alias"] for one in given["aliases"]]
            found = self.artifacts[key] = ServerArtifact(key, name, given["artifactTypeName"], digest, aliases)
        state = "COMMITTED" if found.is_committed else "PENDING"
        return {"createArtifact": {"artifact": {"id": found.id, "state": state,
                                                "artifactSequence": {"id": "s", "latestArtifact": None}}}}  # fmt: skip

    def _upload(self, key: str, name: str) -> dict[str, Any]:
        url = f"{self.url}/upload/artifact/{key}/{name}"
        return {"id": "f", "name": name, "displayName": name, "uploadUrl": url, "storagePath": name,
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": key}}  # fmt: skip

    def _describe(self, found: ServerArtifact) -> dict[str, Any]:
        sequence = {"__typename": "ArtifactSequence", "id": "s", "name": found.name, "project": PROJECT}
        return {"__typename": "Artifact", "id": found.id, "artifactSequence": sequence, "versionIndex": 0,
                "artifactType": {"name": found.kind}, "description": None, "metadata": "{}", "ttlDurationSeconds": -1,
                "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 1,
                "digest": found.digest, "commitHash": "c", "fileCount": len(found.files), "createdAt": TIME,
                "updatedAt": TIME, "aliases": []}  # fmt: skip

    def _link(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.artifacts[given["artifactID"]]
        self.links.append((found.name, given["projectName"], given["artifactPortfolioName"]))
        project = {**PROJECT, "name": given["projectName"], "entity": {"name": given["entityName"]}}
        target = {"__typename": "ArtifactPortfolio", "name": given["artifactPortfolioName"], "project": project}
        member = {"__typename": "ArtifactCollectionMembership", "id": "l", "versionIndex": 0, "createdAt": TIME,
                  "aliases": [], "artifactCollection": target, "artifact": self._describe(found)}  # fmt: skip
        return {"result": {"versionIndex": 0, "artifactMembership": member}}
