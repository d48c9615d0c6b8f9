"""Parts of the engines' model that a sync leaves as they are: pure data, stated by the trainer (both sides)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from rollcast.comm.plan.manifest import Manifest


@dataclass(frozen=True)
class Kept:
    """What engines keep as they have it."""

    manifest: Manifest = field(default_factory=lambda: Manifest(()))
    """Parameters that the trainer has and does not send."""
    patterns: tuple[str, ...] = ()
    """Names of modules or parameters that the trainer need not have: see `matches`."""

    def matches(self, name: str) -> bool:
        """Return whether the name has a pattern among its levels: "visual" and "layers.?.mlp" are in many names."""
        return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in self.patterns)

    def to_bytes(self) -> bytes:
        """Encode as JSON."""
        return json.dumps([self.manifest.to_bytes().decode(), self.patterns]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Kept":
        """Decode what `to_bytes` encoded."""
        manifest, patterns = json.loads(data)
        return cls(Manifest.from_bytes(manifest.encode()), tuple(patterns))

    @classmethod
    def merged(cls, ranks: "Sequence[Kept]", sent: Manifest) -> "Kept":
        """Return what all trainer ranks keep. Raises `ValueError` naming a parameter that another rank sends."""
        specs = {spec.name: spec for kept in ranks for spec in kept.manifest.specs}
        for spec in sent.specs:
            if spec.name in specs:
                raise ValueError(f"one trainer rank sends parameter {spec.name}, and another keeps it")
        patterns = dict.fromkeys(pattern for kept in ranks for pattern in kept.patterns)
        return cls(Manifest(tuple(specs.values())), tuple(patterns))
