"""What the verbs share: opening models that belong together, and telling afterwards what they were."""

from __future__ import annotations
